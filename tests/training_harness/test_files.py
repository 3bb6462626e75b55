"""What is written appears whole or not at all, and a log that a kill tore is mended."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import CHECKOUT

from training_harness import files
from training_harness.errors import UserError
from training_harness.files import atomic_file, atomic_folder, update_folder, write_json, write_text
from training_harness.metric_log import MetricLog, read_metrics
from training_harness.output_lock import output_lock


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


# -- folders that are not ours alone, and file systems that cannot do everything ------------------------------------------


def fill(folder: Path, **contents: str) -> None:
    with update_folder(folder, last="index") as beside:
        for name, text in contents.items():
            write_text(beside / "sub" / name if name != "index" else beside / name, text)


def test_files_take_their_places_among_those_of_the_user_and_the_index_is_the_last(tmp_path, monkeypatch):
    order, move = [], files._move
    monkeypatch.setattr(files, "_move", lambda source, target: (order.append(target.name), move(source, target)))
    write_text(tmp_path / "sub" / "mine", "mine")
    order.clear()
    fill(tmp_path, index="i", a="new", b="new")
    assert order[-3:] == ["a", "b", "index"]
    assert names(tmp_path) == ["index", "sub"]
    assert (tmp_path / "sub" / "mine").read_text() == "mine"


def test_what_a_link_points_to_receives_the_files_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    fill(tmp_path / "link", index="i")
    write_text(tmp_path / "link" / "a.txt", "a")
    (tmp_path / "b.txt").symlink_to("disk/b.txt")
    write_text(tmp_path / "b.txt", "b")
    with atomic_folder(tmp_path / "link" / "f") as beside:
        write_text(beside / "x", "x")
    assert names(tmp_path / "disk") == ["a.txt", "b.txt", "f", "index"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "b.txt").is_symlink()


def test_a_file_system_that_neither_flushes_folders_nor_renames_over_devices_still_gets_the_files(
    tmp_path, monkeypatch
):
    def refused(*_):
        raise OSError(errno.EXDEV, "over devices")

    def no_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "a folder")

    monkeypatch.setattr(Path, "replace", refused)
    monkeypatch.setattr(os, "fsync", no_folders)
    write_text(tmp_path / "a.txt", "a")
    with atomic_folder(tmp_path / "f") as beside:
        write_text(beside / "x", "x")
    fill(tmp_path / "g", index="i", y="y")
    assert names(tmp_path) == ["a.txt", "f", "g"]
    assert names(tmp_path / "g" / "sub") == ["y"]


def test_a_disk_that_fails_to_flush_a_file_is_not_passed_over(tmp_path, monkeypatch):
    def failing(descriptor):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="broken"):
        write_text(tmp_path / "a.txt", "a")


# -- one command a folder ---------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from training_harness.output_lock import output_lock
with output_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_command_is_refused_and_the_lock_of_a_killed_one_is_gone(tmp_path):
    folder = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=r"another command is writing to .*run"), output_lock(folder):
        pass
    first.kill()
    first.wait()
    with output_lock(folder):
        write_text(folder / "a.txt", "a")
    assert names(folder) == ["a.txt"]


def test_a_command_that_writes_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="refused"), output_lock(tmp_path / "run"):
        raise UserError("refused")
    assert names(tmp_path) == []
