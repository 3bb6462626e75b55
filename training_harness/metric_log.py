"""`metrics.jsonl`: one JSON object per logged step. Rows are appended and flushed, so a killed run keeps its rows."""

import json
from pathlib import Path
from typing import Any

from training_harness.files import write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a log. Reading stops at an incomplete line, which a killed run may leave at the end."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricLog:
    """Writer of a metric log."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Delete the rows after `step`; a resumed run writes them again."""
        if self.path.exists():
            rows = [row for row in read_metrics(self.path) if row["step"] <= step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: dict[str, Any]) -> None:
        """Append one row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
