"""A configuration section can hold one of several variants, selected by `name`."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from small_parts import error_message

from training_harness.configuration import build_unchecked, fill_defaults, from_mapping, merge_mappings, to_mapping
from training_harness.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    side: int = 1


@dataclass(frozen=True, kw_only=True)
class Square(Shape):
    name: Literal["square"] = "square"
    round_corners: bool = False


@dataclass(frozen=True, kw_only=True)
class Polygon(Shape):
    name: Literal["polygon"] = "polygon"
    corners: int

    def __post_init__(self) -> None:
        if self.corners < 3:
            raise ConfigError(f"corners is {self.corners}; expected 3 or more")


@dataclass(frozen=True, kw_only=True)
class Shadow:
    depth: int = 2


@dataclass(frozen=True, kw_only=True)
class Drawing:
    shape: Square | Polygon = field(default_factory=Square)
    shadow: Shadow | None = None


def test_the_name_selects_the_variant_and_the_first_one_is_the_default() -> None:
    assert from_mapping(Drawing, {"shape": {"name": "polygon", "corners": 5}}).shape == Polygon(corners=5)
    assert from_mapping(Drawing, {"shape": {"side": 3}}).shape == Square(side=3)
    drawing = Drawing(shape=Polygon(corners=4), shadow=Shadow(depth=1))
    assert from_mapping(Drawing, to_mapping(drawing)) == drawing
    assert from_mapping(Drawing, {"shadow": {}}).shadow == Shadow()
    assert from_mapping(Drawing, {"shadow": None}).shadow is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "sqare"}, "shape.name is 'sqare'; did you mean 'square'?"),
        ({"name": ["square"]}, "shape.name is ['square']; did you mean 'square'?"),
        (
            {"corners": 4},
            "unknown field 'shape.corners' for the shape square; expected it only with polygon; remove it",
        ),
        ({"sides": 4}, "unknown field 'shape.sides' for the shape square; did you mean 'side'?"),
        ({"name": "polygon"}, "missing field 'shape.corners'; expected"),
        (4, "shape is 4; expected a section of fields"),
    ],
)
def test_an_invalid_variant_is_one_line(section: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_mapping(Drawing, {"shape": section})
    assert message in error_message(error)


def test_selecting_another_variant_drops_the_options_that_it_does_not_have() -> None:
    base = {"shape": {"side": 3, "round_corners": True}, "shadow": {"depth": 1}}
    overlay = {"shape": {"name": "polygon", "corners": 6}}
    assert merge_mappings(base, overlay, Drawing) == {"shape": {"side": 3, **overlay["shape"]}, "shadow": {"depth": 1}}
    same_variant = {"shape": {"name": "square", "side": 4}}
    assert merge_mappings(base, same_variant, Drawing)["shape"] == {"name": "square", "side": 4, "round_corners": True}
    assert merge_mappings(base, {"shadow": None}, Drawing)["shadow"] is None
    with pytest.raises(ConfigError, match="round_corners"):  # fields of the overlay itself are not dropped
        from_mapping(Drawing, merge_mappings(base, {"shape": overlay["shape"] | {"round_corners": True}}, Drawing))


def test_build_unchecked_accepts_missing_values_and_values_that_contradict_each_other() -> None:
    unchecked = build_unchecked(Drawing, {"shape": {"name": "polygon"}}, "later")
    assert (unchecked.shape.name, unchecked.shape.corners, unchecked.shape.side) == ("polygon", "later", 1)
    assert build_unchecked(Drawing, {"shape": {"name": "polygon", "corners": 2}}).shape.corners == 2
    with pytest.raises(ConfigError, match="corners is 'two'; expected int"):
        build_unchecked(Drawing, {"shape": {"name": "polygon", "corners": "two"}})
    assert fill_defaults(Drawing, {"shape": {"side": 3}}) == {
        "shape": {"name": "square", "side": 3, "round_corners": False},
        "shadow": None,
    }
