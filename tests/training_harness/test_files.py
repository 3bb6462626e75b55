"""What is written appears whole or not at all, and a log that a kill tore is mended."""

import json
from pathlib import Path

import pytest

from training_harness.files import atomic_file, atomic_folder, write_json, write_text
from training_harness.metric_log import MetricLog, read_metrics


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_when_the_block_ends_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with atomic_file(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")

    def write_half() -> None:
        with atomic_file(tmp_path / "a.txt") as beside:
            beside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_replaces_the_old_one_whole_and_keeps_no_file_of_it(tmp_path):
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "f") as beside:
            (beside / "sub").mkdir()
            write_text(beside / "sub" / content, content)
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f" / "sub") == ["two"]


def test_an_error_while_filling_a_folder_leaves_the_old_one_or_none(tmp_path):
    with atomic_folder(tmp_path / "f") as beside:
        write_text(beside / "kept", "kept")

    def fill_half(path: Path) -> None:
        with atomic_folder(path) as beside:
            write_text(beside / "half", "half")
            raise KeyboardInterrupt

    for path in (tmp_path / "f", tmp_path / "g"):
        with pytest.raises(KeyboardInterrupt):
            fill_half(path)
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["kept"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no space left")
        return replace(self, target)

    def fill() -> None:
        with atomic_folder(tmp_path / "f") as beside:
            write_text(beside / "content", "content")

    fill()
    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="no space"):
        fill()
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["content"]


def test_json_is_readable_and_ends_its_last_line(tmp_path):
    write_json(tmp_path / "a.json", {"größe": [1, 2]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "größe" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"größe": [1, 2]}


# The metric log


def log_of(path, *steps: int) -> MetricLog:
    log = MetricLog(path)
    for step in steps:
        log.append({"step": step, "loss": step / 10})
    return log


def test_rows_read_back_in_their_order(tmp_path):
    log_of(tmp_path / "m.jsonl", 1, 2, 3)
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3]
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_mended_before_more_is_written(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    log = log_of(path, 1, 2, 3)
    path.write_bytes(path.read_bytes()[:-cut])  # a cut of 1 takes the line's end alone
    kept = 3 if cut == 1 else 2
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3][:kept]
    log.rewind(3)
    log.append({"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(1, kept + 1), 4]


def test_rewinding_forgets_what_a_resumed_run_writes_again(tmp_path):
    log = log_of(tmp_path / "m.jsonl", 10, 20, 30)
    log.rewind(20)
    assert [row["step"] for row in read_metrics(log.path)] == [10, 20]
    log.rewind(0)
    assert read_metrics(log.path) == []
    MetricLog(tmp_path / "new.jsonl").rewind(5)
    assert not (tmp_path / "new.jsonl").exists()
