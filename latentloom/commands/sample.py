"""latentloom sample: pictures from a pipeline, as PNG files and one grid."""

import re
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import PIL.Image
import torch

from latentloom.checks import check_count, check_output, check_seed
from latentloom.commands.arguments import parse
from latentloom.commands.sampling_arguments import SamplingArguments
from latentloom.jobs.sample_folders import SAMPLE_LIST, build_sample_list
from pipelines.across_processes import sample_across_processes
from pipelines.editing import check_edit
from pipelines.latent_generation import LatentGenerationPipeline, image_generators, to_uint8
from stage1_tokenizer.data.image_decoding import decode_image
from stage1_tokenizer.data.image_grids import image_grid, save_image, save_images
from stage1_tokenizer.data.image_processor import ImageLike
from training_harness.errors import UserError
from training_harness.files import write_json
from training_harness.output_lock import output_lock
from training_harness.processes import accelerated_device, is_main_process, print_once

STEP_ROWS, STEP_COLUMNS = 8, 10


@dataclass(frozen=True, kw_only=True)
class Arguments(SamplingArguments):
    pipeline: str
    """Run folder, pipeline folder or Hub repository."""
    classes: tuple[str, ...] = ()
    """Names or ids of classes; by default all that had training images, in turn."""
    num_images: int = 16
    """Images in all, shared evenly among the classes."""
    seed: int = 0
    output: Path = Path("samples")
    overwrite: bool = False
    """Write into a folder that holds files already."""
    num_candidates: int | None = None
    """How many candidates for a hole an autoregressive prior of raster order weighs by what is known after it."""
    image: Path | None = None
    """Picture to go on from: under a mask it is inpainted, without one it is varied."""
    mask_image: Path | None = None
    """White where to draw, black where the picture stays exactly as it is."""
    strength: float | None = None
    """Share of the codes that are drawn anew; by default all under a mask, and 0.8 without one."""
    show_steps: bool = False
    """Also write steps.png: a row for each of the first images, from the first step to the last."""
    interpolate_to: int | None = None
    """Another seed: the images of each class go from the noise of --seed to its; of a prior of latents."""
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_count("--num-images", self.num_images)
        check_seed(self.seed)
        if self.batch_size is not None:
            check_count("--batch-size", self.batch_size)
        if self.interpolate_to is not None:
            check_seed(self.interpolate_to)
        if [self.image is not None, self.interpolate_to is not None, self.show_steps].count(True) > 1:
            raise UserError("two of --image, --interpolate-to and --show-steps were given; expected one of them")
        check_edit(self.image, self.mask_image, self.strength)


def main(words: list[str]) -> None:
    a = parse(Arguments, "sample", words)
    with output_lock(a.output):
        check_output(a.output, a.overwrite)
        write_samples(a)


def write_samples(a: Arguments) -> None:
    pipeline = LatentGenerationPipeline.from_pretrained(a.pipeline).to(accelerated_device())
    by_default = (
        [] if pipeline.prior.is_restoration else list(pipeline.trained_classes)
    )  # what is to be restored has a class of its own
    wanted = pipeline.label_ids(a.classes or by_default or None)
    labels = sorted(islice(cycle(wanted), a.num_images), key=wanted.index)
    options = a.sampling_options() | {"num_candidates": a.num_candidates}
    generator = torch.Generator().manual_seed(a.seed)
    if a.interpolate_to is not None:
        images = interpolated(pipeline, a.seed, a.interpolate_to, labels, a.batch_size, options)
    elif a.image is None:
        images = sample_across_processes(pipeline, torch.tensor(labels), generator, a.batch_size, **options)
    elif is_main_process():
        pipeline_options = options | {"image": open_image(a.image), "strength": a.strength, "batch_size": a.batch_size}
        if a.mask_image is not None:
            pipeline_options["mask_image"] = open_image(a.mask_image)
        named, each = (None, len(labels)) if wanted == [-1] else (labels, 1)
        (drawn,) = pipeline(named, each, output_type="pt", generator=generator, return_dict=False, **pipeline_options)
        images = to_uint8(cast("torch.Tensor", drawn))
    if not is_main_process():
        return
    if a.show_steps:
        save_image(step_grid(pipeline, torch.tensor(labels), a.seed, options), a.output / "steps.png")
    names = [_file_name(pipeline, i, label) for i, label in enumerate(labels)]
    save_images(images, [a.output / name for name in names])
    class_names = [pipeline.label_names[label] if pipeline.label_names and label >= 0 else None for label in labels]
    write_json(a.output / SAMPLE_LIST, build_sample_list(names, class_names, len(images[0])))
    save_image(image_grid(images, columns=min(8, len(images))), a.output / "grid.png")
    print_once(f"{len(images)} images: {a.output} (all at once: {a.output / 'grid.png'})")


def step_grid(
    pipeline: LatentGenerationPipeline, labels: torch.Tensor, seed: int, options: dict[str, Any]
) -> PIL.Image.Image:
    """A row for each of the first images that the labels and the seed give, from the first step to the last."""
    states, count = list[torch.Tensor](), min(STEP_ROWS, len(labels))

    def keep(pipeline: LatentGenerationPipeline, step: int, time: int, values: dict[str, Any]) -> None:
        states.append(values[pipeline.prior.output_kind].clone())

    generators = image_generators(torch.Generator().manual_seed(seed), len(labels))[:count]
    pipeline.sample_pixels(labels[:count], generators, callback_on_step_end=keep, **options)
    shown = torch.linspace(0, len(states) - 1, min(STEP_COLUMNS, len(states))).round().long().tolist()
    columns = [to_uint8(pipeline.decode(states[step])) for step in shown]
    return image_grid(torch.stack(columns, dim=1).flatten(0, 1), columns=len(columns))


def interpolated(
    pipeline: LatentGenerationPipeline,
    seed: int,
    other_seed: int,
    labels: list[int],
    batch_size: int | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """uint8 (N, C, h, w) of labels in order, as many of each."""
    classes = list(dict.fromkeys(labels))
    each, left = divmod(len(labels), len(classes))
    if left or each < 2:
        raise UserError(
            f"--num-images is {len(labels)} for {len(classes)} classes; expected as many of each, and 2 at least; give "
            f"--num-images {8 * len(classes)}, or name --classes"
        )
    named = None if classes == [-1] else classes
    drawn = pipeline.interpolate(seed, other_seed, each, named, output_type="pt", batch_size=batch_size, **options)[0]
    return to_uint8(cast("torch.Tensor", drawn))


def open_image(path: Path) -> ImageLike:
    """A picture file; raises UserError when it cannot be read."""
    try:
        return decode_image(path.read_bytes())
    except Exception as error:  # decoders raise errors of many classes on broken files
        raise UserError(f"{path} could not be read ({error}); expected a picture such as a PNG or JPEG file") from error


def _file_name(pipeline: LatentGenerationPipeline, number: int, label: int) -> str:
    if label < 0:
        return f"{number:05d}.png"
    name = pipeline.label_names[label] if pipeline.label_names else str(label)
    return f"{number:05d}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower() or label}.png"
