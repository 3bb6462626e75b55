"""A search over a stage's settings: Optuna draws them, the stage trains a short trial, hopeless trials end early.

    OUTPUT/best.yaml     the best as a recipe   trials.csv   a row for each      trials/NNN/   a run folder for each

The first trial has the recipe's own values where the space holds them, so that the best is at least as good.
"""

import gc
import math
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from latentloom.search.results import TrialResult, best_of, describe, table, write_recipe, write_trials
from latentloom.search.space import with_values
from latentloom.search.study import (
    REASON,
    Plan,
    draw,
    holds_this_search,
    journal_names,
    open_study,
    require_optuna,
    results_of,
    write_request,
)
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.data.sources import ImageSource
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.losses.perceptual import perceptual_loss
from stage1_tokenizer.train import train_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.train import objective_of, train_prior
from stage2_prior.training_config import PriorTraining
from training_harness.errors import ConfigError, UserError
from training_harness.guard import NonFiniteLossError
from training_harness.output_lock import output_lock
from training_harness.processes import accelerated_device, number_of_processes, print_once
from training_harness.signals import Interrupted

if TYPE_CHECKING:
    import optuna

Told = Callable[[int, float], None]
Train = Callable[[Any, Told], object]
"""Trains a configuration and tells each validated step with its figure, the lower the better."""


class TrialPruned(Exception):  # noqa: N818 - what was found; no error of the program
    """A trial worse than half of those before it."""


class TimeLimitReached(Exception):  # noqa: N818 - as above
    """The search may take no longer."""


def run_sweep(plan: Plan, prepare: Callable[[], Train]) -> list[TrialResult]:
    """Does the trials that are left, and writes what was found after each.

    `prepare` reads what all trials are trained on. Raises Interrupted when told to stop; what is done is kept.
    """
    require_optuna()
    if number_of_processes() > 1:
        raise UserError(
            "a search trains in one process and was launched in several; expected one; leave out accelerate launch"
        )
    with output_lock(plan.folder):
        return _run_trials(plan, prepare)


def _run_trials(plan: Plan, prepare: Callable[[], Train]) -> list[TrialResult]:
    done = results_of(open_study(plan), plan) if holds_this_search(plan) else []
    if len(done) >= plan.trials:
        print_once(f"{plan.folder} has finished its {len(done)} trials; give a larger --trials to go on")
        report(plan, done)
        return done
    train = prepare()  # before the folder is taken: what is refused leaves no trace
    write_request(plan)
    searched = " ".join(f"'{parameter.field}={parameter.spec}'" for parameter in plan.space)
    print_once(f"{plan.trials} trials of {plan.steps} steps, {len(done)} of them done, over {searched}")
    study = open_study(plan)
    deadline = time.monotonic() + (math.inf if plan.minutes is None else 60 * plan.minutes)
    try:
        while len(done) < plan.trials:
            if time.monotonic() > deadline:
                raise TimeLimitReached
            run_trial(plan, study, train, len(done) + 1, deadline)
            done = results_of(study, plan)
            report(plan, done)
            print_once(describe(done[-1], plan.metric, plan.trials, plan.steps, best_of(done)))
    except TimeLimitReached:
        again = "run the same command again to go on" if best_of(done) else "give more --minutes or fewer --max-steps"
        print_once(f"{plan.minutes:g} minutes were over after {len(done)} of {plan.trials} trials; {again}")
    except (Interrupted, KeyboardInterrupt) as stopped:
        number = getattr(stopped, "signal_number", signal.SIGINT)
        held = f"; the best so far is in {plan.folder / 'best.yaml'}" if best_of(done) else ""
        raise Interrupted(
            number,
            f"stopped by {signal.Signals(number).name} after {len(done)} of {plan.trials} trials{held}; run the same command "
            "again to go on",
        ) from None
    return done


def run_trial(plan: Plan, study: "optuna.Study", train: Train, number: int, deadline: float) -> None:
    """Leaves the trial finished, pruned or failed in the journal, and its run folder.

    A trial that anything else ends stays open, and is done again by the next search here.
    """
    from optuna.trial import TrialState

    trial = draw(plan, study, number)
    figures: list[float] = []

    def on_validation(step: int, figure: float) -> None:
        if not math.isfinite(figure):
            raise NonFiniteLossError(f"step {step}: the validation figure is {figure}")
        figures.append(figure)
        trial.report(figure, step)
        if step < plan.steps:
            if trial.should_prune():
                raise TrialPruned
            if time.monotonic() > deadline:
                raise TimeLimitReached

    shutil.rmtree(plan.trial_folder(number), ignore_errors=True)  # of a trial that was cut off
    try:
        known_as = journal_names(plan, study)
        values = {p.field: p.value_of(trial.params[known_as[p.field]]) for p in plan.space}
        train(plan.trial_config(number, values), on_validation)
    except TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except (ConfigError, NonFiniteLossError, torch.OutOfMemoryError) as error:
        trial.set_user_attr(REASON, str(error).split("; expected")[0].splitlines()[0])
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, min(figures))
    finally:
        gc.collect()  # networks and their accelerator point at one another: a GPU would hold two trials' at once


def report(plan: Plan, done: Sequence[TrialResult]) -> None:
    """Writes what was found so far; of the trials that are not the best only configuration and log are kept."""
    best = best_of(done)
    write_trials(plan.folder / "trials.csv", done, plan.metric, plan.space)
    if best is not None:
        header = (
            f"latentloom sweep: {plan.metric.show(best.figure)} in validation within {plan.steps} steps: trial {best.number}, the "
            f"best of {len(done)}, seed {plan.base.seed}.",
            f"max_steps is the recipe's again. {plan.steps} steps favour high rates and small models: compare a longer run.",
        )
        write_recipe(plan.folder / "best.yaml", with_values(plan.base, dict(best.values)), header)
    for number in range(1, len(done) + 1):
        if best is None or number != best.number:
            for name in ("checkpoints", "model", "samples"):
                shutil.rmtree(plan.trial_folder(number) / name, ignore_errors=True)


def closing(plan: Plan, done: Sequence[TrialResult]) -> str:
    """The best trials, and what to do with them; raises UserError where none finished."""
    if best_of(done) is None:
        why = f"; the last failed: {done[-1].reason}" if done and done[-1].reason else ""
        raise UserError(
            f"none of {len(done)} trials finished{why}; expected one at least; narrow --search, or give more --trials or --minutes"
        )
    counts = ", ".join(f"{sum(r.outcome == name for r in done)} {name}" for name in ("finished", "pruned", "failed"))
    return f"{table(done, plan.metric)}\n{len(done)} trials of {plan.steps} steps: {counts}"


# -- what a stage trains on, read once ------------------------------------------------------------------------------


def prior_trainer(base: PriorTraining, codes: CodeCache) -> Train:
    codes.verify()
    objective_of(base, codes)  # the recipe itself is refused before any trial
    return lambda config, told: train_prior(config, codes, None, told)


def tokenizer_trainer(base: TokenizerTraining, source: ImageSource) -> Train:
    seen = dataset_statistics(source.train)
    # The size and the channels of the images follow from the data, whatever a trial's model is.
    images = tokenizer_inputs(base, source, seen).images
    perceptual = perceptual_loss(base.perceptual)
    distance = perceptual and perceptual.to(accelerated_device())
    images.train.report_skipped()

    def one(config: TokenizerTraining, told: Told) -> object:
        trial = tokenizer_inputs(config, source, seen)
        return train_tokenizer(trial.config, trial.model, images.train, images.validation, distance, told)

    return one
