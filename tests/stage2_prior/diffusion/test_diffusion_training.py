"""The stage-two loop with a diffusion prior: training inputs, validation, and resumed runs."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import seeded, tiny_source, tiny_tokenizer
from torch.testing import assert_close

from stage1_tokenizer.codes.reader import CodeCache, CodeSplit
from stage1_tokenizer.codes.writer import write_code_cache
from stage2_prior.diffusion.config import DiTModel
from stage2_prior.diffusion.health import normalization_warning
from stage2_prior.diffusion.mean_flow import MeanFlow
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.diffusion.objective import DiffusionObjective
from stage2_prior.diffusion.process import Prediction
from stage2_prior.diffusion.schedule import NoiseSchedule
from stage2_prior.diffusion.times import TimesConfig
from stage2_prior.train import train_prior
from stage2_prior.training_config import AutoregressiveTraining, DiffusionTraining, parse_prior_training
from training_harness.errors import ConfigError, UserError
from training_harness.optimization import ScheduleConfig

MODEL = DiTModel(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> CodeCache:
    folder = tmp_path_factory.mktemp("stage-two")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    return CodeCache(
        write_code_cache(tokenizer, folder / "tokenizer", tiny_source(), folder / "codes", contents="latents")
    )


def make_config(codes: CodeCache, output: Path, **fields: Any) -> DiffusionTraining:
    steps = {"max_steps": 6, "batch_size": 8, "log_every": 1, "sample_every": 3, "checkpoint_every": 3}
    return DiffusionTraining(output=output, codes=codes.path, **{"model": MODEL} | steps | fields)


def read_column(folder: Path, name: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def read_weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_run_reduces_the_loss_and_writes_a_prior_that_loads(codes: CodeCache, tmp_path: Path) -> None:
    folder = train_prior(make_config(codes, tmp_path / "run", max_steps=60, sample_every=60), codes)
    losses = read_column(tmp_path / "run", "squared_error")
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    prior = DiffusionPrior.from_pretrained(folder)
    assert prior.config.tokenizer_id == codes.spec.tokenizer_id
    assert "# Diffusion prior" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_resumed_run_equals_a_run_without_a_stop(codes: CodeCache, tmp_path: Path) -> None:
    constant = {"schedule": ScheduleConfig(warmup=0, decay="constant")}  # does not depend on max_steps
    train_prior(make_config(codes, tmp_path / "whole", **constant), codes)
    train_prior(make_config(codes, tmp_path / "parts", max_steps=3, **constant), codes)
    train_prior(make_config(codes, tmp_path / "parts", **constant), codes)
    assert read_weights(tmp_path / "parts") == read_weights(tmp_path / "whole")
    assert read_column(tmp_path / "parts", "squared_error") == read_column(tmp_path / "whole", "squared_error")


def test_validation_is_deterministic_and_its_bands_average_to_the_total(codes: CodeCache, tmp_path: Path) -> None:
    objective = DiffusionObjective(make_config(codes, tmp_path / "run"), codes)
    prior = objective.new_prior().eval()
    torch.nn.init.normal_(prior.denoiser.final.weight, std=0.2, generator=seeded(0))
    metrics = objective.validate(prior)
    torch.randn(7)
    assert objective.validate(prior) == metrics
    bands = [value for name, value in metrics.items() if "_t0." in name]
    count = len(codes.validation)
    sizes = [sum(band / 5 < (i + 0.5) / count <= (band + 1) / 5 for i in range(count)) for band in range(5)]
    assert sum(size * value for size, value in zip(sizes, bands, strict=True)) / count == pytest.approx(
        metrics["validation_squared_error"], rel=1e-5
    )


def test_a_prediction_of_0_has_the_mean_square_of_the_target_as_its_error(codes: CodeCache, tmp_path: Path) -> None:
    objective = DiffusionObjective(make_config(codes, tmp_path / "run"), codes)
    actual = objective.validate(objective.new_prior())["validation_squared_error"]
    size = float(codes.validation.latents(torch.arange(len(codes.validation)).numpy()).square().mean())
    assert actual == pytest.approx(1 + size, rel=0.15)  # of ε − x, where ε and x are independent


def test_codes_without_latents_are_refused_with_the_command_to_run(codes: CodeCache, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = write_code_cache(tokenizer, tmp_path / "tokenizer", tiny_source(), tmp_path / "codes")
    with pytest.raises(UserError, match=r"no latents; run: latentloom tokenize --contents latents"):
        train_prior(make_config(CodeCache(folder), tmp_path / "run"), CodeCache(folder))
    assert not (tmp_path / "run").exists()


def test_logit_normal_times_have_the_given_mean_and_standard_deviation() -> None:
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    times = TimesConfig(distribution="logit-normal", logit_mean=0.4, logit_std=0.8).sample_times(uniform)
    logits = torch.log(times / (1 - times))
    assert float(logits.mean()) == pytest.approx(0.4, abs=1e-3)
    assert float(logits.std()) == pytest.approx(0.8, abs=1e-3)
    assert TimesConfig(distribution="logit-normal").sample_times(torch.tensor([0.0, 1 - 2**-24])).isfinite().all()


PAPER_WEIGHTS = {  # as functions of the SNR r and γ: Hang et al. 2023; the last line is derived for v
    "sample": lambda r, gamma: min(r, gamma),
    "epsilon": lambda r, gamma: min(r, gamma) / r,
    "v_prediction": lambda r, gamma: min(r, gamma) / (r + 1),
}


@pytest.mark.parametrize("kind", PAPER_WEIGHTS)
def test_min_snr_weights_equal_the_weights_of_the_paper(kind: Prediction) -> None:
    level = NoiseSchedule("cosine").levels(torch.tensor([0.05, 0.2, 0.5, 0.9], dtype=torch.float64))
    actual = TimesConfig(min_snr_gamma=5.0).loss_weights(level, kind)
    assert actual is not None
    ratios = ((level.alpha / level.sigma) ** 2).tolist()
    assert_close(actual, torch.tensor([PAPER_WEIGHTS[kind](ratio, 5.0) for ratio in ratios], dtype=torch.float64))
    assert TimesConfig().loss_weights(level, kind) is None


def test_a_mean_flow_trains_as_a_plain_flow_until_its_spans_begin(codes: CodeCache, tmp_path: Path) -> None:
    model, rows = replace(MODEL, mean_flow=MeanFlow(spans_from=0.5, instant_share=0.5)), np.arange(8)
    config = make_config(codes, tmp_path, model=model, max_steps=6)
    objective, uniform = DiffusionObjective(config, codes), torch.rand(8, 4, generator=seeded(0))
    uniform[:, 3] = torch.linspace(0, 1, 8)
    for step in range(6):
        *_, ends, guidance = objective.prepare_inputs(rows, uniform, step)
        assert (ends is None) == (guidance is None) == (step < 3)
    assert guidance is not None
    assert_close(guidance, torch.linspace(1, 4, 8))  # uniform from 1 to max_guidance
    with pytest.raises(ConfigError, match=r"spans_from is 1\.0; expected a share in \[0, 1\)"):
        MeanFlow(spans_from=1.0)


def test_the_key_prior_selects_the_configuration_class() -> None:
    paths = {"codes": "codes", "output": "run"}
    assert isinstance(parse_prior_training(paths), AutoregressiveTraining)
    actual = parse_prior_training(paths | {"prior": "diffusion", "times": {"min_snr_gamma": 5}})
    assert isinstance(actual, DiffusionTraining)
    assert math.isclose(actual.times.min_snr_gamma, 5)
    with pytest.raises(ConfigError, match=r"prior is 'gan'; expected one of: autoregressive, diffusion"):
        parse_prior_training(paths | {"prior": "gan"})


@pytest.mark.parametrize(("scale", "shift"), [(1.6, 0.0), (0.6, 0.0), (1.0, 0.5)])
def test_the_warning_names_a_channel_far_from_mean_0_and_standard_deviation_1(scale: float, shift: float) -> None:
    latents = torch.randn(200, 3, 4, 4, generator=seeded(0))  # statistics are within 0.1: 5 standard errors
    assert normalization_warning(latents) is None
    latents[:, 1] = latents[:, 1] * scale + shift
    text = normalization_warning(latents)
    assert text is not None
    match = re.search(r"1 of 3 channels .* channel 1 with (\S+) and (\S+):", text)
    assert match is not None
    assert [float(number) for number in match.groups()] == pytest.approx([shift, scale], abs=0.1)


def test_a_run_on_latents_of_another_scale_warns_once_and_continues(
    codes: CodeCache, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = CodeSplit.latents
    for factor, times in ((1.0, 0), (3.0, 1)):
        rows = latents(codes.train, np.arange(len(codes.train)))
        mean, std = rows.mean((0, 2, 3), keepdim=True), rows.std((0, 2, 3), keepdim=True)
        monkeypatch.setattr(CodeSplit, "latents", lambda split, at, f=factor: f * (latents(split, at) - mean) / std)  # noqa: B023
        capsys.readouterr()
        for steps in (3, 6):
            train_prior(make_config(codes, tmp_path / f"{factor}", max_steps=steps), codes)
        assert capsys.readouterr().err.count("channels of the latents are far from") == times
        assert len(read_column(tmp_path / f"{factor}", "warning")) == times
