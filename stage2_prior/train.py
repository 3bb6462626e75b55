"""Stage two: trains a prior on a code cache."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.autoregressive.orders import drawn_orders
from stage2_prior.codes import CodeCache, CodeSplit
from stage2_prior.conditioning import without_some
from stage2_prior.health import turned
from stage2_prior.model_card import prior_card
from stage2_prior.training_config import PriorTraining
from training_harness.batch_order import BatchOrder
from training_harness.ema import EMA
from training_harness.errors import SpecMismatchError, UserError
from training_harness.files import whole_folder, write_text
from training_harness.optimization import build_optimizer, set_learning_rate
from training_harness.processes import mean_over_processes, share_of
from training_harness.run import Run

Preview = Callable[[AutoregressivePrior, Path], None]
"""Decodes samples of a prior and saves them at a path, all processes together: this stage knows no pixels."""


class TrainedOn:
    """Goes into each checkpoint, so that no run goes on with another tokenizer's codes."""

    def __init__(self, codes: CodeCache) -> None:
        self.path, self.tokenizer_id = codes.path, codes.spec.tokenizer_id

    def state_dict(self) -> dict[str, Any]:
        return {"tokenizer_id": self.tokenizer_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["tokenizer_id"] != self.tokenizer_id:
            raise SpecMismatchError(
                f"{self.path} holds codes of the tokenizer {self.tokenizer_id} and the run was trained on those of "
                f"{state['tokenizer_id']}; expected the same; choose another --output to train on these"
            )


def train_prior(
    config: PriorTraining,
    codes: CodeCache,
    preview: Preview | None = None,
    on_validation: Callable[[int, float], None] | None = None,
) -> Path:
    """Trains, or goes on training, in `config.output`; returns the folder of the finished model.

    `on_validation` is called with each step that is validated and its nats a token; what it raises ends the run.
    """
    if codes.spec.codebook_size is None:
        raise UserError(
            f"the codes in {codes.path} come from a tokenizer without a codebook; expected discrete codes for an "
            "autoregressive prior; train a tokenizer that has a codebook, such as --recipe vqgan-f4"
        )
    codes.train.require("indices")
    model_config = config.model.for_spec(
        codes.spec, len(codes.label_names or ()), config.order.final
    )  # refused before a folder is made
    run = Run(config)
    run.on_validation = on_validation or run.on_validation
    accelerator = run.accelerator
    prior = AutoregressivePrior(model_config)
    prior.start_from_code_vectors(codes.code_vectors())
    if config.gradient_checkpointing:
        prior.recompute_blocks()
    optimizer = build_optimizer(prior, config.optimizer)
    ema = EMA(prior, config.ema)  # before the model is sharded
    model, optimizer = accelerator.prepare(prior, optimizer)
    ema.follow(run.unwrap(model))
    run.track(model=model, ema=ema, optimizer=optimizer, codes=TrainedOn(codes))
    order = BatchOrder(
        len(codes.train), config.batch_size, config.seed, accelerator.process_index, accelerator.num_processes
    )
    run.sources = lambda step: codes.train.source_ids(order.examples(step, config.accumulation_steps))

    warned = False
    for step in run.steps(config.batch_size, "prior"):
        set_learning_rate(optimizer, config.schedule.at(step, config.max_steps))
        for number in order.numbers(step, config.accumulation_steps):
            rows = order.batch(number)
            draws = torch.from_numpy(order.draws(number, 2 + model_config.places if config.order.ever_random else 1))
            indices = codes.train.indices(rows).to(accelerator.device)
            labels = without_some(codes.train.labels(rows), draws[:, 0], config.model.class_dropout).to(
                accelerator.device
            )
            orders = drawn_orders(draws[:, 1:].to(accelerator.device), config.order.at(step, config.max_steps))
            with accelerator.accumulate(model):
                loss = model(indices, labels, orders)  # through forward: DDP hooks nothing else
                accelerator.backward(loss.total)
                run.optimizer_step(step, optimizer, model, loss.terms, config.optimizer.max_grad_norm)
        ema.update(step)
        run.log(step, loss.terms | {"learning_rate": optimizer.param_groups[0]["lr"]})
        if run.due(step, config.sample_every):
            averaged = ema.collect()
            nats = validation_loss(averaged, codes.validation, config.validation_images)
            bits = nats / math.log(2) * codes.spec.tokens
            run.log_row(step, {"validation_nats_per_token": nats, "validation_bits_per_image": bits})
            run.judge(step, nats)
            if not warned and run.best and (text := turned(nats, run.best["value"], int(run.best["step"]))):
                run.warn(step, "validation", text)
                warned = True
            if preview is not None:
                preview(averaged, run.picture(step))
                run.show_picture(step)
        if run.checkpoint_due(step):
            run.checkpoint(step)

    folder, averaged = run.folder / "model", ema.collect()
    if accelerator.is_main_process:
        with whole_folder(folder) as beside:
            averaged.save_pretrained(beside)
            write_text(beside / "README.md", prior_card(averaged, run.log_file.path))
    accelerator.wait_for_everyone()
    return folder


@torch.no_grad()
def validation_loss(prior: AutoregressivePrior, split: CodeSplit, limit: int) -> float:
    """Nats a token on the first `limit` images of a split, of which each process takes its share."""
    positions, total = np.array(share_of(min(limit, len(split)))), 0.0
    for start in range(0, len(positions), 250):
        rows = positions[start : start + 250]
        loss = prior(split.indices(rows).to(prior.device), split.labels(rows).to(prior.device))
        total += float(loss.total) * len(rows)
    return mean_over_processes(total, len(positions))
