"""A search over settings: what it reads, draws, gives up, survives and leaves behind."""

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
from latentloom.search.space import Choices, Range, default_words, own_values, parse_space
from latentloom.search.study import Plan, open_study
from latentloom.search.sweep import prior_trainer, run_sweep
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.codes.writer import write_code_cache
from stage1_tokenizer.data.image_processor import ImageProcessor
from stage1_tokenizer.quantizers import SimVQConfig
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.training_config import AutoregressiveModel, AutoregressiveTraining, prior_training
from training_harness.configuration import from_mapping, read_yaml, to_mapping
from training_harness.errors import ConfigError, UserError
from training_harness.guard import NonFiniteLossError
from training_harness.metric_log import read_metrics
from training_harness.signals import Interrupted

Told = Callable[[int, float], None]

SMALL = AutoregressiveModel(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48)
PRIOR = AutoregressiveTraining(output=Path("search"), codes=Path("codes"), model=SMALL, max_steps=40, batch_size=4)
TOKENIZER = TokenizerTraining(output=Path("search"), data="pictures")
RATE, DROPOUT = "optimizer.learning_rate", "model.dropout"
WORDS = (f"{RATE}=1e-5..1e-1", f"{DROPOUT}=0..0.5", "model.num_layers=1|2|4")
STEPS = 16


@pytest.fixture(autouse=True)
def without_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for what is left of each trial takes longer than a trial that trains nothing."""
    monkeypatch.setattr("latentloom.search.sweep.gc", SimpleNamespace(collect=lambda: 0))


# -- words ----------------------------------------------------------------------------------------------------------

READ = {
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


@pytest.mark.parametrize(("word", "parameter"), READ.items(), ids=READ.keys())
def test_a_word_is_read_with_the_type_of_its_field(word: str, parameter: Range | Choices) -> None:
    (found,) = parse_space([word], PRIOR)
    assert found == parameter
    ends = (found.low, found.high) if isinstance(found, Range) else found.values
    expected = (parameter.low, parameter.high) if isinstance(parameter, Range) else parameter.values
    assert [type(end) for end in ends] == [type(end) for end in expected]  # 0 == 0.0 == False


@pytest.mark.parametrize(
    ("low", "high", "logarithmic"),
    [(1e-4, 1e-3, True), (1e-4, 9e-4, False), (0.0, 1.0, False), (-1.0, 1.0, False), (1, 100, False)],
)
def test_floats_are_drawn_by_their_logarithm_from_a_factor_of_ten_on(
    low: float, high: float, logarithmic: bool
) -> None:
    assert Range("x", low, high).logarithmic == logarithmic


rates = st.floats(min_value=1e-12, max_value=1e6)
ends_of_rates = st.lists(rates, min_size=2, max_size=2, unique=True).map(sorted)
ends_of_counts = st.lists(st.integers(1, 2**31), min_size=2, max_size=2, unique=True).map(sorted)


@given(ends_of_rates, ends_of_counts, st.lists(st.integers(1, 99), min_size=2, unique=True))
def test_what_a_search_file_says_of_a_parameter_reads_back_as_the_same(
    floats: list[float], whole: list[int], choices: list[int]
) -> None:
    wanted = (
        Choices("model.hidden_size", tuple(map(str, choices)), tuple(choices)),
        Range("model.num_layers", *whole),
        Range(RATE, *floats),
    )
    assert parse_space([f"{p.field}={p.spec}" for p in wanted], PRIOR) == wanted


@given(ends_of_rates, st.floats(0, 1))
def test_six_digits_of_what_was_drawn_stay_in_the_range(ends: list[float], share: float) -> None:
    low, high = ends
    drawn = min(max(low + share * (high - low), low), high)
    value = Range("x", low, high).value_of(drawn)
    assert low <= value <= high
    assert value == pytest.approx(drawn, rel=1e-5)
    assert value in (low, high) or value == float(f"{value:.6g}")


REFUSED = {
    "no value": ("model.dropout", "'model.dropout'", "FIELD=LOW..HIGH"),
    "one value": ("model.dropout=0.1", "'model.dropout=0.1'", "FIELD=LOW..HIGH"),
    "no field": ("=0..1", "'=0..1'", "write it as in"),
    "an empty choice": ("model.num_layers=2||4", "'model.num_layers=2||4'", "FIELD=ONE|TWO"),
    "no YAML": ("optimizer.betas=[1|2", "'optimizer.betas=[1|2'", "FIELD=ONE|TWO"),
    "a misspelt field": ("model.num_layer=2|4", "'model.num_layer'", "did you mean 'model.num_layers'?"),
    "a field without its section": ("learning_rate=1e-4..1e-2", "'learning_rate'", f"did you mean '{RATE}'?"),
    "a section": ("schedule=1|2", "'schedule'", "did you mean 'schedule."),
    "words for a number": ("model.num_layers=two|four", "model.num_layers is 'two'", "expected int"),
    "floats for whole numbers": ("model.num_layers=1.5..3", "model.num_layers is 1.5", "expected int"),
    "numbers for a choice": ("optimizer.name=1..2", "optimizer.name is 1", "expected one of: adamw, muon"),
    "a name that is no choice": ("optimizer.name=adam|muon", "optimizer.name is 'adam'", "did you mean 'adamw'?"),
    "a value that is refused": (f"{RATE}=-1..1", f"{RATE} is -1.0", "expected a positive rate"),
    "ends the wrong way round": (f"{DROPOUT}=0.5..0.1", "0.5..0.1", "first end is the lower one"),
    "an infinite end": (f"{RATE}=1..1e999", "1..1e999", "expected a finite range"),
    "a choice twice": (f"{RATE}=1e-3|0.001", "1e-3|0.001", "leave one out"),
    "the steps": ("max_steps=10..20", "max_steps, which --max-steps sets", "such as optimizer.learning_rate"),
    "the folder": ("output=a|b", "output, which is the same for all trials", "such as optimizer.learning_rate"),
    "what is measured on": ("validation_images=10|20", "validation_images, which decides", "expected a setting"),
    "what is not measured": ("sampling.top_p=0.5..1", "no part in the validation figure", "expected a setting"),
}


@pytest.mark.parametrize(("word", "found", "remedy"), REFUSED.values(), ids=REFUSED.keys())
def test_a_word_that_does_not_fit_is_one_line(word: str, found: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_space([word], PRIOR)
    line = error_message(error)
    assert found in line
    assert remedy in line


def test_a_field_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.dropout twice"):
        parse_space([f"{DROPOUT}=0..0.1", f"{DROPOUT}=0..0.2"], PRIOR)


@pytest.mark.parametrize("stage", ["prior", "tokenizer"])
def test_where_nothing_is_asked_for_the_search_holds_each_recipe_and_goes_a_factor_of_four_either_side(
    stage: str,
) -> None:
    places = {"output": "search"} | ({"codes": "codes"} if stage == "prior" else {"data": "pictures"})
    for name in recipe_names(stage):
        values = recipe_values(name, stage) | places
        base = prior_training(values) if stage == "prior" else from_mapping(TokenizerTraining, values)
        space = parse_space(default_words(base), base)
        assert set(own_values(space, base)) == {p.field for p in space}, name
        rate = next(p for p in space if p.field == RATE)
        assert isinstance(rate, Range)
        assert (rate.low, rate.high) == pytest.approx(
            (base.optimizer.learning_rate / 4, base.optimizer.learning_rate * 4)
        )
        assert ("optimizer.matrix_learning_rate" in {p.field for p in space}) == (base.optimizer.name == "muon")


# -- searches that train nothing ------------------------------------------------------------------------------------


def plan_in(folder: Path, words: tuple[str, ...] = WORDS, trials: int = 12, seed: int = 0, **fields: Any) -> Plan:
    base = replace(PRIOR, output=folder, seed=seed)
    space = parse_space(words, base)
    return Plan(base=base, space=space, metric=METRICS["autoregressive"], steps=STEPS, trials=trials, **fields)


def bowl(config: AutoregressiveTraining) -> float:
    """Least at a rate of 1e-3 and a dropout of 0.2."""
    return (math.log10(config.optimizer.learning_rate) + 3) ** 2 + (config.model.dropout - 0.2) ** 2


def pretend(config: AutoregressiveTraining, told: Told) -> None:
    """Falls towards the bowl, validation by validation."""
    for step in range(config.sample_every, config.max_steps + 1, config.sample_every):
        told(step, bowl(config) + 1 / step)


def search(plan: Plan, train: Callable[[Any, Told], object] = pretend) -> list[tuple[Any, ...]]:
    """What each trial was and gave, without how long it took."""
    return [(dict(r.values), r.outcome, r.figure, r.steps, r.reason) for r in run_sweep(plan, lambda: train)]


def test_the_same_seed_draws_the_same_values_and_another_seed_others(tmp_path: Path) -> None:
    one, again, other = (search(plan_in(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert one == again
    assert [trial[0] for trial in one[1:]] != [trial[0] for trial in other[1:]]


def test_the_first_trial_is_the_recipe_itself_and_no_other_is(tmp_path: Path) -> None:
    plan = plan_in(tmp_path / "search")
    values = [trial[0] for trial in search(plan)]
    own = {RATE: PRIOR.optimizer.learning_rate, DROPOUT: 0.0, "model.num_layers": 1}
    assert values[0] == own
    assert own not in values[1:]
    elsewhere = plan_in(tmp_path / "elsewhere", (f"{RATE}=1e-2..1e-1", f"{DROPOUT}=0..0.5"), trials=1)
    ((drawn, *_),) = search(elsewhere)
    assert drawn[RATE] >= 1e-2  # a space without the recipe's value draws one
    assert drawn[DROPOUT] == 0.0


def killed(folder: Path) -> None:
    """The search was ended while a line was being written."""
    with (folder / "study.log").open("ab") as file:
        file.write(b'{"op_code": 6, "trial_')


@pytest.mark.parametrize("stops", [(2,), (0, 1, 7)], ids=str)
def test_a_search_that_was_stopped_ends_with_the_trials_of_one_that_was_not(
    stops: tuple[int, ...], tmp_path: Path
) -> None:
    """Past the six random trials too, where the sampler and the pruner look at what came before."""
    whole = search(plan_in(tmp_path / "whole"))
    assert {outcome for _, outcome, *_ in whole} == {"finished", "pruned"}
    plan, begun = plan_in(tmp_path / "stopped"), 0

    def stopping(config: AutoregressiveTraining, told: Told, at: int) -> None:
        nonlocal begun
        if config.output == plan.trial_folder(at + 1):
            told(config.sample_every, bowl(config))  # some of it was done
            config.output.mkdir(parents=True)
            (config.output / "rest").touch()
            raise Interrupted(signal.SIGTERM, "stopped") if at else KeyboardInterrupt
        begun += 1
        pretend(config, told)

    for done, at in enumerate(stops):
        with pytest.raises(Interrupted, match=f"after {at} of 12 trials"):
            search(plan, functools.partial(stopping, at=at))
        assert (plan.folder / "best.yaml").exists() == (at > 0)
        assert (plan.trial_folder(at + 1) / "rest").exists()
        if done:
            killed(plan.folder)
    assert search(plan, functools.partial(stopping, at=99)) == whole
    assert begun == 12
    assert not list(plan.folder.glob("trials/*/rest"))


def test_a_search_killed_before_its_first_trial_does_the_recipe_once(tmp_path: Path) -> None:
    plan = plan_in(tmp_path / "search", trials=3)
    plan.folder.mkdir()
    open_study(plan).enqueue_trial(own_values(plan.space, plan.base))
    (plan.folder / "search.yaml").write_text(yaml.safe_dump(plan.request))
    assert search(plan) == search(plan_in(tmp_path / "whole", trials=3))


def test_more_trials_extend_a_finished_search(tmp_path: Path) -> None:
    search(plan_in(tmp_path / "one", trials=5))
    assert search(plan_in(tmp_path / "one", trials=9)) == search(plan_in(tmp_path / "two", trials=9))


def test_a_search_that_an_earlier_version_began_goes_on_under_the_present_names(tmp_path: Path) -> None:
    words = (f"{RATE}=1e-5..1e-1", "class_dropout=0..0.5")
    search(plan_in(tmp_path / "one", words, trials=5))
    path, journal = tmp_path / "one" / "search.yaml", tmp_path / "one" / "study.log"
    request = read_yaml(path)
    assert request.pop("format") == 2
    request["model"]["class_dropout"] = request.pop("class_dropout")
    del request["model"]["rms_norm_eps"]
    request["search"]["model.class_dropout"] = request["search"].pop("class_dropout")
    path.write_text(yaml.safe_dump(request))
    journal.write_text(journal.read_text().replace('"class_dropout"', '"model.class_dropout"'))
    whole = search(plan_in(tmp_path / "two", words, trials=9))
    assert search(plan_in(tmp_path / "one", words, trials=9)) == whole
    assert search(plan_in(tmp_path / "one", words, trials=9)) == whole  # the request is of the present format now
    with pytest.raises(ConfigError, match=r"--search has model\.class_dropout, .* expected class_dropout"):
        parse_space(["model.class_dropout=0..0.5"], PRIOR)


def test_a_search_over_variants_leaves_out_the_options_of_the_others(tmp_path: Path) -> None:
    plan = replace(plan_in(tmp_path, ()), base=TOKENIZER)
    assert isinstance(plan.trial_config(1, {"model.quantizer.name": "simvq"}).model.quantizer, SimVQConfig)
    (found,) = parse_space(["model.quantizer.name=ema|vq|simvq"], TOKENIZER)
    assert isinstance(found, Choices)


def test_a_hopeless_trial_ends_before_its_last_step_and_a_good_one_does_not(tmp_path: Path) -> None:
    told_of: dict[str, int] = {}

    def watched(config: AutoregressiveTraining, told: Told) -> None:
        for step in range(2, STEPS + 1, 2):
            told_of[config.output.name] = step
            hopeless = config.output.name == "006" or (config.output.name == "007" and step == STEPS)
            told(step, 9.0 if hopeless else 1.0 / step)

    plan = plan_in(tmp_path / "search", trials=7)
    trials = search(plan, watched)
    assert [outcome for _, outcome, *_ in trials] == ["finished"] * 5 + ["pruned", "finished"]
    assert told_of["006"] == STEPS // 4  # warm-ups are waited for
    assert trials[5][2:4] == (9.0, STEPS // 4)
    assert told_of["007"] == STEPS  # what is done has nothing left to save
    assert trials[6][2] == open_study(plan).trials[6].value == 1 / (STEPS - 2)  # its best, not its last


def test_what_goes_wrong_in_a_trial_does_not_end_the_search(tmp_path: Path) -> None:
    wrong = {
        "002": NonFiniteLossError("step 5: loss = nan; expected finite numbers; lower the rate"),
        "003": torch.OutOfMemoryError("CUDA out of memory.\nMuch more"),
        "004": ConfigError("model.hidden_size is 32 for 5 heads; expected a multiple of 20"),
    }

    def failing(config: AutoregressiveTraining, told: Told) -> None:
        if config.output.name in wrong:
            raise wrong[config.output.name]
        if config.output.name == "005":
            told(2, math.nan)
        pretend(config, told)

    plan = plan_in(tmp_path / "search", trials=6)
    trials = search(plan, failing)
    reasons = [reason for *_, reason in trials]
    assert [outcome for _, outcome, *_ in trials] == ["finished", *["failed"] * 4, "finished"]
    assert reasons[1:5] == [
        "step 5: loss = nan",
        "CUDA out of memory.",
        "model.hidden_size is 32 for 5 heads",
        "step 2: the validation figure is nan",
    ]
    with (plan.folder / "trials.csv").open() as file:
        assert [row["reason"] for row in csv.DictReader(file)] == reasons
    assert len(search(plan, failing)) == 6  # failed trials are over: none is done again


def test_an_error_of_the_program_is_not_taken_for_a_trial_that_failed(tmp_path: Path) -> None:
    def broken(config: AutoregressiveTraining, told: Told) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search(plan_in(tmp_path / "search"), broken)


def test_minutes_bound_the_search_and_the_next_one_does_the_trial_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 0.0

    def slow(config: AutoregressiveTraining, told: Told) -> None:
        nonlocal clock
        for step in range(2, STEPS + 1, 2):
            clock += 10
            told(step, bowl(config) + 1 / step)

    monkeypatch.setattr("latentloom.search.sweep.time", SimpleNamespace(monotonic=lambda: clock))
    whole = search(plan_in(tmp_path / "whole", trials=3), slow)
    assert [steps for *_, steps, _ in whole] == [STEPS] * 3
    begin = clock
    bounded = plan_in(tmp_path / "bounded", trials=3, minutes=2)  # a trial takes 80 s
    assert search(bounded, slow) == whole[:1]
    assert clock - begin == 130
    assert "2 minutes were over after 1 of 3 trials" in capsys.readouterr().out
    assert search(replace(bounded, minutes=60), slow) == whole
    begin = clock
    assert search(plan_in(tmp_path / "last", trials=3, minutes=1.25), slow) == whole[:1]
    assert clock - begin == 80  # a trial may take its last step, and none begins after it


def test_a_folder_with_another_search_or_with_anything_else_is_left_alone(tmp_path: Path) -> None:
    plan = plan_in(tmp_path / "search", trials=1)
    search(plan)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    before = hash_files(tmp_path)
    others = {
        f"search.{DROPOUT} is '0.0..0.5' there and '0.0..0.1' here": plan_in(
            plan.folder, (*WORDS[::2], f"{DROPOUT}=0..0.1")
        ),
        "seed is 0 there and 1 here": plan_in(plan.folder, seed=1),
        "trial_steps is 16 there and 17 here": replace(plan, steps=17),
        "trained_on is '' there and 'another' here": replace(plan, trained_on="another"),
        "holds no search": plan_in(tmp_path / "mine"),
    }
    for found, other in others.items():
        with pytest.raises(UserError) as error:
            search(other)
        assert found in error_message(error)
        assert "choose another --output" in error_message(error)
    assert hash_files(tmp_path) == before


# -- searches that train --------------------------------------------------------------------------------------------

SEARCH = ("sweep", "--trials", 4, "--max-steps", 8)
SMALL_PRIOR = to_mapping(replace(PRIOR, batch_size=8))
SMALL_PRIOR = {name: value for name, value in SMALL_PRIOR.items() if name not in ("output", "codes")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A code cache, some pictures, and the configuration of a small model of each stage."""
    folder = tmp_path_factory.mktemp("place")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    write_code_cache(tiny_tokenizer(), folder / "tokenizer", tiny_source(), folder / "codes")
    write_images(folder / "pictures")
    (folder / "prior.yaml").write_text(yaml.safe_dump(SMALL_PRIOR))
    model = {"channels": [8, 8], "blocks": [0, 1], "latent_channels": 4, "codebook_size": 16}
    training = {"batch_size": 4, "max_steps": 40, "resolution": 16, "adversarial": {"weight": 0.0}}
    (folder / "tokenizer.yaml").write_text(yaml.safe_dump({"model": model, **training}))
    return folder


def figures_in(folder: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(folder / "metrics.jsonl") if name in row]


def test_a_search_leaves_the_trial_of_the_least_validation_figure_as_a_recipe(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "search"
    words = (*SEARCH, "--codes", place / "codes", "--config", place / "prior.yaml", "--output", output)
    words += ("--search", f"{RATE}=1e-4..1e-1", f"{DROPOUT}=0..0.5", "--search", "model.num_heads=2|4|1", "--seed", 3)
    assert latentloom(*words) == 0
    said = capsys.readouterr().out

    name = "validation_nats_per_token"
    found = {path.name: figures_in(path, name) for path in sorted((output / "trials").iterdir())}
    with (output / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(len(figures) == 8 for figures in found.values())
    assert [float(row[name]) for row in rows] == [min(figures) for figures in found.values()]
    best = min(found, key=lambda trial: min(found[trial]))
    assert f"trial {int(best)}, the best of 4, seed 3" in (output / "best.yaml").read_text().splitlines()[0]

    recipe = AutoregressiveTraining.migration.migrate(read_yaml(output / "best.yaml"))
    assert not {"output", "codes"} & set(recipe)
    config = prior_training(recipe | {"output": "there", "codes": "codes"})
    trial = prior_training(
        AutoregressiveTraining.migration.migrate(read_yaml(output / "trials" / best / "config.yaml"))
    )
    assert (config.model, config.optimizer, config.seed) == (trial.model, trial.optimizer, trial.seed)
    assert (config.max_steps, trial.max_steps, trial.seed) == (40, 8, 3)

    kept = {path.parent.name for path in output.glob("trials/*/model")}
    assert kept == {path.parent.name for path in output.glob("trials/*/checkpoints")} == {best}
    assert not list(output.glob("trials/*/samples"))
    assert f"--config {output / 'best.yaml'}" in said.splitlines()[-1]

    before = hash_files(output)
    assert latentloom(*words) == 0
    assert "has finished its 4 trials" in capsys.readouterr().out
    del before["study.log"]
    assert {file: digest for file, digest in hash_files(output).items() if file != "study.log"} == before


def test_the_recipe_repeats_through_the_command_that_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "search"
    words = ("sweep", "--trials", 1, "--codes", place / "codes", "--config", place / "prior.yaml")
    assert latentloom(*words, "--output", output) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next: latentloom ").split()
    assert latentloom(*command, "--max-steps", 10) == 0  # a quarter of 40
    name = "validation_nats_per_token"
    assert figures_in(output / "best", name)[-1] == figures_in(output / "trials" / "001", name)[-1]


def test_a_search_does_not_go_on_with_the_codes_of_another_tokenizer(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of codes is the same by name."""
    codes = shutil.copytree(place / "codes", tmp_path / "codes")
    words = (
        "sweep",
        "--max-steps",
        2,
        "--codes",
        codes,
        "--config",
        place / "prior.yaml",
        "--output",
        tmp_path / "new",
    )
    assert latentloom(*words, "--trials", 1) == 0
    shutil.rmtree(codes)
    tiny_tokenizer(seed=1).save_pretrained(tmp_path / "tokenizer")
    write_code_cache(tiny_tokenizer(seed=1), tmp_path / "tokenizer", tiny_source(), codes)
    capsys.readouterr()
    assert latentloom(*words, "--trials", 2) == 2
    assert "trained_on is" in capsys.readouterr().err


def test_a_tokenizers_search_reads_each_picture_once_and_looks_for_the_highest_psnr(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, read = [], ImageProcessor.read
    monkeypatch.setattr(ImageProcessor, "read", lambda self, image: reads.append(1) or read(self, image))
    output = tmp_path / "search"
    words = (*SEARCH, "--trials", 3, "--data", place / "pictures", "--config", place / "tokenizer.yaml")
    words += ("--output", output, "--search", "model.channels=[8,8]|[4,8]", f"{RATE}=1e-4..1e-2")
    assert latentloom(*words) == 0
    assert len(reads) == 24
    found = {path.name: max(figures_in(path, "validation_psnr")) for path in (output / "trials").iterdir()}
    best = max(found, key=lambda trial: found[trial])
    assert len(found) == 3
    said = (output / "best.yaml").read_text().splitlines()[0]
    assert f"{found[best]:.5g} dB PSNR" in said
    assert f"trial {int(best)}, the best of 3" in said
    with (output / "trials.csv").open() as file:
        assert {f"{int(row['trial']):03d}": float(row["validation_psnr"]) for row in csv.DictReader(file)} == found
    recipe, trial = (
        TokenizerTraining.migration.migrate(read_yaml(path))
        for path in (output / "best.yaml", output / "trials" / best / "config.yaml")
    )
    config = from_mapping(TokenizerTraining, recipe | {"output": "there", "data": "here"})
    assert config.model == from_mapping(TokenizerTraining, trial).model


def test_a_trial_leaves_neither_its_network_nor_its_hold_on_signals_to_the_next(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop given up in its middle would else put signals back in the middle of another's."""
    monkeypatch.setattr("latentloom.search.sweep.gc", gc)
    monkeypatch.setattr("optuna.Trial.should_prune", lambda trial: trial.number == 0)
    train, seen = prior_trainer(PRIOR, CodeCache(place / "codes")), []

    def watched(config: AutoregressiveTraining, told: Told) -> None:
        priors = sum(type(thing) is AutoregressivePrior for thing in gc.get_objects())
        seen.append((priors, signal.getsignal(signal.SIGINT)))
        train(config, told)

    gc.collect()
    trials = search(plan_in(tmp_path / "search", trials=3), watched)
    assert [(outcome, steps) for _, outcome, _, steps, _ in trials] == [("pruned", 2), *[("finished", STEPS)] * 2]
    assert seen[0] == seen[1] == seen[2]


COMMANDS = {
    "neither stage": ("", "--codes and --data are both missing", "expected --codes"),
    "both stages": ("--codes codes --data pictures", "--codes and --data are both given", "expected --codes"),
    "a size for a prior": ("--codes codes --resolution 16", "--resolution is 16", "expected it with --data"),
    "no trials": ("--codes codes --trials 0", "--trials is 0", "expected at least 1"),
    "no steps": ("--codes codes --max-steps 0", "--max-steps is 0", "expected at least 1"),
    "no time": ("--codes codes --minutes 0", "--minutes is 0", "expected a positive number"),
    "codes that are missing": ("--codes nowhere", "nowhere", "latentloom tokenize"),
    "a word that does not fit": ("--codes codes --search model.dropout=0", "'model.dropout=0'", "FIELD=LOW..HIGH"),
    "an unknown field": ("--codes codes --search model.drop_out=0..1", "'model.drop_out'", "'model.dropout'"),
    "a tokenizer's field": ("--codes codes --search reconstruction.l1=0|1", "'reconstruction.l1'", "expected one of"),
    "a recipe that is refused": ("--codes codes --config heads.yaml", "for 5 heads", "expected a multiple"),
}


@pytest.mark.parametrize(("words", "found", "remedy"), COMMANDS.values(), ids=COMMANDS.keys())
def test_a_search_that_cannot_be_is_refused_in_one_line_before_anything_is_written(
    words: str,
    found: str,
    remedy: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    (place / "heads.yaml").write_text("model: {num_heads: 5}")
    before = hash_files(place)
    assert latentloom("sweep", "--output", "new", *words.split()) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert found in line
    assert remedy in line
    assert hash_files(place) == before


def test_a_search_in_which_nothing_finished_says_why(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*SEARCH, "--codes", place / "codes", "--config", place / "prior.yaml", "--output", tmp_path / "search")
    assert latentloom(*words, "--search", "model.num_heads=3|5") == 2
    line = capsys.readouterr().err
    assert "none of 4 trials finished" in line
    assert "model.hidden_size is 32 for" in line
    assert not (tmp_path / "search" / "best.yaml").exists()


def test_without_optuna_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the codes are looked for: they may take long to read."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert latentloom("sweep", "--codes", tmp_path / "nowhere", "--output", tmp_path / "search") == 2
    assert 'run: pip install "latentloom[sweep]"' in capsys.readouterr().err
    assert not (tmp_path / "search").exists()
