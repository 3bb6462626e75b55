"""A run takes correct steps, skips non-finite ones, resumes from its newest complete checkpoint and checks its folder."""

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
from training_harness.signals import Interrupted


@dataclass(frozen=True, kw_only=True)
class Training(RunConfig):
    width: int = 4


def training_config(tmp_path: Path, **fields) -> Training:
    return Training(**{"output": tmp_path / "run", "max_steps": 4, "batch_size": 2} | fields)


def start_run(config: Training, rate: float = 0.1) -> tuple[Run, nn.Module, torch.optim.Optimizer]:
    run = Run(config)
    model = nn.Linear(3, 1)
    model, optimizer = run.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=rate))
    return run, model, optimizer


def train_batch(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, x: torch.Tensor, norm=0.0
) -> bool:
    with run.accelerator.accumulate(model):
        loss = model(x).square().mean()
        run.accelerator.backward(loss)
        return run.optimizer_step(step, optimizer, model, {"loss": loss}, norm)


# Steps


def test_two_accumulated_half_batches_equal_one_full_batch(tmp_path):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    full_batch = start_run(training_config(tmp_path))
    before = full_batch[1].weight.clone()
    train_batch(*full_batch, 1, x)
    half_batches = start_run(training_config(tmp_path, accumulation_steps=2))  # the same seed gives the same weights
    assert torch.equal(half_batches[1].weight, before)
    train_batch(*half_batches, 1, x[:4])
    assert torch.equal(half_batches[1].weight, before)
    train_batch(*half_batches, 1, x[4:])
    assert torch.allclose(half_batches[1].weight, full_batch[1].weight, atol=1e-6)
    assert not torch.allclose(half_batches[1].weight, before, atol=1e-3)


def test_gradients_are_clipped_to_the_maximum_norm_and_zero_disables_clipping(tmp_path):
    x = 100 * torch.ones(2, 3)
    for norm, is_expected in ((0.5, lambda d: d == pytest.approx(0.05, rel=1e-4)), (0.0, lambda d: d > 1)):
        run, model, optimizer = start_run(training_config(tmp_path))
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        train_batch(run, model, optimizer, 1, x, norm)
        assert is_expected((nn.utils.parameters_to_vector(model.parameters()) - before).norm().item())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_step_keeps_the_weights_and_the_next_step_changes_them(tmp_path, value):
    run, model, optimizer = start_run(training_config(tmp_path))
    before = model.weight.clone()
    assert not train_batch(run, model, optimizer, 1, torch.full((2, 3), value))
    assert torch.equal(model.weight, before)
    assert train_batch(run, model, optimizer, 2, torch.ones(2, 3))
    assert not torch.equal(model.weight, before)
    assert model.weight.isfinite().all()


def test_the_guard_counts_consecutive_non_finite_steps_and_names_the_terms():
    guard, finite, nan = NonFiniteGuard(patience=3), torch.tensor(1.0), torch.tensor(float("nan"))
    assert guard.allows({"l1": finite}, 1.0)
    assert [guard.allows({"l1": finite, "l2": nan}, 1.0) for _ in range(2)] == [False, False]
    assert guard.allows({"l1": finite, "l2": finite}, 1.0)  # a finite step resets the count
    assert [guard.allows({"l1": finite}, float("inf")) for _ in range(2)] == [False, False]
    assert not guard.is_exhausted
    guard.allows({"l1": finite, "l2": nan}, 1.0)
    assert guard.is_exhausted
    error = guard.build_error(7, "the output of head")
    assert str(error).startswith("step 7: l2 = nan, 3 steps in a row, first in the output of head; expected")


def test_a_gradient_norm_far_above_the_median_is_a_spike_and_a_slow_rise_is_not():
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


def test_the_first_non_finite_tensor_is_named():
    x = torch.ones(2, 3)
    assert find_first_non_finite(Chain(), (x,)) == "a term outside the model"
    assert find_first_non_finite(Chain(), (x * float("inf"),)) == "the output of first"
    overflowing = Chain()
    overflowing.second.weight.data.fill_(3e38)
    assert find_first_non_finite(overflowing, (100 * x,)) == "the output of second"
    bad_parameter = Chain()
    bad_parameter.second.bias.data[1] = float("nan")
    assert find_first_non_finite(bad_parameter, (x,)) == "the parameter second.bias"
    bad_gradients = Chain()
    bad_gradients.first.weight.grad = torch.full((3, 3), float("nan"))
    bad_gradients.second.weight.grad = torch.full((3, 3), float("inf"))
    assert find_first_non_finite(bad_gradients, (x,)) == "the gradient of second.weight"


def test_a_run_with_repeated_non_finite_steps_stops_and_names_the_tensor_and_the_examples(tmp_path):
    run, model, optimizer = start_run(training_config(tmp_path))
    run.track(model=model)
    run.source_ids = lambda step: [f"cat/{step}.png"]
    for step in range(1, 5):
        assert not train_batch(run, model, optimizer, step, torch.full((2, 3), float("nan")))
    with pytest.raises(NonFiniteLossError) as caught:
        train_batch(run, model, optimizer, 5, torch.full((2, 3), float("nan")))
    assert "first in the output of the model" in error_message(caught)
    skipped = read_metrics(run.folder / "skipped_steps.0.jsonl")
    assert [row["source_ids"] for row in skipped] == [[f"cat/{step}.png"] for step in range(1, 6)]
    assert skipped[0]["loss"] == "nan"


def test_with_a_gradient_scaler_overflow_lowers_the_scale_and_the_run_continues(tmp_path, monkeypatch):
    run = Run(training_config(tmp_path))
    scaler = run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # overflows float32
    model = nn.Linear(3, 1)
    model, optimizer = run.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-6))
    run.accelerator.native_amp = True
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")  # so that Accelerate unscales before clipping
    before, x = model.weight.clone(), 100 * torch.ones(2, 3)
    scales = []
    for step in range(1, 25):
        train_batch(run, model, optimizer, step, x if step != 20 else x * float("inf"))  # step 20 has a non-finite loss
        scales.append(scaler.get_scale())
    assert scales[:6] == [2.0**126, 2.0**125, 2.0**124, 2.0**123, 2.0**122, 2.0**121]
    assert scales[-1] == scales[-2] > 1
    assert model.weight.isfinite().all()
    assert not torch.equal(model.weight, before)


def test_each_step_and_process_has_a_different_seed_that_torch_accepts():
    seeds = [step_seed(*key) for key in itertools.product((0, 1, 2**63 - 1), range(50), range(8))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_the_random_numbers_of_a_step_depend_on_seed_and_step_alone(tmp_path):
    def random_numbers(start: int, **fields) -> list[float]:
        run = Run(training_config(tmp_path, **fields))
        run.step = start
        return [torch.rand(3).tolist() for _ in run.steps(2, "test")]

    uninterrupted = random_numbers(0)
    torch.rand(100)
    assert random_numbers(2) == uninterrupted[2:]
    assert random_numbers(0, seed=1) != uninterrupted


# Checkpoints


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def write_checkpoints(config: Training, *steps: int) -> None:
    run, counter = Run(config), Counter()
    run.track(counter=counter)
    for step in steps:
        counter.value = 10 * step
        run.log_row(step, {"loss": step})
        run.checkpoint(step)


def test_the_newest_checkpoints_are_kept_and_the_newest_is_loaded_even_after_a_million_steps(tmp_path):
    config = training_config(tmp_path, max_steps=2_000_000)
    write_checkpoints(config, 999_998, 999_999, 1_000_000)
    assert {path.name for path in (config.output / "checkpoints").iterdir()} == {"step_999999", "step_1000000"}
    run, counter = Run(config), Counter()
    run.track(counter=counter)
    assert (run.step, counter.value) == (1_000_000, 10_000_000)
    assert newest_step(config.output) == 1_000_000


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "missing", "altered", "description truncated", "description missing"]
)
def test_a_corrupt_checkpoint_is_skipped_and_its_rows_are_deleted(tmp_path, capsys, damage):
    config = training_config(tmp_path)
    write_checkpoints(config, 1, 2)
    newest = config.output / "checkpoints" / "step_000002"
    damaged = newest / ("checkpoint.json" if "description" in damage else "state.pt")
    content = damaged.read_bytes()
    if "missing" in damage:
        damaged.unlink()
    elif damage == "altered":
        damaged.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
    else:
        damaged.write_bytes(content[: 0 if damage == "empty" else -40])
    run, counter = Run(config), Counter()
    run.track(counter=counter)
    assert (run.step, counter.value) == (1, 10)
    assert "step_000002" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(config.output / "metrics.jsonl") if "loss" in row] == [1]


def test_a_checkpoint_truncated_at_any_length_is_skipped(tmp_path):
    config = training_config(tmp_path)
    write_checkpoints(config, 1, 2)
    newest = config.output / "checkpoints" / "step_000002" / "state.pt"
    content = newest.read_bytes()
    for length in random.Random(0).sample(range(len(content)), 20):
        newest.write_bytes(content[:length])
        run = Run(config)
        run.track(counter=Counter())
        assert run.step == 1


def test_a_run_resumes_from_a_selected_checkpoint_and_later_ones_are_deleted(tmp_path):
    config = training_config(tmp_path, keep_checkpoints=9)
    write_checkpoints(config, 1, 2, 3)
    run, counter = Run(replace(config, resume="step_000001")), Counter()
    run.track(counter=counter)
    assert (run.step, counter.value) == (1, 10)
    assert len(list((config.output / "checkpoints").iterdir())) == 3  # until a new one is written
    run.checkpoint(2)
    assert newest_step(config.output) == 2
    assert read_metrics(config.output / "metrics.jsonl")[-1] == {"step": 1, "resumed_from": 1}


def test_resuming_from_the_last_step_deletes_later_checkpoints(tmp_path):
    config = training_config(tmp_path, keep_checkpoints=9, max_steps=2)
    write_checkpoints(config, 1, 2, 3)
    run, counter = Run(replace(config, resume="step_000002")), Counter()
    run.track(counter=counter)
    assert list(run.steps(1, "nothing")) == []
    assert newest_step(config.output) == 2


def test_selecting_a_missing_or_corrupt_checkpoint_is_an_error(tmp_path):
    config = training_config(tmp_path)
    write_checkpoints(config, 1, 2)
    with pytest.raises(UserError) as caught:
        Run(replace(config, resume="step_000007")).track()
    assert "has step_000001, step_000002; expected one of these checkpoints" in error_message(caught)
    (config.output / "checkpoints" / "step_000002" / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="step_000002"):
        Run(replace(config, resume="step_000002")).track()
    with pytest.raises(ConfigError, match="--resume is newest; expected latest"):
        training_config(tmp_path, resume="newest")


def test_the_checkpoint_of_the_best_metric_is_kept(tmp_path):
    run = Run(training_config(tmp_path, max_steps=9, checkpoint_every=3))
    run.track()
    for step, metric in enumerate([5.0, 2.0, 3.0, 4.0, 2.0, 6.0], 1):
        run.record_validation(step, metric)
        if run.is_checkpoint_due(step):
            run.checkpoint(step)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == [
        "step_000002",
        "step_000003",
        "step_000006",
    ]
    resumed = Run(run.config)
    resumed.track()
    assert resumed.best == {"step": 2, "value": 2.0}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files, which needs POSIX")
def test_a_stopped_run_is_interrupted_even_if_another_process_has_left_already(tmp_path, monkeypatch):
    run, _, _ = start_run(training_config(tmp_path))

    barriers = itertools.count()

    def leave_at_the_second_barrier() -> None:  # the first one ends the checkpoint
        if newest_step(tmp_path / "run") and next(barriers) == 1:
            raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(run.accelerator, "wait_for_everyone", leave_at_the_second_barrier)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 1"):
        [os.kill(os.getpid(), signal.SIGTERM) for _ in run.steps(2, "test")]
    assert newest_step(tmp_path / "run") == 1
    assert next(barriers) == 2


def test_a_full_disk_is_one_line_and_complete_checkpoints_are_kept(tmp_path):
    config = training_config(tmp_path)
    write_checkpoints(config, 1)
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


def test_a_run_without_a_checkpoint_starts_at_step_zero_and_deletes_old_rows(tmp_path):
    config = training_config(tmp_path)
    run = Run(config)
    run.log_row(3, {"loss": 1.0})
    run.track(counter=Counter())
    assert run.step == 0
    assert read_metrics(config.output / "metrics.jsonl") == []


def test_rows_are_logged_at_the_interval_and_at_the_last_step(tmp_path):
    run = Run(training_config(tmp_path, max_steps=5, log_every=2))
    run.track()
    for step in run.steps(2, "test"):
        run.log(step, {"loss": torch.tensor(step / 3, requires_grad=True)})
    rows = read_metrics(run.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert [row["loss"] for row in rows] == pytest.approx([2 / 3, 4 / 3, 5 / 3], abs=1e-5)
    assert all(row["images_per_second"] > 0 for row in rows)


# Checks of the run folder


def write_finished_run(config: Training, steps: int) -> None:
    write_checkpoints(config, steps)
    write_text(config.output / "model" / "config.json", "{}")


def test_a_new_or_empty_folder_and_a_run_of_the_same_configuration_are_accepted(tmp_path):
    config = training_config(tmp_path)
    assert check_run_folder(config, "tokenizer") is None
    config.output.mkdir()
    assert check_run_folder(config, "tokenizer") is None
    write_checkpoints(config, 2)
    assert check_run_folder(config, "tokenizer") is None


def test_a_finished_run_returns_its_steps_and_a_larger_number_extends_it(tmp_path):
    config = training_config(tmp_path)
    write_finished_run(config, 4)
    assert check_run_folder(config, "tokenizer") == 4
    assert check_run_folder(replace(config, max_steps=3), "tokenizer") == 4
    assert check_run_folder(replace(config, max_steps=5), "tokenizer") is None


def test_a_run_killed_before_writing_its_model_is_not_finished(tmp_path):
    config = training_config(tmp_path)
    write_checkpoints(config, 4)
    assert check_run_folder(config, "tokenizer") is None
    with pytest.raises(UserError) as caught:
        check_run_folder(replace(config, max_steps=3), "tokenizer")
    assert "--max-steps is 3" in error_message(caught)


def test_an_extended_run_killed_before_writing_its_new_model_is_not_finished(tmp_path):
    config = training_config(tmp_path)
    write_finished_run(config, 4)
    longer = replace(config, max_steps=6)
    write_checkpoints(longer, 6)
    model, checkpoint = (
        config.output / "model" / "config.json",
        config.output / "checkpoints" / "step_000006" / "state.pt",
    )
    os.utime(model, (checkpoint.stat().st_mtime - 60,) * 2)
    assert check_run_folder(longer, "tokenizer") is None
    os.utime(model, (checkpoint.stat().st_mtime + 1,) * 2)
    assert check_run_folder(longer, "tokenizer") == 6


def test_another_configuration_is_an_error_with_the_differences_and_changes_no_file(tmp_path):
    config = training_config(tmp_path)
    write_checkpoints(config, 2)
    stored = (config.output / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        check_run_folder(replace(config, width=8, seed=3), "tokenizer")
    message = error_message(caught)
    assert "width is 4 in the run and 8 in this command" in message
    assert "seed is 0 in the run and 3 in this command" in message
    assert (config.output / "config.yaml").read_bytes() == stored
    assert check_run_folder(replace(config, log_every=1, checkpoint_every=7), "tokenizer") is None


@dataclass(frozen=True, kw_only=True)
class TrainingOnData(Training):
    data: str = "images"


def test_a_run_is_identified_by_the_fingerprint_of_its_data_after_both_are_moved(tmp_path):
    config = TrainingOnData(output=tmp_path / "run", max_steps=4, batch_size=2)
    run = Run(config, trained_on="a hash")
    run.track(counter=Counter())
    run.checkpoint(2)
    moved = replace(config, output=tmp_path / "moved", data="/elsewhere/images")
    config.output.rename(moved.output)
    assert check_run_folder(moved, "tokenizer", "a hash") is None
    for data in ("images", "/elsewhere/images"):
        with pytest.raises(UserError) as caught:
            check_run_folder(replace(moved, data=data), "tokenizer", "another hash")
        error_message(caught)


def test_a_run_without_a_fingerprint_is_identified_by_the_path_of_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    config = TrainingOnData(output=tmp_path / "run", max_steps=4, batch_size=2)
    write_checkpoints(config, 2)
    for data in ("images/", "./images", str(tmp_path / "images")):
        assert check_run_folder(replace(config, data=data), "tokenizer", "a hash") is None
    with pytest.raises(UserError, match="data is 'images' in the run and 'others' in this command"):
        check_run_folder(replace(config, data="others"), "tokenizer", "a hash")


def test_a_folder_with_other_files_is_an_error(tmp_path):
    write_text(tmp_path / "run" / "thesis.tex", "years of work")
    with pytest.raises(UserError) as caught:
        check_run_folder(training_config(tmp_path), "tokenizer")
    assert "contains no tokenizer run" in error_message(caught)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_steps", 0), ("batch_size", -1), ("accumulation_steps", 0), ("checkpoint_every", 0), ("seed", -1)],
)
def test_an_invalid_count_is_one_line_with_the_option_and_the_value(tmp_path, name, value):
    with pytest.raises(ConfigError) as caught:
        training_config(tmp_path, **{name: value})
    assert f"--{name.replace('_', '-')} is {value}" in error_message(caught)
