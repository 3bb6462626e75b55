"""latentloom reconstruct: images through a tokenizer and back, as PNG files and one sheet of both."""

from dataclasses import dataclass
from pathlib import Path

import torch

from latentloom.checks import check_count, check_output
from latentloom.commands.arguments import parse
from latentloom.jobs.stages import load_source, load_tokenizer
from pipelines.evaluation.evaluator import BATCH
from pipelines.evaluation.tokenizer_metrics import reconstruct
from stage1_tokenizer.data.image_grids import reconstruction_grid, save_image, save_images
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.metrics import psnr
from training_harness.output_lock import output_lock
from training_harness.processes import accelerated_device, is_main_process, main_process_first, print_once
from training_harness.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class Arguments:
    tokenizer: str
    """Run folder, model folder, pipeline folder or Hub repository."""
    data: str
    """Images. The test split is used if there is one, else the validation split."""
    num_images: int = 20
    """Images to reconstruct, at most."""
    output: Path = Path("reconstructions")
    """Folder for the reconstructions."""
    overwrite: bool = False
    """Write into a folder that already holds files."""

    def __post_init__(self) -> None:
        check_count("--num-images", self.num_images)


GROUPS = {"data": ("tokenizer", "data", "num_images"), "output": ("output", "overwrite")}


def main(words: list[str]) -> None:
    a = parse(Arguments, "reconstruct", words, GROUPS)
    with main_process_first():
        if is_main_process():
            rebuild(a)


def rebuild(a: Arguments) -> None:
    with output_lock(a.output):
        check_output(a.output, a.overwrite)
        write_reconstructions(a)


def write_reconstructions(a: Arguments) -> None:
    tokenizer = load_tokenizer(a.tokenizer)[0].to(accelerated_device())
    processor = tokenizer.config.image_processor
    split = load_source(a.data).held_out
    pixels = ImageLoader(split.select(range(min(a.num_images, len(split)))), processor)
    pixels.report_skipped()
    images = torch.cat([batch for _, batch in pixels.batches(BATCH)])
    rebuilt = torch.cat(
        [
            reconstruct(tokenizer, batch)[0]
            for batch in progress_bar(iterable=images.split(BATCH), desc="reconstruct", unit="batch")
        ]
    )
    save_images(rebuilt, [a.output / f"{i:05d}.png" for i in range(len(rebuilt))])
    save_image(reconstruction_grid(images, rebuilt, columns=min(10, len(images))), a.output / "grid.png")
    print_once(f"{len(images)} images, PSNR {psnr(rebuilt, images).mean():.2f} dB: {a.output / 'grid.png'}")
