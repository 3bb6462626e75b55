"""The stage-two loop: run folder, loss, resumed runs, validation and warnings."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_models import tiny_source, tiny_tokenizer

from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.codes.writer import write_code_cache
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.autoregressive.objective import validation_loss
from stage2_prior.train import train_prior
from stage2_prior.training_config import AutoregressiveModel, AutoregressiveTraining
from training_harness.ema import EMAConfig
from training_harness.errors import ConfigError, UserError
from training_harness.guard import NonFiniteLossError
from training_harness.metric_log import read_metrics
from training_harness.optimization import OptimizerConfig

MODEL = AutoregressiveModel(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, dropout=0.1)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> CodeCache:
    folder = tmp_path_factory.mktemp("stage-two")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    return CodeCache(write_code_cache(tokenizer, folder / "tokenizer", tiny_source(), folder / "codes"))


def make_config(codes: CodeCache, output: Path, **fields: Any) -> AutoregressiveTraining:
    steps = {"max_steps": 6, "batch_size": 8, "log_every": 1, "sample_every": 3, "checkpoint_every": 3}
    return AutoregressiveTraining(output=output, codes=codes.path, **{"model": MODEL} | steps | fields)


def read_rows(folder: Path, *names: str) -> list[tuple[Any, ...]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [tuple(row.get(name) for name in names) for row in map(json.loads, lines) if names[-1] in row]


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read_weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_run_writes_its_folder_and_a_prior_for_its_codes(codes: CodeCache, tmp_path: Path) -> None:
    def preview(prior: AutoregressivePrior, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"an image")

    folder = train_prior(make_config(codes, tmp_path / "run"), codes, preview)
    assert folder == tmp_path / "run" / "model"
    assert list_files(tmp_path / "run") == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "run.json",
        "samples/step_000003.png",
        "samples/step_000006.png",
        "checkpoints/step_000003/checkpoint.json",
        "checkpoints/step_000003/state.pt",
        "checkpoints/step_000006/checkpoint.json",
        "checkpoints/step_000006/state.pt",
        "model/README.md",
        "model/config.json",
        "model/model.safetensors",
    }
    prior = AutoregressivePrior.from_pretrained(folder)
    prior.check_spec(codes.spec)
    assert prior.config.num_classes == 3
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert stored["model"]["hidden_size"] == 32
    logged = read_rows(tmp_path / "run", "step", "nats_per_token")
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
    for _, nats, bits in read_rows(tmp_path / "run", "step", "validation_nats_per_token", "validation_bits_per_image"):
        assert bits == pytest.approx(16 * nats / np.log(2), rel=1e-4)  # h·w codes per image


def test_a_prior_starts_from_the_code_vectors_of_the_tokenizer(
    codes: CodeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[torch.Tensor] = []
    monkeypatch.setattr(
        AutoregressivePrior, "initialize_from_code_vectors", lambda prior, vectors: received.append(vectors)
    )
    train_prior(make_config(codes, tmp_path / "run", max_steps=1), codes)
    config, codebook = tiny_tokenizer().config, tiny_tokenizer().quantizer.codebook
    expected = (codebook - torch.tensor(config.latent_mean)) / torch.tensor(config.latent_std)
    torch.testing.assert_close(received[0], expected)


def test_the_loss_falls_well_below_a_uniform_guess(codes: CodeCache, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=5e-3)
    train_prior(make_config(codes, tmp_path, max_steps=60, sample_every=60, optimizer=optimizer), codes)
    losses = [nats for _, nats in read_rows(tmp_path, "step", "nats_per_token")]
    assert losses[0] == pytest.approx(np.log(16), abs=0.5)  # the head starts from the codebook, not from 0
    assert np.mean(losses[-5:]) < 0.75 * losses[0]


def test_a_resumed_run_ends_with_the_same_bits(codes: CodeCache, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_prior(make_config(codes, whole, accumulation_steps=2), codes)
    # The state after a kill between steps 3 and 6: one checkpoint, and a longer log.
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step_000006")
    shutil.rmtree(stopped / "model")
    started: list[str] = []

    def preview(prior: AutoregressivePrior, path: Path) -> None:
        started.append(path.name)
        torch.rand(3)  # a preview may use the global generator without effect on training

    train_prior(make_config(codes, stopped, accumulation_steps=2), codes, preview)
    assert started == ["step_000006.png"]
    assert read_weights(stopped) == read_weights(whole)
    assert read_rows(stopped, "step", "learning_rate", "nats_per_token") == read_rows(
        whole, "step", "learning_rate", "nats_per_token"
    )
    other = tmp_path / "other"
    train_prior(make_config(codes, other, accumulation_steps=2, seed=1), codes)
    assert read_weights(other) != read_weights(whole)


def test_previews_and_the_saved_model_use_the_ema_weights(codes: CodeCache, tmp_path: Path) -> None:
    previews: dict[str, dict[str, torch.Tensor]] = {}

    def preview(prior: AutoregressivePrior, path: Path) -> None:
        assert not prior.training
        previews[path.name] = {name: tensor.clone() for name, tensor in prior.state_dict().items()}

    config = make_config(codes, tmp_path, ema=EMAConfig(decay=0.5))
    saved = AutoregressivePrior.from_pretrained(train_prior(config, codes, preview)).state_dict()
    state = torch.load(tmp_path / "checkpoints" / "step_000006" / "state.pt", weights_only=True)["objects"]
    assert list(previews) == ["step_000003.png", "step_000006.png"]
    for name, tensor in previews["step_000006.png"].items():
        assert torch.equal(tensor, saved[name])
        assert torch.equal(tensor, state["ema"][name])
    assert any(not torch.equal(state["ema"][name], state["model"][name]) for name in saved)


def test_the_validation_loss_is_the_mean_over_images_without_dropout(codes: CodeCache, tmp_path: Path) -> None:
    prior = AutoregressivePrior.from_pretrained(
        train_prior(make_config(codes, tmp_path, matmul_precision="highest"), codes)
    )
    all_rows = np.arange(10)
    with torch.no_grad():
        expected = float(prior(codes.validation.indices(all_rows), codes.validation.labels(all_rows)).total)
    assert validation_loss(prior, codes.validation, limit=1000) == pytest.approx(expected, rel=1e-5)
    _, (step, logged) = read_rows(tmp_path, "step", "validation_nats_per_token")
    assert step == 6
    assert logged == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        expected_of_three = float(
            prior(codes.validation.indices(np.arange(3)), codes.validation.labels(np.arange(3))).total
        )
    assert expected_of_three != pytest.approx(expected, rel=1e-4)
    assert validation_loss(prior, codes.validation, limit=3) == pytest.approx(expected_of_three, rel=1e-5)


def test_codes_with_latents_only_are_refused_with_the_command_to_run(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = tiny_source(8, 2)
    folder = write_code_cache(tokenizer, tmp_path / "tokenizer", source, tmp_path / "codes", contents="latents")
    latents = CodeCache(folder)
    with pytest.raises(UserError, match="no indices; run: latentloom tokenize"):
        train_prior(make_config(latents, tmp_path / "run"), latents)


def test_zero_validation_images_are_refused(codes: CodeCache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--validation-images is 0"):
        make_config(codes, tmp_path, validation_images=0)


def test_a_nan_loss_is_reported_with_its_images_and_changes_no_weight(
    codes: CodeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, count = AutoregressivePrior.forward, iter(range(1, 100))

    def return_nan(self: AutoregressivePrior, *arguments: torch.Tensor) -> Any:
        loss = forward(self, *arguments)
        if not self.training or next(count) < 4:
            return loss
        return loss._replace(total=loss.total * np.nan, terms={"nats_per_token": loss.total * np.nan})

    config = make_config(codes, tmp_path / "run", max_steps=20, checkpoint_every=1, keep_checkpoints=20)
    with monkeypatch.context() as patch:
        patch.setattr(AutoregressivePrior, "forward", return_nan)
        with pytest.raises(NonFiniteLossError, match="step 8: nats_per_token = nan"):
            train_prior(config, codes)
    skipped = read_metrics(config.output / "skipped_steps.0.jsonl")
    assert [row["step"] for row in skipped] == [4, 5, 6, 7, 8]
    assert set(skipped[0]["source_ids"]) <= set(codes.train.source_ids(np.arange(len(codes.train))))
    state = torch.load(config.output / "checkpoints" / "step_000007" / "state.pt", weights_only=True)["objects"]
    assert all(value.isfinite().all() for name in ("model", "ema") for value in state[name].values())
    train_prior(config, codes)


@pytest.mark.parametrize(
    ("losses", "warnings"), [([2.0, 1.9, 1.905, 2.1, 2.2], [(4, "validation")]), ([2.0, 1.9, 1.8, 1.81, 1.7], [])]
)
def test_a_rising_validation_loss_warns_once_with_the_best_step(
    losses: list[float],
    warnings: list[tuple[int, str]],
    codes: CodeCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    next_losses = iter(losses)
    monkeypatch.setattr("stage2_prior.autoregressive.objective.validation_loss", lambda *_: next(next_losses))
    train_prior(make_config(codes, tmp_path / "run", max_steps=5, sample_every=1, checkpoint_every=5), codes)
    assert read_rows(tmp_path / "run", "step", "about") == warnings
    assert ("after 1.900 at step 2" in capsys.readouterr().err) == bool(warnings)
    checkpoints = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert f"step_{1 + losses.index(min(losses)):06d}" in checkpoints
