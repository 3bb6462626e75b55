"""`metrics.jsonl`: one JSON object a logged step, appended and flushed, so that a killed run keeps what it logged."""

import json
from pathlib import Path
from typing import Any

from training_harness.files import write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, without a last line that a kill cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricLog:
    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Forgets the rows after `step`: a resumed run writes them again."""
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
