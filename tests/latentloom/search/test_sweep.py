"""The settings search: its expressions, trials, pruning, interruptions and results."""

import csv
import functools
import gc
import math
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from command_line import hash_files, latentloom
from hypothesis import given
from hypothesis import strategies as st
from small_parts import error_message, write_images
from tiny_models import tiny_source, tiny_tokenizer

from latentloom.recipes import recipe_names, recipe_values
from latentloom.search.results import METRICS
from latentloom.search.space import Choices, Range, base_optuna_values, default_expressions, parse_space
from latentloom.search.study import SearchPlan, open_study
from latentloom.search.sweep import build_prior_trainer, run_sweep
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.codes.writer import write_code_cache
from stage1_tokenizer.data.image_processor import ImageProcessor
from stage1_tokenizer.quantizers import SimVQConfig
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.training_config import AutoregressiveModel, AutoregressiveTraining, parse_prior_training
from training_harness.configuration import from_mapping, read_yaml, to_mapping
from training_harness.errors import ConfigError, UserError
from training_harness.guard import NonFiniteLossError
from training_harness.metric_log import read_metrics
from training_harness.signals import Interrupted

OnValidation = Callable[[int, float], None]

SMALL = AutoregressiveModel(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48)
PRIOR = AutoregressiveTraining(output=Path("search"), codes=Path("codes"), model=SMALL, max_steps=40, batch_size=4)
TOKENIZER = TokenizerTraining(output=Path("search"), data="images")
RATE, DROPOUT = "optimizer.learning_rate", "model.dropout"
EXPRESSIONS = (f"{RATE}=1e-5..1e-1", f"{DROPOUT}=0..0.5", "model.num_layers=1|2|4")
STEPS = 16


@pytest.fixture(autouse=True)
def skip_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip gc.collect, which takes longer than a trial that trains nothing."""
    monkeypatch.setattr("latentloom.search.sweep.gc", SimpleNamespace(collect=lambda: 0))


# -- search expressions -------------------------------------------------------------------------------------------

PARSED = {
    f"{RATE}=1e-4..1e-2": Range(RATE, 1e-4, 1e-2),
    "optimizer.learning-rate=1e-4..1e-2": Range(RATE, 1e-4, 1e-2),
    f"{DROPOUT}=0..1": Range(DROPOUT, 0.0, 1.0),
    f"{DROPOUT}=0...5": Range(DROPOUT, 0.0, 0.5),
    "model.num_layers=2..6": Range("model.num_layers", 2, 6),
    "model.num_layers=2|4|6": Choices("model.num_layers", ("2", "4", "6"), (2, 4, 6)),
    f"{RATE}=1e-4|3e-4": Choices(RATE, ("1e-4", "3e-4"), (1e-4, 3e-4)),
    "schedule.warmup=10..50": Range("schedule.warmup", 10, 50),
    "schedule.warmup=0..0.1": Range("schedule.warmup", 0.0, 0.1),
    "model.qk_norm=true|false": Choices("model.qk_norm", ("true", "false"), (True, False)),
    "optimizer.name=adamw | muon": Choices("optimizer.name", ("adamw", "muon"), ("adamw", "muon")),
    "optimizer.betas=[0.9,0.95]|[0.8,0.9]": Choices(
        "optimizer.betas", ("[0.9,0.95]", "[0.8,0.9]"), ((0.9, 0.95), (0.8, 0.9))
    ),
}


@pytest.mark.parametrize(("expression", "parameter"), PARSED.items(), ids=PARSED.keys())
def test_an_expression_is_parsed_with_the_type_of_its_field(expression: str, parameter: Range | Choices) -> None:
    (parsed,) = parse_space([expression], PRIOR)
    assert parsed == parameter
    values = (parsed.low, parsed.high) if isinstance(parsed, Range) else parsed.values
    expected = (parameter.low, parameter.high) if isinstance(parameter, Range) else parameter.values
    assert [type(value) for value in values] == [type(value) for value in expected]  # 0 == 0.0 == False


@pytest.mark.parametrize(
    ("low", "high", "is_logarithmic"),
    [(1e-4, 1e-3, True), (1e-4, 9e-4, False), (0.0, 1.0, False), (-1.0, 1.0, False), (1, 100, False)],
)
def test_a_range_of_floats_is_logarithmic_from_a_factor_of_ten(low: float, high: float, is_logarithmic: bool) -> None:
    assert Range("x", low, high).is_logarithmic == is_logarithmic


rates = st.floats(min_value=1e-12, max_value=1e6)
ends_of_rates = st.lists(rates, min_size=2, max_size=2, unique=True).map(sorted)
ends_of_counts = st.lists(st.integers(1, 2**31), min_size=2, max_size=2, unique=True).map(sorted)


@given(ends_of_rates, ends_of_counts, st.lists(st.integers(1, 99), min_size=2, unique=True))
def test_the_spec_of_a_parameter_parses_to_the_same_parameter(
    floats: list[float], integers: list[int], choices: list[int]
) -> None:
    parameters = (
        Choices("model.hidden_size", tuple(map(str, choices)), tuple(choices)),
        Range("model.num_layers", *integers),
        Range(RATE, *floats),
    )
    assert parse_space([f"{p.field}={p.spec}" for p in parameters], PRIOR) == parameters


@given(ends_of_rates, st.floats(0, 1))
def test_a_value_rounded_to_six_digits_stays_in_its_range(ends: list[float], share: float) -> None:
    low, high = ends
    optuna_value = min(max(low + share * (high - low), low), high)
    value = Range("x", low, high).to_config_value(optuna_value)
    assert low <= value <= high
    assert value == pytest.approx(optuna_value, rel=1e-5)
    assert value in (low, high) or value == float(f"{value:.6g}")


INVALID_EXPRESSIONS = {
    "no value": ("model.dropout", "'model.dropout'", "FIELD=LOW..HIGH"),
    "one value": ("model.dropout=0.1", "'model.dropout=0.1'", "FIELD=LOW..HIGH"),
    "no field": ("=0..1", "'=0..1'", "Write it as in"),
    "an empty choice": ("model.num_layers=2||4", "'model.num_layers=2||4'", "FIELD=ONE|TWO"),
    "invalid YAML": ("optimizer.betas=[1|2", "'optimizer.betas=[1|2'", "FIELD=ONE|TWO"),
    "a misspelled field": ("model.num_layer=2|4", "'model.num_layer'", "did you mean 'model.num_layers'?"),
    "a field without its section": ("learning_rate=1e-4..1e-2", "'learning_rate'", f"did you mean '{RATE}'?"),
    "a section": ("schedule=1|2", "'schedule'", "did you mean 'schedule."),
    "text for a number": ("model.num_layers=two|four", "model.num_layers is 'two'", "expected int"),
    "floats for integers": ("model.num_layers=1.5..3", "model.num_layers is 1.5", "expected int"),
    "numbers for a choice": ("optimizer.name=1..2", "optimizer.name is 1", "expected one of: adamw, muon"),
    "a name that is not a choice": ("optimizer.name=adam|muon", "optimizer.name is 'adam'", "did you mean 'adamw'?"),
    "a value that is out of range": (f"{RATE}=-1..1", f"{RATE} is -1.0", "expected a positive rate"),
    "ends in the wrong order": (f"{DROPOUT}=0.5..0.1", "0.5..0.1", "the lower end first"),
    "an infinite end": (f"{RATE}=1..1e999", "1..1e999", "expected a finite range"),
    "a choice twice": (f"{RATE}=1e-3|0.001", "1e-3|0.001", "Leave one out"),
    "the steps": ("max_steps=10..20", "max_steps, which --max-steps sets", "such as optimizer.learning_rate"),
    "the folder": ("output=a|b", "output, which is the same for all trials", "such as optimizer.learning_rate"),
    "validation data": ("validation_images=10|20", "validation_images, which decides", "expected a setting"),
    "sampling": ("sampling.top_p=0.5..1", "does not change the validation metric", "expected a setting"),
}


@pytest.mark.parametrize(
    ("expression", "problem", "advice"), INVALID_EXPRESSIONS.values(), ids=INVALID_EXPRESSIONS.keys()
)
def test_an_invalid_expression_is_refused_in_one_line(expression: str, problem: str, advice: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_space([expression], PRIOR)
    line = error_message(error)
    assert problem in line
    assert advice in line


def test_a_field_that_is_searched_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.dropout twice"):
        parse_space([f"{DROPOUT}=0..0.1", f"{DROPOUT}=0..0.2"], PRIOR)


@pytest.mark.parametrize("stage", ["prior", "tokenizer"])
def test_the_default_search_contains_each_recipe_and_spans_a_factor_of_four_around_its_rates(
    stage: str,
) -> None:
    paths = {"output": "search"} | ({"codes": "codes"} if stage == "prior" else {"data": "images"})
    for name in recipe_names(stage):
        values = recipe_values(name, stage) | paths
        base = parse_prior_training(values) if stage == "prior" else from_mapping(TokenizerTraining, values)
        space = parse_space(default_expressions(base), base)
        assert set(base_optuna_values(space, base)) == {p.field for p in space}, name
        rate = next(p for p in space if p.field == RATE)
        assert isinstance(rate, Range)
        assert (rate.low, rate.high) == pytest.approx(
            (base.optimizer.learning_rate / 4, base.optimizer.learning_rate * 4)
        )
        assert ("optimizer.matrix_learning_rate" in {p.field for p in space}) == (base.optimizer.name == "muon")


# -- searches with simulated training -----------------------------------------------------------------------------


def build_plan(
    folder: Path, expressions: tuple[str, ...] = EXPRESSIONS, trials: int = 12, seed: int = 0, **fields: Any
) -> SearchPlan:
    base = replace(PRIOR, output=folder, seed=seed)
    space = parse_space(expressions, base)
    return SearchPlan(base=base, space=space, metric=METRICS["autoregressive"], steps=STEPS, trials=trials, **fields)


def quadratic_loss(config: AutoregressiveTraining) -> float:
    """Return a loss with its minimum at a learning rate of 1e-3 and a dropout of 0.2."""
    return (math.log10(config.optimizer.learning_rate) + 3) ** 2 + (config.model.dropout - 0.2) ** 2


def simulate_training(config: AutoregressiveTraining, on_validation: OnValidation) -> None:
    """Report losses that fall towards quadratic_loss from validation to validation."""
    for step in range(config.sample_every, config.max_steps + 1, config.sample_every):
        on_validation(step, quadratic_loss(config) + 1 / step)


def run_search(
    plan: SearchPlan, train: Callable[[Any, OnValidation], object] = simulate_training
) -> list[tuple[Any, ...]]:
    """Run the search, and return the values and the result of each trial without its duration."""
    return [(dict(r.values), r.outcome, r.objective, r.steps, r.reason) for r in run_sweep(plan, lambda: train)]


def test_the_same_seed_suggests_the_same_values_and_another_seed_suggests_others(tmp_path: Path) -> None:
    first, repeated, reseeded = (
        run_search(build_plan(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == repeated
    assert [trial[0] for trial in first[1:]] != [trial[0] for trial in reseeded[1:]]


def test_only_the_first_trial_has_the_values_of_the_recipe(tmp_path: Path) -> None:
    plan = build_plan(tmp_path / "search")
    values = [trial[0] for trial in run_search(plan)]
    base_values = {RATE: PRIOR.optimizer.learning_rate, DROPOUT: 0.0, "model.num_layers": 1}
    assert values[0] == base_values
    assert base_values not in values[1:]
    outside_plan = build_plan(tmp_path / "outside", (f"{RATE}=1e-2..1e-1", f"{DROPOUT}=0..0.5"), trials=1)
    ((suggested, *_),) = run_search(outside_plan)
    assert suggested[RATE] >= 1e-2  # the range does not contain the recipe's rate
    assert suggested[DROPOUT] == 0.0


def simulate_kill(folder: Path) -> None:
    """Append half a line to the journal, as a kill during a write does."""
    with (folder / "study.log").open("ab") as file:
        file.write(b'{"op_code": 6, "trial_')


@pytest.mark.parametrize("stops", [(2,), (0, 1, 7)], ids=str)
def test_an_interrupted_search_ends_with_the_same_trials_as_an_uninterrupted_one(
    stops: tuple[int, ...], tmp_path: Path
) -> None:
    """This also holds after the six random trials, when sampler and pruner depend on the earlier trials."""
    uninterrupted = run_search(build_plan(tmp_path / "uninterrupted"))
    assert {outcome for _, outcome, *_ in uninterrupted} == {"finished", "pruned"}
    plan, trained = build_plan(tmp_path / "stopped"), 0

    def train_until(config: AutoregressiveTraining, on_validation: OnValidation, at: int) -> None:
        nonlocal trained
        if config.output == plan.trial_folder(at + 1):
            on_validation(config.sample_every, quadratic_loss(config))  # a part of the trial was trained
            config.output.mkdir(parents=True)
            (config.output / "leftover").touch()
            raise Interrupted(signal.SIGTERM, "stopped") if at else KeyboardInterrupt
        trained += 1
        simulate_training(config, on_validation)

    for stop_number, at in enumerate(stops):
        with pytest.raises(Interrupted, match=f"after {at} of 12 trials"):
            run_search(plan, functools.partial(train_until, at=at))
        assert (plan.folder / "best.yaml").exists() == (at > 0)
        assert (plan.trial_folder(at + 1) / "leftover").exists()
        if stop_number > 0:
            simulate_kill(plan.folder)
    assert run_search(plan, functools.partial(train_until, at=99)) == uninterrupted
    assert trained == 12
    assert not list(plan.folder.glob("trials/*/leftover"))


def test_a_search_killed_before_its_first_trial_runs_the_recipe_once(tmp_path: Path) -> None:
    plan = build_plan(tmp_path / "search", trials=3)
    plan.folder.mkdir()
    open_study(plan).enqueue_trial(base_optuna_values(plan.space, plan.base))
    (plan.folder / "search.yaml").write_text(yaml.safe_dump(plan.request))
    assert run_search(plan) == run_search(build_plan(tmp_path / "uninterrupted", trials=3))


def test_more_trials_extend_a_finished_search(tmp_path: Path) -> None:
    run_search(build_plan(tmp_path / "one", trials=5))
    assert run_search(build_plan(tmp_path / "one", trials=9)) == run_search(build_plan(tmp_path / "two", trials=9))


def test_a_search_of_an_earlier_version_continues_with_the_present_field_names(tmp_path: Path) -> None:
    arguments = (f"{RATE}=1e-5..1e-1", "class_dropout=0..0.5")
    run_search(build_plan(tmp_path / "one", arguments, trials=5))
    path, journal = tmp_path / "one" / "search.yaml", tmp_path / "one" / "study.log"
    request = read_yaml(path)
    assert request.pop("format") == 2
    request["model"]["class_dropout"] = request.pop("class_dropout")
    del request["model"]["rms_norm_eps"]
    request["search"]["model.class_dropout"] = request["search"].pop("class_dropout")
    path.write_text(yaml.safe_dump(request))
    journal.write_text(journal.read_text().replace('"class_dropout"', '"model.class_dropout"'))
    uninterrupted = run_search(build_plan(tmp_path / "two", arguments, trials=9))
    assert run_search(build_plan(tmp_path / "one", arguments, trials=9)) == uninterrupted
    assert (
        run_search(build_plan(tmp_path / "one", arguments, trials=9)) == uninterrupted
    )  # now the request has the present format
    with pytest.raises(ConfigError, match=r"--search has model\.class_dropout, .* expected class_dropout"):
        parse_space(["model.class_dropout=0..0.5"], PRIOR)


def test_a_search_over_quantizers_leaves_out_the_options_of_other_quantizers(tmp_path: Path) -> None:
    plan = replace(build_plan(tmp_path, ()), base=TOKENIZER)
    assert isinstance(plan.trial_config(1, {"model.quantizer.name": "simvq"}).model.quantizer, SimVQConfig)
    (parsed,) = parse_space(["model.quantizer.name=ema|vq|simvq"], TOKENIZER)
    assert isinstance(parsed, Choices)


def test_a_weak_trial_is_pruned_before_its_last_step_and_a_good_one_is_not(tmp_path: Path) -> None:
    last_steps: dict[str, int] = {}

    def record_steps(config: AutoregressiveTraining, on_validation: OnValidation) -> None:
        for step in range(2, STEPS + 1, 2):
            last_steps[config.output.name] = step
            is_weak = config.output.name == "006" or (config.output.name == "007" and step == STEPS)
            on_validation(step, 9.0 if is_weak else 1.0 / step)

    plan = build_plan(tmp_path / "search", trials=7)
    trials = run_search(plan, record_steps)
    assert [outcome for _, outcome, *_ in trials] == ["finished"] * 5 + ["pruned", "finished"]
    assert last_steps["006"] == STEPS // 4  # pruning begins after the warm-up
    assert trials[5][2:4] == (9.0, STEPS // 4)
    assert last_steps["007"] == STEPS  # a trial is not pruned at its last step
    assert trials[6][2] == open_study(plan).trials[6].value == 1 / (STEPS - 2)  # the best objective, not the last one


def test_an_error_in_a_trial_does_not_end_the_search(tmp_path: Path) -> None:
    errors = {
        "002": NonFiniteLossError("step 5: loss = nan; expected finite numbers; lower the rate"),
        "003": torch.OutOfMemoryError("CUDA out of memory.\nMuch more"),
        "004": ConfigError("model.hidden_size is 32 for 5 heads; expected a multiple of 20"),
    }

    def fail(config: AutoregressiveTraining, on_validation: OnValidation) -> None:
        if config.output.name in errors:
            raise errors[config.output.name]
        if config.output.name == "005":
            on_validation(2, math.nan)
        simulate_training(config, on_validation)

    plan = build_plan(tmp_path / "search", trials=6)
    trials = run_search(plan, fail)
    reasons = [reason for *_, reason in trials]
    assert [outcome for _, outcome, *_ in trials] == ["finished", *["failed"] * 4, "finished"]
    assert reasons[1:5] == [
        "step 5: loss = nan",
        "CUDA out of memory.",
        "model.hidden_size is 32 for 5 heads",
        "step 2: the validation metric is nan",
    ]
    with (plan.folder / "trials.csv").open() as file:
        assert [row["reason"] for row in csv.DictReader(file)] == reasons
    assert len(run_search(plan, fail)) == 6  # failed trials are not repeated


def test_an_error_of_the_program_is_raised_and_does_not_count_as_a_failed_trial(tmp_path: Path) -> None:
    def raise_program_error(config: AutoregressiveTraining, on_validation: OnValidation) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_search(build_plan(tmp_path / "search"), raise_program_error)


def test_minutes_limit_the_search_and_the_next_search_repeats_the_interrupted_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 0.0

    def train_slowly(config: AutoregressiveTraining, on_validation: OnValidation) -> None:
        nonlocal clock
        for step in range(2, STEPS + 1, 2):
            clock += 10
            on_validation(step, quadratic_loss(config) + 1 / step)

    monkeypatch.setattr("latentloom.search.sweep.time", SimpleNamespace(monotonic=lambda: clock))
    uninterrupted = run_search(build_plan(tmp_path / "uninterrupted", trials=3), train_slowly)
    assert [steps for *_, steps, _ in uninterrupted] == [STEPS] * 3
    begin = clock
    limited_plan = build_plan(tmp_path / "limited_plan", trials=3, minutes=2)  # a trial takes 80 seconds
    assert run_search(limited_plan, train_slowly) == uninterrupted[:1]
    assert clock - begin == 130
    assert "2 minutes were over after 1 of 3 trials" in capsys.readouterr().out
    assert run_search(replace(limited_plan, minutes=60), train_slowly) == uninterrupted
    begin = clock
    assert run_search(build_plan(tmp_path / "last", trials=3, minutes=1.25), train_slowly) == uninterrupted[:1]
    assert clock - begin == 80  # the trial finishes its last step, and no trial begins after it


def test_a_folder_with_another_search_or_with_other_files_is_not_changed(tmp_path: Path) -> None:
    plan = build_plan(tmp_path / "search", trials=1)
    run_search(plan)
    (tmp_path / "other_files").mkdir()
    (tmp_path / "other_files" / "notes.txt").write_text("notes")
    before = hash_files(tmp_path)
    other_plans = {
        f"search.{DROPOUT} was '0.0..0.5', now '0.0..0.1'": build_plan(
            plan.folder, (*EXPRESSIONS[::2], f"{DROPOUT}=0..0.1")
        ),
        "seed was 0, now 1": build_plan(plan.folder, seed=1),
        "trial_steps was 16, now 17": replace(plan, steps=17),
        "trained_on was '', now 'another'": replace(plan, trained_on="another"),
        "holds no search": build_plan(tmp_path / "other_files"),
    }
    for problem, other_plan in other_plans.items():
        with pytest.raises(UserError) as error:
            run_search(other_plan)
        assert problem in error_message(error)
        assert "choose another --output" in error_message(error)
    assert hash_files(tmp_path) == before


# -- searches with real training ----------------------------------------------------------------------------------

SWEEP = ("sweep", "--trials", 4, "--max-steps", 8)
SMALL_PRIOR = to_mapping(replace(PRIOR, batch_size=8))
SMALL_PRIOR = {name: value for name, value in SMALL_PRIOR.items() if name not in ("output", "codes")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a code cache, some images, and the configuration of a small model of each stage."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    write_code_cache(tiny_tokenizer(), folder / "tokenizer", tiny_source(), folder / "codes")
    write_images(folder / "images")
    (folder / "prior.yaml").write_text(yaml.safe_dump(SMALL_PRIOR))
    model = {"channels": [8, 8], "blocks": [0, 1], "latent_channels": 4, "codebook_size": 16}
    training = {"batch_size": 4, "max_steps": 40, "resolution": 16, "adversarial": {"weight": 0.0}}
    (folder / "tokenizer.yaml").write_text(yaml.safe_dump({"model": model, **training}))
    return folder


def read_metric(folder: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(folder / "metrics.jsonl") if name in row]


def test_a_search_writes_the_trial_with_the_lowest_validation_loss_as_a_recipe(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "search"
    arguments = (*SWEEP, "--codes", inputs / "codes", "--config", inputs / "prior.yaml", "--output", output)
    arguments += (
        "--search",
        f"{RATE}=1e-4..1e-1",
        f"{DROPOUT}=0..0.5",
        "--search",
        "model.num_heads=2|4|1",
        "--seed",
        3,
    )
    assert latentloom(*arguments) == 0
    printed = capsys.readouterr().out

    name = "validation_nats_per_token"
    losses_by_trial = {path.name: read_metric(path, name) for path in sorted((output / "trials").iterdir())}
    with (output / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(len(losses) == 8 for losses in losses_by_trial.values())
    assert [float(row[name]) for row in rows] == [min(losses) for losses in losses_by_trial.values()]
    best = min(losses_by_trial, key=lambda trial: min(losses_by_trial[trial]))
    assert f"trial {int(best)}, the best of 4, seed 3" in (output / "best.yaml").read_text().splitlines()[0]

    recipe = AutoregressiveTraining.migration.migrate(read_yaml(output / "best.yaml"))
    assert not {"output", "codes"} & set(recipe)
    config = parse_prior_training(recipe | {"output": "run", "codes": "codes"})
    trial = parse_prior_training(
        AutoregressiveTraining.migration.migrate(read_yaml(output / "trials" / best / "config.yaml"))
    )
    assert (config.model, config.optimizer, config.seed) == (trial.model, trial.optimizer, trial.seed)
    assert (config.max_steps, trial.max_steps, trial.seed) == (40, 8, 3)

    saved_trials = {path.parent.name for path in output.glob("trials/*/model")}
    assert saved_trials == {path.parent.name for path in output.glob("trials/*/checkpoints")} == {best}
    assert not list(output.glob("trials/*/samples"))
    assert f"--config {output / 'best.yaml'}" in printed.splitlines()[-1]

    before = hash_files(output)
    assert latentloom(*arguments) == 0
    assert "has finished its 4 trials" in capsys.readouterr().out
    del before["study.log"]
    assert {file: digest for file, digest in hash_files(output).items() if file != "study.log"} == before


def test_the_printed_command_repeats_the_best_trial(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "search"
    arguments = ("sweep", "--trials", 1, "--codes", inputs / "codes", "--config", inputs / "prior.yaml")
    assert latentloom(*arguments, "--output", output) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next: latentloom ").split()
    assert latentloom(*command, "--max-steps", 10) == 0  # a quarter of 40
    name = "validation_nats_per_token"
    assert read_metric(output / "best", name)[-1] == read_metric(output / "trials" / "001", name)[-1]


def test_a_search_does_not_continue_with_the_codes_of_another_tokenizer(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path of the code cache is the same."""
    codes = shutil.copytree(inputs / "codes", tmp_path / "codes")
    arguments = (
        "sweep",
        "--max-steps",
        2,
        "--codes",
        codes,
        "--config",
        inputs / "prior.yaml",
        "--output",
        tmp_path / "new",
    )
    assert latentloom(*arguments, "--trials", 1) == 0
    shutil.rmtree(codes)
    tiny_tokenizer(seed=1).save_pretrained(tmp_path / "tokenizer")
    write_code_cache(tiny_tokenizer(seed=1), tmp_path / "tokenizer", tiny_source(), codes)
    capsys.readouterr()
    assert latentloom(*arguments, "--trials", 2) == 2
    assert "trained_on was" in capsys.readouterr().err


def test_a_tokenizer_search_reads_each_image_once_and_maximizes_psnr(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, read = [], ImageProcessor.read
    monkeypatch.setattr(ImageProcessor, "read", lambda self, image: reads.append(1) or read(self, image))
    output = tmp_path / "search"
    arguments = (*SWEEP, "--trials", 3, "--data", inputs / "images", "--config", inputs / "tokenizer.yaml")
    arguments += ("--output", output, "--search", "model.channels=[8,8]|[4,8]", f"{RATE}=1e-4..1e-2")
    assert latentloom(*arguments) == 0
    assert len(reads) == 24
    psnr_by_trial = {path.name: max(read_metric(path, "validation_psnr")) for path in (output / "trials").iterdir()}
    best = max(psnr_by_trial, key=lambda trial: psnr_by_trial[trial])
    assert len(psnr_by_trial) == 3
    header = (output / "best.yaml").read_text().splitlines()[0]
    assert f"{psnr_by_trial[best]:.5g} dB PSNR" in header
    assert f"trial {int(best)}, the best of 3" in header
    with (output / "trials.csv").open() as file:
        assert {
            f"{int(row['trial']):03d}": float(row["validation_psnr"]) for row in csv.DictReader(file)
        } == psnr_by_trial
    recipe, trial = (
        TokenizerTraining.migration.migrate(read_yaml(path))
        for path in (output / "best.yaml", output / "trials" / best / "config.yaml")
    )
    config = from_mapping(TokenizerTraining, recipe | {"output": "run", "data": "images"})
    assert config.model == from_mapping(TokenizerTraining, trial).model


def test_a_trial_leaves_neither_its_network_nor_its_signal_handlers_to_the_next(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the loop of a pruned trial would restore its signal handlers during the next trial."""
    monkeypatch.setattr("latentloom.search.sweep.gc", gc)
    monkeypatch.setattr("optuna.Trial.should_prune", lambda trial: trial.number == 0)
    train, states = build_prior_trainer(PRIOR, CodeCache(inputs / "codes")), []

    def record_steps(config: AutoregressiveTraining, on_validation: OnValidation) -> None:
        priors = sum(type(item) is AutoregressivePrior for item in gc.get_objects())
        states.append((priors, signal.getsignal(signal.SIGINT)))
        train(config, on_validation)

    gc.collect()
    trials = run_search(build_plan(tmp_path / "search", trials=3), record_steps)
    assert [(outcome, steps) for _, outcome, _, steps, _ in trials] == [("pruned", 2), *[("finished", STEPS)] * 2]
    assert states[0] == states[1] == states[2]


INVALID_COMMANDS = {
    "neither stage": ("", "--codes and --data are both missing", "expected --codes"),
    "both stages": ("--codes codes --data images", "--codes and --data are both given", "expected --codes"),
    "a size for a prior": ("--codes codes --resolution 16", "--resolution is 16", "expected it with --data"),
    "no trials": ("--codes codes --trials 0", "--trials is 0", "expected at least 1"),
    "no steps": ("--codes codes --max-steps 0", "--max-steps is 0", "expected at least 1"),
    "no time": ("--codes codes --minutes 0", "--minutes is 0", "expected a positive number"),
    "codes that are missing": ("--codes nowhere", "nowhere", "latentloom tokenize"),
    "an invalid expression": ("--codes codes --search model.dropout=0", "'model.dropout=0'", "FIELD=LOW..HIGH"),
    "an unknown field": ("--codes codes --search model.drop_out=0..1", "'model.drop_out'", "'model.dropout'"),
    "a tokenizer's field": ("--codes codes --search reconstruction.l1=0|1", "'reconstruction.l1'", "expected one of"),
    "an invalid recipe": ("--codes codes --config heads.yaml", "for 5 heads", "expected a multiple"),
}


@pytest.mark.parametrize(("arguments", "problem", "advice"), INVALID_COMMANDS.values(), ids=INVALID_COMMANDS.keys())
def test_an_invalid_command_is_refused_in_one_line_before_anything_is_written(
    arguments: str,
    problem: str,
    advice: str,
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(inputs)
    (inputs / "heads.yaml").write_text("model: {num_heads: 5}")
    before = hash_files(inputs)
    assert latentloom("sweep", "--output", "new", *arguments.split()) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert problem in line
    assert advice in line
    assert hash_files(inputs) == before


def test_a_search_without_a_finished_trial_gives_the_reason(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        *SWEEP,
        "--codes",
        inputs / "codes",
        "--config",
        inputs / "prior.yaml",
        "--output",
        tmp_path / "search",
    )
    assert latentloom(*arguments, "--search", "model.num_heads=3|5") == 2
    line = capsys.readouterr().err
    assert "none of 4 trials finished" in line
    assert "model.hidden_size is 32 for" in line
    assert not (tmp_path / "search" / "best.yaml").exists()


def test_without_optuna_one_line_names_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check comes before the codes are opened, which may take long."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert latentloom("sweep", "--codes", tmp_path / "nowhere", "--output", tmp_path / "search") == 2
    assert 'run: pip install "latentloom[sweep]"' in capsys.readouterr().err
    assert not (tmp_path / "search").exists()
