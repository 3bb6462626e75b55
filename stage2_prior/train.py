"""Training loop of stage two: trains a prior on a code cache."""

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
"""Decodes samples of a prior and saves them as an image at a path. All processes call it; this package never handles pixels."""


class TokenizerIdState:
    """Stores the tokenizer id in each checkpoint, so that a run cannot continue with codes of another tokenizer."""

    def __init__(self, codes: CodeCache) -> None:
        self.path, self.tokenizer_id = codes.path, codes.spec.tokenizer_id

    def state_dict(self) -> dict[str, Any]:
        return {"tokenizer_id": self.tokenizer_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["tokenizer_id"] != self.tokenizer_id:
            raise SpecMismatchError(
                f"{self.path} has codes of the tokenizer {self.tokenizer_id} and the run was trained on codes of "
                f"{state['tokenizer_id']}; expected the same tokenizer. Pass another `--output` to train on these codes."
            )


def train_prior(
    config: PriorTraining,
    codes: CodeCache,
    preview: Preview | None = None,
    on_validation: Callable[[int, float], None] | None = None,
) -> Path:
    """Train a prior in `config.output`, or resume its training.

    Args:
        config: Configuration of the run.
        codes: Code cache to train on.
        preview: Saves an image of samples at each validation.
        on_validation: Called with the step and the validation loss at each validation. An exception in it ends the run.

    Returns:
        The folder of the trained model.
    """
    objective = build_objective(config, codes)  # raises errors before a folder is created
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
    run.track(model=model, ema=ema, optimizer=optimizer, codes=TokenizerIdState(codes))
    order = BatchOrder(
        len(codes.train), config.batch_size, config.seed, accelerator.process_index, accelerator.num_processes
    )
    run.source_ids = lambda step: codes.train.source_ids(order.step_indices(step, config.accumulation_steps))

    if run.step == 0:
        for warning in objective.list_warnings():
            run.warn(0, "codes", warning)
    warned = False
    for step in run.steps(config.batch_size, "prior"):
        set_learning_rate(optimizer, config.schedule.at(step, config.max_steps))
        for number in order.batch_numbers(step, config.accumulation_steps):
            rows = order.batch_indices(number)
            uniform = torch.from_numpy(order.random_numbers(number, objective.num_random))
            inputs = [
                x if x is None else x.to(accelerator.device) for x in objective.prepare_inputs(rows, uniform, step)
            ]
            with accelerator.accumulate(model):
                loss = model(*inputs)  # a call of forward, since DDP has hooks on nothing else
                accelerator.backward(loss.total)
                run.optimizer_step(step, optimizer, model, loss.terms, config.optimizer.max_grad_norm)
        ema.update(step)
        run.log(step, loss.terms | {"learning_rate": optimizer.param_groups[0]["lr"]})
        if run.is_due(step, config.sample_every):
            averaged = ema.gather_model()
            metrics = objective.validate(averaged)
            validation_loss = next(iter(metrics.values()))
            run.log_row(step, metrics)
            run.record_validation(step, validation_loss)
            if not warned and run.best:
                message = overfitting_message(validation_loss, run.best["value"], int(run.best["step"]))
                if message:
                    run.warn(step, "validation", message)
                    warned = True
            if preview is not None:
                preview(averaged, run.samples_path(step))
                run.log_samples(step)
        if run.is_checkpoint_due(step):
            run.checkpoint(step)

    folder, averaged = run.folder / "model", ema.gather_model()
    if accelerator.is_main_process:
        with update_folder(folder, last="config.json") as temporary_folder:
            averaged.save_pretrained(temporary_folder)
            write_card(folder, temporary_folder, prior_card(averaged, run.log_file.path))
    accelerator.wait_for_everyone()
    return folder


def build_objective(config: PriorTraining, codes: CodeCache) -> Objective:
    """Create the objective for a configuration; raises UserError when the codes do not fit it."""
    if isinstance(config, DiffusionTraining):
        return DiffusionObjective(config, codes)
    return AutoregressiveObjective(config, codes)
