"""Progress is a bar in a terminal and lines elsewhere."""

import io
import sys

import pytest

from training_harness import progress
from training_harness.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_progress_bar(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, seconds: float, updates: int = 4) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
    with progress_bar(total=40, desc="tokenizer", unit="image") as bar:
        for step in range(1, updates + 1):
            bar.set_postfix({"step": step, "l1": "0.25"}, refresh=False)
            bar.update(10)
    return stream.getvalue()


def test_without_a_terminal_a_line_has_step_loss_rate_and_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run_progress_bar(io.StringIO(), monkeypatch, seconds=0).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("tokenizer: 20 of 40 images, ")
    for fragment in ("image/s", "00:00 left", "step=2", "l1=0.25"):
        assert fragment in lines[1]
    assert "\r" not in "".join(lines)


def test_short_work_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_progress_bar(io.StringIO(), monkeypatch, seconds=30) == ""


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\r" in run_progress_bar(Terminal(), monkeypatch, seconds=0)


def test_a_disabled_bar_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(total=2, desc="x", unit="image", disable=True) as bar:
            bar.update(2)
        assert stream.getvalue() == ""
