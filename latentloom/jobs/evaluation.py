"""What `evaluate` and the main job share: which features, where they are kept, a sheet of samples, and the settings."""

import getpass
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from latentloom.data.embedded import FASHION_MNIST, classifier_path
from pipelines.evaluation.features import FeatureExtractor, FeatureName, feature_extractor, has_efficientnet
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.image_grids import image_grid
from stage1_tokenizer.data.image_processor import ImageProcessor
from training_harness.processes import accelerated_device, print_once
from training_harness.provenance import describe_machine, library_versions

GRID_ROWS, GRID_COLUMNS = 10, 10


def extractor_for(
    data: str, processor: ImageProcessor, features: FeatureName | None, quick: bool = False
) -> FeatureExtractor:
    """The extractor of that name; by default the embedded set's judge, EfficientNet-Lite0 where it is installed, or pixels.

    `quick` leaves out EfficientNet-Lite0, which would take minutes on a CPU, from what is chosen by default.
    """
    classifier = classifier_path() if data == FASHION_MNIST else None
    if features is None:
        fits_classifier = classifier is not None and processor.channels == 1 and processor.content_size == (28, 28)
        other: FeatureName = "efficientnet-lite0" if has_efficientnet() and not quick else "pixels-8x8"
        features = "classifier" if fits_classifier else other
    return feature_extractor(features, accelerated_device(), classifier)


def features_folder() -> Path:
    """Where features of real images are kept: $LATENTLOOM_CACHE, else the user's cache folder, else a temporary one."""
    own = os.environ.get("LATENTLOOM_CACHE")
    try:
        cache = Path(own or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = (cache if own else cache / "latentloom") / "features"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable", str(folder))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        folder = Path(tempfile.gettempdir()) / f"latentloom-{getpass.getuser()}" / "features"
        print_once(f"note: the cache folder cannot be used ({error}); features of real images are kept in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def settings_of(
    extractor: FeatureExtractor, processor: ImageProcessor, pipeline: LatentGenerationPipeline | None, seed: int
) -> dict[str, Any]:
    """All that the figures depend on besides the images."""
    found: dict[str, Any] = {
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
        found |= {
            "sampler": type(pipeline.prior).__name__,
            "num_inference_steps": pipeline.prior.num_steps(pipeline.tokenizer.latent_spec(), pipeline.sampling),
            "sampling": vars(pipeline.sampling),
            "classes": list(pipeline.label_names or ()),
        }
    return found


def sheet(kept: dict[int, list[Tensor]], label_names: tuple[str, ...] | None) -> Image:
    """A labelled sheet of (C, h, w) uint8 images, a row a class; a block of those without classes."""
    if set(kept) == {-1}:
        return image_grid(torch.stack(kept[-1]), min(GRID_COLUMNS, len(kept[-1])))
    shown = {label: kept[label] for label in sorted(kept)}
    columns = max(map(len, shown.values()))
    blank = torch.full_like(next(iter(shown.values()))[0], 255)
    images = torch.stack([image for row in shown.values() for image in row + [blank] * (columns - len(row))])
    return image_grid(images, columns, [label_names[label] for label in shown] if label_names else None)
