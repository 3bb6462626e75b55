"""A run takes the steps it should, passes over bad ones, finds its newest whole checkpoint and guards its folder."""

import itertools
import os
import random
import resource
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from small_parts import error_message
from torch import nn

from training_harness.checkpoints import newest_step
from training_harness.errors import ConfigError, UserError
from training_harness.files import write_text
from training_harness.guard import NonFiniteGuard, NonFiniteLossError, find_first_non_finite
from training_harness.metric_log import read_metrics
from training_harness.run import Run, step_seed
from training_harness.run_config import RunConfig
from training_harness.run_folder import check_run_folder


@dataclass(frozen=True, kw_only=True)
class Training(RunConfig):
    width: int = 4


def training(tmp_path: Path, **fields) -> Training:
    return Training(**{"output": tmp_path / "run", "max_steps": 4, "batch_size": 2} | fields)


def run_of(config: Training, rate: float = 0.1) -> tuple[Run, nn.Module, torch.optim.Optimizer]:
    run = Run(config)
    model = nn.Linear(3, 1)
    model, optimizer = run.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=rate))
    return run, model, optimizer


def learn(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, x: torch.Tensor, norm=0.0) -> bool:
    with run.accelerator.accumulate(model):
        loss = model(x).square().mean()
        run.accelerator.backward(loss)
        return run.optimizer_step(step, optimizer, model, {"loss": loss}, norm)


# Steps


def test_two_accumulated_halves_take_the_step_of_the_whole_batch(tmp_path):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    whole = run_of(training(tmp_path))
    before = whole[1].weight.clone()
    learn(*whole, 1, x)
    halves = run_of(training(tmp_path, accumulation_steps=2))  # the same seed: the same weights
    assert torch.equal(halves[1].weight, before)
    learn(*halves, 1, x[:4])
    assert torch.equal(halves[1].weight, before)
    learn(*halves, 1, x[4:])
    assert torch.allclose(halves[1].weight, whole[1].weight, atol=1e-6)
    assert not torch.allclose(halves[1].weight, before, atol=1e-3)


def test_a_gradient_longer_than_the_bound_is_shortened_to_it_and_nought_is_no_bound(tmp_path):
    x = 100 * torch.ones(2, 3)
    for norm, moved in ((0.5, lambda d: d == pytest.approx(0.05, rel=1e-4)), (0.0, lambda d: d > 1)):
        run, model, optimizer = run_of(training(tmp_path))
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        learn(run, model, optimizer, 1, x, norm)
        assert moved((nn.utils.parameters_to_vector(model.parameters()) - before).norm().item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_the_weights_and_the_next_one_counts_again(tmp_path, bad):
    run, model, optimizer = run_of(training(tmp_path))
    before = model.weight.clone()
    assert not learn(run, model, optimizer, 1, torch.full((2, 3), bad))
    assert torch.equal(model.weight, before)
    assert learn(run, model, optimizer, 2, torch.ones(2, 3))
    assert not torch.equal(model.weight, before)
    assert model.weight.isfinite().all()


def test_the_guard_counts_bad_steps_in_a_row_and_names_the_terms():
    guard, good, bad = NonFiniteGuard(patience=3), torch.tensor(1.0), torch.tensor(float("nan"))
    assert guard.allows({"l1": good}, 1.0)
    assert [guard.allows({"l1": good, "l2": bad}, 1.0) for _ in range(2)] == [False, False]
    assert guard.allows({"l1": good, "l2": good}, 1.0)  # a good one in between starts the count anew
    assert [guard.allows({"l1": good}, float("inf")) for _ in range(2)] == [False, False]
    assert not guard.is_exhausted
    guard.allows({"l1": good, "l2": bad}, 1.0)
    assert guard.is_exhausted
    error = guard.build_error(7, "the output of head")
    assert str(error).startswith("step 7: l2 = nan, 3 steps in a row, first in the output of head; expected")


def test_a_norm_far_above_the_usual_is_a_spike_and_a_rising_one_is_not():
    guard = NonFiniteGuard()
    assert [guard.detect_spike(1.0 + i / 10) for i in range(40)] == [None] * 40
    assert guard.detect_spike(50.0) == pytest.approx(2.95)
    assert guard.detect_spike(4.0) is None


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(3, 3), nn.Linear(3, 3), nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.scale * self.second(self.first(x))}


def test_the_first_tensor_that_went_wrong_is_named():
    x = torch.ones(2, 3)
    assert find_first_non_finite(Chain(), (x,)) == "a term outside the model"
    assert find_first_non_finite(Chain(), (x * float("inf"),)) == "the output of first"
    overflowing = Chain()
    overflowing.second.weight.data.fill_(3e38)
    assert find_first_non_finite(overflowing, (100 * x,)) == "the output of second"
    broken = Chain()
    broken.second.bias.data[1] = float("nan")
    assert find_first_non_finite(broken, (x,)) == "the parameter second.bias"
    backwards = Chain()
    backwards.first.weight.grad = torch.full((3, 3), float("nan"))
    backwards.second.weight.grad = torch.full((3, 3), float("inf"))
    assert find_first_non_finite(backwards, (x,)) == "the gradient of second.weight"


def test_a_run_that_stays_bad_stops_with_the_tensor_s_name_and_the_examples_of_its_steps(tmp_path):
    run, model, optimizer = run_of(training(tmp_path))
    run.track(model=model)
    run.source_ids = lambda step: [f"cat/{step}.png"]
    for step in range(1, 5):
        assert not learn(run, model, optimizer, step, torch.full((2, 3), float("nan")))
    with pytest.raises(NonFiniteLossError) as caught:
        learn(run, model, optimizer, 5, torch.full((2, 3), float("nan")))
    assert "first in the output of the model" in error_message(caught)
    skipped = read_metrics(run.folder / "skipped_steps.0.jsonl")
    assert [row["source_ids"] for row in skipped] == [[f"cat/{step}.png"] for step in range(1, 6)]
    assert skipped[0]["loss"] == "nan"


def test_under_a_gradient_scaler_overflow_lowers_the_scale_and_the_run_goes_on(tmp_path, monkeypatch):
    run = Run(training(tmp_path))
    scaler = run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # overflows float32
    model = nn.Linear(3, 1)
    model, optimizer = run.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-6))
    run.accelerator.native_amp = True
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")  # so that it unscales before it clips
    before, x = model.weight.clone(), 100 * torch.ones(2, 3)
    scales = []
    for step in range(1, 25):
        learn(run, model, optimizer, step, x if step != 20 else x * float("inf"))  # a loss that is not finite, too
        scales.append(scaler.get_scale())
    assert scales[:6] == [2.0**126, 2.0**125, 2.0**124, 2.0**123, 2.0**122, 2.0**121]
    assert scales[-1] == scales[-2] > 1
    assert model.weight.isfinite().all()
    assert not torch.equal(model.weight, before)


def test_every_step_and_process_has_a_seed_of_its_own_that_torch_takes():
    seeds = [step_seed(*key) for key in itertools.product((0, 1, 2**63 - 1), range(50), range(8))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_what_a_step_draws_depends_on_seed_and_step_alone(tmp_path):
    def draws(start: int, **fields) -> list[float]:
        run = Run(training(tmp_path, **fields))
        run.step = start
        return [torch.rand(3).tolist() for _ in run.steps(2, "test")]

    whole = draws(0)
    torch.rand(100)
    assert draws(2) == whole[2:]
    assert draws(0, seed=1) != whole


# Checkpoints


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def checkpointed(config: Training, *steps: int) -> None:
    run, counter = Run(config), Counter()
    run.track(counter=counter)
    for step in steps:
        counter.value = 10 * step
        run.log_row(step, {"loss": step})
        run.checkpoint(step)


def test_the_newest_checkpoints_stay_and_the_newest_is_loaded_even_beyond_a_million_steps(tmp_path):
    config = training(tmp_path, max_steps=2_000_000)
    checkpointed(config, 999_998, 999_999, 1_000_000)
    assert {path.name for path in (config.output / "checkpoints").iterdir()} == {"step_999999", "step_1000000"}
    run, counter = Run(config), Counter()
    run.track(counter=counter)
    assert (run.step, counter.value) == (1_000_000, 10_000_000)
    assert newest_step(config.output) == 1_000_000


@pytest.mark.parametrize("harm", ["cut short", "empty", "gone", "altered", "description cut short", "description gone"])
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_its_rows_are_forgotten(tmp_path, capsys, harm):
    config = training(tmp_path)
    checkpointed(config, 1, 2)
    newest = config.output / "checkpoints" / "step_000002"
    harmed = newest / ("checkpoint.json" if "description" in harm else "state.pt")
    whole = harmed.read_bytes()
    if "gone" in harm:
        harmed.unlink()
    elif harm == "altered":
        harmed.write_bytes(whole[:-200] + bytes([whole[-200] ^ 1]) + whole[-199:])
    else:
        harmed.write_bytes(whole[: 0 if harm == "empty" else -40])
    run, counter = Run(config), Counter()
    run.track(counter=counter)
    assert (run.step, counter.value) == (1, 10)
    assert "step_000002" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(config.output / "metrics.jsonl") if "loss" in row] == [1]


def test_a_checkpoint_cut_at_any_length_is_passed_over(tmp_path):
    config = training(tmp_path)
    checkpointed(config, 1, 2)
    newest = config.output / "checkpoints" / "step_000002" / "state.pt"
    whole = newest.read_bytes()
    for length in random.Random(0).sample(range(len(whole)), 20):
        newest.write_bytes(whole[:length])
        run = Run(config)
        run.track(counter=Counter())
        assert run.step == 1


def test_a_chosen_checkpoint_is_gone_on_from_and_later_ones_give_way(tmp_path):
    config = training(tmp_path, keep_checkpoints=9)
    checkpointed(config, 1, 2, 3)
    run, counter = Run(replace(config, resume="step_000001")), Counter()
    run.track(counter=counter)
    assert (run.step, counter.value) == (1, 10)
    assert len(list((config.output / "checkpoints").iterdir())) == 3  # until there is a newer one
    run.checkpoint(2)
    assert newest_step(config.output) == 2
    assert read_metrics(config.output / "metrics.jsonl")[-1] == {"step": 1, "resumed_from": 1}


def test_a_chosen_checkpoint_that_is_the_last_makes_later_ones_give_way(tmp_path):
    config = training(tmp_path, keep_checkpoints=9, max_steps=2)
    checkpointed(config, 1, 2, 3)
    run, counter = Run(replace(config, resume="step_000002")), Counter()
    run.track(counter=counter)
    assert list(run.steps(1, "nothing")) == []
    assert newest_step(config.output) == 2


def test_a_checkpoint_that_is_not_there_or_not_whole_cannot_be_chosen(tmp_path):
    config = training(tmp_path)
    checkpointed(config, 1, 2)
    with pytest.raises(UserError) as caught:
        Run(replace(config, resume="step_000007")).track()
    assert "has step_000001, step_000002; expected one of those" in error_message(caught)
    (config.output / "checkpoints" / "step_000002" / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="step_000002"):
        Run(replace(config, resume="step_000002")).track()
    with pytest.raises(ConfigError, match="--resume is newest; expected latest"):
        training(tmp_path, resume="newest")


def test_the_checkpoint_of_the_best_figure_stays(tmp_path):
    run = Run(training(tmp_path, max_steps=9, checkpoint_every=3))
    run.track()
    for step, figure in enumerate([5.0, 2.0, 3.0, 4.0, 2.0, 6.0], 1):
        run.record_validation(step, figure)
        if run.is_checkpoint_due(step):
            run.checkpoint(step)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == [
        "step_000002",
        "step_000003",
        "step_000006",
    ]
    again = Run(run.config)
    again.track()
    assert again.best == {"step": 2, "value": 2.0}


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on the size of files, of the POSIX kind")
def test_a_disk_that_is_full_ends_in_one_line_and_leaves_what_was_whole(tmp_path):
    config = training(tmp_path)
    checkpointed(config, 1)
    run = Run(config)
    run.track(counter=Counter())
    run._tracked["model"] = nn.Linear(300, 300)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError) as caught:
            run.checkpoint(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    message = str(caught.value)
    assert "the checkpoint of step 2 could not be saved" in message
    assert "the newest complete one is of step 1" in message
    assert [path.name for path in (config.output / "checkpoints").iterdir()] == ["step_000001"]


def test_a_new_run_begins_at_nought_and_forgets_rows_without_a_checkpoint(tmp_path):
    config = training(tmp_path)
    run = Run(config)
    run.log_row(3, {"loss": 1.0})
    run.track(counter=Counter())
    assert run.step == 0
    assert read_metrics(config.output / "metrics.jsonl") == []


def test_rows_come_at_their_interval_and_at_the_end(tmp_path):
    run = Run(training(tmp_path, max_steps=5, log_every=2))
    run.track()
    for step in run.steps(2, "test"):
        run.log(step, {"loss": torch.tensor(step / 3, requires_grad=True)})
    rows = read_metrics(run.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert [row["loss"] for row in rows] == pytest.approx([2 / 3, 4 / 3, 5 / 3], abs=1e-5)
    assert all(row["images_per_second"] > 0 for row in rows)


# The folder's guard


def finished(config: Training, steps: int) -> None:
    checkpointed(config, steps)
    write_text(config.output / "model" / "config.json", "{}")


def test_a_new_or_empty_folder_is_free_and_a_run_of_the_same_configuration_goes_on(tmp_path):
    config = training(tmp_path)
    assert check_run_folder(config, "tokenizer") is None
    config.output.mkdir()
    assert check_run_folder(config, "tokenizer") is None
    checkpointed(config, 2)
    assert check_run_folder(config, "tokenizer") is None


def test_a_finished_run_says_its_steps_and_a_larger_number_extends_it(tmp_path):
    config = training(tmp_path)
    finished(config, 4)
    assert check_run_folder(config, "tokenizer") == 4
    assert check_run_folder(replace(config, max_steps=3), "tokenizer") == 4
    assert check_run_folder(replace(config, max_steps=5), "tokenizer") is None


def test_a_run_killed_before_its_model_was_written_is_not_finished(tmp_path):
    config = training(tmp_path)
    checkpointed(config, 4)
    assert check_run_folder(config, "tokenizer") is None
    with pytest.raises(UserError) as caught:
        check_run_folder(replace(config, max_steps=3), "tokenizer")
    assert "--max-steps is 3" in error_message(caught)


def test_an_extended_run_killed_before_its_model_was_renewed_is_not_finished(tmp_path):
    config = training(tmp_path)
    finished(config, 4)
    longer = replace(config, max_steps=6)
    checkpointed(longer, 6)
    model, checkpoint = (
        config.output / "model" / "config.json",
        config.output / "checkpoints" / "step_000006" / "state.pt",
    )
    os.utime(model, (checkpoint.stat().st_mtime - 60,) * 2)
    assert check_run_folder(longer, "tokenizer") is None
    os.utime(model, (checkpoint.stat().st_mtime + 1,) * 2)
    assert check_run_folder(longer, "tokenizer") == 6


def test_another_configuration_is_refused_with_what_differs_and_nothing_is_touched(tmp_path):
    config = training(tmp_path)
    checkpointed(config, 2)
    held = (config.output / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        check_run_folder(replace(config, width=8, seed=3), "tokenizer")
    message = error_message(caught)
    assert "width is 4 in the run and 8 in this command" in message
    assert "seed is 0 in the run and 3 in this command" in message
    assert (config.output / "config.yaml").read_bytes() == held
    assert check_run_folder(replace(config, log_every=1, checkpoint_every=7), "tokenizer") is None


@dataclass(frozen=True, kw_only=True)
class TrainingOnData(Training):
    data: str = "images"


def test_a_run_is_known_by_the_fingerprint_of_its_data_wherever_they_and_the_run_are_moved(tmp_path):
    config = TrainingOnData(output=tmp_path / "run", max_steps=4, batch_size=2)
    run = Run(config, trained_on="a hash")
    run.track(counter=Counter())
    run.checkpoint(2)
    moved = replace(config, output=tmp_path / "moved", data="/elsewhere/pictures")
    config.output.rename(moved.output)
    assert check_run_folder(moved, "tokenizer", "a hash") is None
    for data in ("images", "/elsewhere/pictures"):
        with pytest.raises(UserError) as caught:
            check_run_folder(replace(moved, data=data), "tokenizer", "another hash")
        error_message(caught)


def test_a_run_without_a_fingerprint_is_known_by_where_its_data_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    config = TrainingOnData(output=tmp_path / "run", max_steps=4, batch_size=2)
    checkpointed(config, 2)
    for data in ("images/", "./images", str(tmp_path / "images")):
        assert check_run_folder(replace(config, data=data), "tokenizer", "a hash") is None
    with pytest.raises(UserError, match="data is 'images' in the run and 'others' in this command"):
        check_run_folder(replace(config, data="others"), "tokenizer", "a hash")


def test_a_folder_of_something_else_is_refused(tmp_path):
    write_text(tmp_path / "run" / "thesis.tex", "years of work")
    with pytest.raises(UserError) as caught:
        check_run_folder(training(tmp_path), "tokenizer")
    assert "contains no tokenizer run" in error_message(caught)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_steps", 0), ("batch_size", -1), ("accumulation_steps", 0), ("checkpoint_every", 0), ("seed", -1)],
)
def test_counts_that_make_no_sense_are_one_line_with_the_flag_and_the_value(tmp_path, name, value):
    with pytest.raises(ConfigError) as caught:
        training(tmp_path, **{name: value})
    assert f"--{name.replace('_', '-')} is {value}" in error_message(caught)
