"""The shared parts of the benchmarks: order of the contenders, ratios, and the written report."""

import gc
import importlib
import json
import time
from pathlib import Path

import frame
import pytest
from frame import Report, compare_times, markdown_table, time_interleaved
from run import NAMES
from where_time_goes import Stopwatch


def test_contenders_take_turns_and_each_is_first_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", int)  # takes half a second here, where every test module is loaded
    order: list[str] = []
    contenders = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = time_interleaved(contenders, rounds=3, warm_up=1)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 12, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert sorted(each[0] for each in rounds[1:]) == ["a", "b", "c"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}  # without the warm-up


def test_a_ratio_is_the_median_of_the_ratios_of_each_round() -> None:
    # a machine that slows down: each round has the ratio 2, the ratio of the medians would be 1
    comparison = compare_times({"latentloom": [1.0, 2.0, 8.0], "peer": [2.0, 4.0, 16.0]})
    assert comparison["peer"]["ratio"] == 2
    assert comparison["peer"]["quartiles"] == [2, 2]
    assert comparison["latentloom"]["ratio"] == 1
    noisy = compare_times({"latentloom": [1.0, 1.0, 1.0, 1.0], "peer": [1.0, 2.0, 3.0, 9.0]})["peer"]
    assert noisy["ratio"] == 2.5
    assert noisy["quartiles"] == [1.75, 4.5]


def test_a_report_writes_its_results_its_chart_and_a_page_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "RESULTS_FOLDER", tmp_path)
    Report("another", "Another", "text", {}).publish()
    other_page = (tmp_path / "another.md").read_text()
    report = Report("sizes", "Sizes", "text", {"x": 1.5}, ["numpy"], lambda path: path.write_bytes(b"image"))
    report.publish()
    assert (tmp_path / "another.md").read_text() == other_page
    assert "![" not in other_page
    report_json = json.loads((tmp_path / "sizes.json").read_text())
    assert report_json["results"] == {"x": 1.5}
    assert {"numpy", "torch", "latentloom"} <= report_json["versions"].keys()
    assert report_json["machine"]["threads"] == 1
    page = (tmp_path / "sizes.md").read_text()
    assert page.startswith("# Sizes\n\n*")
    assert "1 threads of" in page
    assert page.endswith("text\n\n![Sizes](sizes.png)\n")


def test_every_benchmark_has_its_page_in_the_documentation() -> None:
    folder = frame.ROOT / "docs" / "benchmarks"
    benchmark_names = {path.stem for path in folder.glob("*.json")}
    assert {path.stem for path in folder.glob("*.md")} - {"index"} == benchmark_names
    index_page = (folder / "index.md").read_text(encoding="utf-8")
    assert all(f"({name}.md)" in index_page for name in benchmark_names)


def test_tables_have_three_digits_and_a_dash_for_missing_values() -> None:
    assert markdown_table(["a", "b"], [[0.12345, None], [12345.6, 20_000]]).splitlines()[2:] == [
        "| 0.123 | – |",
        "| 12,346 | 20,000 |",
    ]


def test_the_stopwatch_times_each_part_without_the_parts_inside_it() -> None:
    class Work:
        def outer(self) -> None:
            time.sleep(0.03)
            self.inner()
            time.sleep(0.03)

        def inner(self) -> None:
            time.sleep(0.4)

    watch, original = Stopwatch(), Work.outer
    with watch.watch({(Work, "outer"): "outer", (Work, "inner"): "inner"}):
        Work().outer()
    assert Work.outer is original
    assert 0.06 <= watch.seconds["outer"] < 0.3
    assert watch.seconds["inner"] >= 0.4


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_can_be_imported_and_run(name: str) -> None:
    pytest.importorskip("diffusers", reason="the peers of the benchmarks are in the extra `bench`")
    assert callable(importlib.import_module(name).run)
