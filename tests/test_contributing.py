"""CONTRIBUTING.md says where things are: the paths exist, and the files define the names."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PATH = r"[\w.-]+(?:/[\w.-]+)*/?"
QUESTIONS = (
    "Where is a JPEG decoded?",
    "Where is a code sampled?",
    "What does `--min-p` do?",
    "How do I add a quantizer?",
)


def paths() -> set[str]:
    """What stands in backticks and looks like a path in the repository."""
    found = re.findall(rf"`({PATH})`", TEXT)
    return {path for path in found if "/" in path or path.endswith((".md", ".toml", ".py"))}


def names_with_files() -> list[tuple[str, str]]:
    """Names in the answers, each with the file that is named next in parentheses: `sample_codes` (`stage2_prior/…/sampling.py`)."""
    answers = TEXT.partition("## Four questions")[2].partition("\n## ")[0]
    pairs: list[tuple[str, str]] = []
    waiting: list[str] = []
    for name, path in re.findall(rf"`([A-Za-z_][\w.]*)`|\([^()`]*`({PATH}\.py)`\)", answers):
        if path:
            pairs += [(each, path) for each in waiting]
        waiting = [] if path else [*waiting, name]
    return pairs


def defined(path: Path) -> set[str]:
    """Names that a file defines: functions, classes, their members, and variables."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str = "") -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.update({node.name, prefix + node.name})
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{node.name}.")
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            names.update(target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body)
    return names


def test_every_path_in_contributing_exists() -> None:
    found = paths()
    assert "stage1_tokenizer/data/sources.py" in found
    assert [path for path in sorted(found) if not (ROOT / path).exists()] == []


def test_the_four_questions_are_answered_with_names_that_their_files_define() -> None:
    for question in QUESTIONS:
        assert f"**{question}**" in TEXT
    pairs = names_with_files()
    for name in ("ImageSplit.image", "sample_codes", "truncate_logits", "Quantizer", "QUANTIZERS"):
        assert name in dict(pairs), name
    wrong = [(name, path) for name, path in pairs if name not in defined(ROOT / path)]
    assert wrong == []
