"""latentloom quickstart: train both stages on the embedded images and generate samples."""

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


def main(argv: list[str]) -> None:
    arguments = parse(Arguments, "quickstart", argv, GROUPS)
    shared: dict[str, object] = {"seed": arguments.seed}
    if arguments.max_steps is not None:
        shared["max_steps"] = arguments.max_steps
    tokenizer_paths = {"data": FASHION_MNIST, "output": str(arguments.output / "tokenizer")}
    prior_paths = {"codes": str(arguments.output / "codes"), "output": str(arguments.output / "prior")}
    tokenizer_recipe, prior_recipe = RECIPES[arguments.prior]
    tokenizer = from_mapping(
        TokenizerTraining, training_values("tokenizer", tokenizer_recipe, None, shared | tokenizer_paths)
    )
    prior = parse_prior_training(training_values("prior", prior_recipe, None, shared | prior_paths))
    inputs = tokenizer_inputs(tokenizer, load_source(FASHION_MNIST))
    metrics = run_main_job(arguments.output, inputs, prior, minutes=arguments.minutes, num_images=arguments.num_images)
    print_once(format_summary(arguments.output, metrics))
