"""Sets of features for the tests of `pipelines.evaluation`: drawn at random, kept in files, read in slices of any size."""

from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import seeded
from torch import Tensor

from pipelines.evaluation.feature_files import FeatureFile, slices, write_features
from pipelines.evaluation.features import ImageFeatures


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def stored_features(folder: Path, features: Tensor) -> FeatureFile:
    """The features as a file in a new folder, which rounds them to float32."""
    folder.mkdir()
    return write_features(folder, [ImageFeatures(features)])["features"]


def set_slice_size(rows: int, module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """From here on `module` holds that many rows in memory at once."""
    patch.setattr(module, "slices", partial(slices, size=rows))
