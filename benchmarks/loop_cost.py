"""Cost of the training loops compared with bare loops of the same models, and cost of a checkpoint.

The bare loop has the forward and backward pass, gradient clipping, the optimizer step and the moving average of the weights,
on the same batches and with the same matmul precision. Our loop also checks for non-finite numbers, logs, counts, handles
signals and can resume after a kill. A round runs both for the same number of steps. The first steps are not timed. The share of
a checkpoint is its time relative to the time between two checkpoints at the default interval.
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
from frame import OURS, Report, compare_times, load_recipe, markdown_table

from latentloom.data.embedded import FASHION_MNIST
from latentloom.jobs.stages import load_source, run_prior, run_tokenize, run_tokenizer
from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.losses.reconstruction import reconstruction_terms, sum_weighted
from stage1_tokenizer.training_config import TokenizerTraining, build_model_config, complete_config
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


def run_bare_loop(
    model: torch.nn.Module, config: Any, compute_loss: Callable[[int], torch.Tensor], steps: int
) -> list[float]:
    """Train in a bare loop; return the time at the end of each step."""
    optimizer, ema, ends = build_optimizer(model, config.optimizer), EMA(model, config.ema), []
    with reduced_matmul_precision(accelerated_device(), enabled=True):
        for step in range(1, steps + 1):
            set_learning_rate(optimizer, config.schedule.at(step, steps))
            compute_loss(step).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(step)
            ends.append(time.perf_counter())
    return ends


def record_our_loop(train: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Run our loop; return the time at the end of each step and the seconds of each checkpoint."""
    ends, saves = list[float](), list[float]()
    log, checkpoint = Run.log, Run.checkpoint

    def timed_log(run: Run, *arguments: Any) -> None:
        log(run, *arguments)
        ends.append(time.perf_counter())

    def timed_checkpoint(run: Run, step: int) -> None:
        begin = time.perf_counter()
        checkpoint(run, step)
        saves.append(time.perf_counter() - begin)

    with mock.patch.object(Run, "log", timed_log), mock.patch.object(Run, "checkpoint", timed_checkpoint):
        train()
    return ends, saves


def seconds_per_step(ends: list[float]) -> float:
    """Return the mean seconds of a step without the first steps."""
    return (ends[-1] - ends[WARM_UP]) / (len(ends) - 1 - WARM_UP)


def run(quick: bool) -> Report:
    steps, rounds = (25, 1) if quick else (120, 7)
    source, rows, results = load_source(FASHION_MNIST), [], []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def shorten(config: Any, number: int) -> Any:
            fields = {"output": folder / str(number), "sample_every": 10**9, "checkpoint_every": 10**9}
            return dataclasses.replace(config, max_steps=steps, **fields)

        image_statistics = dataset_statistics(source.train)
        tokenizer_config = complete_config(
            load_recipe(TokenizerTraining, "tokenizer", "vqgan-f4", 1, 0, data=FASHION_MNIST, output="t"),
            image_statistics,
        )
        tokenizer_model = build_model_config(tokenizer_config, image_statistics)
        pixels, processor = ImageLoader(source.train, tokenizer_model.image_processor), tokenizer_model.image_processor

        def bare_tokenizer() -> list[float]:
            model = VQGAN(tokenizer_model).to(memory_format=torch.channels_last).train()
            order = BatchOrder(len(pixels), tokenizer_config.batch_size, 0)

            def compute_loss(step: int) -> torch.Tensor:
                batch = processor.preprocess(pixels[order.batch_indices(step - 1)]).contiguous(
                    memory_format=torch.channels_last
                )
                output = model(batch)
                terms = reconstruction_terms(output.reconstruction, batch, tokenizer_config.reconstruction, None)
                return sum_weighted(terms, tokenizer_config.reconstruction) + output.losses["commitment"]

            return run_bare_loop(model, tokenizer_config, compute_loss, steps)

        run_tokenizer(tokenizer_inputs(shorten(tokenizer_config, 0), source))
        run_tokenize(folder / "0", source, folder / "codes", "indices")
        prior_config = load_recipe(AutoregressiveTraining, "prior", "ar-tiny", 1, 0, codes=folder / "codes", output="p")
        codes = CodeCache(folder / "codes")

        def bare_prior() -> list[float]:
            model = AutoregressivePrior(prior_config.prior_config(codes.spec, 10)).train()
            order = BatchOrder(len(codes.train), prior_config.batch_size, 0)

            def compute_loss(step: int) -> torch.Tensor:
                batch = order.batch_indices(step - 1)
                return model(codes.train.indices(batch), codes.train.labels(batch)).total

            return run_bare_loop(model, prior_config, compute_loss, steps)

        stages: list[tuple[str, RunConfig, Callable[[RunConfig], object], Callable[[], list[float]]]] = [
            (
                "stage one",
                tokenizer_config,
                lambda config: run_tokenizer(tokenizer_inputs(config, source)),
                bare_tokenizer,
            ),
            ("stage two", prior_config, run_prior, bare_prior),
        ]
        number = 1
        for name, config, train, bare_loop in stages:
            seconds: dict[str, list[float]] = {OURS: [], BARE: []}
            saves: list[float] = []
            for turn in range(rounds):
                for contender in (OURS, BARE) if turn % 2 else (BARE, OURS):
                    if contender == BARE:
                        seconds[BARE].append(seconds_per_step(bare_loop()))
                        continue
                    ends, saved = record_our_loop(lambda: train(shorten(config, number)))  # noqa: B023 - called at once
                    seconds[OURS].append(seconds_per_step(ends))
                    saves += saved
                    number += 1
            times = compare_times(seconds, reference=BARE)[OURS]
            low, high = times["quartiles"]
            interval_seconds = config.checkpoint_every * times["seconds"]
            saving = statistics.median(saves) / interval_seconds
            cost = f"{times['ratio'] - 1:+.1%} ({low - 1:+.1%} … {high - 1:+.1%})"
            rows.append([name, 1e3 * times["seconds"], cost, statistics.median(saves), f"{saving:.2%}"])
            results.append({"stage": name, "loop": times, "save_seconds": saves, "saving_share": saving})
    head = [
        "",
        "ms per step",
        "over the bare loop (quartiles)",
        "seconds per checkpoint",
        "share of the time between two",
    ]
    text = f"{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n{markdown_table(head, rows)}"
    return Report("loop_cost", "Cost of the training loops", text, {"rows": results})
