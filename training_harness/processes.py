"""This process among those that `accelerate launch` started; alone without it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce


def accelerated_device() -> torch.device:
    """The device that Accelerate finds for this process; the first call joins the other processes, where there are any.

    They may wait for one another for a day: while one reads, tokenizes or measures, the usual ten minutes are soon over.
    """
    return PartialState(parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=1)).device


def is_main_process() -> bool:
    """The first of the processes that were launched; told by their environment, before they have joined."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process goes through the block before the others: what it writes, they find."""
    accelerated_device()
    with PartialState().main_process_first():
        yield


def share_of(count: int) -> range:
    """Every so-manieth of `count` positions: those that are this process's to work on."""
    accelerated_device()
    state = PartialState()
    return range(state.process_index, count, state.num_processes)


def mean_over_processes(total: float, count: int) -> float:
    """Σ total / Σ count over all processes."""
    found = torch.tensor([total, count], dtype=torch.float32, device=accelerated_device())
    totals, counts = reduce(found, "sum").tolist()
    return totals / counts
