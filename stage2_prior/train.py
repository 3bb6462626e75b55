"""Stage two: trains a prior on a code cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stage1_tokenizer.codes.reader import CodeCache
from stage2_prior.autoregressive.objective import AutoregressiveObjective
from stage2_prior.diffusion.objective import DiffusionObjective
from stage2_prior.health import overfitting_message
from stage2_prior.model_card import prior_card
from stage2_prior.objective import Objective
from stage2_prior.prior import Prior
from stage2_prior.training_config import DiffusionTraining, PriorTraining
from training_harness.batch_order import BatchOrder
from training_harness.ema import EMA
from training_harness.errors import SpecMismatchError
from training_harness.files import update_folder
from training_harness.model_cards import write_card
from training_harness.optimization import build_optimizer, set_learning_rate
from training_harness.run import Run

Preview = Callable[[Prior, Path], None]
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

    `on_validation` is called with each step that is validated and its first figure; what it raises ends the run.
    """
    objective = objective_of(config, codes)  # refused before a folder is made
    run = Run(config, codes.fingerprint)
    run.on_validation = on_validation or run.on_validation
    accelerator = run.accelerator
    prior = objective.new_prior()
    if config.gradient_checkpointing:
        prior.enable_gradient_checkpointing()
    optimizer = build_optimizer(prior, config.optimizer)
    ema = EMA(prior, config.ema)  # before the model is sharded
    model, optimizer = accelerator.prepare(prior, optimizer)
    ema.set_source(run.unwrap(model))
    run.track(model=model, ema=ema, optimizer=optimizer, codes=TrainedOn(codes))
    order = BatchOrder(
        len(codes.train), config.batch_size, config.seed, accelerator.process_index, accelerator.num_processes
    )
    run.source_ids = lambda step: codes.train.source_ids(order.step_indices(step, config.accumulation_steps))

    if run.step == 0:
        for finding in objective.warnings():
            run.warn(0, "codes", finding)
    warned = False
    for step in run.steps(config.batch_size, "prior"):
        set_learning_rate(optimizer, config.schedule.at(step, config.max_steps))
        for number in order.batch_numbers(step, config.accumulation_steps):
            rows = order.batch_indices(number)
            draws = torch.from_numpy(order.random_numbers(number, objective.draws))
            inputs = [x if x is None else x.to(accelerator.device) for x in objective.inputs(rows, draws, step)]
            with accelerator.accumulate(model):
                loss = model(*inputs)  # through forward: DDP hooks nothing else
                accelerator.backward(loss.total)
                run.optimizer_step(step, optimizer, model, loss.terms, config.optimizer.max_grad_norm)
        ema.update(step)
        run.log(step, loss.terms | {"learning_rate": optimizer.param_groups[0]["lr"]})
        if run.is_due(step, config.sample_every):
            averaged = ema.gather_model()
            figures = objective.validation(averaged)
            judged = next(iter(figures.values()))
            run.log_row(step, figures)
            run.record_validation(step, judged)
            if (
                not warned
                and run.best
                and (text := overfitting_message(judged, run.best["value"], int(run.best["step"])))
            ):
                run.warn(step, "validation", text)
                warned = True
            if preview is not None:
                preview(averaged, run.samples_path(step))
                run.log_samples(step)
        if run.is_checkpoint_due(step):
            run.checkpoint(step)

    folder, averaged = run.folder / "model", ema.gather_model()
    if accelerator.is_main_process:
        with update_folder(folder, last="config.json") as beside:
            averaged.save_pretrained(beside)
            write_card(folder, beside, prior_card(averaged, run.log_file.path))
    accelerator.wait_for_everyone()
    return folder


def objective_of(config: PriorTraining, codes: CodeCache) -> Objective:
    if isinstance(config, DiffusionTraining):
        return DiffusionObjective(config, codes)
    return AutoregressiveObjective(config, codes)
