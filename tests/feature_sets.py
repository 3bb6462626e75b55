"""Sets of features for the tests of `pipelines.evaluation`: random, stored in files, or read in slices of any size."""

from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import seeded
from torch import Tensor

from pipelines.evaluation.feature_files import FeatureFile, iterate_slices, write_features
from pipelines.evaluation.features import ImageFeatures


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal features in float64."""
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def stored_features(folder: Path, features: Tensor) -> FeatureFile:
    """Write the features to a file in a new folder; the file rounds them to float32."""
    folder.mkdir()
    return write_features(folder, [ImageFeatures(features)])["features"]


def set_slice_size(rows: int, module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Make `module` read `rows` rows at a time."""
    patch.setattr(module, "iterate_slices", partial(iterate_slices, size=rows))
