"""The wheel: the five packages with recipes, data and classifier work outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command_line import CHECKOUT

from latentloom.recipes import recipe_names

PACKAGES = {"latentloom", "pipelines", "stage1_tokenizer", "stage2_prior", "training_harness"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; it comes with the dev extra")
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    built = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_python(unpacked: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in another folder, with the unpacked wheel before an installed checkout."""
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    return subprocess.run(
        [sys.executable, "-P", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_wheel_holds_the_five_packages_and_nothing_else(unpacked: Path) -> None:
    folders = {path.name for path in unpacked.iterdir()}
    assert {name for name in folders if not name.endswith(".dist-info")} == PACKAGES
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *sorted(PACKAGES)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("no git checkout to compare the wheel with")
    wheel_files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {path for path in wheel_files if ".dist-info/" not in path} == set(tracked.stdout.split())


def test_the_wheel_holds_recipes_data_classifier_and_licences(unpacked: Path) -> None:
    data = unpacked / "latentloom" / "data"
    assert {path.name for path in (data / "fashion-mnist-mini").iterdir()} >= {
        "train.parquet",
        "test.parquet",
        "LICENSE",
    }
    assert {path.name for path in (data / "fashion-mnist-classifier").iterdir()} >= {"config.json", "model.safetensors"}
    recipes = {path.stem for path in (unpacked / "latentloom" / "recipes").glob("*.yaml")}
    assert recipes == {*recipe_names("tokenizer"), *recipe_names("prior")}
    (information,) = unpacked.glob("*.dist-info")
    assert (information / "licenses" / "LICENSE").read_text() == (CHECKOUT / "LICENSE").read_text()
    assert (information / "licenses" / "latentloom" / "data" / "fashion-mnist-mini" / "LICENSE").exists()
    metadata = (information / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert "latentloom = latentloom.cli:main" in (information / "entry_points.txt").read_text()


def test_the_wheel_is_smaller_than_10_megabytes(wheel: Path) -> None:
    assert wheel.stat().st_size < 10e6  # at most 8 MB of images and 2 MB of classifier


def test_the_wheel_finds_its_own_data_from_another_folder(unpacked: Path, tmp_path: Path) -> None:
    program = """
import latentloom
from latentloom.data.embedded import data_path, classifier_path
from latentloom import open_source
from latentloom.cli import main
from pipelines import ReferenceClassifier
source = open_source(data_path("fashion-mnist-mini"))
labels = ReferenceClassifier.from_pretrained(classifier_path()).config.num_labels
print(latentloom.__file__, len(source.train) + len(source.validation), len(source.held_out), labels, sep="\\n")
main(["quickstart", "--help"])
"""
    done = run_python(unpacked, tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    file, *counts, help_text = done.stdout.split("\n", 4)
    assert Path(file) == unpacked / "latentloom" / "__init__.py"
    assert list(map(int, counts)) == [10_000, 2_000, 10]  # training images, test images, classes
    assert "runs/quickstart" in help_text


@pytest.mark.slow
def test_quickstart_runs_from_the_wheel_in_another_folder(unpacked: Path, tmp_path: Path) -> None:
    words = ["quickstart", "--max-steps", "2", "--num-images", "20", "--output", "quick"]
    done = run_python(unpacked, tmp_path, "-m", "latentloom.cli", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "quick" / "metrics.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"quick"}
