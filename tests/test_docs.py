"""The commands, options, make targets, names and files in the documentation exist."""

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
# Options in the documentation that belong to no single command of latentloom.
OTHER_OPTIONS = {"--debug", "--version", "--machine_rank", "--main_process_ip"}


def blocks(text: str, *languages: str) -> Iterator[str]:
    """Yield the text of fenced blocks, including those in lists."""
    for match in re.finditer(rf"^( *)```(?:{'|'.join(languages)})\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE):
        yield textwrap.dedent(match[2])


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each command in the shell blocks."""
    for block in blocks(text, "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if command := shlex.split(line, comments=True):
                yield command


def latentloom_arguments(command: list[str]) -> list[str] | None:
    """Return the verb and its arguments; None for other commands."""
    if command[0] == "latentloom":
        return command[1:]
    is_launcher = command[0] in ("accelerate", "torchrun", "python") and "latentloom" in command
    return command[command.index("-m") + 2 :] if is_launcher else None


@cache
def options_of(verb: str, *recipe: str) -> set[str]:
    """Return the options of a verb."""
    return command_help.option_names(verb, *recipe)


def find_error(arguments: list[str]) -> str | None:
    """Return the unknown verb or options of a command, or None."""
    verb, *rest = arguments
    if verb not in VERBS:
        return f"no verb {verb}"
    values = dict(pairwise(rest))
    recipe = ("--recipe", values["--recipe"]) if verb == "train-prior" and "--recipe" in values else ()
    unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in options_of(verb, *recipe)]
    return f"{verb} has no {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_on_a_page_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in command_lines(page.read_text(encoding="utf-8")):
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, flags=re.MULTILINE), command
        elif (arguments := latentloom_arguments(command)) is not None:
            assert find_error(arguments) is None, command
        else:
            assert command[:2] in (["pip", "install"], ["hf", "auth"]), command


def test_an_unknown_verb_and_an_unknown_option_are_errors() -> None:
    assert find_error(["samples", "--pipeline", "x"]) == "no verb samples"
    assert find_error(["sample", "--pipeline", "x", "--pictures", "3"]) == "sample has no --pictures"
    assert find_error(["train-prior", "--recipe", "ar-tiny", "--model.patch-size", "1"]) is not None
    assert find_error(["train-prior", "--recipe", "diffusion-tiny", "--model.patch-size", "1"]) is None
    assert latentloom_arguments(shlex.split("accelerate launch --config_file x -m latentloom sample --seed 1")) == [
        *("sample", "--seed", "1")
    ]
    assert list(command_lines("1. x\n\n   ```sh\n   make test  # all\n   ```\n")) == [["make", "test"]]


def test_every_option_in_the_text_belongs_to_a_verb() -> None:
    known = set(OTHER_OPTIONS).union(*(options_of(verb) for verb in VERBS))
    known |= options_of("train-prior", "--recipe", "diffusion-tiny")
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for code in re.findall(r"`(--[^`]+)`", text):
            options = {word.split("=")[0] for word in code.split() if word.startswith("--")}
            assert options <= known, f"{page.relative_to(ROOT)}: {code}"


def test_every_verb_is_in_the_command_line_reference_with_its_options() -> None:
    for verb in VERBS:
        groups = command_help.option_groups(verb)
        assert groups, verb
        helps = " ".join(option.help for group in groups for option in group.options)
        assert "(default" not in helps, verb
        printed = re.findall(r"^  (?:-h, )?(--\S+?)(?:,| |$)", command_help.help_text(verb), flags=re.MULTILINE)
        assert command_help.option_names(verb) >= set(printed), verb


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_on_a_page_parses_and_its_imports_exist(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_links_of_pages_outside_the_site_exist(name: str) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("http") and not (ROOT / t.partition("#")[0]).exists()]
    assert missing == []
