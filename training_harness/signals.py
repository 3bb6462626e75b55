"""SIGTERM and SIGINT as a stop request: the loop completes its step, saves and stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):  # noqa: N818 - a requested stop is not an error
    """A signal stopped the run; the run was saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """`signal_number` is the received signal, or 0 if none was received."""

    signal_number = 0


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Record the first SIGTERM or SIGINT within the block; a second one has its previous effect.

    Outside the main thread no signal is recorded, because Python allows signal handlers only there.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous_handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore_handlers() -> None:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    def record_signal(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        restore_handlers()

    for number in previous_handlers:
        signal.signal(number, record_signal)
    try:
        yield request
    finally:
        restore_handlers()
