"""Parameter counts of the recipes, on the meta device, compared with the published models."""

from typing import Any

import pytest
import torch

from latentloom.commands.arguments import training_values
from latentloom.recipes import recipe_names
from stage1_tokenizer.latent_spec import LatentSpec
from stage2_prior.diffusion.dit import DiT
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.training_config import parse_prior_training
from training_harness.pretrained import count_parameters

# Sun et al. 2024 (arXiv 2406.06525), table 1.
MILLIONS = {
    "ar-llamagen-b": 111,
    "ar-llamagen-l": 343,
    "ar-llamagen-xl": 775,
    "ar-llamagen-xxl": 1400,
    "ar-llamagen-3b": 3100,
}
SMALL = {"ar-tiny": 1, "ar-tiny-any-order": 1, "ar-mini": 3, "ar-small": 11}
# Peebles, Xie 2022 (arXiv 2212.09748), table 4: at patches of 2 on 32×32 latents of 4 channels.
DIT = {"diffusion-dit-s": 33, "diffusion-dit-b": 130, "diffusion-dit-l": 458, "diffusion-dit-xl": 675}
SPEC: dict[str, Any] = {"channels": 8, "levels": 1, "image_channels": 3, "downsampling_factor": 16, "tokenizer_id": "0"}


@pytest.mark.parametrize(("recipe", "millions"), (MILLIONS | SMALL).items())
def test_a_recipe_has_the_number_of_parameters_of_its_name(recipe: str, millions: int) -> None:
    config = parse_prior_training(training_values("prior", recipe, None, {"codes": "codes", "output": "run"}))
    codes = 16_384 if recipe in MILLIONS else 512
    spec = LatentSpec(codebook_size=codes, height=16, width=16, image_height=256, image_width=256, **SPEC)
    with torch.device("meta"):
        prior = config.new_prior(spec, 1000 if recipe in MILLIONS else 10)
    assert count_parameters(prior) / 1e6 == pytest.approx(millions, rel=0.02 if recipe in MILLIONS else 0.25)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize(("recipe", "millions"), DIT.items())
def test_a_dit_has_the_published_parameters_and_tokens_at_every_patch_size(
    recipe: str, millions: int, patch_size: int
) -> None:
    values = {"codes": "codes", "output": "run", "model": {"patch_size": patch_size}}
    config = parse_prior_training(training_values("prior", recipe, None, values))
    spec = LatentSpec(
        codebook_size=None, height=32, width=32, image_height=256, image_width=256, **SPEC | {"channels": 4}
    )
    with torch.device("meta"):
        prior = config.new_prior(spec, 1000)
    assert count_parameters(prior) / 1e6 == pytest.approx(millions, rel=0.01)
    assert isinstance(prior, DiffusionPrior)
    assert isinstance(prior.denoiser, DiT)
    assert prior.denoiser.patchify(torch.zeros(1, 4, 32, 32)).shape == (1, (32 // patch_size) ** 2, 4 * patch_size**2)


def test_every_autoregressive_recipe_is_tested_here() -> None:
    assert {name for name in recipe_names("prior") if name.startswith("ar-")} == MILLIONS.keys() | SMALL.keys()
