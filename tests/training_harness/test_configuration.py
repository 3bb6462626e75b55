"""A configuration is equal after writing and reading, and each wrong value is a one-line error with its field."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_parts import error_message

from stage1_tokenizer.migration import TRAINING
from stage1_tokenizer.quantizers import EMAVectorQuantizerConfig, SimVQConfig, VectorQuantizerConfig
from stage1_tokenizer.training_config import TokenizerTraining
from stage1_tokenizer.vqgan import VQGANModel
from training_harness.configuration import from_mapping, merge_mappings, read_yaml, suggest_nearest, write_yaml
from training_harness.errors import ConfigError
from training_harness.optimization import OptimizerConfig, ScheduleConfig


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    folder: Path
    count: int = 3
    amount: int | float = 0.25
    share: float | int = 0.25
    kind: Literal["no", "bf16"] = "no"
    flag: bool = False
    pair: tuple[float, float] = (0.0, 1.0)
    size: int | str | None = None
    inner: Inner = field(default_factory=Inner)


def outer(**values) -> Outer:
    return from_mapping(Outer, {"folder": "runs/a", **values})


# Valid values


def test_only_fields_without_a_default_are_required():
    assert outer() == Outer(folder=Path("runs/a"))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("inner: {rate: 1e-4}", "inner", Inner(rate=1e-4)),  # YAML 1.1 reads the string '1e-4'
        ("inner: {rate: 2}", "inner", Inner(rate=2.0)),
        ("inner: {sizes: [4, 5, 6]}", "inner", Inner(sizes=(4, 5, 6))),
        ("amount: 3", "amount", 3),
        ("amount: 0.5", "amount", 0.5),
        ("amount: 1e-2", "amount", 0.01),
        ("kind: no", "kind", "no"),  # YAML 1.1 reads false
        ("kind: bf16", "kind", "bf16"),
        ("flag: no", "flag", False),
        ("pair: [1, 2.5]", "pair", (1.0, 2.5)),
        ("size: 64x96", "size", "64x96"),
        ("size: 64", "size", 64),
        ("size: ~", "size", None),
    ],
)
def test_a_yaml_value_gets_the_type_of_its_field(text, name, value):
    actual = getattr(outer(**yaml.safe_load(text)), name)
    assert actual == value
    assert type(actual) is type(value)


def test_ints_and_floats_keep_their_type_in_a_union():
    assert type(outer(amount=1).amount) is int
    assert type(outer(amount=1.0).amount) is float
    assert type(outer(share=1).share) is int
    assert type(outer(share=1.0).share) is float


# Invalid values


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"cuont": 1}, ["'cuont'", "did you mean 'count'?"]),
        ({"inner": {"rat": 1}}, ["'inner.rat'", "did you mean 'rate'?"]),
        ({"zzz": 1}, ["'zzz'", "folder, count, amount"]),
        ({"count": "three"}, ["count is 'three'", "int"]),
        ({"count": 2.0}, ["count is 2.0", "int"]),
        ({"count": True}, ["count is True", "int"]),
        ({"flag": 1}, ["flag is 1", "bool"]),
        ({"amount": "much"}, ["amount is 'much'", "int | float"]),
        ({"amount": True}, ["amount is True"]),
        ({"kind": "bf61"}, ["kind is 'bf61'", "did you mean 'bf16'?"]),
        ({"kind": True}, ["kind is True", "no, bf16"]),
        ({"pair": [1.0]}, ["pair is [1.0]"]),
        ({"pair": 3}, ["pair is 3"]),
        ({"inner": {"sizes": [1, "b"]}}, ["inner.sizes[1] is 'b'", "int"]),
        ({"inner": 3}, ["inner is 3", "section"]),
        ({"inner": None}, ["inner is None", "section"]),
        ({"size": 2.5}, ["size is 2.5", "int | str | none"]),
    ],
)
def test_a_wrong_value_is_one_line_with_the_field_and_the_expected_type(values, fragments):
    with pytest.raises(ConfigError) as caught:
        outer(**values)
    for fragment in fragments:
        assert fragment in error_message(caught)


def test_the_error_names_a_missing_field():
    with pytest.raises(ConfigError) as caught:
        from_mapping(Outer, {})
    assert "'folder'" in error_message(caught)


def test_the_nearest_name_is_suggested_and_all_names_are_listed_if_none_is_similar():
    assert suggest_nearest("learnign", ["learning", "yearning"]) == "did you mean 'learning'?"
    assert suggest_nearest("xyz", ["a", "b"]) == "expected one of: a, b"


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n", "plain text"])
def test_a_file_without_a_mapping_is_one_line_with_its_path(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "c.yaml")
    assert str(tmp_path / "c.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_an_empty_mapping_and_a_missing_file_is_an_error(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "c.yaml") == {}
    with pytest.raises(ConfigError, match=r"no configuration file"):
        read_yaml(tmp_path / "d.yaml")


# Writing and reading


def test_an_overlay_replaces_values_section_by_section_without_changing_its_base():
    base = {"a": 1, "b": {"c": 2, "d": 3}}
    assert merge_mappings(base, {"b": {"d": 4}, "e": 5}) == {"a": 1, "b": {"c": 2, "d": 4}, "e": 5}
    assert merge_mappings(base, {"b": 7}) == {"a": 1, "b": 7}
    assert base == {"a": 1, "b": {"c": 2, "d": 3}}


fractions = st.floats(0, 1)
rates = st.floats(1e-9, 1e3)
trainings = st.builds(
    TokenizerTraining,
    output=st.text("abcäö/ -:", min_size=1).map(Path),
    data=st.text(min_size=1),
    seed=st.integers(0, 2**63 - 1),
    max_steps=st.integers(1, 10**9),
    mixed_precision=st.sampled_from(["no", "bf16", "fp16"]),
    resolution=st.none() | st.integers(1, 4096) | st.sampled_from(["64", "64x96", "1e3"]),
    image_channels=st.none() | st.integers(1, 4),
    model=st.integers(1, 5).flatmap(
        lambda levels: st.builds(
            VQGANModel,
            channels=st.tuples(*[st.integers(1, 512)] * levels),
            blocks=st.tuples(*[st.integers(0, 4)] * levels),
            attention=st.just((2 ** (levels - 1),)),
            quantizer=st.just(SimVQConfig())
            | st.builds(VectorQuantizerConfig, restart_threshold=fractions)
            | st.builds(EMAVectorQuantizerConfig, usage_decay=fractions.filter(lambda fraction: fraction < 1)),
        )
    ),
    optimizer=st.builds(
        OptimizerConfig, name=st.sampled_from(["adamw", "muon"]), learning_rate=rates, weight_decay=fractions
    ),
    schedule=st.builds(ScheduleConfig, warmup=fractions | st.integers(0, 10**6), final=fractions),
)


@given(trainings)
@settings(max_examples=60, deadline=None)
def test_every_training_configuration_is_equal_after_writing_and_reading(training):
    with TemporaryDirectory() as folder:
        write_yaml(Path(folder) / "config.yaml", training)
        loaded = from_mapping(TokenizerTraining, TRAINING.migrate(read_yaml(Path(folder) / "config.yaml")))
    assert loaded == training
    assert type(loaded.schedule.warmup) is type(training.schedule.warmup)
    assert type(loaded.resolution) is type(training.resolution)


def test_a_written_configuration_reads_back_equal_and_a_changed_one_differs(tmp_path):
    training = TokenizerTraining(output=tmp_path / "run", data="images")
    write_yaml(tmp_path / "config.yaml", training)
    assert from_mapping(TokenizerTraining, TRAINING.migrate(read_yaml(tmp_path / "config.yaml"))) == training
    write_yaml(tmp_path / "config.yaml", dataclasses.replace(training, seed=1))
    assert from_mapping(TokenizerTraining, TRAINING.migrate(read_yaml(tmp_path / "config.yaml"))) != training
