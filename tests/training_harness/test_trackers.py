"""Trackers get the figures of metrics.jsonl and the samples, and a run that goes on is one run there too."""

import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import start_processes, wait_for_exit, write_training_data

from latentloom.cli import main
from training_harness.errors import UserError
from training_harness.metric_log import read_metrics
from training_harness.trackers import check_trackers

SMALL = ("--model.hidden-size", 32, "--model.num-layers", 1, "--model.num-heads", 2, "--model.intermediate-size", 32)
EVERY = ("--batch-size", 4, "--log-every", 1, "--sample-every", 3, "--checkpoint-every", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that was extended to six, with every tracker."""
    for name in ("tensorboard", "wandb", "trackio"):
        pytest.importorskip(name, reason="the trackers are in the extra `track`")
    folder = tmp_path_factory.mktemp("tracked")
    write_training_data(folder)
    for steps in (3, 6):
        words = ("train-prior", "--codes", folder / "codes", "--output", folder / "mine", "--max-steps", steps)
        track = ("--report-to", "tensorboard", "wandb", "trackio")
        places = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(folder / "trackio")}
        everything = [str(word) for word in (*words, *EVERY, *SMALL, *track)]
        assert wait_for_exit(start_processes(run_here, 1, everything, places)) == [0]
    return folder


def run_here(rank: int, processes: int, port: int, words: list[str], environment: dict[str, str]) -> None:
    """In a process of its own: trackers read the environment when they are imported, and keep threads."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(main(words))


def logged(folder: Path, name: str) -> dict[int, Any]:
    return {row["step"]: row[name] for row in read_metrics(folder / "mine" / "metrics.jsonl") if name in row}


@pytest.mark.parametrize("name", ["nats_per_token", "validation_nats_per_token", "learning_rate"])
def test_tensorboard_shows_the_figures_of_the_log(folder: Path, name: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "mine" / "tensorboard" / "latentloom"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars(name)}
    assert found == pytest.approx(logged(folder, name), rel=1e-6)
    assert [image.step for image in events.Images("samples")] == [3, 6]


def test_trackio_holds_one_run_with_the_figures_of_the_log(folder: Path) -> None:
    with sqlite3.connect(folder / "trackio" / "latentloom.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {"mine"}
    found = [(step, json.loads(values)) for _, step, values in rows]
    assert {s: v["nats_per_token"] for s, v in found if "nats_per_token" in v} == logged(folder, "nats_per_token")
    assert [step for step, values in found if "samples" in values] == [3, 6]


def test_wandb_goes_on_with_the_run_s_own_id_and_keeps_the_pictures(folder: Path) -> None:
    run_id = json.loads((folder / "mine" / "environment.json").read_text(encoding="utf-8"))["run_id"]
    runs = sorted((folder / "mine" / "wandb").glob("offline-run-*"))
    assert {path.name.rsplit("-", 1)[-1] for path in runs} == {run_id}
    pictures = [picture.name for path in runs for picture in path.glob("files/media/images/samples_*.png")]
    assert {name.split("_")[1] for name in pictures} == {"3", "6"}


def test_a_tracker_that_is_not_installed_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(())
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r'wandb, which is not installed; .* pip install "latentloom\[track\]"'):
        check_trackers(("wandb",))
