"""Small runs of both stages in processes of their own, which a test may stop, or compare with others."""

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
from stage1_tokenizer.training_config import TokenizerTraining, completed, model_config
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
    """What the runs are trained on."""
    write_images(folder / "pictures")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    write_code_cache(tiny_tokenizer(), folder / "tokenizer", tiny_source(), folder / "codes")


def train(stage: str, folder: Path, output: Path, fields: dict[str, Any], dropout: float, adversarial: float) -> None:
    if stage == "prior":
        model = AutoregressiveModel(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, dropout=dropout)
        codes = CodeCache(folder / "codes")
        train_prior(AutoregressiveTraining(output=output, codes=codes.path, model=model, **fields), codes)
        return
    source = open_source(folder / "pictures")
    seen = dataset_statistics(source.train)
    model = VQGANModel(channels=(8, 8), blocks=(0, 1), attention=(2,), latent_channels=4, codebook_size=16)
    judged = AdversarialConfig(weight=adversarial, start=5, warmup=2, ramp=4, channels=4, layers=2)
    config = TokenizerTraining(output=output, data="pictures", model=model, adversarial=judged, **fields)
    config = completed(config, seen)
    shape = model_config(config, seen)
    train_tokenizer(
        config, shape, *(ImageLoader(split, shape.image_processor) for split in (source.train, source.validation))
    )


def train_in_float64(stage: str, folder: Path, output: Path, processes: int, fields: dict[str, Any]) -> None:
    """20 steps of 32 images in all, without dropout and discriminator; `exact.jsonl` has the log without rounding."""
    torch.set_default_dtype(torch.float64)
    log = MetricLog(output / "exact.jsonl")

    def log_exactly(run: Run, step: int, row: Mapping[str, float]) -> None:
        if run.accelerator.is_main_process:
            log.append({"step": step, **row})

    Run.log_row = log_exactly
    fields = RUN_FIELDS | {"max_steps": 20, "batch_size": 32 // processes, "checkpoint_every": 20} | fields
    train(stage, folder, output, fields, dropout=0.0, adversarial=0.0)


def set_launch_environment(rank: int, processes: int, port: int) -> None:
    """Makes this process one of several, as `accelerate launch` does; Accelerate then starts the group, on gloo."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"})


def enable_fsdp() -> None:
    """Lays models over the processes as scripts/accelerate/8_gpus_fsdp.yaml does.

    Accelerate leaves FSDP out on CPUs: the group is told to be one of GPUs.
    """
    accelerated_device()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    configuration = Path(__file__).parents[1] / "scripts" / "accelerate" / "8_gpus_fsdp.yaml"
    environment = launcher_environment(configuration)
    os.environ.update({name: value for name, value in environment.items() if "FSDP" in name})


def launcher_environment(configuration: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` adds to the environment of each process."""
    words = ["--config_file", str(configuration), "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return prepare_multi_gpu_env(arguments)


def slow_down_saves() -> None:
    """A checkpoint's file is half written for half a second."""
    save = checkpoints.torch.save

    def slow(state: Any, path: Path) -> None:
        save(state, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        time.sleep(0.5)
        path.write_bytes(whole)

    checkpoints.torch = SimpleNamespace(save=slow, load=checkpoints.torch.load)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


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
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
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
    except Interrupted as stopped:
        os._exit(128 + stopped.signal_number)
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
    """A run in processes of their own; `fields` of its configuration."""
    return start_processes(run_process, processes, stage, folder, output, in_float64, sharded, slow_saves, fields)


def start_processes(target: Callable[..., None], processes: int, *arguments: Any) -> list[BaseProcess]:
    """`target(rank, processes, port, *arguments)` for each rank, forked from a server that has imported what a run needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_runs"])
    # the server looks for it before it is told where
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    port = free_port()
    started = [context.Process(target=target, args=(rank, processes, port, *arguments)) for rank in range(processes)]
    for process in started:
        process.start()
    return started


def stop_processes(started: list[BaseProcess], number: signal.Signals) -> list[int | None]:
    """Sends the signal to all; returns their exit codes."""
    for process in started:
        assert process.pid is not None
        os.kill(process.pid, number)
    return wait_for_exit(started)


def wait_for_exit(started: list[BaseProcess]) -> list[int | None]:
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def resumed_steps(output: Path) -> list[int]:
    return [row["resumed_from"] for row in read_metrics(output / "metrics.jsonl") if "resumed_from" in row]


def wait_for_step(output: Path, step: int, started: list[BaseProcess], resumed: int = 0) -> None:
    """Until the run has been taken up again `resumed` times and has logged `step`, or is over."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(process.is_alive() for process in started):
        rows = read_metrics(output / "metrics.jsonl")
        if len(resumed_steps(output)) == resumed and any(row["step"] >= step for row in rows):
            return
        time.sleep(0.002)
