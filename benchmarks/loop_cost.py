"""Cost of the training loops over bare ones of the same models, and what saving costs.

The bare loop has the forward and backward pass, gradient clipping, the optimizer step and the moving average of the weights,
on the same batches and with the same matmul precision. Our loop also checks for non-finite numbers, logs, counts, handles
signals and can resume after a kill. A round runs both for the same number of steps. The first steps do not count. Saving is
the time of one checkpoint, relative to the time between two checkpoints at the default interval.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from frame import OURS, Report, compared, recipe, table

from latentloom.data.embedded import FASHION_MNIST
from latentloom.jobs.stages import load_source, run_prior, run_tokenize, run_tokenizer
from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.losses.reconstruction import reconstruction_terms, sum_weighted
from stage1_tokenizer.training_config import TokenizerTraining, completed, model_config
from stage1_tokenizer.vqgan import VQGAN
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.training_config import AutoregressiveTraining
from training_harness.batch_order import BatchOrder
from training_harness.ema import EMA
from training_harness.matmul_precision import reduced_matmul_precision
from training_harness.optimization import build_optimizer, set_learning_rate
from training_harness.processes import accelerated_device
from training_harness.run import Run
from training_harness.run_config import RunConfig

BARE = "bare loop"
WARM_UP = 5


def bare(model: torch.nn.Module, config: Any, loss_of: Callable[[int], torch.Tensor], steps: int) -> list[float]:
    optimizer, ema, ends = build_optimizer(model, config.optimizer), EMA(model, config.ema), []
    with reduced_matmul_precision(accelerated_device(), enabled=True):
        for step in range(1, steps + 1):
            set_learning_rate(optimizer, config.schedule.at(step, steps))
            loss_of(step).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(step)
            ends.append(time.perf_counter())
    return ends


def ours(train: Callable[[], object]) -> tuple[list[float], list[float]]:
    """When each step ended, and seconds of each checkpoint."""
    ends, saves = list[float](), list[float]()
    log, checkpoint = Run.log, Run.checkpoint

    def noted(run: Run, *arguments: Any) -> None:
        log(run, *arguments)
        ends.append(time.perf_counter())

    def saved(run: Run, step: int) -> None:
        begin = time.perf_counter()
        checkpoint(run, step)
        saves.append(time.perf_counter() - begin)

    with mock.patch.object(Run, "log", noted), mock.patch.object(Run, "checkpoint", saved):
        train()
    return ends, saves


def per_step(ends: list[float]) -> float:
    return (ends[-1] - ends[WARM_UP]) / (len(ends) - 1 - WARM_UP)


def run(quick: bool) -> Report:
    steps, rounds = (25, 1) if quick else (120, 7)
    source, rows, figures = load_source(FASHION_MNIST), [], []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def replaced(config: Any, number: int) -> Any:
            rest = {"output": folder / str(number), "sample_every": 10**9, "checkpoint_every": 10**9}
            return dataclasses.replace(config, max_steps=steps, **rest)

        seen = dataset_statistics(source.train)
        first = completed(
            recipe(TokenizerTraining, "tokenizer", "vqgan-f4", 1, 0, data=FASHION_MNIST, output="t"), seen
        )
        shape = model_config(first, seen)
        pixels, processor = ImageLoader(source.train, shape.image_processor), shape.image_processor

        def bare_tokenizer() -> list[float]:
            model = VQGAN(shape).to(memory_format=torch.channels_last).train()
            order = BatchOrder(len(pixels), first.batch_size, 0)

            def loss_of(step: int) -> torch.Tensor:
                batch = processor.preprocess(pixels[order.batch_indices(step - 1)]).contiguous(
                    memory_format=torch.channels_last
                )
                output = model(batch)
                terms = reconstruction_terms(output.reconstruction, batch, first.reconstruction, None)
                return sum_weighted(terms, first.reconstruction) + output.losses["commitment"]

            return bare(model, first, loss_of, steps)

        run_tokenizer(tokenizer_inputs(replaced(first, 0), source))
        run_tokenize(folder / "0", source, folder / "codes", "indices")
        second = recipe(AutoregressiveTraining, "prior", "ar-tiny", 1, 0, codes=folder / "codes", output="p")
        codes = CodeCache(folder / "codes")

        def bare_prior() -> list[float]:
            model = AutoregressivePrior(second.prior_config(codes.spec, 10)).train()
            order = BatchOrder(len(codes.train), second.batch_size, 0)

            def loss_of(step: int) -> torch.Tensor:
                batch = order.batch_indices(step - 1)
                return model(codes.train.indices(batch), codes.train.labels(batch)).total

            return bare(model, second, loss_of, steps)

        stages: list[tuple[str, RunConfig, Callable[[RunConfig], object], Callable[[], list[float]]]] = [
            ("stage one", first, lambda config: run_tokenizer(tokenizer_inputs(config, source)), bare_tokenizer),
            ("stage two", second, run_prior, bare_prior),
        ]
        number = 1
        for name, config, train, bare_loop in stages:
            seconds: dict[str, list[float]] = {OURS: [], BARE: []}
            saves: list[float] = []
            for turn in range(rounds):
                for who in (OURS, BARE) if turn % 2 else (BARE, OURS):
                    if who == BARE:
                        seconds[BARE].append(per_step(bare_loop()))
                        continue
                    ends, saved = ours(lambda: train(replaced(config, number)))  # noqa: B023 - called at once
                    seconds[OURS].append(per_step(ends))
                    saves += saved
                    number += 1
            found = compared(seconds, ours=BARE)[OURS]
            low, high = found["quartiles"]
            between = config.checkpoint_every * found["seconds"]
            saving = statistics.median(saves) / between
            cost = f"{found['ratio'] - 1:+.1%} ({low - 1:+.1%} … {high - 1:+.1%})"
            rows.append([name, 1e3 * found["seconds"], cost, statistics.median(saves), f"{saving:.2%}"])
            figures.append({"stage": name, "loop": found, "save_seconds": saves, "saving_share": saving})
    head = ["", "ms a step", "over the bare loop (quartiles)", "seconds a checkpoint", "share of the time between two"]
    text = f"{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n{table(head, rows)}"
    return Report("loop_cost", "Cost of the training loops", text, {"rows": figures})
