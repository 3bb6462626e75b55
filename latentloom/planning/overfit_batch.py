"""`--overfit-batch`: trains on one batch alone, as a check of one's set-up.

A network that cannot learn a handful of images by heart will not learn many: the images, the loss or the learning rate are at
fault. The run is a whole one, beside the output folder, so its pictures and its log can be looked at.
"""

import shutil
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from latentloom.planning.step_timing import check_trainable
from latentloom.planning.tokenizer_inputs import TokenizerInputs
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.losses.perceptual import perceptual_loss
from stage1_tokenizer.train import train_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.train import train_prior
from stage2_prior.training_config import DiffusionTraining, PriorTraining
from training_harness.ema import EMAConfig
from training_harness.errors import UserError
from training_harness.metric_log import read_metrics
from training_harness.processes import accelerated_device
from training_harness.run_config import RunConfig
from training_harness.run_folder import stored_configuration

Training = TypeVar("Training", bound=TokenizerTraining | PriorTraining)
MAX_STEPS = 300
LARGEST_LOSS_RATIO = {
    "l2": 0.25,
    "nats_per_token": 0.5,
    "squared_error": 0.5,
}  # what must be left at most of a loss's first value


def overfit_tokenizer(inputs: TokenizerInputs) -> str:
    """What the check found, as a line. Raises UserError when the loss hardly fell."""
    config, model, train = inputs.config, inputs.model, inputs.source.train
    check_trainable(config)
    pixels = ImageLoader(
        train.select(_select_spread_positions(len(train), config.batch_size).tolist()), model.image_processor
    )
    perceptual = perceptual_loss(config.perceptual)
    perceptual = perceptual and perceptual.to(accelerated_device())
    short = _shorten_run(config, replace(config.ema, decay=0.9))
    train_tokenizer(short, model, pixels, pixels, perceptual)
    return _describe_result(short, "l2")


def overfit_prior(config: PriorTraining) -> str:
    """What the check found, as a line. Raises UserError when the loss hardly fell."""
    codes = CodeCache(config.codes)
    codes.train = codes.validation = codes.train.select(_select_spread_positions(len(codes.train), config.batch_size))
    short = _shorten_run(config, replace(config.ema, decay=0.9))
    if isinstance(short, DiffusionTraining):
        plain: PriorTraining = replace(short, class_dropout=0.0)
        term = "squared_error"
    else:
        plain = replace(short, class_dropout=0.0, model=replace(short.model, dropout=0.0))
        term = "nats_per_token"
    train_prior(plain, codes)
    return _describe_result(plain, term)


def _select_spread_positions(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` positions, evenly over all: folders come class by class."""
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(np.int64))


def _shorten_run(config: Training, ema: EMAConfig) -> Training:
    folder = config.output.absolute()
    folder = folder.with_name(f"{folder.name}-overfit-batch")
    if stored_configuration(folder, config.migration) is not None:  # of an earlier check
        shutil.rmtree(folder)
    steps = min(config.max_steps, MAX_STEPS)
    every: dict[str, Any] = {"log_every": 1, "sample_every": steps, "checkpoint_every": steps, "accumulation_steps": 1}
    return replace(config, output=folder, max_steps=steps, ema=ema, **every)


def _describe_result(config: RunConfig, term: str) -> str:
    values = [row[term] for row in read_metrics(config.output / "metrics.jsonl") if term in row]
    first, last = values[0], values[-1]
    found = f"{term} fell from {first:.4g} to {last:.4g} in {config.max_steps} steps on one batch ({last / first:.0%})"
    if last > LARGEST_LOSS_RATIO[term] * first:
        raise UserError(
            f"{found}; expected at most {LARGEST_LOSS_RATIO[term]:.0%} of it, since a network should learn a batch by heart; look "
            f"at {config.output}, and try another --optimizer.learning-rate or more --max-steps"
        )
    return f"{found}: the set-up can learn; its pictures and log: {config.output}"
