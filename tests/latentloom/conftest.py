"""A small set of real images, and one run of the main job on it, for the tests of this folder."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import CHECKOUT, latentloom

from latentloom.planning import step_timing
from stage1_tokenizer.data.sources import open_source


@pytest.fixture(scope="session", autouse=True)
def rough_timing() -> Iterator[None]:
    """Measure the time of a step on one step instead of four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_timing, "WARM_UP_STEPS", 0)
        patch.setattr(step_timing, "MEASURED_STEPS", 1)
        yield


@pytest.fixture(scope="session")
def real_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 200 of the embedded images as PNG files, in a folder for each of the ten classes."""
    folder = tmp_path_factory.mktemp("images") / "clothes"
    split = open_source(CHECKOUT / "latentloom" / "data" / "fashion-mnist-mini").train
    for i in range(200):
        path = folder / f"class {split.label(i)}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        split.image(i).save(path)
    return folder


@pytest.fixture(scope="session")
def finished_job(rough_timing: None, real_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `latentloom train` on the real images at 16×16. Tests must not change the folder."""
    output = tmp_path_factory.mktemp("jobs") / "clothes"
    small = ["--resolution", 16, "--batch-size", 8, "--max-steps", 4, "--num-images", 20]
    assert latentloom("train", "--data", real_images, "--output", output, *small) == 0
    return output


@pytest.fixture
def job(finished_job: Path, tmp_path: Path) -> Path:
    """Copy the finished job, for a test that changes it."""
    return shutil.copytree(finished_job, tmp_path / "job")
