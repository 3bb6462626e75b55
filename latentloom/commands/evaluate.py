"""latentloom evaluate: figures of a pipeline, of a tokenizer, or of images from elsewhere, on held-out images."""

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
from latentloom.commands.sampling_arguments import SAMPLING_GROUPS, SamplingArguments
from latentloom.data.embedded import data_path
from latentloom.jobs.evaluation import GRID_COLUMNS, GRID_ROWS, extractor_for, features_folder, settings_of, sheet
from latentloom.jobs.evaluation_plots import plot_by_class
from latentloom.jobs.sample_folders import listed_samples
from latentloom.jobs.stages import load_source, load_tokenizer
from pipelines.evaluation.evaluator import BATCH, Evaluator, ImageSet, check_inception
from pipelines.evaluation.feature_files import random_positions
from pipelines.evaluation.features import FeatureExtractor, FeatureName
from pipelines.evaluation.image_arrays import ImageArray, read_reference, written
from pipelines.evaluation.pipeline_metrics import (
    balanced_labels,
    check_enough,
    keeping_first,
    pipeline_metrics,
    sampled_batches,
    warnings_for,
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
from training_harness.files import sha256_of, write_json
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
            raise UserError("expected one of --pipeline, --tokenizer and --samples; give what is to be measured")
        for option, path, ending in (("--output", self.output, ".json"), ("--save-samples", self.save_samples, ".npz")):
            if path is not None and (path.is_dir() or path.suffix != ending):
                such = path.with_suffix(ending) if path.name else f"figures{ending}"
                raise UserError(f"{option} is {path}; expected a {ending} file, such as {such}")
        of_samples = [self.save_samples, *self.sampling_options().values()]
        if self.tokenizer is not None and any(value is not None for value in of_samples):
            raise UserError(
                "--tokenizer was given with --save-samples or an option of sampling; a tokenizer draws no samples; expected "
                "--pipeline with those; leave them out"
            )
        check_count("--num-images", self.num_images)
        check_count("--max-training-images", self.max_training_images)
        check_seed(self.seed)


GROUPS = {
    "required, one of": ("pipeline", "tokenizer", "samples"),
    "metrics": ("features", "num_images", "max_training_images", "seed"),
    **SAMPLING_GROUPS,
    "output": ("output", "save_samples"),
}


class Samples(NamedTuple):
    """Images to be measured, as they come."""

    batches: Iterator[Tensor]
    labels: Tensor
    label_names: tuple[str, ...] | None
    processor: ImageProcessor
    restorations: Restorations | None = None
    """Of a pipeline that restores held-out pictures."""


def main(words: list[str]) -> None:
    a = parse(Arguments, "evaluate", words, GROUPS)
    if not is_main_process():
        help_to_sample(a)
        return
    if a.tokenizer is not None:
        figures = measure_tokenizer(a)
    elif a.reference.endswith(".npz"):
        figures = measure_array_samples(a)
    else:
        figures = measure_image_samples(a)
    if a.output is not None:
        write_json(a.output, figures)
        if figures.get("by_class"):
            plot_by_class(figures, a.output.with_suffix(".by_class.png"))
    print_once(json.dumps(figures, indent=2, ensure_ascii=False))


def help_to_sample(a: Arguments) -> None:
    """What other processes than the main one, which measures, have to do."""
    if a.pipeline is not None:
        for _ in load_samples(a)[1].batches:
            pass


def measure_tokenizer(a: Arguments) -> dict[str, Any]:
    tokenizer = load_tokenizer(a.tokenizer or "")[0].to(accelerated_device())
    processor = tokenizer.config.image_processor
    if a.reference.endswith(".npz"):
        raise UserError(f"--reference is {a.reference}; a tokenizer is measured on images; expected a folder of them")
    source = load_source(a.reference)
    held_out = readable(source.held_out, processor)
    extractor = extractor_for(a.reference, processor, a.features)
    with Evaluator(extractor, features_folder(), a.seed) as evaluator:
        real = evaluator.measure(held_out, "held-out images")
        few = readable(some(source.train, min(len(real), a.max_training_images), a.seed), processor)
        figures = tokenizer_metrics(evaluator, tokenizer, held_out, real, evaluator.measure(few, "training images"))
    return (
        figures
        | {"num_reference_images": len(real), "reference": source.name, "reference_hash": real.hash}
        | settings_of(extractor, processor, None, a.seed)
        | {"notes": warnings_for(len(real), len(real))}
    )


def measure_image_samples(a: Arguments) -> dict[str, Any]:
    """Figures of samples on a source's held-out images, with its training images for what needs them."""
    source = load_source(a.reference)
    check_enough(len(source.held_out), f"held-out images in {a.reference}")
    pipeline, samples = load_samples(a)
    if pipeline is None:
        check_size(source, a.reference, samples.processor)
    source = source.numbered_as(samples.label_names)
    names = source.label_names if samples.label_names == source.label_names else None
    source = source.relabelled(samples.label_names)
    extractor = extractor_for(a.reference, samples.processor, a.features)
    held_out = readable(source.held_out, samples.processor)
    train = readable(some(source.train, a.max_training_images, a.seed), samples.processor)
    with Evaluator(extractor, features_folder(), a.seed) as evaluator:
        measured = evaluator.measure_stream(samples.batches, samples.labels, "samples")
        if pipeline is not None:
            figures = pipeline_metrics(evaluator, pipeline, measured, held_out, train, names or ())
            figures |= {} if samples.restorations is None else samples.restorations.figures()
        else:
            real, trained = evaluator.measure(held_out, "held-out images"), evaluator.measure(train, "training images")
            figures = evaluator.sample_metrics(measured, real, trained, names or ())
            figures |= {"num_images": len(measured), "num_reference_images": len(real), "reference_hash": real.hash}
    return (
        figures
        | {"reference": source.name}
        | settings_of(extractor, samples.processor, pipeline, a.seed)
        | {"notes": warnings_for(figures["num_images"], figures["num_reference_images"])}
    )


def measure_array_samples(a: Arguments) -> dict[str, Any]:
    """Figures of samples against an `.npz` of images, or of moments of Inception's features."""
    reference = read_reference(Path(a.reference))
    pipeline, samples = load_samples(a)
    processor = samples.processor
    if reference.images is not None:
        check_enough(len(reference.images), f"images in {a.reference}")
        if reference.images.image_shape[1:] != processor.content_size:
            raise other_size(a.reference, reference.images.image_shape[1:], processor)
    features = a.features or ("inception" if reference.moments else None)
    extractor = in_rgb(extractor_for("", processor, features))
    if reference.images is None:
        check_inception(extractor)  # before samples are drawn
    with Evaluator(extractor, features_folder(), a.seed) as evaluator:
        measured = evaluator.measure_stream(samples.batches, samples.labels, "samples")
        figures: dict[str, Any] = {"num_images": len(measured), "num_reference_images": None}
        figures["reference_hash"] = sha256_of(Path(a.reference))[:16]
        if reference.images is not None:
            real = evaluator.measure(reference.images, "reference images")
            figures |= evaluator.sample_metrics(measured, real)
            figures["num_reference_images"] = len(real)
        if reference.moments and (extractor.name == "inception" or reference.images is None):
            figures |= evaluator.moments_metrics(measured, reference.moments)
    return (
        figures
        | {"reference": Path(a.reference).name}
        | settings_of(extractor, processor, pipeline, a.seed)
        | {"notes": warnings_for(len(measured), figures["num_reference_images"] or len(measured))}
    )


def load_samples(a: Arguments) -> tuple[LatentGenerationPipeline | None, Samples]:
    """The pipeline, if there is one, and its samples, or those that something else generated."""
    pipeline = None
    if a.pipeline is not None:
        pipeline = LatentGenerationPipeline.from_pretrained(a.pipeline).to(accelerated_device())
        pipeline.sampling = pipeline.sampling_options(a.sampling_options())
        pipeline.set_progress_bar_config(disable=True)  # the evaluator's counts images
        processor, names = pipeline.tokenizer.config.image_processor, pipeline.label_names
        if pipeline.prior.is_restoration:
            if a.reference.endswith(".npz"):
                raise UserError(
                    f"--reference is {a.reference} for a pipeline that restores; expected a folder of images to restore"
                )
            held_out = readable(load_source(a.reference).relabelled(names).held_out, processor)
            restorations = Restorations(pipeline, held_out, a.num_images, a.seed)
            batches = restorations.batches() if is_main_process() else iter(())
            samples = Samples(batches, restorations.labels, names, processor, restorations)
        else:
            labels = balanced_labels(pipeline, a.num_images)
            samples = Samples(sampled_batches(pipeline, labels, a.seed), labels, names, processor)
    else:
        samples = read_samples(a.samples or "", a.reference)
    check_enough(len(samples.labels), "samples")
    return pipeline, samples._replace(batches=passed_on(a, samples)) if is_main_process() else samples


def read_samples(path: str, reference: str) -> Samples:
    """Samples from an `.npz` or a folder, all of one size; grey ones in colour where the reference has colours."""
    images: ImageSet
    names = None
    if path.endswith(".npz"):
        images = array = ImageArray(Path(path))
        _, first = next(array.batches(BATCH))
        grey = bool((first == first[:, :1]).all())  # written as RGB, since published evaluators know nothing else
        processor = processor_of(1 if grey else len(first[0]), array.image_shape[1:])
    else:
        split, names = sample_split(path)
        channels = max(dataset_statistics(split).channels, reference_channels(reference))
        processor = processor_of(channels, one_size(split, path))
        images = readable(split, processor)
    labels = images.labels()
    chosen = torch.tensor([-1] * len(images) if labels is None else labels)
    batches = (batch[:, : processor.channels] for _, batch in images.batches(BATCH))
    return Samples(batches, chosen, names, processor)


def sample_split(path: str) -> tuple[ImageSplit, tuple[str, ...] | None]:
    """The images of a folder, and the names of their classes; of a folder that `sample` wrote its samples alone."""
    folder = Path(path).expanduser()
    if (listed := listed_samples(folder)) is None:
        source = open_source(data_path(path), hold_out=False)
        return source.train, source.label_names
    files, classes = listed
    names = tuple(dict.fromkeys(name for name in classes if name is not None))
    labels = [names.index(name) for name in classes if name is not None]
    return ImageSplit(FileStore(folder, files), labels if names and None not in classes else None), names or None


def reference_channels(reference: str) -> int:
    """Channels of the images to compare with; an `.npz` is compared as RGB later."""
    return 1 if reference.endswith(".npz") else dataset_statistics(load_source(reference).held_out).channels


def passed_on(a: Arguments, samples: Samples) -> Iterator[Tensor]:
    """The samples, written and drawn on their way as `--save-samples` and `--output` ask."""
    batches = samples.batches
    if a.save_samples is not None:
        batches = written(a.save_samples, batches, len(samples.labels))
    if a.output is None:
        yield from batches
        return
    kept: dict[int, list[Tensor]] = {}
    yield from keeping_first(batches, samples.labels, kept, GRID_ROWS, GRID_COLUMNS)
    save_image(sheet(kept, samples.label_names), a.output.with_suffix(".samples.png"))


def readable(split: ImageSplit, processor: ImageProcessor) -> ImageLoader:
    """Pictures decoded each time they are asked for, so that a large set takes no memory."""
    return ImageLoader(split, processor, memory_limit=0)


def some(split: ImageSplit, most: int, seed: int) -> ImageSplit:
    """At most that many pictures of a split, drawn at random."""
    return split.select(random_positions(len(split), most, seed).tolist())


def processor_of(channels: int, size: tuple[int, int]) -> ImageProcessor:
    return ImageProcessor(channels=channels, content_size=size, image_size=size)


def one_size(split: ImageSplit, path: str) -> tuple[int, int]:
    """The (height, width) that all pictures of a split have."""
    try:
        sizes = Counter(split.size(i) for i in range(len(split)))
    except UnreadableImage as error:
        raise UserError(
            f"an image in {path} cannot be read: {error}; expected whole pictures; mend or remove it"
        ) from None
    if len(sizes) > 1:
        (first, many), (second, _) = sizes.most_common(2)
        raise UserError(
            f"{path} holds images of {len(sizes)} sizes, such as {first[0]}×{first[1]} ({many}) and {second[0]}×{second[1]}; "
            "expected one; bring them to the size that was generated"
        )
    return next(iter(sizes))


def check_size(source: ImageSource, name: str, processor: ImageProcessor) -> None:
    """Raises UserError unless the source's held-out images have the samples' size: nothing says how to resize them."""
    size = one_size(source.held_out, name)
    if size != processor.content_size:
        raise other_size(name, size, processor)


def other_size(name: str, size: tuple[int, ...], processor: ImageProcessor) -> UserError:
    height, width = processor.content_size
    return UserError(
        f"{name} holds images of {size[0]}×{size[1]} and the samples are {height}×{width}; expected one size; compare with "
        "images of that size"
    )


def in_rgb(extractor: FeatureExtractor) -> FeatureExtractor:
    """For an `.npz`, which holds RGB alone: samples of other channels are compared as published evaluators would."""
    return extractor._replace(extract=lambda images: extractor.extract(as_rgb(images)))
