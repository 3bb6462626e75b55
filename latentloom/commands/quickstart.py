"""latentloom quickstart: the main job on the embedded images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latentloom.arguments import parse, training_values
from latentloom.embedded import FASHION_MNIST
from latentloom.main_job import run_main_job, summary
from latentloom.stages import load_source, say
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.training_config import PriorTraining
from training_harness.configuration import from_mapping

RECIPES = {"autoregressive": "ar-tiny"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    prior: Literal["autoregressive"] = "autoregressive"
    output: Path = Path("runs/quickstart")
    minutes: float | None = None
    """Scales the steps to what fits into this time on this machine; without it they are fixed, and a seed repeats."""
    seed: int = 0
    num_images: int = 2000
    """Samples that the figures are measured on."""


def main(words: list[str]) -> None:
    a = parse(Arguments, "quickstart", words)
    values = training_values(
        "tokenizer", "vqgan-f4", None, {"data": FASHION_MNIST, "output": str(a.output / "tokenizer"), "seed": a.seed}
    )
    tokenizer = from_mapping(TokenizerTraining, values)
    values = training_values(
        "prior",
        RECIPES[a.prior],
        None,
        {"codes": str(a.output / "codes"), "output": str(a.output / "prior"), "seed": a.seed},
    )
    prior = from_mapping(PriorTraining, values)
    metrics = run_main_job(
        a.output, load_source(FASHION_MNIST), tokenizer, prior, minutes=a.minutes, num_images=a.num_images
    )
    say(summary(a.output, metrics))
