"""latentloom sample: generate images with a pipeline, as PNG files and one grid."""

import re
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import PIL.Image
import torch

from latentloom.checks import check_count, check_output_folder, check_seed
from latentloom.commands.arguments import parse
from latentloom.commands.sampling_arguments import SAMPLING_GROUPS, SamplingArguments
from latentloom.jobs.sample_folders import SAMPLE_LIST, build_sample_list
from pipelines.across_processes import sample_across_processes
from pipelines.editing import check_edit
from pipelines.latent_generation import DEFAULT_BATCH_SIZE, LatentGenerationPipeline, image_generators, to_uint8
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


def main(argv: list[str]) -> None:
    arguments = parse(Arguments, "sample", argv, GROUPS)
    with output_lock(arguments.output):
        check_output_folder(arguments.output, arguments.overwrite)
        write_samples(arguments)


def write_samples(arguments: Arguments) -> None:
    pipeline = LatentGenerationPipeline.from_pretrained(arguments.pipeline).to(accelerated_device())
    # An image to restore has a class already.
    default_classes = [] if pipeline.prior.is_restoration else list(pipeline.trained_classes)
    classes = pipeline.label_ids(arguments.classes or default_classes or None)
    labels = sorted(islice(cycle(classes), arguments.num_images), key=classes.index)
    options = arguments.sampling_options() | {"num_candidates": arguments.num_candidates}
    generator = torch.Generator().manual_seed(arguments.seed)
    if arguments.interpolate_to is not None:
        images = interpolate_images(
            pipeline, arguments.seed, arguments.interpolate_to, labels, arguments.batch_size, options
        )
    elif arguments.image is None:
        images = sample_across_processes(pipeline, torch.tensor(labels), generator, arguments.batch_size, **options)
    elif is_main_process():
        pipeline_options = options | {
            "image": open_image(arguments.image),
            "strength": arguments.strength,
            "batch_size": arguments.batch_size,
        }
        if arguments.mask_image is not None:
            pipeline_options["mask_image"] = open_image(arguments.mask_image)
        image_classes, images_per_class = (None, len(labels)) if classes == [-1] else (labels, 1)
        (samples,) = pipeline(
            image_classes,
            images_per_class,
            output_type="pt",
            generator=generator,
            return_dict=False,
            **pipeline_options,
        )
        images = to_uint8(cast("torch.Tensor", samples))
    if not is_main_process():
        return
    if arguments.show_steps:
        save_image(
            make_step_grid(pipeline, torch.tensor(labels), arguments.seed, options), arguments.output / "steps.png"
        )
    names = [_sample_file_name(pipeline, i, label) for i, label in enumerate(labels)]
    save_images(images, [arguments.output / name for name in names])
    class_names = [pipeline.label_names[label] if pipeline.label_names and label >= 0 else None for label in labels]
    write_json(arguments.output / SAMPLE_LIST, build_sample_list(names, class_names, len(images[0])))
    save_image(image_grid(images, columns=min(8, len(images))), arguments.output / "grid.png")
    print_once(f"{len(images)} images: {arguments.output} (all at once: {arguments.output / 'grid.png'})")


def make_step_grid(
    pipeline: LatentGenerationPipeline, labels: torch.Tensor, seed: int, options: dict[str, Any]
) -> PIL.Image.Image:
    """Make a grid with a row for each of the first images, from the first step to the last."""
    states, num_rows = list[torch.Tensor](), min(STEP_ROWS, len(labels))

    def record_state(pipeline: LatentGenerationPipeline, step: int, time: int, values: dict[str, Any]) -> None:
        states.append(values[pipeline.prior.output_kind].clone())

    generators = image_generators(torch.Generator().manual_seed(seed), len(labels))[:num_rows]
    pipeline.sample_pixels(labels[:num_rows], generators, callback_on_step_end=record_state, **options)
    steps = torch.linspace(0, len(states) - 1, min(STEP_COLUMNS, len(states))).round().long().tolist()
    columns = [to_uint8(pipeline.decode(states[step])) for step in steps]
    return image_grid(torch.stack(columns, dim=1).flatten(0, 1), columns=len(columns))


def interpolate_images(
    pipeline: LatentGenerationPipeline,
    seed: int,
    end_seed: int,
    labels: list[int],
    batch_size: int,
    options: dict[str, Any],
) -> torch.Tensor:
    """Interpolate between the noise of two seeds for each class.

    Args:     labels: Class ids in order, the same number of each.
    Returns:  uint8 (N, C, h, w).
    """
    classes = list(dict.fromkeys(labels))
    images_per_class, remainder = divmod(len(labels), len(classes))
    if remainder or images_per_class < 2:
        raise UserError(
            f"--num-images is {len(labels)} for {len(classes)} classes; expected the same number of each, at least 2; give "
            f"--num-images {8 * len(classes)}, or name --classes"
        )
    images = pipeline.interpolate(
        seed,
        end_seed,
        images_per_class,
        None if classes == [-1] else classes,
        output_type="pt",
        batch_size=batch_size,
        **options,
    )[0]
    return to_uint8(cast("torch.Tensor", images))


def open_image(path: Path) -> ImageLike:
    """Read an image file. Raises UserError if it cannot be read."""
    try:
        return decode_image(path.read_bytes())
    except Exception as error:  # decoders raise many types of errors for broken files
        raise UserError(f"{path} could not be read ({error}); expected an image such as a PNG or JPEG file") from error


def _sample_file_name(pipeline: LatentGenerationPipeline, number: int, label: int) -> str:
    if label < 0:
        return f"{number:05d}.png"
    name = pipeline.label_names[label] if pipeline.label_names else str(label)
    return f"{number:05d}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower() or label}.png"
