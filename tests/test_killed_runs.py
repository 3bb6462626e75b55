"""A run that is killed and started again ends in the weights of one that was not; one that is told to stop saves first.

Two processes, as under `accelerate launch`, do what one does.
"""

import random
import signal
import time
from pathlib import Path

import pytest
from small_runs import STEPS, finish, prepare, resumptions, start, stop, wait_for

from training_harness.checkpoints import newest_step
from training_harness.metric_log import read_metrics

STAGES = ("tokenizer", "prior")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    prepare(folder)
    return folder


def model(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "model").iterdir() if path.suffix != ".md"}


def losses(output: Path) -> dict[int, dict[str, float]]:
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "learning_rate" in row]
    assert len(rows) == len({row["step"] for row in rows}), "a step was logged twice"
    return {row["step"]: {k: v for k, v in row.items() if k != "images_per_second"} for row in rows}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_ten_kills_change_nothing(folder: Path, tmp_path: Path, stage: str, processes: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(stage, folder, whole, processes)) == [0] * processes
    assert resumptions(whole) == []

    draw = random.Random(f"{stage}{processes}")
    for number in range(10):
        held, before = newest_step(killed), resumptions(killed)
        if not held:  # its rows would be taken for the next one's
            (killed / "metrics.jsonl").unlink(missing_ok=True)
        started = start(stage, folder, killed, processes)
        if number in (0, 5):  # at any moment, before the first step as well
            time.sleep(draw.uniform(0, 0.5))
            assert set(stop(started, signal.SIGKILL)) == {-signal.SIGKILL}
            continue
        step = min(held + draw.randint(1, 9), STEPS["max_steps"] - 1)
        wait_for(killed, step, started, len(before) + (held > 0))
        time.sleep(draw.uniform(0, 0.02))  # in a step, a save, or a preview
        assert set(stop(started, signal.SIGKILL)) == {-signal.SIGKILL}
        assert resumptions(killed) == [*before, *([held] if held else [])], (
            "it did not go on from the newest checkpoint"
        )
    held = newest_step(killed)
    assert held > 0
    assert finish(start(stage, folder, killed, processes)) == [0] * processes
    assert resumptions(killed)[-1] == held

    assert model(killed) == model(whole)
    assert losses(killed) == losses(whole)
    assert not list((killed / "checkpoints").glob(".*")), "half a checkpoint was left"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on_from_there(
    folder: Path, tmp_path: Path, number: signal.Signals, processes: int
) -> None:
    started = start("prior", folder, tmp_path, processes)
    wait_for(tmp_path, 7, started)
    assert stop(started, number) == [128 + number] * processes
    held = newest_step(tmp_path)
    assert 7 <= held < STEPS["max_steps"]
    assert max(losses(tmp_path)) == held, "the step that was under way was not saved"
    assert finish(start("prior", folder, tmp_path, processes)) == [0] * processes
    assert resumptions(tmp_path) == [held]


def test_one_of_two_processes_being_told_is_enough(folder: Path, tmp_path: Path) -> None:
    started = start("prior", folder, tmp_path, 2)
    wait_for(tmp_path, 5, started)
    assert stop(started[1:], signal.SIGTERM) == [143]
    assert finish(started) == [143, 143]
    assert newest_step(tmp_path) >= 5


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_with_half_the_batch_follow_one(folder: Path, tmp_path: Path, stage: str) -> None:
    logs = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        assert finish(start(stage, folder, output, processes, in_float64=True)) == [0] * processes
        logs.append([row for row in read_metrics(output / "exact.jsonl") if "learning_rate" in row])
    alone, together = logs
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
