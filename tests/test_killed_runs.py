"""A killed and restarted run ends with the weights of an uninterrupted run; a run that receives a signal saves first.

Two processes, as with `accelerate launch`, give the results of one.
"""

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Literal

import pytest
import torch
from small_runs import (
    RUN_FIELDS,
    resumed_steps,
    start_run,
    stop_processes,
    wait_for_exit,
    wait_for_step,
    write_training_data,
)

from stage2_prior.autoregressive.model import AutoregressivePrior
from training_harness.checkpoints import checkpoint_path, newest_step, read_checkpoint
from training_harness.metric_log import read_metrics
from training_harness.optimization import OptimizerConfig

STAGES = ("tokenizer", "prior")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    write_training_data(folder)
    return folder


def model_files(output: Path) -> dict[str, bytes]:
    """Return the content of the model files except the card."""
    return {path.name: path.read_bytes() for path in (output / "model").iterdir() if path.suffix != ".md"}


def losses(output: Path) -> dict[int, dict[str, float]]:
    """Return the logged values of each training step."""
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "learning_rate" in row]
    assert len(rows) == len({row["step"] for row in rows}), "a step was logged twice"
    return {row["step"]: {k: v for k, v in row.items() if k != "images_per_second"} for row in rows}


SLOW = pytest.mark.slow  # each stage and each number of processes has a fast test


@pytest.mark.parametrize(
    ("stage", "processes", "kills"),
    [
        ("tokenizer", 1, 4),
        ("prior", 2, 4),
        *(pytest.param(stage, processes, 10, marks=SLOW) for stage in STAGES for processes in (1, 2)),
    ],
)
def test_a_run_killed_many_times_ends_like_an_uninterrupted_run(
    folder: Path, tmp_path: Path, stage: str, processes: int, kills: int
) -> None:
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert wait_for_exit(start_run(stage, folder, uninterrupted, processes)) == [0] * processes
    assert resumed_steps(uninterrupted) == []

    rng = random.Random(f"{stage}{processes}")
    for kill in range(kills):
        newest, before = newest_step(killed), resumed_steps(killed)
        if not newest:  # without a checkpoint, old rows would be mistaken for new ones
            (killed / "metrics.jsonl").unlink(missing_ok=True)
        running = start_run(stage, folder, killed, processes)
        if kill % 5 == 0:  # at any time, also before the first step
            time.sleep(rng.uniform(0, 0.5))
            assert set(stop_processes(running, signal.SIGKILL)) == {-signal.SIGKILL}
            continue
        step = min(newest + rng.randint(1, 9), RUN_FIELDS["max_steps"] - 1)
        wait_for_step(killed, step, running, len(before) + (newest > 0))
        time.sleep(rng.uniform(0, 0.02))  # during a step, a save or a preview
        assert set(stop_processes(running, signal.SIGKILL)) == {-signal.SIGKILL}
        assert resumed_steps(killed) == [*before, *([newest] if newest else [])], (
            "the run did not resume from the newest checkpoint"
        )
    newest = newest_step(killed)
    assert newest > 0
    assert wait_for_exit(start_run(stage, folder, killed, processes)) == [0] * processes
    assert resumed_steps(killed)[-1] == newest

    assert model_files(killed) == model_files(uninterrupted)
    assert losses(killed) == losses(uninterrupted)
    assert not list((killed / "checkpoints").glob(".*")), "a partial checkpoint remains"


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_saves_and_stops_the_run_and_it_resumes_from_there(
    folder: Path, tmp_path: Path, number: signal.Signals, processes: int
) -> None:
    running = start_run("prior", folder, tmp_path, processes)
    wait_for_step(tmp_path, 7, running)
    assert stop_processes(running, number) == [128 + number] * processes
    newest = newest_step(tmp_path)
    assert 7 <= newest < RUN_FIELDS["max_steps"]
    assert max(losses(tmp_path)) == newest, "the current step was not saved"
    assert wait_for_exit(start_run("prior", folder, tmp_path, processes)) == [0] * processes
    assert resumed_steps(tmp_path) == [newest]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_during_a_save_loses_no_complete_checkpoint(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    assert wait_for_exit(start_run("prior", folder, uninterrupted, 1)) == [0]
    running = start_run("prior", folder, stopped, 1, slow_saves=True)
    wait_for_step(stopped, 6, running)
    deadline = time.monotonic() + 20
    while not list(stopped.glob("checkpoints/.step_000006.*.partial")) and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.1)
    exit_code = 143 if number is signal.SIGTERM else -number
    assert stop_processes(running, number) == [exit_code]
    newest = 6 if number is signal.SIGTERM else 3  # after SIGTERM the run completes the save
    assert newest_step(stopped) == newest
    read_checkpoint(checkpoint_path(stopped, newest))
    assert wait_for_exit(start_run("prior", folder, stopped, 1)) == [0]
    assert resumed_steps(stopped) == [newest]
    assert model_files(stopped) == model_files(uninterrupted)


def test_a_signal_to_one_of_two_processes_stops_both(folder: Path, tmp_path: Path) -> None:
    running = start_run("prior", folder, tmp_path, 2)
    wait_for_step(tmp_path, 5, running)
    assert stop_processes(running[1:], signal.SIGTERM) == [143]
    assert wait_for_exit(running) == [143, 143]
    assert newest_step(tmp_path) >= 5


def exact_rows(output: Path) -> list[dict[str, float]]:
    """Return the training rows without rounding."""
    return [row for row in read_metrics(output / "exact.jsonl") if "learning_rate" in row]


def last_validation(output: Path) -> dict[str, float]:
    """Return the last validation metrics without rounding."""
    row = next(row for row in read_metrics(output / "exact.jsonl")[::-1] if "learning_rate" not in row)
    return {name: value for name, value in row.items() if name.startswith("validation")}


def assert_equal_rows(single: list[dict[str, float]], multiple: list[dict[str, float]]) -> None:
    """Check that one process and several processes logged the same values."""
    assert [row["step"] for row in single] == [row["step"] for row in multiple] == list(range(1, 21))
    for single_row, multiple_row in zip(single, multiple, strict=True):
        assert single_row["learning_rate"] == multiple_row["learning_rate"]
        terms = single_row.keys() - {"images_per_second"}
        assert terms == multiple_row.keys() - {"images_per_second"}
        assert {name: multiple_row[name] for name in terms} == pytest.approx(
            {name: single_row[name] for name in terms}, rel=1e-9
        )
    first_term = next(iter(single[0].keys() - {"step", "learning_rate", "images_per_second", "gradient_norm"}))
    assert single[0][first_term] != single[-1][first_term], "the loss did not change"


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_with_half_the_batch_size_equal_one_process(folder: Path, tmp_path: Path, stage: str) -> None:
    for processes in (1, 2):
        assert (
            wait_for_exit(start_run(stage, folder, tmp_path / str(processes), processes, in_float64=True))
            == [0] * processes
        )
    assert_equal_rows(exact_rows(tmp_path / "1"), exact_rows(tmp_path / "2"))
    assert last_validation(tmp_path / "2") == pytest.approx(
        last_validation(tmp_path / "1"), rel=1e-6
    )  # each process validates on half of the images


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_prior_sharded_over_two_processes_equals_an_unsharded_prior(
    folder: Path, tmp_path: Path, optimizer: Literal["adamw", "muon"]
) -> None:
    options = {"in_float64": True, "optimizer": OptimizerConfig(name=optimizer)}
    assert wait_for_exit(start_run("prior", folder, tmp_path / "1", 1, **options)) == [0]
    assert wait_for_exit(start_run("prior", folder, tmp_path / "2", 2, sharded=True, **options)) == [0, 0]
    assert_equal_rows(exact_rows(tmp_path / "1"), exact_rows(tmp_path / "2"))
    unsharded, sharded = (
        AutoregressivePrior.from_pretrained(tmp_path / name / "model").state_dict() for name in ("1", "2")
    )
    for name, value in unsharded.items():
        assert torch.allclose(value, sharded[name], rtol=0, atol=1e-6), name  # the EMA weights are saved in float32


def test_a_killed_sharded_run_resumes_exactly_and_one_process_resumes_from_its_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert wait_for_exit(start_run("prior", folder, uninterrupted, 2, sharded=True)) == [0, 0]
    running = start_run("prior", folder, killed, 2, sharded=True)
    wait_for_step(killed, 10, running)
    assert set(stop_processes(running, signal.SIGKILL)) == {-signal.SIGKILL}
    newest = newest_step(killed)
    single = tmp_path / "single"
    shutil.copytree(killed, single)
    assert wait_for_exit(start_run("prior", folder, killed, 2, sharded=True)) == [0, 0]
    assert resumed_steps(killed) == [newest]
    assert model_files(killed) == model_files(uninterrupted)
    assert losses(killed) == losses(uninterrupted)
    assert wait_for_exit(start_run("prior", folder, single, 1, batch_size=8)) == [0]
    assert resumed_steps(single) == [newest]


def test_sharding_a_tokenizer_is_an_error(folder: Path, tmp_path: Path) -> None:
    assert 0 not in wait_for_exit(start_run("tokenizer", folder, tmp_path, 2, sharded=True))
