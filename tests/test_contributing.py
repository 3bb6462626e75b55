"""The paths in CONTRIBUTING.md exist, and the files define the names that it mentions."""

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


def mentioned_paths() -> set[str]:
    """Return the texts in backticks that look like paths in the repository."""
    paths = re.findall(rf"`({PATH})`", TEXT)
    return {path for path in paths if "/" in path or path.endswith((".md", ".toml", ".py"))}


def names_with_files() -> list[tuple[str, str]]:
    """Return the names in the answers with the file in the next parentheses, as in `draw` (`stage2_prior/…/sampling.py`)."""
    answers = TEXT.partition("## Four questions")[2].partition("\n## ")[0]
    pairs: list[tuple[str, str]] = []
    names: list[str] = []
    for name, path in re.findall(rf"`([A-Za-z_][\w.]*)`|\([^()`]*`({PATH}\.py)`\)", answers):
        if path:
            pairs += [(name, path) for name in names]
        names = [] if path else [*names, name]
    return pairs


def defined_names(path: Path) -> set[str]:
    """Return the functions, classes, their members and the variables that a file defines."""
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
    paths = mentioned_paths()
    assert "stage1_tokenizer/data/sources.py" in paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_answers_to_the_four_questions_use_names_that_their_files_define() -> None:
    for question in QUESTIONS:
        assert f"**{question}**" in TEXT
    pairs = names_with_files()
    for name in ("ImageSplit.image", "sample_codes", "truncate_logits", "Quantizer", "QUANTIZERS"):
        assert name in dict(pairs), name
    undefined = [(name, path) for name, path in pairs if name not in defined_names(ROOT / path)]
    assert undefined == []
