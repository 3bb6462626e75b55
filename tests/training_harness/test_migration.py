"""Stored mappings of earlier formats are migrated, and new or renamed fields do not invalidate old runs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from small_parts import error_message

from training_harness.configuration import read_yaml, write_yaml
from training_harness.errors import ConfigError, UserError
from training_harness.files import write_text
from training_harness.migration import Migration, MigrationStep, Values
from training_harness.run_config import RunConfig
from training_harness.run_folder import check_run_folder, stored_configuration


def halve(values: Values) -> Values:
    return {name: value / 2 if name == "both" else value for name, value in values.items()}


TWO_STEPS = Migration(
    "test file",
    (
        MigrationStep(renamed_fields={"width": "model.width", "both": "one"}, convert=halve),
        MigrationStep(renamed_fields={"model.width": "model.hidden_size"}),
    ),
)


@pytest.mark.parametrize(
    "stored",
    [
        {"width": 3, "both": 8, "left": 1},
        {"format": 1, "width": 3, "both": 8, "left": 1},
        {"format": 2, "model": {"width": 3}, "one": 4.0, "left": 1},
        {"format": 3, "model": {"hidden_size": 3}, "one": 4.0, "left": 1},
        {"model": {"hidden_size": 3}, "one": 4.0, "left": 1},  # written by hand with current names and no number
    ],
)
def test_every_format_is_migrated_to_the_current_one(stored: dict[str, Any]) -> None:
    before = yaml.safe_dump(stored)
    assert TWO_STEPS.migrate(stored) == {"model": {"hidden_size": 3}, "one": 4.0, "left": 1}
    assert yaml.safe_dump(stored) == before


def test_written_files_have_a_format_number_that_is_removed_on_reading() -> None:
    values = {"both": 8}
    assert TWO_STEPS.add_format_number(values) == {"format": 3, "both": 8}
    assert TWO_STEPS.migrate(TWO_STEPS.add_format_number(values)) == values
    assert Migration("test file").add_format_number(values) == values  # files of the first format have no number


def test_renamed_fields_has_the_current_name_for_the_names_of_all_formats() -> None:
    assert TWO_STEPS.renamed_fields == {"width": "model.hidden_size", "both": "one", "model.width": "model.hidden_size"}


def test_an_old_name_next_to_its_current_name_is_kept() -> None:
    assert TWO_STEPS.migrate({"both": 8, "one": 3}) == {"both": 4, "one": 3}


@pytest.mark.parametrize("number", [4, 0, "2", True, None])
def test_an_unknown_format_number_is_an_error(number: Any) -> None:
    with pytest.raises(ConfigError) as error:
        TWO_STEPS.migrate({"format": number})
    assert f"format is {number!r} in a test file; expected a whole number from 1 to 3" in error_message(error)


# Runs


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Earlier(RunConfig):
    width: int = 4
    inner: Inner = Inner()


@dataclass(frozen=True, kw_only=True)
class LaterInner(Inner):
    momentum: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Later(RunConfig):
    """`width` is renamed, and a field and an option are new."""

    migration: ClassVar[Migration] = Migration(
        "test configuration", (MigrationStep(renamed_fields={"width": "hidden_size"}),)
    )

    hidden_size: int = 4
    inner: LaterInner = LaterInner()
    added: bool = False


def write_earlier_run(folder: Path, **fields: Any) -> Path:
    """Write the files of a finished run of an earlier version."""
    folder.mkdir()
    write_yaml(folder / "config.yaml", Earlier(output=folder, max_steps=4, **fields))
    write_text(folder / "model" / "config.json", "{}")
    return folder


def test_a_new_field_does_not_change_the_configuration_of_an_old_run(tmp_path: Path) -> None:
    config = Later(output=write_earlier_run(tmp_path / "run"), max_steps=4)
    check_run_folder(config, "test")
    for changed, message in (
        (replace(config, added=True), "added is False in the run and True in this command"),
        (replace(config, inner=LaterInner(momentum=0.5)), "inner.momentum is 0.9 in the run and 0.5 in this command"),
    ):
        with pytest.raises(UserError) as error:
            check_run_folder(changed, "test")
        assert message in error_message(error)


def test_a_renamed_field_is_migrated_in_an_old_run(tmp_path: Path) -> None:
    config = Later(output=write_earlier_run(tmp_path / "run", width=8), max_steps=4, hidden_size=8)
    check_run_folder(config, "test")
    stored = stored_configuration(config.output, Later.migration)
    assert stored is not None
    assert stored["hidden_size"] == 8
    with pytest.raises(UserError) as error:
        check_run_folder(replace(config, hidden_size=4), "test")
    assert "hidden_size is 8 in the run and 4 in this command" in error_message(error)


def test_a_run_of_a_later_version_is_an_error_with_its_format_number(tmp_path: Path) -> None:
    folder = write_earlier_run(tmp_path / "run")
    write_yaml(folder / "config.yaml", Later(output=folder))
    assert next(iter(read_yaml(folder / "config.yaml"))) == "format"
    with pytest.raises(ConfigError, match="format is 2 in a run configuration"):
        check_run_folder(Earlier(output=folder), "test")
