"""Checks before a run: --dry-run and --overfit-batch."""

import re
from pathlib import Path

import pytest
from command_line import hash_files, latentloom
from small_parts import write_images
from small_runs import write_training_data

from training_harness.metric_log import read_metrics

SMALL = ("--model.hidden-size", 32, "--model.num-layers", 1, "--model.num-heads", 2, "--model.intermediate-size", 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    write_training_data(folder)
    return folder


def test_a_dry_run_of_a_prior_prints_its_cost_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hash_files(folder)
    arguments = (
        "--codes",
        folder / "codes",
        "--output",
        folder / "run",
        "--batch-size",
        8,
        "--max-steps",
        30,
        "--dry-run",
    )
    assert latentloom("train-prior", *arguments, *SMALL) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines() if line.startswith("  ")}
    assert list(lines) == ["parameters", "memory", "to", "compute", "data", "length", "time", "rate"]
    assert "40 images per epoch, 5 steps of 8 images" in lines["data"]
    assert "30 steps, 6.0 epochs" in lines["length"]
    counts = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", lines["parameters"])]
    assert counts[0] == sum(counts[1:])
    assert hash_files(folder) == before


def test_a_dry_run_of_the_main_job_adds_up_both_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images")
    assert latentloom("train", "--data", images, "--output", tmp_path / "job", "--batch-size", 2, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^tokenizer vqgan-f4$", printed, re.MULTILINE)
    assert re.search(r"^prior ar-tiny$", printed, re.MULTILINE)
    assert "nothing was written" in printed.splitlines()[-1]
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_one_batch_is_memorized_without_writing_the_run_folder(
    folder: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (
        ("--data", folder / "images", "--recipe", "vqgan-f4") if stage == "tokenizer" else ("--codes", folder / "codes")
    )
    arguments = (*source, "--output", tmp_path / "run", "--batch-size", 4, "--max-steps", 30, "--overfit-batch")
    for _ in range(2):  # the second check replaces the first
        assert latentloom(f"train-{stage}", *arguments) == 0
        assert "the set-up can learn" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    steps = [
        row["step"] for row in read_metrics(tmp_path / "run-overfit-batch" / "metrics.jsonl") if "learning_rate" in row
    ]
    assert steps == list(range(1, 31))


def test_a_learning_rate_that_is_too_small_is_reported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ("--optimizer.learning-rate", 1e-9, "--optimizer.matrix-learning-rate", 1e-9)
    arguments = ("--codes", folder / "codes", "--output", tmp_path / "run", "--max-steps", 10, "--overfit-batch")
    assert latentloom("train-prior", *arguments, *rates, *SMALL) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: nats_per_token fell from .* expected at most 50% of it", line), line
    assert "--optimizer.learning-rate" in line
