"""Provenance of metrics: library versions and machine, and the environment file of a run."""

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
    """Return the versions of Python and of the installed libraries that affect metrics."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def describe_machine() -> dict[str, Any]:
    """Return the device, the processor and the numbers of cores and threads."""
    device = accelerated_device()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def processor_name() -> str:
    """Return the processor's name if the system provides it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def record_environment(folder: Path, accelerator: Accelerator) -> str:
    """Write `environment.json` when a run starts or resumes; return the run id, which never changes."""
    path = folder / "environment.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run_id = stored.get("run_id") or secrets.token_hex(4)
    environment = {"run_id": run_id, "machine": describe_machine(), "versions": library_versions()}
    environment |= {"processes": accelerator.num_processes, "distributed_type": accelerator.distributed_type.value}
    write_json(path, environment)
    return run_id
