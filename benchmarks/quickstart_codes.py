"""The quickstart's tokenizer and codes, trained once for all benchmarks of a process that work on them, and priors on them."""

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

from frame import recipe

from latentloom.data.embedded import FASHION_MNIST
from latentloom.jobs.stages import load_source, run_prior, run_tokenize, run_tokenizer
from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.training_config import AutoregressiveTraining, DiffusionTraining

_HELD: list[TemporaryDirectory[str]] = []  # until the process ends


@functools.cache
def codes_folder(share: float, seed: int, tokenizer: str = "vqgan-f4") -> Path:
    """Codes, or latents, of the embedded images, of a tokenizer that was trained for a share of its recipe's steps."""
    _HELD.append(TemporaryDirectory())
    folder, source = Path(_HELD[-1].name), load_source(FASHION_MNIST)
    run = recipe(
        TokenizerTraining, "tokenizer", tokenizer, share, seed, data=FASHION_MNIST, output=folder / "tokenizer"
    )
    run_tokenizer(tokenizer_inputs(run, source))
    return run_tokenize(run.output, source, folder / "codes")


def trained_prior(codes: Path, name: str, share: float, seed: int) -> Path:
    """Its pipeline's folder, trained unless it is there."""
    output = codes.with_name(f"{name}-{seed}")
    kind = DiffusionTraining if name.startswith("diffusion-") else AutoregressiveTraining
    return run_prior(recipe(kind, "prior", name, share, seed, codes=codes, output=output))
