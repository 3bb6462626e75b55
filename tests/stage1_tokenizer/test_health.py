"""What is wrong with a run is said while it trains, once, with the option that mends it."""

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
from stage1_tokenizer.training_config import TokenizerTraining, completed, model_config
from stage1_tokenizer.vqgan import VQGANModel
from training_harness.metric_log import read_metrics

EMA = EMAVectorQuantizerConfig()


def said(health: Health, psnr: float = 20.0, used: int = 512, share: float = 0.0, choices: int = 2048):
    return health.warnings(psnr, {"codes_used": used, "perplexity": used / 2}, choices, 512, EMA, share)


def test_less_than_a_tenth_of_the_codes_is_a_collapse_that_is_said_once():
    health = Health()
    assert said(health, used=52) == {}
    assert said(health, used=3, choices=2047) == {}  # too early to say
    found = said(health, used=51)
    assert list(found) == ["codebook"]
    assert "51 of 512" in found["codebook"]
    assert "--model.quantizer.restart-threshold" in found["codebook"]
    assert said(health, used=3) == {}
    resumed = Health()
    resumed.load_state_dict(health.state_dict())
    assert said(resumed, used=3) == {}


def test_a_level_that_collapses_is_seen_beside_one_that_does_not():
    usage = CodeUsage(100, levels=2)
    indices = torch.stack([torch.arange(400).view(4, 10, 10) % 100, torch.full((4, 10, 10), 7)], dim=1)
    usage.count(indices)
    choices, used = usage.choices, usage.since_last()
    assert (choices, used["codes_used"], used["codes_used_at_fewest_level"]) == (400, 100, 1)
    found = Health().warnings(20.0, used, choices, 100, ResidualQuantizerConfig(), 0.0)
    assert "1 of 100 codes were used at a level" in found["codebook"]
    assert usage.since_last()["codes_used"] == 0


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_remedy_names_options_that_the_quantizer_has(name):
    remedy = usage_recommendation(name, 0.3, 512)
    assert "--" in remedy
    assert ("restart-threshold" in remedy) == (name in ("ema", "residual"))
    if name in ("vq", "ema", "residual"):
        assert "restart-threshold 0.3" in usage_recommendation(name, 0.0, 512)


@pytest.mark.parametrize(("loss", "wins"), [(0.02, True), (0.5, False)])
def test_a_discriminator_wins_outright_when_its_mean_loss_is_nearly_nought(loss, wins):
    health = Health()
    for value in (loss / 2, 3 * loss / 2):
        health.record_discriminator(torch.tensor(value))
    found = said(health, share=1.0)
    assert ("discriminator" in found) == wins
    if wins:
        assert f"{loss:.3g}" in found["discriminator"]
        assert "--adversarial.learning-rate" in found["discriminator"]
    assert discriminator_warning(None) is None  # nothing was judged
    assert health.judged == 0  # counted anew from here


def test_reconstructions_are_worse_by_what_they_were_before_the_decoder_heard_of_the_discriminator():
    health = Health()
    said(health, psnr=24.0)
    said(health, psnr=23.0)
    assert said(health, psnr=23.1, share=0.5) == {}
    found = said(health, psnr=22.9, share=1.0)
    assert "PSNR 22.90 dB, before it 24.00 dB" in found["reconstruction"]
    assert "--adversarial.weight" in found["reconstruction"]
    without = Health()
    said(without, psnr=24.0)
    assert said(without, psnr=10.0) == {}  # no discriminator, no such warning


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("health") / "pictures")


def trained(output: Path, pictures: Path, config: TokenizerTraining) -> list[dict]:
    source = open_source(str(pictures))
    config = completed(replace(config, output=output, data=str(pictures)), seen := dataset_statistics(source.train))
    shape = model_config(config, seen)
    train_tokenizer(
        config, shape, *(ImageLoader(split, shape.image_processor) for split in (source.train, source.validation))
    )
    return read_metrics(output / "metrics.jsonl")


def small(**fields) -> TokenizerTraining:
    model = VQGANModel(channels=(8, 8), blocks=(0, 0), latent_channels=4, codebook_size=64)
    plain = TokenizerTraining(output=Path("x"), data="x", model=model, batch_size=4, max_steps=8, sample_every=4)
    return replace(plain, **fields)


def test_a_run_whose_codebook_collapses_says_so_on_stderr_and_in_its_log(tmp_path, pictures, capsys, monkeypatch):
    monkeypatch.setattr(CodeUsage, "count", lambda usage, indices: usage.counts[:, :1].add_(indices.numel()))
    rows = trained(tmp_path / "run", pictures, small())
    warnings = [row for row in rows if "warning" in row]
    assert [(row["step"], row["about"]) for row in warnings] == [(4, "codebook")]
    assert f"warning at step 4: {warnings[0]['warning']}" in capsys.readouterr().err


def test_a_run_whose_discriminator_cannot_be_wrong_says_so(tmp_path, pictures, monkeypatch, capsys):
    monkeypatch.setattr("stage1_tokenizer.train.discriminator_loss", lambda kind, real, fake: 0 * (real - fake).mean())
    judged = AdversarialConfig(weight=0.1, start=0, warmup=0, ramp=1, channels=4, layers=1)
    rows = trained(tmp_path / "run", pictures, small(adversarial=judged))
    assert "discriminator" in [row.get("about") for row in rows]
    assert "the discriminator wins outright" in capsys.readouterr().err
