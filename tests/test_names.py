"""Names that were renamed for good do not come back: `former_names.csv` holds them, with the file that defined each.

A row forbids one whole name in one file. Add a row for each definition that you rename.
"""

import ast
import csv
from pathlib import Path

ROOT = Path(__file__).parents[1]
with (ROOT / "tests" / "former_names.csv").open(encoding="utf-8", newline="") as rows:
    FORMER_NAMES = [(row["old name"], row["file"]) for row in csv.DictReader(rows)]


def defined_names(source: str) -> set[str]:
    """Functions, classes, methods, fields and constants that a module defines; no local variables."""
    names: set[str] = set()
    blocks: list[list[ast.stmt]] = [ast.parse(source).body]
    while blocks:
        for node in blocks.pop():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            if isinstance(node, ast.ClassDef | ast.If | ast.Try | ast.With):
                blocks.append(node.body)
    return names


def test_no_file_defines_a_name_that_was_renamed_in_it() -> None:
    files = {file for _, file in FORMER_NAMES}
    defined = {file: defined_names((ROOT / file).read_text(encoding="utf-8")) for file in files}
    assert [(name, file) for name, file in FORMER_NAMES if name in defined[file]] == []


def test_a_former_name_would_be_seen() -> None:
    source = "class A:\n    b: int\n    def c(self):\n        d = 1\nif A:\n    e = f = 2\n"
    assert defined_names(source) == {"A", "b", "c", "e", "f"}
