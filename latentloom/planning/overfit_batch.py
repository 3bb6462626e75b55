"""`--overfit-batch`: train on one batch only, to check the set-up.

A network that cannot memorize a few images will not learn a data set: then the images, the loss or the learning rate are at
fault. The check is a complete run in a folder next to the output folder, so that its images and its log can be inspected.
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
LARGEST_LOSS_RATIO = {"l2": 0.25, "nats_per_token": 0.5, "squared_error": 0.5}  # last loss / first loss


def overfit_tokenizer(inputs: TokenizerInputs) -> str:
    """Train a tokenizer on one batch; return the result as one line.

    Raises:
        UserError: the loss hardly fell, or the tokenizer is not trained.
    """
    config, model, train = inputs.config, inputs.model, inputs.source.train
    check_trainable(config)
    positions = _select_spread_positions(len(train), config.batch_size).tolist()
    images = ImageLoader(train.select(positions), model.image_processor)
    perceptual = perceptual_loss(config.perceptual)
    perceptual = perceptual and perceptual.to(accelerated_device())
    short_config = _shorten_run(config, replace(config.ema, decay=0.9))
    train_tokenizer(short_config, model, images, images, perceptual)
    return _describe_result(short_config, "l2")


def overfit_prior(config: PriorTraining) -> str:
    """Train a prior on one batch; return the result as one line.

    Raises:
        UserError: the loss hardly fell.
    """
    codes = CodeCache(config.codes)
    codes.train = codes.validation = codes.train.select(_select_spread_positions(len(codes.train), config.batch_size))
    short_config = _shorten_run(config, replace(config.ema, decay=0.9))
    if isinstance(short_config, DiffusionTraining):
        config_without_dropout: PriorTraining = replace(short_config, class_dropout=0.0)
        loss = "squared_error"
    else:
        config_without_dropout = replace(
            short_config, class_dropout=0.0, model=replace(short_config.model, dropout=0.0)
        )
        loss = "nats_per_token"
    train_prior(config_without_dropout, codes)
    return _describe_result(config_without_dropout, loss)


def _select_spread_positions(length: int, count: int) -> np.ndarray:
    """Select at most `count` evenly spaced positions of `length`, because folders list their images class by class."""
    return np.unique(np.linspace(0, length - 1, count).round().astype(np.int64))


def _shorten_run(config: Training, ema: EMAConfig) -> Training:
    """Limit the run to 300 steps in a folder of its own, and remove the folder of an earlier check."""
    folder = config.output.absolute()
    folder = folder.with_name(f"{folder.name}-overfit-batch")
    if stored_configuration(folder, config.migration) is not None:
        shutil.rmtree(folder)
    steps = min(config.max_steps, MAX_STEPS)
    every: dict[str, Any] = {"log_every": 1, "sample_every": steps, "checkpoint_every": steps, "accumulation_steps": 1}
    return replace(config, output=folder, max_steps=steps, ema=ema, **every)


def _describe_result(config: RunConfig, loss: str) -> str:
    """Compare the first and the last logged value of `loss`; raise UserError when it hardly fell."""
    values = [row[loss] for row in read_metrics(config.output / "metrics.jsonl") if loss in row]
    first, last = values[0], values[-1]
    result = f"{loss} fell from {first:.4g} to {last:.4g} in {config.max_steps} steps on one batch ({last / first:.0%})"
    if last > LARGEST_LOSS_RATIO[loss] * first:
        raise UserError(
            f"{result}; expected at most {LARGEST_LOSS_RATIO[loss]:.0%} of it, because a network should memorize one batch. "
            f"Look at {config.output}, and try another --optimizer.learning-rate or more --max-steps"
        )
    return f"{result}: the set-up can learn; images and log of the check: {config.output}"
