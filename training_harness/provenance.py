"""Where figures were measured: versions and the machine's kind; and where a run runs, in its folder."""

import json
import os
import platform
import secrets
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from training_harness.files import write_json
from training_harness.processes import accelerated_device

LIBRARIES = ("latentloom", "torch", "torchvision", "transformers", "accelerate", "numpy")


def library_versions() -> dict[str, str]:
    """Of Python and of the libraries that figures depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def describe_machine() -> dict[str, Any]:
    device = accelerated_device()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def processor_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def record_environment(folder: Path, accelerator: Accelerator) -> str:
    """Writes `environment.json` of a run that starts or goes on; returns its id, which stays the same."""
    path = folder / "environment.json"
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run_id = held.get("run_id") or secrets.token_hex(4)
    found = {"run_id": run_id, "machine": describe_machine(), "versions": library_versions()}
    found |= {"processes": accelerator.num_processes, "distributed_type": accelerator.distributed_type.value}
    write_json(path, found)
    return run_id
