"""latentloom quickstart: the main job on the embedded images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latentloom.checks import check_count, check_minutes
from latentloom.commands.arguments import parse, training_values
from latentloom.data.embedded import FASHION_MNIST
from latentloom.jobs.main_job import format_summary, run_main_job
from latentloom.jobs.stages import load_source
from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.training_config import parse_prior_training
from training_harness.configuration import from_mapping
from training_harness.processes import print_once

RECIPES = {"autoregressive": ("vqgan-f4", "ar-tiny"), "diffusion": ("kl-f8", "diffusion-tiny")}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    prior: Literal["autoregressive", "diffusion"] = "autoregressive"
    output: Path = Path("runs/quickstart")
    minutes: float | None = None
    """Scales the steps to what fits into this time on this machine; without it they are fixed, and a seed repeats."""
    max_steps: int | None = None
    """Steps of each stage, in place of the recipes'."""
    seed: int = 0
    num_images: int = 2000
    """Samples that the figures are measured on."""

    def __post_init__(self) -> None:
        check_minutes(self.minutes)
        check_count("--num-images", self.num_images)


def main(words: list[str]) -> None:
    a = parse(Arguments, "quickstart", words)
    given: dict[str, object] = {"seed": a.seed}
    if a.max_steps is not None:
        given["max_steps"] = a.max_steps
    of_images = {"data": FASHION_MNIST, "output": str(a.output / "tokenizer")}
    of_codes = {"codes": str(a.output / "codes"), "output": str(a.output / "prior")}
    tokenizer_recipe, prior_recipe = RECIPES[a.prior]
    tokenizer = from_mapping(TokenizerTraining, training_values("tokenizer", tokenizer_recipe, None, given | of_images))
    prior = parse_prior_training(training_values("prior", prior_recipe, None, given | of_codes))
    inputs = tokenizer_inputs(tokenizer, load_source(FASHION_MNIST))
    metrics = run_main_job(a.output, inputs, prior, minutes=a.minutes, num_images=a.num_images)
    print_once(format_summary(a.output, metrics))
