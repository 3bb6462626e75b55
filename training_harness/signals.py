"""SIGTERM and SIGINT as a wish: the loop ends its step, saves, and goes."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):  # noqa: N818 - what was asked for; no error of the program
    """A run that saved and stopped because it was told to."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = number


class StopRequest:
    """`number` is the signal that came, 0 before one came."""

    signal_number = 0


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Notes the first SIGTERM or SIGINT; a second one does what it did before.

    Outside the main thread, where Python has no handlers, none is ever noted.
    """
    wish = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        wish.signal_number = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
