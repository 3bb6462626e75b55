"""This process among those that `accelerate launch` started; alone without it."""

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce

NOTICE_AFTER = 20.0  # seconds of waiting for the other processes


def requested_process_count() -> int:
    """How many processes the environment tells of."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def _report_missing_processes() -> None:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    print(
        f"waiting for the other processes at {address}: the environment says this is RANK {os.environ.get('RANK')} of WORLD_SIZE "
        f"{os.environ.get('WORLD_SIZE')}; unset these variables to run alone",
        file=sys.stderr,
        flush=True,
    )


def join_processes() -> PartialState:
    """What Accelerate knows of the processes; the first call joins the others, where there are any.

    They may wait for one another for a day: while one reads, tokenizes or measures, the usual ten minutes are soon over.
    """
    first = not PartialState._shared_state
    notice = threading.Timer(NOTICE_AFTER, _report_missing_processes)
    notice.daemon = True
    if first and requested_process_count() > 1:
        notice.start()
    # Without an accelerator Accelerate must be told so, or processes that torchrun started would not know of each other.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    try:
        state = PartialState(on_cpu, timeout=timedelta(days=1))
    finally:
        notice.cancel()
    if first and state.num_processes > 1:
        atexit.register(state.destroy_process_group)  # or gloo's threads abort the process that ends last
    return state


def accelerated_device() -> torch.device:
    """The device that Accelerate finds for this process."""
    return join_processes().device


def is_main_process() -> bool:
    """The first of the processes that were launched; told by their environment, before they have joined."""
    return os.environ.get("RANK", "0") == "0"


def print_once(line: str) -> None:
    """Prints a line in the main process alone."""
    if is_main_process():
        print(line, flush=True)


def number_of_processes() -> int:
    return join_processes().num_processes


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process goes through the block before the others: what it writes, they find."""
    with join_processes().main_process_first():
        yield


def wait_for_everyone() -> None:
    join_processes().wait_for_everyone()


def process_indices(count: int) -> range:
    """Every so-manieth of `count` positions: those that are this process's to work on."""
    state = join_processes()
    return range(state.process_index, count, state.num_processes)


def mean_over_processes(total: float, count: int) -> float:
    """Σ total / Σ count over all processes."""
    found = torch.tensor([total, count], dtype=torch.float32, device=accelerated_device())
    totals, counts = reduce(found, "sum").tolist()
    return totals / counts
