"""latentloom reconstruct: encode and decode images with a tokenizer; write PNG files and a grid of both."""

from dataclasses import dataclass
from pathlib import Path

import torch

from latentloom.checks import check_count, check_output_folder
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


def main(argv: list[str]) -> None:
    arguments = parse(Arguments, "reconstruct", argv, GROUPS)
    with main_process_first():
        if is_main_process():
            with output_lock(arguments.output):
                check_output_folder(arguments.output, arguments.overwrite)
                write_reconstructions(arguments)


def write_reconstructions(arguments: Arguments) -> None:
    tokenizer = load_tokenizer(arguments.tokenizer)[0].to(accelerated_device())
    processor = tokenizer.config.image_processor
    split = load_source(arguments.data).held_out
    loader = ImageLoader(split.select(range(min(arguments.num_images, len(split)))), processor)
    loader.report_skipped()
    images = torch.cat([batch for _, batch in loader.batches(BATCH)])
    reconstructions = torch.cat(
        [
            reconstruct(tokenizer, batch)[0]
            for batch in progress_bar(iterable=images.split(BATCH), desc="reconstruct", unit="batch")
        ]
    )
    save_images(reconstructions, [arguments.output / f"{i:05d}.png" for i in range(len(reconstructions))])
    save_image(
        reconstruction_grid(images, reconstructions, columns=min(10, len(images))), arguments.output / "grid.png"
    )
    print_once(
        f"{len(images)} images, PSNR {psnr(reconstructions, images).mean():.2f} dB: {arguments.output / 'grid.png'}"
    )
