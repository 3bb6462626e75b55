"""latentloom sample: pictures from a pipeline, as PNG files and one grid."""

import re
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch

from latentloom.arguments import check_count, check_output, check_seed, parse
from latentloom.stages import say
from pipelines.across_processes import sample_across_processes
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.pictures import image_grid, save_images, save_picture
from training_harness.processes import accelerated_device, is_main_process


@dataclass(frozen=True, kw_only=True)
class Arguments:
    pipeline: str
    """Run folder, pipeline folder or Hub repository."""
    classes: tuple[str, ...] = ()
    """Names or ids of classes; by default all of them in turn."""
    num_images: int = 16
    """Images in all, shared evenly among the classes."""
    seed: int = 0
    output: Path = Path("samples")
    overwrite: bool = False
    """Write into a folder that holds files already."""
    guidance_scale: float | None = None
    """1 is without guidance; by default what the pipeline was saved with, as for the next three."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_count("--num-images", self.num_images)
        check_seed(self.seed)
        if self.batch_size is not None:
            check_count("--batch-size", self.batch_size)


def main(words: list[str]) -> None:
    a = parse(Arguments, "sample", words)
    check_output(a.output, a.overwrite)
    pipeline = LatentGenerationPipeline.from_pretrained(a.pipeline).to(accelerated_device())
    every_class = range(pipeline.prior.config.num_classes)
    wanted = pipeline.label_ids(a.classes or list(every_class) or None)
    labels = sorted(islice(cycle(wanted), a.num_images), key=wanted.index)
    options = {name: getattr(a, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    generator = torch.Generator().manual_seed(a.seed)
    images = sample_across_processes(pipeline, torch.tensor(labels), generator, a.batch_size, **options)
    if not is_main_process():
        return
    names = [_file_name(pipeline, i, label) for i, label in enumerate(labels)]
    save_images(images, [a.output / name for name in names])
    save_picture(image_grid(images, columns=min(8, len(images))), a.output / "grid.png")
    say(f"{len(images)} images: {a.output} (all at once: {a.output / 'grid.png'})")


def _file_name(pipeline: LatentGenerationPipeline, number: int, label: int) -> str:
    if label < 0:
        return f"{number:05d}.png"
    name = pipeline.label_names[label] if pipeline.label_names else str(label)
    return f"{number:05d}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower() or label}.png"
