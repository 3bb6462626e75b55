"""`latentloom VERB --help`: every option in a titled group, with its type, its help text and the default in use."""

import re
from pathlib import Path
from typing import Any

import pytest
import tyro
from command_line import latentloom
from small_parts import write_images

from latentloom.cli import VERBS
from latentloom.recipes import recipe_names, recipe_values
from stage1_tokenizer.data.sources import ImageSplit
from stage1_tokenizer.data.statistics import DatasetStatistics, dataset_statistics
from training_harness.errors import UserError

PARSER = tyro.cli

COMMANDS = [*VERBS, *(f"train-prior --recipe {name}" for name in ("diffusion-tiny", "diffusion-ddpm-pixels"))]
COMMANDS += [*(f"train-tokenizer --recipe {name}" for name in ("kl", "residual", "lfq", "ibq", "simvq", "fsq"))]
COMMANDS += ["train-prior --recipe diffusion-tiny-few-steps"]


def help_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        latentloom(*words, "--help")
    return capsys.readouterr().out


def option_groups(text: str) -> dict[str, list[tuple[str, str]]]:
    """The options in each group: the names with the values, and the help text."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for block in re.split(r"\n\n(?=\S.*:\n)", text)[1:]:
        title, _, lines = block.partition(":\n")
        entries = re.split(r"^  (?=-|[A-Z]+  )", lines, flags=re.MULTILINE)[1:]
        parts = [re.split(r"\n {28,}| {2,}", entry, maxsplit=1) for entry in entries]
        groups[title] = [(names, " ".join(text.split())) for names, text in parts]
    return groups


def names_at_the_left(text: str) -> set[str]:
    """The options that begin a line of a page of help."""
    heads = re.findall(r"^  (-.*?)(?:  |$)", text, re.MULTILINE)
    return {name for head in heads for name in re.findall(r"(?<![\w-])--\w[\w.-]*", head)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_group_a_type_a_help_text_and_a_default(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_text(capsys, monkeypatch, *command.split())
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(r"\bNone\b|STR\b|\(default: \)", text)
    groups = option_groups(text)
    assert "other" not in groups  # a field that no group names
    assert all(re.fullmatch(r"[a-z][a-z_., -]*", title) for title in groups)
    for title, options in groups.items():
        for names, help_of_option in options:
            description, default = re.fullmatch(r"(.*?)( \(default: .+\))?", help_of_option).groups()  # type: ignore[union-attr]
            assert len(description.split()) > 1, names
            assert bool(default) == (not title.startswith("required") and title != "general"), names
            is_flag = ", --" in names or names == "--debug" or names.isupper()
            assert is_flag or re.fullmatch(r"--[\w.-]+ (INT|FLOAT|TEXT|PATH|\{\S+\}|none|[ |.])+", names), names


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_options_that_the_parser_takes(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = names_at_the_left(help_text(capsys, monkeypatch, *command.split()))
    parser_page = list[str]()

    def read_parser_page(cls: Any, **options: Any) -> tuple[Any, list[str]]:
        with pytest.raises(SystemExit):
            PARSER(cls, **options | {"args": ["--help"]})
        parser_page.append(capsys.readouterr().out)
        raise UserError("the page is read")

    monkeypatch.setattr("tyro.cli", read_parser_page)
    assert latentloom(*command.split()) == 2
    taken = names_at_the_left(re.sub(r"^[│|]", " ", parser_page[0], flags=re.MULTILINE))
    assert listed - {"--debug", "--model.mean-flow"} == taken


@pytest.mark.parametrize("verb", VERBS)
def test_required_options_come_first(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_text(capsys, monkeypatch, verb)
    titles = list(option_groups(text))
    count = sum(title.startswith("required") for title in titles)
    assert all(title.startswith("required") for title in titles[:count])
    assert bool(count) == (verb not in ("quickstart", "report"))
    usage = " ".join(text.partition("\n\n")[0].split())
    for names, _ in option_groups(text).get("required", []):
        assert names in usage


def test_help_without_images_names_the_recipe_of_its_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_text(capsys, monkeypatch, "train-tokenizer")
    assert "The defaults below come from the recipe vqgan-f4;" in text
    assert f"(default: {recipe_values('vqgan-f4', 'tokenizer')['batch_size']})" in text
    text = help_text(capsys, monkeypatch, "train-prior", "--recipe", "diffusion-tiny")
    assert "The defaults below come from the recipe diffusion-tiny;" in text


def test_help_with_images_shows_their_size_and_the_recipe_that_fits_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "images")
    text = help_text(capsys, monkeypatch, "train-tokenizer", "--data", images)
    assert "The defaults below come from the recipe vqgan-f4;" in text
    assert re.search(r"--resolution TEXT .*\(default: \d+x\d+\)", " ".join(text.split()))


def test_train_tokenizer_computes_the_statistics_of_its_images_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(split: ImageSplit) -> DatasetStatistics:
        calls.append(split)
        return dataset_statistics(split)

    for module in ("latentloom.commands.train_tokenizer", "latentloom.planning.tokenizer_inputs"):
        monkeypatch.setattr(f"{module}.dataset_statistics", counted)
    words = ["--data", write_images(tmp_path / "images"), "--output", tmp_path / "run", "--dry-run"]
    assert latentloom("train-tokenizer", *words, "--batch-size", 4) == 0
    assert len(calls) == 1


def test_the_help_of_sweep_lists_the_recipes_of_both_stages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(help_text(capsys, monkeypatch, "sweep").split())
    assert f"Of a prior: {', '.join(recipe_names('prior'))}." in text
    assert f"Of a tokenizer: {', '.join(recipe_names('tokenizer'))}." in text
