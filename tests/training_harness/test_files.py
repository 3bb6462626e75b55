"""Writes are atomic, and the metric log recovers from an incomplete line."""

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


def file_names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_the_block_ends_without_leaving_temporary_files(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert file_names(path.parent) == ["a.txt"]


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")

    def write_half() -> None:
        with atomic_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert file_names(tmp_path) == ["a.txt"]


def test_a_folder_replaces_all_files_of_the_old_folder(tmp_path):
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "f") as temporary:
            (temporary / "sub").mkdir()
            write_text(temporary / "sub" / content, content)
    assert file_names(tmp_path) == ["f"]
    assert file_names(tmp_path / "f" / "sub") == ["two"]


def test_an_error_while_filling_a_folder_keeps_the_old_folder_or_creates_none(tmp_path):
    with atomic_folder(tmp_path / "f") as temporary:
        write_text(temporary / "kept", "kept")

    def fill_half(path: Path) -> None:
        with atomic_folder(path) as temporary:
            write_text(temporary / "half", "half")
            raise KeyboardInterrupt

    for path in (tmp_path / "f", tmp_path / "g"):
        with pytest.raises(KeyboardInterrupt):
            fill_half(path)
    assert file_names(tmp_path) == ["f"]
    assert file_names(tmp_path / "f") == ["kept"]


def test_a_failing_rename_keeps_the_old_folder(tmp_path, monkeypatch):
    original_replace = Path.replace

    def failing_replace(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no space left")
        return original_replace(self, target)

    def fill() -> None:
        with atomic_folder(tmp_path / "f") as temporary:
            write_text(temporary / "content", "content")

    fill()
    monkeypatch.setattr(Path, "replace", failing_replace)
    with pytest.raises(OSError, match="no space"):
        fill()
    assert file_names(tmp_path) == ["f"]
    assert file_names(tmp_path / "f") == ["content"]


def test_json_is_readable_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"größe": [1, 2]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "größe" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"größe": [1, 2]}


# The metric log


def write_log(path, *steps: int) -> MetricLog:
    log = MetricLog(path)
    for step in steps:
        log.append({"step": step, "loss": step / 10})
    return log


def test_rows_are_read_in_order(tmp_path):
    write_log(tmp_path / "m.jsonl", 1, 2, 3)
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3]
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_an_incomplete_last_line_is_removed_before_more_rows_are_written(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    log = write_log(path, 1, 2, 3)
    path.write_bytes(path.read_bytes()[:-cut])  # a cut of 1 removes only the newline
    complete = 3 if cut == 1 else 2
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3][:complete]
    log.rewind(3)
    log.append({"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(1, complete + 1), 4]


def test_rewinding_deletes_the_rows_after_a_step(tmp_path):
    log = write_log(tmp_path / "m.jsonl", 10, 20, 30)
    log.rewind(20)
    assert [row["step"] for row in read_metrics(log.path)] == [10, 20]
    log.rewind(0)
    assert read_metrics(log.path) == []
    MetricLog(tmp_path / "new.jsonl").rewind(5)
    assert not (tmp_path / "new.jsonl").exists()


# -- folders with files of the user, and file systems with limited features -----------------------------------------------


def fill(folder: Path, **contents: str) -> None:
    with update_folder(folder, last="index") as temporary:
        for name, text in contents.items():
            write_text(temporary / "sub" / name if name != "index" else temporary / name, text)


def test_updating_a_folder_keeps_the_files_of_the_user_and_writes_the_index_last(tmp_path, monkeypatch):
    order, move = [], files._move
    monkeypatch.setattr(files, "_move", lambda source, target: (order.append(target.name), move(source, target)))
    write_text(tmp_path / "sub" / "mine", "mine")
    order.clear()
    fill(tmp_path, index="i", a="new", b="new")
    assert order[-3:] == ["a", "b", "index"]
    assert file_names(tmp_path) == ["index", "sub"]
    assert (tmp_path / "sub" / "mine").read_text() == "mine"


def test_files_are_written_to_the_target_of_a_link_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    fill(tmp_path / "link", index="i")
    write_text(tmp_path / "link" / "a.txt", "a")
    (tmp_path / "b.txt").symlink_to("disk/b.txt")
    write_text(tmp_path / "b.txt", "b")
    with atomic_folder(tmp_path / "link" / "f") as temporary:
        write_text(temporary / "x", "x")
    assert file_names(tmp_path / "disk") == ["a.txt", "b.txt", "f", "index"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "b.txt").is_symlink()


def test_writes_work_without_syncing_folders_and_renaming_across_devices(tmp_path, monkeypatch):
    def failing_replace(*_):
        raise OSError(errno.EXDEV, "across devices")

    def fsync_without_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "a folder")

    monkeypatch.setattr(Path, "replace", failing_replace)
    monkeypatch.setattr(os, "fsync", fsync_without_folders)
    write_text(tmp_path / "a.txt", "a")
    with atomic_folder(tmp_path / "f") as temporary:
        write_text(temporary / "x", "x")
    fill(tmp_path / "g", index="i", y="y")
    assert file_names(tmp_path) == ["a.txt", "f", "g"]
    assert file_names(tmp_path / "g" / "sub") == ["y"]


def test_an_error_while_syncing_a_file_is_raised(tmp_path, monkeypatch):
    def failing_fsync(descriptor):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(OSError, match="broken"):
        write_text(tmp_path / "a.txt", "a")


# -- one command per folder -------------------------------------------------------------------------------------------------

HOLD_LOCK = """
import sys, time
from pathlib import Path
from training_harness.output_lock import output_lock
with output_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_command_is_an_error_and_a_killed_command_releases_its_lock(tmp_path):
    folder = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, folder], stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)
    assert first.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=r"another command is writing to .*run"), output_lock(folder):
        pass
    first.kill()
    first.wait()
    with output_lock(folder):
        write_text(folder / "a.txt", "a")
    assert file_names(folder) == ["a.txt"]


def test_a_command_that_writes_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="invalid"), output_lock(tmp_path / "run"):
        raise UserError("invalid")
    assert file_names(tmp_path) == []
