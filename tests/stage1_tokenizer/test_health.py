"""A run warns about each training problem once and recommends an option."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_parts import write_images

from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.sources import open_source
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.health import Health, discriminator_warning, usage_recommendation
from stage1_tokenizer.losses.adversarial import AdversarialConfig
from stage1_tokenizer.metrics import CodeUsage
from stage1_tokenizer.quantizers import QUANTIZERS, EMAVectorQuantizerConfig, ResidualQuantizerConfig
from stage1_tokenizer.train import train_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining, build_model_config, complete_config
from stage1_tokenizer.vqgan import VQGANModel
from training_harness.metric_log import read_metrics

EMA = EMAVectorQuantizerConfig()


def check_health(
    health: Health, psnr: float = 20.0, codes_used: int = 512, ramp_factor: float = 0.0, assignments: int = 2048
):
    return health.new_warnings(
        psnr, {"codes_used": codes_used, "perplexity": codes_used / 2}, assignments, 512, EMA, ramp_factor
    )


def test_a_usage_below_a_tenth_of_the_codes_gives_one_collapse_warning():
    health = Health()
    assert check_health(health, codes_used=52) == {}
    assert check_health(health, codes_used=3, assignments=2047) == {}  # too few positions for a warning
    warnings = check_health(health, codes_used=51)
    assert list(warnings) == ["codebook"]
    assert "51 of 512" in warnings["codebook"]
    assert "--model.quantizer.restart-threshold" in warnings["codebook"]
    assert check_health(health, codes_used=3) == {}
    resumed = Health()
    resumed.load_state_dict(health.state_dict())
    assert check_health(resumed, codes_used=3) == {}


def test_one_collapsed_level_gives_a_warning_when_the_other_level_is_healthy():
    usage = CodeUsage(100, levels=2)
    indices = torch.stack([torch.arange(400).view(4, 10, 10) % 100, torch.full((4, 10, 10), 7)], dim=1)
    usage.update(indices)
    assignments, metrics = usage.assignments, usage.compute_and_reset()
    assert (assignments, metrics["codes_used"], metrics["codes_used_at_fewest_level"]) == (400, 100, 1)
    warnings = Health().new_warnings(20.0, metrics, assignments, 100, ResidualQuantizerConfig(), 0.0)
    assert "1 of 100 codes were used at one level" in warnings["codebook"]
    assert usage.compute_and_reset()["codes_used"] == 0


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_recommendation_names_options_that_the_quantizer_has(name):
    recommendation = usage_recommendation(name, 0.3, 512)
    assert "--" in recommendation
    assert ("restart-threshold" in recommendation) == (name in ("ema", "residual"))
    if name in ("vq", "ema", "residual"):
        assert "restart-threshold 0.3" in usage_recommendation(name, 0.0, 512)


@pytest.mark.parametrize(("loss", "too_strong"), [(0.02, True), (0.5, False)])
def test_a_mean_discriminator_loss_near_0_gives_a_warning(loss, too_strong):
    health = Health()
    for value in (loss / 2, 3 * loss / 2):
        health.record_discriminator_loss(torch.tensor(value))
    warnings = check_health(health, ramp_factor=1.0)
    assert ("discriminator" in warnings) == too_strong
    if too_strong:
        assert f"{loss:.3g}" in warnings["discriminator"]
        assert "--adversarial.learning-rate" in warnings["discriminator"]
    assert discriminator_warning(None) is None  # the discriminator was not trained
    assert health.discriminator_loss_count == 0  # the next validation starts a new mean


def test_reconstructions_are_compared_with_the_best_psnr_before_the_adversarial_loss_began():
    health = Health()
    check_health(health, psnr=24.0)
    check_health(health, psnr=23.0)
    assert check_health(health, psnr=23.1, ramp_factor=0.5) == {}
    warnings = check_health(health, psnr=22.9, ramp_factor=1.0)
    assert "PSNR 22.90 dB, and 24.00 dB before" in warnings["reconstruction"]
    assert "--adversarial.weight" in warnings["reconstruction"]
    not_adversarial = Health()
    check_health(not_adversarial, psnr=24.0)
    assert check_health(not_adversarial, psnr=10.0) == {}  # the warning needs a discriminator


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("health") / "images")


def train_and_read_log(output: Path, image_folder: Path, config: TokenizerTraining) -> list[dict]:
    source = open_source(str(image_folder))
    statistics = dataset_statistics(source.train)
    config = complete_config(replace(config, output=output, data=str(image_folder)), statistics)
    model_config = build_model_config(config, statistics)
    train_tokenizer(
        config,
        model_config,
        *(ImageLoader(split, model_config.image_processor) for split in (source.train, source.validation)),
    )
    return read_metrics(output / "metrics.jsonl")


def small_config(**fields) -> TokenizerTraining:
    model = VQGANModel(channels=(8, 8), blocks=(0, 0), latent_channels=4, codebook_size=64)
    defaults = TokenizerTraining(output=Path("x"), data="x", model=model, batch_size=4, max_steps=8, sample_every=4)
    return replace(defaults, **fields)


def test_a_codebook_collapse_is_reported_on_stderr_and_in_the_metric_log(tmp_path, image_folder, capsys, monkeypatch):
    monkeypatch.setattr(CodeUsage, "update", lambda usage, indices: usage.counts[:, :1].add_(indices.numel()))
    rows = train_and_read_log(tmp_path / "run", image_folder, small_config())
    warnings = [row for row in rows if "warning" in row]
    assert [(row["step"], row["about"]) for row in warnings] == [(4, "codebook")]
    assert f"warning at step 4: {warnings[0]['warning']}" in capsys.readouterr().err


def test_a_run_with_a_perfect_discriminator_reports_it(tmp_path, image_folder, monkeypatch, capsys):
    monkeypatch.setattr("stage1_tokenizer.train.discriminator_loss", lambda kind, real, fake: 0 * (real - fake).mean())
    adversarial = AdversarialConfig(weight=0.1, start=0, warmup=0, ramp=1, channels=4, layers=1)
    rows = train_and_read_log(tmp_path / "run", image_folder, small_config(adversarial=adversarial))
    assert "discriminator" in [row.get("about") for row in rows]
    assert "the discriminator is too strong" in capsys.readouterr().err
