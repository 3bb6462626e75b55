"""Train the quickstart's tokenizer, codes and priors once for all benchmarks of a process."""

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

from frame import load_recipe

from latentloom.data.embedded import FASHION_MNIST
from latentloom.jobs.stages import load_source, run_prior, run_tokenize, run_tokenizer
from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.training_config import AutoregressiveTraining, DiffusionTraining

_TEMPORARY_FOLDERS: list[TemporaryDirectory[str]] = []  # kept until the process ends


@functools.cache
def train_codes(share: float, seed: int, tokenizer: str = "vqgan-f4") -> Path:
    """Train a tokenizer for a share of its recipe's steps, and return the folder with its codes of the embedded images."""
    _TEMPORARY_FOLDERS.append(TemporaryDirectory())
    folder, source = Path(_TEMPORARY_FOLDERS[-1].name), load_source(FASHION_MNIST)
    run = load_recipe(
        TokenizerTraining, "tokenizer", tokenizer, share, seed, data=FASHION_MNIST, output=folder / "tokenizer"
    )
    run_tokenizer(tokenizer_inputs(run, source))
    return run_tokenize(run.output, source, folder / "codes")


def train_prior(codes: Path, name: str, share: float, seed: int) -> Path:
    """Train a prior on `codes` unless it is there already, and return the folder of its pipeline."""
    output = codes.with_name(f"{name}-{seed}")
    kind = DiffusionTraining if name.startswith("diffusion-") else AutoregressiveTraining
    return run_prior(load_recipe(kind, "prior", name, share, seed, codes=codes, output=output))
