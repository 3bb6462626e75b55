"""latentloom quickstart: the main job on the embedded images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latentloom.checks import check_count, check_minutes
from latentloom.commands.arguments import parse, training_values
from latentloom.data.embedded import FASHION_MNIST
from latentloom.jobs.main_job import run_main_job, summary
from latentloom.jobs.stages import load_source
from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.training_config import prior_training
from training_harness.configuration import from_mapping
from training_harness.processes import print_once

RECIPES = {"autoregressive": ("vqgan-f4", "ar-tiny"), "diffusion": ("kl-f8", "diffusion-tiny")}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    prior: Literal["autoregressive", "diffusion"] = "autoregressive"
    """Kind of prior to train."""
    output: Path = Path("runs/quickstart")
    """Folder for everything that is written."""
    minutes: float | None = None
    """Time limit: sets the number of steps once, at the start, to what fits on this machine. (default: no limit)"""
    max_steps: int | None = None
    """Training steps of each stage. (default: the recipes')"""
    seed: int = 0
    """Random seed. A seed repeats a run, unless --minutes sets the steps."""
    num_images: int = 2000
    """Samples to compute the metrics on."""

    def __post_init__(self) -> None:
        check_minutes(self.minutes)
        check_count("--num-images", self.num_images)


GROUPS = {
    "training": ("prior", "minutes", "max_steps", "seed"),
    "output": ("output", "num_images"),
}


def main(words: list[str]) -> None:
    a = parse(Arguments, "quickstart", words, GROUPS)
    given: dict[str, object] = {"seed": a.seed}
    if a.max_steps is not None:
        given["max_steps"] = a.max_steps
    of_images = {"data": FASHION_MNIST, "output": str(a.output / "tokenizer")}
    of_codes = {"codes": str(a.output / "codes"), "output": str(a.output / "prior")}
    tokenizer_recipe, prior_recipe = RECIPES[a.prior]
    tokenizer = from_mapping(TokenizerTraining, training_values("tokenizer", tokenizer_recipe, None, given | of_images))
    prior = prior_training(training_values("prior", prior_recipe, None, given | of_codes))
    inputs = tokenizer_inputs(tokenizer, load_source(FASHION_MNIST))
    metrics = run_main_job(a.output, inputs, prior, minutes=a.minutes, num_images=a.num_images)
    print_once(summary(a.output, metrics))
