"""Search over the settings of a stage: Optuna suggests values, short trials train with them, and weak trials stop early.

    OUTPUT/best.yaml     the best settings as a recipe
    OUTPUT/trials.csv    one row per trial
    OUTPUT/trials/NNN/   one run folder per trial

The first trial has the recipe's values where the search space contains them, so the best trial is at least as good.
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
from latentloom.search.results import (
    TrialResult,
    describe_trial,
    find_best_trial,
    format_best_trials,
    write_recipe,
    write_trials,
)
from latentloom.search.space import replace_values
from latentloom.search.study import (
    FAILURE_REASON,
    SearchPlan,
    is_resumable,
    map_journal_names,
    open_study,
    read_results,
    require_optuna,
    suggest_trial,
    write_request,
)
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.data.sources import ImageSource
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.losses.perceptual import perceptual_loss
from stage1_tokenizer.train import train_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.train import build_objective, train_prior
from stage2_prior.training_config import PriorTraining
from training_harness.errors import ConfigError, UserError
from training_harness.guard import NonFiniteLossError
from training_harness.output_lock import output_lock
from training_harness.processes import accelerated_device, number_of_processes, print_once
from training_harness.signals import Interrupted

if TYPE_CHECKING:
    import optuna

OnValidation = Callable[[int, float], None]
TrainTrial = Callable[[Any, OnValidation], object]
"""Trains a configuration, and calls `on_validation` with each validated step and its objective; lower is better."""


class TrialPruned(Exception):  # noqa: N818 - a result of the search, not a failure of the program
    """The trial is worse than the median of the earlier ones."""


class TimeLimitReached(Exception):  # noqa: N818 - as above
    """The minutes of the search are over."""


def run_sweep(plan: SearchPlan, prepare: Callable[[], TrainTrial]) -> list[TrialResult]:
    """Run the remaining trials, and write the results after each.

    Args:
        prepare: reads the training data of all trials, and returns the function that trains one trial.

    Raises:
        Interrupted: a signal stopped the search; the trials that have ended are kept.
    """
    require_optuna()
    if number_of_processes() > 1:
        raise UserError("a search was launched in several processes; expected one. Run it without accelerate launch")
    with output_lock(plan.folder):
        return _run_trials(plan, prepare)


def _run_trials(plan: SearchPlan, prepare: Callable[[], TrainTrial]) -> list[TrialResult]:
    results = read_results(open_study(plan), plan) if is_resumable(plan) else []
    if len(results) >= plan.trials:
        print_once(f"{plan.folder} has finished its {len(results)} trials; pass a larger --trials to go on")
        write_search_results(plan, results)
        return results
    train = prepare()  # before anything is written: an error leaves no files
    write_request(plan)
    search_space = " ".join(f"'{parameter.field}={parameter.spec}'" for parameter in plan.space)
    print_once(f"{plan.trials} trials of {plan.steps} steps, {len(results)} of them done, over {search_space}")
    study = open_study(plan)
    deadline = time.monotonic() + (math.inf if plan.minutes is None else 60 * plan.minutes)
    try:
        while len(results) < plan.trials:
            if time.monotonic() > deadline:
                raise TimeLimitReached
            run_trial(plan, study, train, len(results) + 1, deadline)
            results = read_results(study, plan)
            write_search_results(plan, results)
            print_once(describe_trial(results[-1], plan.metric, plan.trials, plan.steps, find_best_trial(results)))
    except TimeLimitReached:
        advice = (
            "run the same command again to go on"
            if find_best_trial(results)
            else "pass more --minutes or fewer --max-steps"
        )
        print_once(f"{plan.minutes:g} minutes were over after {len(results)} of {plan.trials} trials; {advice}")
    except (Interrupted, KeyboardInterrupt) as interruption:
        number = getattr(interruption, "signal_number", signal.SIGINT)
        best = f"; the best so far is in {plan.folder / 'best.yaml'}" if find_best_trial(results) else ""
        raise Interrupted(
            number,
            f"stopped by {signal.Signals(number).name} after {len(results)} of {plan.trials} trials{best}; run the same command "
            "again to go on",
        ) from None
    return results


def run_trial(plan: SearchPlan, study: "optuna.Study", train: TrainTrial, number: int, deadline: float) -> None:
    """Train one trial, and record it in the journal as finished, pruned or failed.

    A trial that ends by another exception stays open, and the next search in this folder repeats it.
    """
    from optuna.trial import TrialState

    trial = suggest_trial(plan, study, number)
    objectives: list[float] = []

    def on_validation(step: int, objective: float) -> None:
        if not math.isfinite(objective):
            raise NonFiniteLossError(f"step {step}: the validation metric is {objective}")
        objectives.append(objective)
        trial.report(objective, step)
        if step < plan.steps:
            if trial.should_prune():
                raise TrialPruned
            if time.monotonic() > deadline:
                raise TimeLimitReached

    shutil.rmtree(plan.trial_folder(number), ignore_errors=True)  # of an interrupted trial
    try:
        journal_names = map_journal_names(plan, study)
        values = {p.field: p.to_config_value(trial.params[journal_names[p.field]]) for p in plan.space}
        train(plan.trial_config(number, values), on_validation)
    except TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except (ConfigError, NonFiniteLossError, torch.OutOfMemoryError) as error:
        trial.set_user_attr(FAILURE_REASON, str(error).split("; expected")[0].splitlines()[0])
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, min(objectives))
    finally:
        gc.collect()  # networks and their accelerator refer to each other: a GPU would hold the networks of two trials


def write_search_results(plan: SearchPlan, results: Sequence[TrialResult]) -> None:
    """Write the results so far, and remove models, samples and checkpoints of all trials except the best one."""
    best = find_best_trial(results)
    write_trials(plan.folder / "trials.csv", results, plan.metric, plan.space)
    if best is not None:
        header = (
            f"latentloom sweep: {plan.metric.format_value(best.objective)} in validation within {plan.steps} steps: "
            f"trial {best.number}, "
            f"the best of {len(results)}, seed {plan.base.seed}.",
            f"max_steps is the recipe's. {plan.steps} steps favour high learning rates and small models: compare a longer run.",
        )
        write_recipe(plan.folder / "best.yaml", replace_values(plan.base, dict(best.values)), header)
    for number in range(1, len(results) + 1):
        if best is None or number != best.number:
            for name in ("checkpoints", "model", "samples"):
                shutil.rmtree(plan.trial_folder(number) / name, ignore_errors=True)


def format_results(plan: SearchPlan, results: Sequence[TrialResult]) -> str:
    """Format the best trials and the number of trials of each outcome.

    Raises:
        UserError: no trial finished.
    """
    if find_best_trial(results) is None:
        reason = f"; the last one failed: {results[-1].reason}" if results and results[-1].reason else ""
        raise UserError(
            f"none of {len(results)} trials finished{reason}; expected at least one. "
            "Narrow --search, or pass more --trials or --minutes"
        )
    counts = ", ".join(f"{sum(r.outcome == name for r in results)} {name}" for name in ("finished", "pruned", "failed"))
    return f"{format_best_trials(results, plan.metric)}\n{len(results)} trials of {plan.steps} steps: {counts}"


# -- training data of a stage, read once for all trials ------------------------------------------------------------


def build_prior_trainer(base: PriorTraining, codes: CodeCache) -> TrainTrial:
    """Return a function that trains a prior on `codes`."""
    codes.verify()
    build_objective(base, codes)  # an invalid recipe fails before the first trial
    return lambda config, on_validation: train_prior(config, codes, None, on_validation)


def build_tokenizer_trainer(base: TokenizerTraining, source: ImageSource) -> TrainTrial:
    """Return a function that trains a tokenizer on the images of `source`."""
    statistics = dataset_statistics(source.train)
    # All trials share the images, because their size and channels depend on the data and not on the model.
    images = tokenizer_inputs(base, source, statistics).images
    perceptual = perceptual_loss(base.perceptual)
    perceptual = perceptual and perceptual.to(accelerated_device())
    images.train.report_skipped()

    def train_trial(config: TokenizerTraining, on_validation: OnValidation) -> object:
        inputs = tokenizer_inputs(config, source, statistics)
        return train_tokenizer(inputs.config, inputs.model, images.train, images.validation, perceptual, on_validation)

    return train_trial
