"""Parts that the evaluating commands and the main job share: selected images, features, their cache, image grid and settings."""

import getpass
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from latentloom.data.embedded import FASHION_MNIST, classifier_path
from pipelines.evaluation.feature_files import random_positions
from pipelines.evaluation.features import FeatureExtractor, FeatureName, feature_extractor, has_efficientnet
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.image_grids import image_grid
from stage1_tokenizer.data.image_processor import ImageProcessor
from stage1_tokenizer.data.sources import ImageSplit
from training_harness.processes import accelerated_device, print_once
from training_harness.provenance import describe_machine, library_versions

GRID_ROWS, GRID_COLUMNS = 10, 10


def choose_feature_extractor(
    data: str, processor: ImageProcessor, features: FeatureName | None, quick: bool = False
) -> FeatureExtractor:
    """Load the feature extractor named `features`, or choose one when the name is None.

    The default is the reference classifier for the embedded images. For other images it is EfficientNet-Lite0 when it is
    installed, and pixels otherwise.

    Args:
        quick: never choose EfficientNet-Lite0 by default, because it takes minutes on a CPU.
    """
    classifier = classifier_path() if data == FASHION_MNIST else None
    if features is None:
        fits_classifier = classifier is not None and processor.channels == 1 and processor.content_size == (28, 28)
        fallback: FeatureName = "efficientnet-lite0" if has_efficientnet() and not quick else "pixels-8x8"
        features = "classifier" if fits_classifier else fallback
    return feature_extractor(features, accelerated_device(), classifier)


def select_at_most(split: ImageSplit, limit: int, seed: int) -> ImageSplit:
    """Select at most `limit` images of a split at random."""
    return split.select(random_positions(len(split), limit, seed).tolist())


def features_folder() -> Path:
    """Return the cache folder for features of real images, and create it.

    It lies in $LATENTLOOM_CACHE, else in the user's cache folder, else in the temporary folder.
    """
    latentloom_cache = os.environ.get("LATENTLOOM_CACHE")
    try:
        cache = Path(latentloom_cache or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = (cache if latentloom_cache else cache / "latentloom") / "features"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable", str(folder))
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        folder = Path(tempfile.gettempdir()) / f"latentloom-{getpass.getuser()}" / "features"
        print_once(f"note: the cache folder cannot be used ({error}); features of real images are kept in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def collect_evaluation_settings(
    extractor: FeatureExtractor, processor: ImageProcessor, pipeline: LatentGenerationPipeline | None, seed: int
) -> dict[str, Any]:
    """Collect every setting that changes the metrics, apart from the images themselves."""
    settings: dict[str, Any] = {
        "features": extractor.name,
        "feature_weights": extractor.weights,
        "feature_resize": extractor.resize,
        "image_size": list(processor.content_size),
        "image_resize": "Lanczos after a centre crop; images of the size are not resampled",
        "seed": seed,
        "weights": "averaged (EMA), as the training run saved them",
        "versions": library_versions(),
        "machine": describe_machine(),
    }
    if pipeline is not None:
        settings |= {
            "sampler": type(pipeline.prior).__name__,
            "num_inference_steps": pipeline.prior.num_steps(pipeline.tokenizer.latent_spec(), pipeline.sampling),
            "sampling": vars(pipeline.sampling),
            "classes": list(pipeline.label_names or ()),
        }
    return settings


def build_class_grid(images_by_class: dict[int, list[Tensor]], label_names: tuple[str, ...] | None) -> Image:
    """Arrange images in a labelled grid, one row per class.

    Args:
        images_by_class: (C, h, w) uint8 images by class id. Images without a class have the id -1 and fill a grid alone.
    """
    if set(images_by_class) == {-1}:
        return image_grid(torch.stack(images_by_class[-1]), min(GRID_COLUMNS, len(images_by_class[-1])))
    rows = {label: images_by_class[label] for label in sorted(images_by_class)}
    columns = max(map(len, rows.values()))
    blank = torch.full_like(next(iter(rows.values()))[0], 255)
    images = torch.stack([image for row in rows.values() for image in row + [blank] * (columns - len(row))])
    return image_grid(images, columns, [label_names[label] for label in rows] if label_names else None)
