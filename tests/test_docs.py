"""The pages name commands, options, targets, names and files that exist."""

import ast
import importlib
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from latentloom.cli import VERBS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

import command_help  # noqa: E402

GENERATED = ("docs/_build/", "docs/reference/api/", "docs/reference/_generated/")
PAGES = [
    path
    for path in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")))
    if not str(path.relative_to(ROOT)).startswith(GENERATED) and path.name != "LOG.md"
]
PACKAGES = ("latentloom", "pipelines", "stage1_tokenizer", "stage2_prior", "training_harness")
# Options that the pages name and that are not a verb's own.
ELSEWHERE = {"--debug", "--version", "--machine_rank", "--main_process_ip"}


def blocks(text: str, *languages: str) -> Iterator[str]:
    """The text of fenced blocks, also within lists."""
    for found in re.finditer(rf"^( *)```(?:{'|'.join(languages)})\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE):
        yield textwrap.dedent(found[2])


def command_lines(text: str) -> Iterator[list[str]]:
    for block in blocks(text, "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def latentloom_words(words: list[str]) -> list[str] | None:
    """A verb and its words; None for another command."""
    if words[0] == "latentloom":
        return words[1:]
    return (
        words[words.index("-m") + 2 :]
        if words[0] in ("accelerate", "torchrun", "python") and "latentloom" in words
        else None
    )


@cache
def options_of(verb: str, *recipe: str) -> set[str]:
    return command_help.option_names(verb, *recipe)


def wrong_with(words: list[str]) -> str | None:
    """What a command line has that its verb does not know."""
    verb, *rest = words
    if verb not in VERBS:
        return f"no verb {verb}"
    given = dict(pairwise(rest))
    recipe = ("--recipe", given["--recipe"]) if verb == "train-prior" and "--recipe" in given else ()
    unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in options_of(verb, *recipe)]
    return f"{verb} has no {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_on_a_page_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in command_lines(page.read_text(encoding="utf-8")):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), words
        elif (own := latentloom_words(words)) is not None:
            assert wrong_with(own) is None, words
        else:
            assert words[:2] in (["pip", "install"], ["hf", "auth"]), words


def test_a_wrong_verb_and_a_wrong_option_are_found() -> None:
    assert wrong_with(["samples", "--pipeline", "x"]) == "no verb samples"
    assert wrong_with(["sample", "--pipeline", "x", "--pictures", "3"]) == "sample has no --pictures"
    assert wrong_with(["train-prior", "--recipe", "ar-tiny", "--model.patch-size", "1"]) is not None
    assert wrong_with(["train-prior", "--recipe", "diffusion-tiny", "--model.patch-size", "1"]) is None
    assert latentloom_words(shlex.split("accelerate launch --config_file x -m latentloom sample --seed 1")) == [
        *("sample", "--seed", "1")
    ]
    assert list(command_lines("1. x\n\n   ```sh\n   make test  # all\n   ```\n")) == [["make", "test"]]


def test_every_option_in_running_text_belongs_to_a_verb() -> None:
    known = set(ELSEWHERE).union(*(options_of(verb) for verb in VERBS))
    known |= options_of("train-prior", "--recipe", "diffusion-tiny")
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for code in re.findall(r"`(--[^`]+)`", text):
            named = {word.split("=")[0] for word in code.split() if word.startswith("--")}
            assert named <= known, f"{page.relative_to(ROOT)}: {code}"


def test_every_verb_is_in_the_command_line_reference_with_its_options() -> None:
    for verb in VERBS:
        groups = command_help.option_groups(verb)
        assert groups, verb
        helps = " ".join(option.help for group in groups for option in group.options)
        assert "(default" not in helps, verb
        printed = re.findall(r"^  (?:-h, )?(--\S+?)(?:,| |$)", command_help.help_text(verb), flags=re.MULTILINE)
        assert command_help.option_names(verb) >= set(printed), verb


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_on_a_page_is_python_and_imports_what_there_is(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_links_of_pages_outside_of_the_site_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("http") and not (ROOT / t.partition("#")[0]).exists()]
    assert missing == []
