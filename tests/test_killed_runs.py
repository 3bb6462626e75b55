"""A run that is killed and started again ends in the weights of one that was not; one that is told to stop saves first.

Two processes, as under `accelerate launch`, do what one does.
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


def model(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "model").iterdir() if path.suffix != ".md"}


def losses(output: Path) -> dict[int, dict[str, float]]:
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "learning_rate" in row]
    assert len(rows) == len({row["step"] for row in rows}), "a step was logged twice"
    return {row["step"]: {k: v for k, v in row.items() if k != "images_per_second"} for row in rows}


SLOW = pytest.mark.slow  # each stage and each number of processes is tried without


@pytest.mark.parametrize(
    ("stage", "processes"),
    [("tokenizer", 1), ("prior", 2), pytest.param("tokenizer", 2, marks=SLOW), pytest.param("prior", 1, marks=SLOW)],
)
def test_ten_kills_change_nothing(folder: Path, tmp_path: Path, stage: str, processes: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert wait_for_exit(start_run(stage, folder, whole, processes)) == [0] * processes
    assert resumed_steps(whole) == []

    draw = random.Random(f"{stage}{processes}")
    for number in range(10):
        held, before = newest_step(killed), resumed_steps(killed)
        if not held:  # its rows would be taken for the next one's
            (killed / "metrics.jsonl").unlink(missing_ok=True)
        started = start_run(stage, folder, killed, processes)
        if number in (0, 5):  # at any moment, before the first step as well
            time.sleep(draw.uniform(0, 0.5))
            assert set(stop_processes(started, signal.SIGKILL)) == {-signal.SIGKILL}
            continue
        step = min(held + draw.randint(1, 9), RUN_FIELDS["max_steps"] - 1)
        wait_for_step(killed, step, started, len(before) + (held > 0))
        time.sleep(draw.uniform(0, 0.02))  # in a step, a save, or a preview
        assert set(stop_processes(started, signal.SIGKILL)) == {-signal.SIGKILL}
        assert resumed_steps(killed) == [*before, *([held] if held else [])], (
            "it did not go on from the newest checkpoint"
        )
    held = newest_step(killed)
    assert held > 0
    assert wait_for_exit(start_run(stage, folder, killed, processes)) == [0] * processes
    assert resumed_steps(killed)[-1] == held

    assert model(killed) == model(whole)
    assert losses(killed) == losses(whole)
    assert not list((killed / "checkpoints").glob(".*")), "half a checkpoint was left"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on_from_there(
    folder: Path, tmp_path: Path, number: signal.Signals, processes: int
) -> None:
    started = start_run("prior", folder, tmp_path, processes)
    wait_for_step(tmp_path, 7, started)
    assert stop_processes(started, number) == [128 + number] * processes
    held = newest_step(tmp_path)
    assert 7 <= held < RUN_FIELDS["max_steps"]
    assert max(losses(tmp_path)) == held, "the step that was under way was not saved"
    assert wait_for_exit(start_run("prior", folder, tmp_path, processes)) == [0] * processes
    assert resumed_steps(tmp_path) == [held]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_during_a_save_loses_nothing_that_was_complete(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert wait_for_exit(start_run("prior", folder, whole, 1)) == [0]
    started = start_run("prior", folder, stopped, 1, slow_saves=True)
    wait_for_step(stopped, 6, started)
    deadline = time.monotonic() + 20
    while not list(stopped.glob("checkpoints/.step_000006.*.partial")) and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.1)
    code = 143 if number is signal.SIGTERM else -number
    assert stop_processes(started, number) == [code]
    held = 6 if number is signal.SIGTERM else 3  # told to stop, it finishes the save
    assert newest_step(stopped) == held
    read_checkpoint(checkpoint_path(stopped, held))
    assert wait_for_exit(start_run("prior", folder, stopped, 1)) == [0]
    assert resumed_steps(stopped) == [held]
    assert model(stopped) == model(whole)


def test_one_of_two_processes_being_told_is_enough(folder: Path, tmp_path: Path) -> None:
    started = start_run("prior", folder, tmp_path, 2)
    wait_for_step(tmp_path, 5, started)
    assert stop_processes(started[1:], signal.SIGTERM) == [143]
    assert wait_for_exit(started) == [143, 143]
    assert newest_step(tmp_path) >= 5


def exact_rows(output: Path) -> list[dict[str, float]]:
    return [row for row in read_metrics(output / "exact.jsonl") if "learning_rate" in row]


def validated(output: Path) -> dict[str, float]:
    row = next(row for row in read_metrics(output / "exact.jsonl")[::-1] if "learning_rate" not in row)
    return {name: value for name, value in row.items() if name.startswith("validation")}


def assert_followed(alone: list[dict[str, float]], together: list[dict[str, float]]) -> None:
    assert [row["step"] for row in alone] == [row["step"] for row in together] == list(range(1, 21))
    for one_row, two_row in zip(alone, together, strict=True):
        assert one_row["learning_rate"] == two_row["learning_rate"]
        terms = one_row.keys() - {"images_per_second"}
        assert terms == two_row.keys() - {"images_per_second"}
        assert {name: two_row[name] for name in terms} == pytest.approx(
            {name: one_row[name] for name in terms}, rel=1e-9
        )
    first_term = next(iter(alone[0].keys() - {"step", "learning_rate", "images_per_second", "gradient_norm"}))
    assert alone[0][first_term] != alone[-1][first_term], "nothing was learnt"


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_with_half_the_batch_follow_one(folder: Path, tmp_path: Path, stage: str) -> None:
    for processes in (1, 2):
        assert (
            wait_for_exit(start_run(stage, folder, tmp_path / str(processes), processes, in_float64=True))
            == [0] * processes
        )
    assert_followed(exact_rows(tmp_path / "1"), exact_rows(tmp_path / "2"))
    assert validated(tmp_path / "2") == pytest.approx(validated(tmp_path / "1"), rel=1e-6)  # each looked at half


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_prior_sharded_over_two_processes_follows_one_that_is_not(
    folder: Path, tmp_path: Path, optimizer: Literal["adamw", "muon"]
) -> None:
    how = {"in_float64": True, "optimizer": OptimizerConfig(name=optimizer)}
    assert wait_for_exit(start_run("prior", folder, tmp_path / "1", 1, **how)) == [0]
    assert wait_for_exit(start_run("prior", folder, tmp_path / "2", 2, sharded=True, **how)) == [0, 0]
    assert_followed(exact_rows(tmp_path / "1"), exact_rows(tmp_path / "2"))
    ours, theirs = (AutoregressivePrior.from_pretrained(tmp_path / name / "model").state_dict() for name in ("1", "2"))
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=1e-6), name  # of the average, written in float32


def test_a_sharded_run_that_was_killed_goes_on_exactly_and_so_does_one_process_from_its_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert wait_for_exit(start_run("prior", folder, whole, 2, sharded=True)) == [0, 0]
    started = start_run("prior", folder, killed, 2, sharded=True)
    wait_for_step(killed, 10, started)
    assert set(stop_processes(started, signal.SIGKILL)) == {-signal.SIGKILL}
    held = newest_step(killed)
    alone = tmp_path / "alone"
    shutil.copytree(killed, alone)
    assert wait_for_exit(start_run("prior", folder, killed, 2, sharded=True)) == [0, 0]
    assert resumed_steps(killed) == [held]
    assert model(killed) == model(whole)
    assert losses(killed) == losses(whole)
    assert wait_for_exit(start_run("prior", folder, alone, 1, batch_size=8)) == [0]
    assert resumed_steps(alone) == [held]


def test_a_tokenizer_refuses_to_be_sharded(folder: Path, tmp_path: Path) -> None:
    assert 0 not in wait_for_exit(start_run("tokenizer", folder, tmp_path, 2, sharded=True))
