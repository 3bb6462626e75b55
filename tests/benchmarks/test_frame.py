"""The frame of the benchmarks: who runs when, what a ratio is, and what is written."""

import importlib
import json
import time
from pathlib import Path

import frame
import pytest
from frame import Report, compared, interleaved, table
from run import NAMES
from where_time_goes import Stopwatch


def test_contenders_take_turns_and_each_is_first_equally_often() -> None:
    order: list[str] = []
    contenders = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleaved(contenders, rounds=3, warm_up=1)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 12, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert sorted(each[0] for each in rounds[1:]) == ["a", "b", "c"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}  # the warm-up not counted


def test_a_ratio_is_the_median_of_the_rounds_own_ratios_and_not_that_of_the_medians() -> None:
    # a machine that slows down: every round says 2, the medians would say 1
    found = compared({"latentloom": [1.0, 2.0, 8.0], "peer": [2.0, 4.0, 16.0]})
    assert found["peer"]["ratio"] == 2
    assert found["peer"]["quartiles"] == [2, 2]
    assert found["latentloom"]["ratio"] == 1
    noisy = compared({"latentloom": [1.0, 1.0, 1.0, 1.0], "peer": [1.0, 2.0, 3.0, 9.0]})["peer"]
    assert noisy["ratio"] == 2.5
    assert noisy["quartiles"] == [1.75, 4.5]


def test_a_report_publishes_its_figures_its_chart_and_a_page_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "FOLDER", tmp_path)
    Report("other", "Other", "words", {}).publish()
    before = (tmp_path / "other.md").read_text()
    report = Report("sizes", "Sizes", "words", {"x": 1.5}, ["numpy"], lambda path: path.write_bytes(b"image"))
    report.publish()
    assert (tmp_path / "other.md").read_text() == before
    assert "![" not in before
    held = json.loads((tmp_path / "sizes.json").read_text())
    assert held["figures"] == {"x": 1.5}
    assert {"numpy", "torch", "latentloom"} <= held["versions"].keys()
    assert held["machine"]["threads"] == 1
    text = (tmp_path / "sizes.md").read_text()
    assert text.startswith("# Sizes\n\n*")
    assert "1 threads of" in text
    assert text.endswith("words\n\n![Sizes](sizes.png)\n")


def test_every_benchmark_has_its_page_in_the_documentation() -> None:
    folder = frame.ROOT / "docs" / "benchmarks"
    results = {path.stem for path in folder.glob("*.json")}
    assert {path.stem for path in folder.glob("*.md")} - {"index"} == results
    listed = (folder / "index.md").read_text(encoding="utf-8")
    assert all(f"({name}.md)" in listed for name in results)


def test_tables_show_three_digits_and_a_dash_for_what_there_is_not() -> None:
    assert table(["a", "b"], [[0.12345, None], [12345.6, 20_000]]).splitlines()[2:] == [
        "| 0.123 | – |",
        "| 12,346 | 20,000 |",
    ]


def test_the_stopwatch_gives_each_part_its_own_time_without_that_of_the_parts_inside() -> None:
    class Work:
        def outer(self) -> None:
            time.sleep(0.03)
            self.inner()
            time.sleep(0.03)

        def inner(self) -> None:
            time.sleep(0.4)

    watch, before = Stopwatch(), Work.outer
    with watch.watch({(Work, "outer"): "outer", (Work, "inner"): "inner"}):
        Work().outer()
    assert Work.outer is before
    assert 0.06 <= watch.seconds["outer"] < 0.3
    assert watch.seconds["inner"] >= 0.4


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_can_be_imported_and_run(name: str) -> None:
    pytest.importorskip("diffusers", reason="the peers of the benchmarks are in the extra `bench`")
    assert callable(importlib.import_module(name).run)
