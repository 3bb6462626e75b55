"""Small training runs of both stages in separate processes, which a test can stop or compare."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed.fsdp  # in the server, because its import takes seconds in each process
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from small_parts import write_images
from tiny_models import tiny_source, tiny_tokenizer

from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.codes.writer import write_code_cache
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.sources import open_source
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.losses.adversarial import AdversarialConfig
from stage1_tokenizer.train import train_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining, build_model_config, complete_config
from stage1_tokenizer.vqgan import VQGANModel
from stage2_prior.train import train_prior
from stage2_prior.training_config import AutoregressiveModel, AutoregressiveTraining
from training_harness import checkpoints
from training_harness.metric_log import MetricLog, read_metrics
from training_harness.processes import accelerated_device
from training_harness.run import Run
from training_harness.signals import Interrupted

RUN_FIELDS = {"max_steps": 40, "batch_size": 4, "log_every": 1, "sample_every": 10, "checkpoint_every": 3}


def write_training_data(folder: Path) -> None:
    """Write images, a tokenizer and a code cache for the runs."""
    write_images(folder / "images")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    write_code_cache(tiny_tokenizer(), folder / "tokenizer", tiny_source(), folder / "codes")


def train(stage: str, folder: Path, output: Path, fields: dict[str, Any], dropout: float, adversarial: float) -> None:
    """Train a tiny model of a stage; `fields` are fields of its configuration."""
    if stage == "prior":
        model = AutoregressiveModel(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, dropout=dropout)
        codes = CodeCache(folder / "codes")
        train_prior(AutoregressiveTraining(output=output, codes=codes.path, model=model, **fields), codes)
        return
    source = open_source(folder / "images")
    statistics = dataset_statistics(source.train)
    model = VQGANModel(channels=(8, 8), blocks=(0, 1), attention=(2,), latent_channels=4, codebook_size=16)
    adversarial_config = AdversarialConfig(weight=adversarial, start=5, warmup=2, ramp=4, channels=4, layers=2)
    config = TokenizerTraining(output=output, data="images", model=model, adversarial=adversarial_config, **fields)
    config = complete_config(config, statistics)
    model_fields = build_model_config(config, statistics)
    train_tokenizer(
        config,
        model_fields,
        *(ImageLoader(split, model_fields.image_processor) for split in (source.train, source.validation)),
    )


def train_in_float64(stage: str, folder: Path, output: Path, processes: int, fields: dict[str, Any]) -> None:
    """Train 20 steps of 32 images in total in float64, without dropout and discriminator; `exact.jsonl` is not rounded."""
    torch.set_default_dtype(torch.float64)
    log = MetricLog(output / "exact.jsonl")

    def log_exactly(run: Run, step: int, row: Mapping[str, float]) -> None:
        if run.accelerator.is_main_process:
            log.append({"step": step, **row})

    Run.log_row = log_exactly
    fields = RUN_FIELDS | {"max_steps": 20, "batch_size": 32 // processes, "checkpoint_every": 20} | fields
    train(stage, folder, output, fields, dropout=0.0, adversarial=0.0)


def set_launch_environment(rank: int, processes: int, port: int) -> None:
    """Set the environment of one of several processes, like `accelerate launch`; Accelerate then uses gloo."""
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(variables | {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"})


def enable_fsdp() -> None:
    """Shard models over the processes with the settings of scripts/accelerate/8_gpus_fsdp.yaml.

    Accelerate does not use FSDP on CPUs, so its state is changed to a group of GPUs.
    """
    accelerated_device()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    configuration = Path(__file__).parents[1] / "scripts" / "accelerate" / "8_gpus_fsdp.yaml"
    environment = launcher_environment(configuration)
    os.environ.update({name: value for name, value in environment.items() if "FSDP" in name})


def launcher_environment(configuration: Path) -> dict[str, str]:
    """Return the variables that `accelerate launch --config_file` adds to the environment of each process."""
    command = ["--config_file", str(configuration), "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    return prepare_multi_gpu_env(arguments)


def slow_down_saves() -> None:
    """Make each checkpoint file stay half written for half a second."""
    original_save = checkpoints.torch.save

    def slow_save(state: Any, path: Path) -> None:
        original_save(state, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        time.sleep(0.5)
        path.write_bytes(content)

    checkpoints.torch = SimpleNamespace(save=slow_save, load=checkpoints.torch.load)


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_process(
    rank: int,
    processes: int,
    port: int,
    stage: str,
    folder: Path,
    output: Path,
    in_float64: bool,
    sharded: bool,
    slow_saves: bool,
    fields: dict[str, Any],
) -> None:
    """Train in this process, which is process `rank` of `processes`."""
    torch.set_num_threads(1)
    if processes > 1:
        set_launch_environment(rank, processes, port)
    if sharded:
        enable_fsdp()
    if slow_saves:
        slow_down_saves()
    try:
        if in_float64:
            train_in_float64(stage, folder, output, processes, fields)
        else:
            train(stage, folder, output, RUN_FIELDS | fields, dropout=0.1, adversarial=0.5)
    except Interrupted as interruption:
        os._exit(128 + interruption.signal_number)
    if processes > 1:
        torch.distributed.destroy_process_group()


def start_run(
    stage: str,
    folder: Path,
    output: Path,
    processes: int,
    in_float64: bool = False,
    sharded: bool = False,
    slow_saves: bool = False,
    **fields: Any,
) -> list[BaseProcess]:
    """Start a run in new processes; `fields` are fields of its configuration."""
    return start_processes(run_process, processes, stage, folder, output, in_float64, sharded, slow_saves, fields)


def start_processes(target: Callable[..., None], processes: int, *arguments: Any) -> list[BaseProcess]:
    """Start `target(rank, processes, port, *arguments)` for each rank, forked from a server with all imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_runs"])
    # The server imports the module before it receives sys.path.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    port = free_port()
    running = [context.Process(target=target, args=(rank, processes, port, *arguments)) for rank in range(processes)]
    for process in running:
        process.start()
    return running


def stop_processes(processes: list[BaseProcess], number: signal.Signals) -> list[int | None]:
    """Send a signal to all processes; return their exit codes."""
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, number)
    return wait_for_exit(processes)


def wait_for_exit(processes: list[BaseProcess]) -> list[int | None]:
    """Wait until all processes end; return their exit codes."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def resumed_steps(output: Path) -> list[int]:
    """Return the steps from which the run was resumed."""
    return [row["resumed_from"] for row in read_metrics(output / "metrics.jsonl") if "resumed_from" in row]


def wait_for_step(output: Path, step: int, processes: list[BaseProcess], resumed: int = 0) -> None:
    """Wait until the run has been resumed `resumed` times and has logged `step`, or has ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        rows = read_metrics(output / "metrics.jsonl")
        if len(resumed_steps(output)) == resumed and any(row["step"] >= step for row in rows):
            return
        time.sleep(0.002)
