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
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def stored(folder: Path, features: Tensor) -> FeatureFile:
    """Store features in a new folder, which rounds them to float32."""
    folder.mkdir()
    return write_features(folder, [ImageFeatures(features)])["features"]


def read_by(rows: int, module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Let `module` read slices of at most `rows` rows from now on."""
    patch.setattr(module, "iterate_slices", partial(iterate_slices, size=rows))
