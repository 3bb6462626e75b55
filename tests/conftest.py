"""Settings of all tests. This file also puts its folder on the import path, for helpers such as `tiny_models`."""

import os
import tempfile

import pytest
import torch
from hypothesis import settings

from latentloom.environment import silence_libraries

# With models this small, two threads wait for each other longer than they compute: up to thirty times as long on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ["LATENTLOOM_CACHE"] = tempfile.mkdtemp(prefix="latentloom-tests-")  # instead of the user's cache
silence_libraries()  # before test modules import the libraries, as the command does

settings.register_profile("CI", derandomize=True)  # the same examples in every run
if "CI" in os.environ:
    settings.load_profile("CI")

# These files run first, so that no core waits for a long file at the end.
LONG_TEST_FILES = (
    "test_examples.py",
    "test_main_job.py",
    "test_killed_runs.py",
    "test_golden_losses.py",
    "test_accelerate_launch.py",
    "test_compiled_runs.py",
    "test_trackers.py",
    "test_readme.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    position = {name: i for i, name in enumerate(LONG_TEST_FILES)}
    items.sort(key=lambda item: position.get(item.path.name, len(position)))
