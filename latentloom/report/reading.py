"""Read the files of a run folder without torch or a model, so that a report takes a second."""

import io
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeGuard

from PIL import Image

import stage1_tokenizer.migration
import stage2_prior.migration
from latentloom.report.svg_charts import Points
from stage1_tokenizer.migration import MODEL
from training_harness.configuration import read_yaml
from training_harness.errors import UserError
from training_harness.metric_log import read_metrics

Stage = Literal["tokenizer", "prior"]
STAGES: tuple[Stage, ...] = ("tokenizer", "prior")
MIGRATIONS = {"tokenizer": stage1_tokenizer.migration.TRAINING, "prior": stage2_prior.migration.TRAINING}
MAX_GRIDS, MAX_GRID_BYTES = 40, 16_000_000  # for each run: larger pages are too much for mail and browsers


@dataclass(frozen=True)
class PNGImage:
    """An encoded PNG file with its size in pixels."""

    png: bytes
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The files of one training run, finished or not."""

    name: str
    stage: Stage
    rows: list[dict[str, Any]]
    """Rows of metrics.jsonl, by step."""
    configuration: dict[str, Any]
    configuration_text: str
    environment: dict[str, Any]
    codebook_size: int | None
    """K, or None when no file of the run states it."""
    skipped_rows: list[dict[str, Any]]
    """Rows of skipped_steps.*.jsonl, one for each skipped step and process."""
    grids: list[tuple[int, PNGImage]]
    """Step and image of the sample grids that the report shows."""
    num_grids: int
    """Number of sample grids in the folder."""
    checkpoints: set[int]
    """Steps with a checkpoint."""
    has_model: bool

    @cached_property
    def metrics(self) -> dict[str, Points]:
        """All logged metrics by name, without non-finite values."""
        points_by_name: dict[str, Points] = {}
        for row in self.rows:
            for name, value in row.items():
                if name != "step" and is_number(value):
                    points = points_by_name.setdefault(name, [])
                    if math.isfinite(value):
                        points.append((row["step"], value))
        return {name: points for name, points in points_by_name.items() if points}

    @cached_property
    def nonfinite_counts(self) -> dict[str, int]:
        """Number of logged NaN or infinite values by metric."""
        counts: dict[str, int] = {}
        for row in self.rows:
            for name, value in row.items():
                if is_number(value) and not math.isfinite(value):
                    counts[name] = counts.get(name, 0) + 1
        return counts

    @property
    def step(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def max_steps(self) -> int | None:
        value = self.configuration.get("max_steps")
        return value if isinstance(value, int) else None

    @property
    def is_finished(self) -> bool:
        return self.has_model and self.max_steps is not None and self.step >= self.max_steps

    @property
    def resumed_steps(self) -> list[int]:
        return [step for step, _ in self.metrics.get("resumed_from", [])]

    def last_value(self, name: str) -> float | None:
        points = self.metrics.get(name)
        return points[-1][1] if points else None

    def setting(self, *path: str) -> Any:
        """Look up a value of the configuration, such as setting("optimizer", "max_grad_norm"); None if it is missing."""
        value: Any = self.configuration
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """One run, or the folder of `train` or `quickstart` with both stages."""

    name: str
    runs: list[RunRecord]
    """One or two runs, the tokenizer first."""
    metrics: dict[str, Any]
    """Content of metrics.json; empty for a single run."""
    images: dict[str, PNGImage]
    """Images of the job by file name; empty for a single run."""


def read_job(folder: Path) -> JobRecord:
    """Read a run folder of either stage, or a job folder that holds both.

    Raises:
        UserError: `folder` is missing, holds no run, or holds a run without logged steps.
    """
    if not folder.exists():
        raise UserError(f"no folder at {folder}; expected a run folder; pass one, such as runs/quickstart")
    if is_run_folder(folder):
        run = read_run(folder)
        folders, runs = [folder], [run]
    else:
        folders = [folder / stage for stage in STAGES if is_run_folder(folder / stage)]
        if not folders:
            raise UserError(
                f"{folder} holds no run: it has no config.yaml or metrics.jsonl, and no tokenizer/ or prior/ with these files; "
                "expected the --output of a training command; pass that folder"
            )
        runs = [read_run(run_folder) for run_folder in folders]
    if not any(run.rows for run in runs):
        logs = " and ".join(str(run_folder / "metrics.jsonl") for run_folder in folders)
        raise UserError(
            f"no complete row in {logs}; expected at least one logged step; wait for --log-every steps and run it again"
        )
    is_job = folders != [folder]
    image_names = ("samples.png", "reconstructions.png") if is_job else ()
    images = {name: image for name in image_names if (image := read_image(folder / name)) is not None}
    name = folder.resolve().name
    return JobRecord(
        name=f"{folder.resolve().parent.name}/{name}" if name in STAGES and not is_job else name,
        runs=runs,
        metrics=read_json(folder / "metrics.json") if is_job else {},
        images=images,
    )


def is_run_folder(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file()


def read_run(folder: Path) -> RunRecord:
    """Read the folder of one training run of either stage."""
    config = folder / "config.yaml"
    configuration = read_yaml(config) if config.exists() else {}
    rows = read_rows(folder / "metrics.jsonl")
    columns = {name for row in rows for name in row}
    stage: Stage = "prior" if "codes" in configuration or columns & {"nats_per_token", "squared_error"} else "tokenizer"
    configuration = MIGRATIONS[stage].migrate(configuration)
    skipped_rows = [row for path in sorted(folder.glob("skipped_steps.*.jsonl")) for row in read_rows(path)]
    grid_paths = {
        int(match[1]): path
        for path in folder.glob("samples/*.png")
        if (match := re.fullmatch(r"step_(\d+)", path.stem))
    }
    grid_steps = select_grid_steps({step: path.stat().st_size for step, path in grid_paths.items()})
    grids = [(step, read_image(grid_paths[step])) for step in grid_steps]
    checkpoint_names = [path.name for path in folder.glob("checkpoints/step_*") if path.is_dir()]
    return RunRecord(
        name=folder.resolve().name,
        stage=stage,
        rows=sorted(rows, key=lambda row: row["step"]),
        configuration=configuration,
        configuration_text=config.read_text(encoding="utf-8") if config.exists() else "",
        environment=read_json(folder / "environment.json"),
        codebook_size=find_codebook_size(folder, stage, configuration),
        skipped_rows=sorted(skipped_rows, key=lambda row: row["step"]),
        grids=[(step, image) for step, image in grids if image is not None],
        num_grids=len(grid_paths),
        checkpoints={int(match[1]) for name in checkpoint_names if (match := re.fullmatch(r"step_(\d+)", name))},
        has_model=(folder / "model" / "config.json").exists(),
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a log that have an integer `step`."""
    try:
        rows = read_metrics(path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; expected one JSON object a line; move the file away") from None
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; empty when the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise UserError(f"{path} is not valid JSON; expected an object; move the file away") from None
    return value if isinstance(value, dict) else {}


def read_image(path: Path) -> PNGImage | None:
    """Read a PNG file without decoding it; None when it is missing or broken."""
    if not path.is_file():
        return None
    png = path.read_bytes()
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            image.load()
            return PNGImage(png, *image.size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def select_grid_steps(sizes: dict[int, int]) -> list[int]:
    """Select evenly spaced steps, the first and the last included, within `MAX_GRIDS` and `MAX_GRID_BYTES`.

    Args:
        sizes: Step → size of its grid in bytes.
    """
    steps = sorted(sizes)
    num_selected = min(len(steps), MAX_GRIDS)
    while True:
        selected = [steps[i * (len(steps) - 1) // max(1, num_selected - 1)] for i in range(num_selected)]
        if num_selected <= 2 or sum(sizes[step] for step in selected) <= MAX_GRID_BYTES:
            return selected
        num_selected -= 1


def find_codebook_size(folder: Path, stage: Stage, configuration: dict[str, Any]) -> int | None:
    """Find K in the configuration, in the model, or in the code cache of a prior.

    The code cache is also looked for next to the run folder, because a job may have been moved.
    """
    saved = read_json(folder / "model" / "config.json")
    if stage == "tokenizer":
        saved = MODEL.migrate(saved)
    sections = (configuration.get("model"), saved, saved.get("model"))
    sizes = [section.get("codebook_size") for section in sections if isinstance(section, dict)]
    size = next(filter(None, sizes), None)
    if stage == "prior" and not size:
        code_folders = (Path(str(configuration.get("codes", "codes"))), folder.parent / "codes")
        specs = [read_json(code_folder / "manifest.json").get("spec") for code_folder in code_folders]
        sizes = [spec.get("codebook_size") for spec in specs if isinstance(spec, dict)]
        size = next(filter(None, sizes), None)
    return size if isinstance(size, int) and size > 1 else None


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
