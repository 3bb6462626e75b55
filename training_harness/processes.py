"""The processes started by `accelerate launch`; without it there is one process."""

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
    """Return the number of processes according to the environment."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def _report_missing_processes() -> None:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    print(
        f"waiting for the other processes at {address}: the environment sets RANK={os.environ.get('RANK')} and "
        f"WORLD_SIZE={os.environ.get('WORLD_SIZE')}. Unset these variables to run a single process",
        file=sys.stderr,
        flush=True,
    )


def join_processes() -> PartialState:
    """Return Accelerate's process state; the first call joins the other processes.

    The timeout is one day. The default of ten minutes is too short while one process reads data, tokenizes or evaluates.
    """
    is_first_call = not PartialState._shared_state
    notice = threading.Timer(NOTICE_AFTER, _report_missing_processes)
    notice.daemon = True
    if is_first_call and requested_process_count() > 1:
        notice.start()
    # Without an accelerator Accelerate needs cpu=True; otherwise processes started by torchrun do not form a group.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    try:
        state = PartialState(on_cpu, timeout=timedelta(days=1))
    finally:
        notice.cancel()
    if is_first_call and state.num_processes > 1:
        atexit.register(state.destroy_process_group)  # otherwise gloo's threads abort the process that ends last
    return state


def accelerated_device() -> torch.device:
    """Return the device that Accelerate selects for this process."""
    return join_processes().device


def is_main_process() -> bool:
    """Return whether this is the first process; the environment tells it before the processes have joined."""
    return os.environ.get("RANK", "0") == "0"


def print_once(line: str) -> None:
    """Print a line in the main process only."""
    if is_main_process():
        print(line, flush=True)


def number_of_processes() -> int:
    """Return the number of processes."""
    return join_processes().num_processes


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in the main process before the others, so that they find the files that it writes."""
    with join_processes().main_process_first():
        yield


def wait_for_everyone() -> None:
    """Wait until all processes have reached this point."""
    join_processes().wait_for_everyone()


def process_indices(count: int) -> range:
    """Return the indices in [0, count) that this process works on; the processes take turns."""
    state = join_processes()
    return range(state.process_index, count, state.num_processes)


def mean_over_processes(total: float, count: int) -> float:
    """Return Σ total / Σ count over all processes."""
    sums = torch.tensor([total, count], dtype=torch.float32, device=accelerated_device())
    total_sum, count_sum = reduce(sums, "sum").tolist()
    return total_sum / count_sum
