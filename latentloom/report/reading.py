"""What a run folder holds, as far as it has come: read with neither torch nor a model, so that a page takes a second."""

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
MAX_GRIDS, MAX_GRID_BYTES = 40, 16_000_000  # of one run: mail and browsers take a page of that size


@dataclass(frozen=True)
class PNGImage:
    png: bytes
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    name: str
    stage: Stage
    rows: list[dict[str, Any]]
    configuration: dict[str, Any]
    configuration_text: str
    environment: dict[str, Any]
    codebook_size: int | None
    """K, where something in the folder tells it."""
    skipped: list[dict[str, Any]]
    """One row a process for each step that was not taken."""
    grids: list[tuple[int, PNGImage]]
    """Samples by step, evenly chosen where there are too many."""
    grids_found: int
    checkpoints: set[int]
    has_model: bool

    @cached_property
    def figures(self) -> dict[str, Points]:
        """Every logged figure by name, without values that are not finite numbers."""
        found: dict[str, Points] = {}
        for row in self.rows:
            for name, value in row.items():
                if name != "step" and is_number(value):
                    points = found.setdefault(name, [])
                    if math.isfinite(value):
                        points.append((row["step"], value))
        return {name: points for name, points in found.items() if points}

    @cached_property
    def not_finite(self) -> dict[str, int]:
        """How many values of each figure were logged as NaN or infinite."""
        found: dict[str, int] = {}
        for row in self.rows:
            for name, value in row.items():
                if is_number(value) and not math.isfinite(value):
                    found[name] = found.get(name, 0) + 1
        return found

    @property
    def step(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def max_steps(self) -> int | None:
        value = self.configuration.get("max_steps")
        return value if isinstance(value, int) else None

    @property
    def finished(self) -> bool:
        return self.has_model and self.max_steps is not None and self.step >= self.max_steps

    @property
    def resumed(self) -> list[int]:
        return [step for step, _ in self.figures.get("resumed_from", [])]

    def last(self, name: str) -> float | None:
        points = self.figures.get(name)
        return points[-1][1] if points else None

    def setting(self, *path: str) -> Any:
        """A value of the configuration, such as setting("optimizer", "max_grad_norm"), or None."""
        value: Any = self.configuration
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    name: str
    runs: list[RunRecord]
    """Of one stage, or of both."""
    metrics: dict[str, Any]
    pictures: dict[str, PNGImage]
    """Those of the job by file name."""


def read_job(folder: Path) -> JobRecord:
    """Reads a run folder of either stage, or the folder of a job that holds both.

    Raises UserError for a folder that is neither, and for one in which nothing was logged yet.
    """
    if not folder.exists():
        raise UserError(f"no folder at {folder}; expected a run folder; give one, such as runs/quickstart")
    if holds_run(folder):
        run = read_run(folder)
        folders, runs = [folder], [run]
    else:
        folders = [folder / stage for stage in STAGES if holds_run(folder / stage)]
        if not folders:
            raise UserError(
                f"{folder} holds no run: neither config.yaml or metrics.jsonl, nor tokenizer/ or prior/ with them; expected "
                "the --output of a training command; give that folder"
            )
        runs = [read_run(below) for below in folders]
    if not any(run.rows for run in runs):
        logs = " and ".join(str(below / "metrics.jsonl") for below in folders)
        raise UserError(
            f"{logs} without a single whole row; expected at least one logged step; wait for --log-every steps"
        )
    whole_job = folders != [folder]
    names = ("samples.png", "reconstructions.png") if whole_job else ()
    pictures = {name: picture for name in names if (picture := read_image(folder / name)) is not None}
    name = folder.resolve().name
    return JobRecord(
        name=f"{folder.resolve().parent.name}/{name}" if name in STAGES and not whole_job else name,
        runs=runs,
        metrics=read_json(folder / "metrics.json") if whole_job else {},
        pictures=pictures,
    )


def holds_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file()


def read_run(folder: Path) -> RunRecord:
    config = folder / "config.yaml"
    configuration = read_yaml(config) if config.exists() else {}
    rows = read_rows(folder / "metrics.jsonl")
    logged = {name for row in rows for name in row}
    stage: Stage = "prior" if "codes" in configuration or logged & {"nats_per_token", "squared_error"} else "tokenizer"
    configuration = MIGRATIONS[stage].migrate(configuration)
    skipped = [row for path in sorted(folder.glob("skipped_steps.*.jsonl")) for row in read_rows(path)]
    paths = {
        int(found[1]): path
        for path in folder.glob("samples/*.png")
        if (found := re.fullmatch(r"step_(\d+)", path.stem))
    }
    grids = [(step, read_image(paths[step])) for step in chosen_grids({s: p.stat().st_size for s, p in paths.items()})]
    names = [path.name for path in folder.glob("checkpoints/step_*") if path.is_dir()]
    return RunRecord(
        name=folder.resolve().name,
        stage=stage,
        rows=sorted(rows, key=lambda row: row["step"]),
        configuration=configuration,
        configuration_text=config.read_text(encoding="utf-8") if config.exists() else "",
        environment=read_json(folder / "environment.json"),
        codebook_size=find_codebook_size(folder, stage, configuration),
        skipped=sorted(skipped, key=lambda row: row["step"]),
        grids=[(step, picture) for step, picture in grids if picture is not None],
        grids_found=len(paths),
        checkpoints={int(found[1]) for name in names if (found := re.fullmatch(r"step_(\d+)", name))},
        has_model=(folder / "model" / "config.json").exists(),
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log that name their step."""
    try:
        rows = read_metrics(path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; expected one JSON object a line; move the file away") from None
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise UserError(f"{path} is not valid JSON; expected an object; move the file away") from None
    return value if isinstance(value, dict) else {}


def read_image(path: Path) -> PNGImage | None:
    """A PNG file as it is, or None where there is none that can be shown."""
    if not path.is_file():
        return None
    png = path.read_bytes()
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            picture.load()
            return PNGImage(png, *picture.size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def chosen_grids(sizes: dict[int, int]) -> list[int]:
    """Steps whose grids are shown: the first, the last and others evenly between, within the limits of one page."""
    steps = sorted(sizes)
    wanted = min(len(steps), MAX_GRIDS)
    while True:
        chosen = [steps[i * (len(steps) - 1) // max(1, wanted - 1)] for i in range(wanted)]
        if wanted <= 2 or sum(sizes[step] for step in chosen) <= MAX_GRID_BYTES:
            return chosen
        wanted -= 1


def find_codebook_size(folder: Path, stage: Stage, configuration: dict[str, Any]) -> int | None:
    """K from the configuration, the model, or for a prior from its codes, also where the job has been moved."""
    saved = read_json(folder / "model" / "config.json")
    if stage == "tokenizer":
        saved = MODEL.migrate(saved)
    sections = (configuration.get("model"), saved, saved.get("model"))
    size = next((found for one in sections if isinstance(one, dict) and (found := one.get("codebook_size"))), None)
    if stage == "prior" and not size:
        places = (Path(str(configuration.get("codes", "codes"))), folder.parent / "codes")
        specs = [read_json(place / "manifest.json").get("spec") for place in places]
        sizes = [spec.get("codebook_size") for spec in specs if isinstance(spec, dict)]
        size = next((found for found in sizes if found), None)
    return size if isinstance(size, int) and size > 1 else None


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
