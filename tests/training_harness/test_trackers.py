"""Trackers receive the metrics of metrics.jsonl and the samples; a resumed run continues its tracker run."""

import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from new_process import run_forked
from small_runs import write_training_data

from training_harness.errors import UserError
from training_harness.metric_log import read_metrics
from training_harness.trackers import check_trackers

MODEL_OPTIONS = (
    "--model.hidden-size",
    32,
    "--model.num-layers",
    1,
    "--model.num-heads",
    2,
    "--model.intermediate-size",
    32,
)
RUN_OPTIONS = ("--batch-size", 4, "--log-every", 1, "--sample-every", 3, "--checkpoint-every", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three steps with all trackers, then extend the run to six steps."""
    for name in ("tensorboard", "wandb", "trackio"):
        pytest.importorskip(name, reason="trackers need the extra `track`")
    folder = tmp_path_factory.mktemp("tracked")
    write_training_data(folder)
    for steps in (3, 6):
        command = ("train-prior", "--codes", folder / "codes", "--output", folder / "mine", "--max-steps", steps)
        tracker_options = ("--report-to", "tensorboard", "wandb", "trackio")
        environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(folder / "trackio")}
        arguments = (*command, *RUN_OPTIONS, *MODEL_OPTIONS, *tracker_options)
        # A new process: trackers read the environment on import and keep threads.
        process = run_forked("-m", "latentloom", *arguments, **environment)
        assert process.returncode == 0, process.stderr
    return folder


def logged_values(folder: Path, name: str) -> dict[int, Any]:
    """Return the values of a metric by step."""
    return {row["step"]: row[name] for row in read_metrics(folder / "mine" / "metrics.jsonl") if name in row}


@pytest.mark.parametrize("name", ["nats_per_token", "validation_nats_per_token", "learning_rate"])
def test_tensorboard_has_the_metrics_of_the_log(folder: Path, name: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "mine" / "tensorboard" / "latentloom"))
    events.Reload()
    values = {event.step: event.value for event in events.Scalars(name)}
    assert values == pytest.approx(logged_values(folder, name), rel=1e-6)
    assert [image.step for image in events.Images("samples")] == [3, 6]


def test_trackio_has_one_run_with_the_metrics_of_the_log(folder: Path) -> None:
    with sqlite3.connect(folder / "trackio" / "latentloom.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {"mine"}
    metrics = [(step, json.loads(values)) for _, step, values in rows]
    assert {s: v["nats_per_token"] for s, v in metrics if "nats_per_token" in v} == logged_values(
        folder, "nats_per_token"
    )
    assert [step for step, values in metrics if "samples" in values] == [3, 6]


def test_wandb_resumes_the_run_by_its_id_and_has_the_images(folder: Path) -> None:
    run_id = json.loads((folder / "mine" / "environment.json").read_text(encoding="utf-8"))["run_id"]
    runs = sorted((folder / "mine" / "wandb").glob("offline-run-*"))
    assert {path.name.rsplit("-", 1)[-1] for path in runs} == {run_id}
    images = [image.name for path in runs for image in path.glob("files/media/images/samples_*.png")]
    assert {name.split("_")[1] for name in images} == {"3", "6"}


def test_a_missing_tracker_package_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(())
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r'wandb, which is not installed; .* run pip install "latentloom\[track\]"'):
        check_trackers(("wandb",))
