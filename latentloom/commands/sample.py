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
from latentloom.commands.sampling_arguments import SAMPLING_GROUPS, SamplingArguments
from latentloom.jobs.sample_folders import SAMPLE_LIST, sample_list
from pipelines.across_processes import sample_across_processes
from pipelines.editing import check_edit
from pipelines.latent_generation import DEFAULT_BATCH_SIZE, LatentGenerationPipeline, image_generators, to_uint8
from stage1_tokenizer.data.image_decoding import decoded
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
    """Names or ids of classes. (default: all classes that have training images)"""
    num_images: int = 16
    """Images in all; each class gets an equal share."""
    seed: int = 0
    """Random seed."""
    output: Path = Path("samples")
    """Folder for the images."""
    overwrite: bool = False
    """Write into a folder that already holds files."""
    num_candidates: int | None = None
    """Candidates for a masked region; a prior of raster order weighs them by the known codes after the region.
    (default: the pipeline's)"""
    image: Path | None = None
    """Image to edit: inpainted with a mask, varied without one. (default: none)"""
    mask_image: Path | None = None
    """Mask: white is generated anew, black stays exactly as it is. (default: none)"""
    strength: float | None = None
    """Share of the codes to generate anew, in (0, 1]. (default: 1 with a mask, 0.8 without one)"""
    show_steps: bool = False
    """Also write steps.png: a row of steps, from first to last, for each of the first images."""
    interpolate_to: int | None = None
    """Second seed: the images of each class go from the noise of --seed to the noise of this seed, for a prior over latents.
    (default: no interpolation)"""
    batch_size: int = DEFAULT_BATCH_SIZE
    """Images in a batch."""

    def __post_init__(self) -> None:
        check_count("--num-images", self.num_images)
        check_seed(self.seed)
        check_count("--batch-size", self.batch_size)
        if self.interpolate_to is not None:
            check_seed(self.interpolate_to)
        if [self.image is not None, self.interpolate_to is not None, self.show_steps].count(True) > 1:
            raise UserError("two of --image, --interpolate-to and --show-steps were given; expected one of them")
        check_edit(self.image, self.mask_image, self.strength)


GROUPS = {
    "images": ("classes", "num_images", "seed", "batch_size"),
    **SAMPLING_GROUPS,
    "editing": ("image", "mask_image", "strength", "num_candidates", "interpolate_to"),
    "output": ("output", "overwrite", "show_steps"),
}


def main(words: list[str]) -> None:
    a = parse(Arguments, "sample", words, GROUPS)
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
    write_json(a.output / SAMPLE_LIST, sample_list(names, class_names, len(images[0])))
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
    batch_size: int,
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
        return decoded(path.read_bytes())
    except Exception as error:  # decoders raise errors of many classes on broken files
        raise UserError(f"{path} could not be read ({error}); expected a picture such as a PNG or JPEG file") from error


def _file_name(pipeline: LatentGenerationPipeline, number: int, label: int) -> str:
    if label < 0:
        return f"{number:05d}.png"
    name = pipeline.label_names[label] if pipeline.label_names else str(label)
    return f"{number:05d}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower() or label}.png"
