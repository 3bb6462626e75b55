"""Without a terminal, progress is a line now and then; in one it is a bar."""

import io
import sys

import pytest

from training_harness import progress
from training_harness.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def output_of(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, seconds: float, updates: int = 4) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
    with progress_bar(total=40, desc="tokenizer", unit="image") as bar:
        for step in range(1, updates + 1):
            bar.set_postfix({"step": step, "l1": "0.25"}, refresh=False)
            bar.update(10)
    return stream.getvalue()


def test_without_a_terminal_a_line_says_step_loss_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = output_of(io.StringIO(), monkeypatch, seconds=0).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("tokenizer: 20 of 40 images, ")
    for part in ("image/s", "00:00 left", "step=2", "l1=0.25"):
        assert part in lines[1]
    assert "\r" not in "".join(lines)


def test_work_that_ends_sooner_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output_of(io.StringIO(), monkeypatch, seconds=30) == ""


def test_in_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\r" in output_of(Terminal(), monkeypatch, seconds=0)


def test_a_disabled_bar_prints_nothing_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(total=2, desc="x", unit="image", disable=True) as bar:
            bar.update(2)
        assert stream.getvalue() == ""
