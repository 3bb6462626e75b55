"""Puts this folder on the import path, so that tests in any folder can use its helpers (`tiny_models`, `hub_stand_in`)."""

import os
import tempfile

import pytest
import torch
from hypothesis import settings

from latentloom.environment import silence_libraries

# On models this small two threads wait for one another longer than they compute: thirty times as long beside other work.
torch.set_num_threads(1)
os.environ["LATENTLOOM_CACHE"] = tempfile.mkdtemp(prefix="latentloom-tests-")  # not the user's own
silence_libraries()  # before a test module imports them; the command does the same

settings.register_profile("CI", derandomize=True)  # a run that decides anything draws the same examples every time
if "CI" in os.environ:
    settings.load_profile("CI")

# Begun first, so that no core waits for a long file at the end.
LONG = (
    "test_main_job.py",
    "test_killed_runs.py",
    "test_golden_losses.py",
    "test_accelerate_launch.py",
    "test_compiled_runs.py",
    "test_trackers.py",
    "test_readme.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
