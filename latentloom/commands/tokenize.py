"""latentloom tokenize: encode images and write a code cache."""

from dataclasses import dataclass
from pathlib import Path

from latentloom.checks import check_count, check_output_outside_data
from latentloom.commands.arguments import parse
from latentloom.jobs.stages import load_source, run_tokenize
from stage1_tokenizer.codes.writer import Contents, View
from stage1_tokenizer.data.degradation import Degradation
from training_harness.errors import UserError
from training_harness.processes import print_once


@dataclass(frozen=True, kw_only=True)
class Arguments:
    tokenizer: str
    """Run folder, model folder or Hub repository of a tokenizer."""
    data: str
    """Folder of images or of class folders, Parquet, saved data set, Hub name, or fashion-mnist-mini."""
    output: Path
    """Folder of the code cache."""
    contents: Contents | None = None
    """`indices` for an autoregressive prior, `latents` for a diffusion prior, or `both`. (default: all that the tokenizer has)"""
    flip: bool = False
    """Also encode the mirror image of each training image."""
    degradation: Degradation = "none"
    """Also encode a degraded version of each image, for a prior that restores images."""
    batch_size: int | None = None
    """Images in a batch. (default: as many as need little memory)"""

    def __post_init__(self) -> None:
        if not self.output.name:
            raise UserError(f"--output is {self.output}; expected a new folder, such as codes")
        check_output_outside_data(self.output, self.data)
        if self.batch_size is not None:
            check_count("--batch-size", self.batch_size)


GROUPS = {
    "data": ("tokenizer", "data"),
    "encoding": ("contents", "flip", "degradation", "batch_size"),
    "output": ("output",),
}


def main(argv: list[str]) -> None:
    arguments = parse(Arguments, "tokenize", argv, GROUPS)
    source = load_source(arguments.data)
    views: tuple[View, ...] = ("original", "flip") if arguments.flip else ("original",)
    codes = run_tokenize(
        arguments.tokenizer,
        source,
        arguments.output,
        arguments.contents,
        views,
        arguments.degradation,
        arguments.batch_size,
    )
    print_once(f"codes: {codes}\nnext: latentloom train-prior --codes {codes} --output runs/prior")
