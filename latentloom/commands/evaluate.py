"""latentloom evaluate: measure a pipeline, a tokenizer or a set of samples against held-out images."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentloom.checks import check_count, check_seed
from latentloom.commands.arguments import parse
from latentloom.commands.option_help import ONE_REQUIRED
from latentloom.commands.sampling_arguments import SAMPLING_GROUPS, SamplingArguments
from latentloom.data.embedded import data_path
from latentloom.jobs.evaluation import (
    GRID_COLUMNS,
    GRID_ROWS,
    build_class_grid,
    choose_feature_extractor,
    collect_evaluation_settings,
    features_folder,
    select_at_most,
)
from latentloom.jobs.evaluation_plots import plot_metrics_by_class
from latentloom.jobs.sample_folders import read_sample_list
from latentloom.jobs.stages import load_source, load_tokenizer
from pipelines.evaluation.evaluator import BATCH, Evaluator, ImageSet, check_inception
from pipelines.evaluation.features import FeatureExtractor, FeatureName
from pipelines.evaluation.image_arrays import ImageArray, read_reference, write_and_yield
from pipelines.evaluation.pipeline_metrics import (
    balanced_labels,
    check_image_count,
    collect_grid_images,
    pipeline_metrics,
    sample_batches,
    sample_size_warnings,
)
from pipelines.evaluation.restoration import Restorations
from pipelines.evaluation.tokenizer_metrics import tokenizer_metrics
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.folder_sources import FileStore
from stage1_tokenizer.data.image_grids import save_image
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.image_processor import ImageProcessor, as_rgb
from stage1_tokenizer.data.sources import ImageSource, ImageSplit, UnreadableImage, open_source
from stage1_tokenizer.data.statistics import dataset_statistics
from training_harness.errors import UserError
from training_harness.files import compute_sha256, write_json
from training_harness.processes import accelerated_device, is_main_process, print_once


@dataclass(frozen=True, kw_only=True)
class Arguments(SamplingArguments):
    reference: str
    """Images to compare with: the test split if there is one, else the validation split; or an .npz in the format of ADM."""
    pipeline: str | None = None
    """Run folder, pipeline folder or Hub repository of a pipeline."""
    tokenizer: str | None = None
    """Run folder, model folder or Hub repository of a tokenizer, to measure its reconstructions."""
    samples: str | None = None
    """Images that another program generated: a folder, or an .npz with arr_0."""
    features: FeatureName | None = None
    """Features to compare images by. (default: classifier for fashion-mnist-mini, else efficientnet-lite0 if it is
    installed, else pixels-8x8)"""
    num_images: int = 2000
    """Samples to generate, the same number of each class."""
    max_training_images: int = 50_000
    """Training images to use for the noise floor, the linear probe and the memorisation check, at most."""
    seed: int = 0
    """Random seed."""
    output: Path | None = None
    """JSON file for the metrics; a grid of samples and a chart of the metrics by class are written beside it. (default: none)"""
    save_samples: Path | None = None
    """File for the samples, an .npz in the format of ADM. (default: none)"""

    def __post_init__(self) -> None:
        if [self.pipeline, self.tokenizer, self.samples].count(None) != 2:
            raise UserError("expected one of --pipeline, --tokenizer and --samples; give the one to measure")
        for option, path, ending in (("--output", self.output, ".json"), ("--save-samples", self.save_samples, ".npz")):
            if path is not None and (path.is_dir() or path.suffix != ending):
                example = path.with_suffix(ending) if path.name else f"metrics{ending}"
                raise UserError(f"{option} is {path}; expected a {ending} file, such as {example}")
        options_for_samples = [self.save_samples, *self.sampling_options().values()]
        if self.tokenizer is not None and any(value is not None for value in options_for_samples):
            raise UserError(
                "--tokenizer was given with --save-samples or a sampling option, but a tokenizer generates no samples; expected "
                "--pipeline with these options; leave them out"
            )
        check_count("--num-images", self.num_images)
        check_count("--max-training-images", self.max_training_images)
        check_seed(self.seed)


GROUPS = {
    ONE_REQUIRED: ("pipeline", "tokenizer", "samples"),
    "metrics": ("features", "num_images", "max_training_images", "seed"),
    **SAMPLING_GROUPS,
    "output": ("output", "save_samples"),
}


class Samples(NamedTuple):
    """Images to measure, batch by batch."""

    batches: Iterator[Tensor]
    labels: Tensor
    label_names: tuple[str, ...] | None
    processor: ImageProcessor
    restorations: Restorations | None = None
    """For a pipeline that restores held-out images."""


def main(argv: list[str]) -> None:
    arguments = parse(Arguments, "evaluate", argv, GROUPS)
    source = None if arguments.reference.endswith(".npz") else load_source(arguments.reference)
    if not is_main_process():
        sample_with_main_process(arguments, source)
        return
    if arguments.tokenizer is not None:
        metrics = measure_tokenizer(arguments, source)
    elif source is None:
        metrics = measure_array_samples(arguments)
    else:
        metrics = measure_image_samples(arguments, source)
    if arguments.output is not None:
        write_json(arguments.output, metrics)
        if metrics.get("by_class"):
            plot_metrics_by_class(metrics, arguments.output.with_suffix(".by_class.png"))
    print_once(json.dumps(metrics, indent=2, ensure_ascii=False))


def sample_with_main_process(arguments: Arguments, source: ImageSource | None) -> None:
    """Generate samples in a process other than the main process, which measures them."""
    if arguments.pipeline is not None:
        for _ in load_samples(arguments, source)[1].batches:
            pass


def measure_tokenizer(arguments: Arguments, source: ImageSource | None) -> dict[str, Any]:
    tokenizer = load_tokenizer(arguments.tokenizer or "")[0].to(accelerated_device())
    processor = tokenizer.config.image_processor
    if source is None:
        raise UserError(f"--reference is {arguments.reference}; expected a folder of images to measure a tokenizer on")
    held_out = make_loader(source.held_out, processor)
    extractor = choose_feature_extractor(arguments.reference, processor, arguments.features)
    with Evaluator(extractor, features_folder(), arguments.seed) as evaluator:
        real = evaluator.measure(held_out, "held-out images")
        train = make_loader(
            select_at_most(source.train, min(len(real), arguments.max_training_images), arguments.seed), processor
        )
        metrics = tokenizer_metrics(evaluator, tokenizer, held_out, real, evaluator.measure(train, "training images"))
    return (
        metrics
        | {"num_reference_images": len(real), "reference": source.name, "reference_hash": real.hash}
        | collect_evaluation_settings(extractor, processor, None, arguments.seed)
        | {"notes": sample_size_warnings(len(real), len(real))}
    )


def measure_image_samples(arguments: Arguments, source: ImageSource) -> dict[str, Any]:
    """Measure samples against held-out images. Some metrics also use the training images."""
    check_image_count(len(source.held_out), f"held-out images in {arguments.reference}")
    pipeline, samples = load_samples(arguments, source)
    if pipeline is None:
        check_size(source, arguments.reference, samples.processor)
    source = source.with_label_order(samples.label_names)
    names = source.label_names if samples.label_names == source.label_names else None
    source = source.with_label_names(samples.label_names)
    extractor = choose_feature_extractor(arguments.reference, samples.processor, arguments.features)
    held_out = make_loader(source.held_out, samples.processor)
    train = make_loader(select_at_most(source.train, arguments.max_training_images, arguments.seed), samples.processor)
    with Evaluator(extractor, features_folder(), arguments.seed) as evaluator:
        measured = evaluator.measure_stream(samples.batches, samples.labels, "samples")
        if pipeline is not None:
            metrics = pipeline_metrics(evaluator, pipeline, measured, held_out, train, names or ())
            metrics |= {} if samples.restorations is None else samples.restorations.metrics()
        else:
            real, training = evaluator.measure(held_out, "held-out images"), evaluator.measure(train, "training images")
            metrics = evaluator.sample_metrics(measured, real, training, names or ())
            metrics |= {"num_images": len(measured), "num_reference_images": len(real), "reference_hash": real.hash}
    return (
        metrics
        | {"reference": source.name}
        | collect_evaluation_settings(extractor, samples.processor, pipeline, arguments.seed)
        | {"notes": sample_size_warnings(metrics["num_images"], metrics["num_reference_images"])}
    )


def measure_array_samples(arguments: Arguments) -> dict[str, Any]:
    """Measure samples against an `.npz` of images or of moments of Inception's features."""
    reference = read_reference(Path(arguments.reference))
    pipeline, samples = load_samples(arguments, None)
    processor = samples.processor
    if reference.images is not None:
        check_image_count(len(reference.images), f"images in {arguments.reference}")
        if reference.images.image_shape[1:] != processor.content_size:
            raise make_size_error(arguments.reference, reference.images.image_shape[1:], processor)
    features = arguments.features or ("inception" if reference.moments else None)
    extractor = convert_to_rgb_first(choose_feature_extractor("", processor, features))
    if reference.images is None:
        check_inception(extractor)  # before samples are generated
    with Evaluator(extractor, features_folder(), arguments.seed) as evaluator:
        measured = evaluator.measure_stream(samples.batches, samples.labels, "samples")
        metrics: dict[str, Any] = {"num_images": len(measured), "num_reference_images": None}
        metrics["reference_hash"] = compute_sha256(Path(arguments.reference))[:16]
        if reference.images is not None:
            real = evaluator.measure(reference.images, "reference images")
            metrics |= evaluator.sample_metrics(measured, real)
            metrics["num_reference_images"] = len(real)
        if reference.moments and (extractor.name == "inception" or reference.images is None):
            metrics |= evaluator.moments_metrics(measured, reference.moments)
    return (
        metrics
        | {"reference": Path(arguments.reference).name}
        | collect_evaluation_settings(extractor, processor, pipeline, arguments.seed)
        | {"notes": sample_size_warnings(len(measured), metrics["num_reference_images"] or len(measured))}
    )


def load_samples(arguments: Arguments, source: ImageSource | None) -> tuple[LatentGenerationPipeline | None, Samples]:
    """Load the pipeline, if there is one, and its samples, or the samples of another program.

    Args:
        source: The reference images; None for an `.npz`.
    """
    pipeline = None
    if arguments.pipeline is not None:
        pipeline = LatentGenerationPipeline.from_pretrained(arguments.pipeline).to(accelerated_device())
        pipeline.sampling = pipeline.sampling_options(arguments.sampling_options())
        pipeline.set_progress_bar_config(disable=True)  # the evaluator's bar counts images
        processor, names = pipeline.tokenizer.config.image_processor, pipeline.label_names
        if pipeline.prior.is_restoration:
            if source is None:
                raise UserError(
                    f"--reference is {arguments.reference}; expected a folder of images, because the pipeline restores images"
                )
            held_out = make_loader(source.with_label_names(names).held_out, processor)
            restorations = Restorations(pipeline, held_out, arguments.num_images, arguments.seed)
            batches = restorations.batches() if is_main_process() else iter(())
            samples = Samples(batches, restorations.labels, names, processor, restorations)
        else:
            labels = balanced_labels(pipeline, arguments.num_images)
            samples = Samples(sample_batches(pipeline, labels, arguments.seed), labels, names, processor)
    else:
        # An .npz counts as grey, because it is compared as RGB later.
        reference_channels = 1 if source is None else dataset_statistics(source.held_out).channels
        samples = read_samples(arguments.samples or "", reference_channels)
    check_image_count(len(samples.labels), "samples")
    return pipeline, samples._replace(
        batches=save_while_streaming(arguments, samples)
    ) if is_main_process() else samples


def read_samples(path: str, reference_channels: int) -> Samples:
    """Read samples of one size from an `.npz` or a folder; grey samples become RGB if the reference has colours."""
    images: ImageSet
    names = None
    if path.endswith(".npz"):
        images = array = ImageArray(Path(path))
        _, first = next(array.batches(BATCH))
        is_grey = bool((first == first[:, :1]).all())  # an .npz always holds RGB, for published evaluators
        processor = make_processor(1 if is_grey else len(first[0]), array.image_shape[1:])
    else:
        split, names = open_samples(path)
        channels = max(dataset_statistics(split).channels, reference_channels)
        processor = make_processor(channels, check_single_size(split, path))
        images = make_loader(split, processor)
    labels = images.labels()
    label_ids = torch.tensor([-1] * len(images) if labels is None else labels)
    batches = (batch[:, : processor.channels] for _, batch in images.batches(BATCH))
    return Samples(batches, label_ids, names, processor)


def open_samples(path: str) -> tuple[ImageSplit, tuple[str, ...] | None]:
    """Open the images of a folder and the names of their classes. In a folder from `sample`, skip the grids."""
    folder = Path(path).expanduser()
    if (sample_files := read_sample_list(folder)) is None:
        source = open_source(data_path(path), hold_out=False)
        return source.train, source.label_names
    files, classes = sample_files
    names = tuple(dict.fromkeys(name for name in classes if name is not None))
    labels = [names.index(name) for name in classes if name is not None]
    return ImageSplit(FileStore(folder, files), labels if names and None not in classes else None), names or None


def save_while_streaming(arguments: Arguments, samples: Samples) -> Iterator[Tensor]:
    """Yield the samples, and write them and a grid as `--save-samples` and `--output` ask."""
    batches = samples.batches
    if arguments.save_samples is not None:
        batches = write_and_yield(arguments.save_samples, batches, len(samples.labels))
    if arguments.output is None:
        yield from batches
        return
    grid_images: dict[int, list[Tensor]] = {}
    yield from collect_grid_images(batches, samples.labels, grid_images, GRID_ROWS, GRID_COLUMNS)
    save_image(build_class_grid(grid_images, samples.label_names), arguments.output.with_suffix(".samples.png"))


def make_loader(split: ImageSplit, processor: ImageProcessor) -> ImageLoader:
    """Make a loader that decodes images at each pass, so that a large set needs no memory."""
    return ImageLoader(split, processor, memory_limit=0)


def make_processor(channels: int, size: tuple[int, int]) -> ImageProcessor:
    return ImageProcessor(channels=channels, content_size=size, image_size=size)


def check_single_size(split: ImageSplit, path: str) -> tuple[int, int]:
    """Return the (height, width) of all images of a split. Raises UserError if their sizes differ."""
    try:
        sizes = Counter(split.size(i) for i in range(len(split)))
    except UnreadableImage as error:
        raise UserError(
            f"an image in {path} cannot be read: {error}; expected readable images; repair or remove it"
        ) from None
    if len(sizes) > 1:
        (first, count), (second, _) = sizes.most_common(2)
        raise UserError(
            f"{path} holds images of {len(sizes)} sizes, such as {first[0]}×{first[1]} ({count}) and {second[0]}×{second[1]}; "
            "expected one; resize them to the size of the generated images"
        )
    return next(iter(sizes))


def check_size(source: ImageSource, name: str, processor: ImageProcessor) -> None:
    """Raise UserError unless the held-out images have the size of the samples; no resizing is defined for them."""
    size = check_single_size(source.held_out, name)
    if size != processor.content_size:
        raise make_size_error(name, size, processor)


def make_size_error(name: str, size: tuple[int, ...], processor: ImageProcessor) -> UserError:
    height, width = processor.content_size
    return UserError(
        f"{name} holds images of {size[0]}×{size[1]} and the samples are {height}×{width}; expected one size; compare with "
        "images of that size"
    )


def convert_to_rgb_first(extractor: FeatureExtractor) -> FeatureExtractor:
    """Make an extractor that converts images to RGB, because an `.npz` holds RGB only."""
    return extractor._replace(extract=lambda images: extractor.extract(as_rgb(images)))
