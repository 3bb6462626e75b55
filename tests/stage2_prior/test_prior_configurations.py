"""The stored configuration of a prior: one section for each option, and earlier formats."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import tiny_diffusion, tiny_prior

from stage2_prior.autoregressive.config import AutoregressiveModel, AutoregressivePriorConfig
from stage2_prior.diffusion.config import DiffusionPriorConfig, DiTModel, UNetModel
from stage2_prior.diffusion.mean_flow import MeanFlow
from stage2_prior.migration import TRAINING
from stage2_prior.registry import load_saved_prior
from stage2_prior.training_config import parse_prior_training
from training_harness.errors import ConfigError

PATHS = {"output": "run", "codes": "codes"}


def test_field_names_of_format_1_still_create_a_configuration() -> None:
    flat = AutoregressivePriorConfig(hidden_size=32, num_heads=2, height=4, rms_norm_eps=1e-5)
    assert flat.model == AutoregressiveModel(hidden_size=32, num_heads=2, rms_norm_eps=1e-5)
    assert flat.height == 4
    unet = DiffusionPriorConfig(
        denoiser="unet", channel_multipliers=(1, 2), hidden_size=8, schedule="linear", num_heads=2
    )
    assert unet.model == UNetModel(channel_multipliers=(1, 2), hidden_size=8, schedule="linear")
    flow = DiffusionPriorConfig(mean_flow=True, max_guidance=3.0)
    assert flow.model == DiTModel(mean_flow=MeanFlow(max_guidance=3.0))
    assert DiffusionPriorConfig(mean_flow=False, max_guidance=3.0, attention=[]).model == DiTModel()
    assert DiffusionPriorConfig(max_guidance=3.0).model == DiTModel()
    with pytest.raises(ConfigError, match=r"unknown field 'model\.channel_multipliers' for the model dit"):
        DiffusionPriorConfig(channel_multipliers=(1, 2))


@pytest.mark.parametrize(
    "prior",
    [
        tiny_prior(),
        tiny_diffusion(denoiser="unet", channel_multipliers=(1, 2)),
        tiny_diffusion(mean_flow=True),
    ],
    ids=["autoregressive", "unet", "mean flow"],
)
def test_a_saved_configuration_has_its_format_and_the_section_model(prior: Any, tmp_path: Path) -> None:
    prior.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["latentloom_format"] == 2
    assert "hidden_size" not in stored
    kind = {"latentloom-autoregressive": "autoregressive"}.get(stored["model_type"], "diffusion")
    training = parse_prior_training(PATHS | {"prior": kind, "model": stored["model"]})
    assert training.model == prior.config.model == load_saved_prior(tmp_path).config.model


DIT = """denoiser: dit
patch_size: 1
hidden_size: 8
num_heads: 2
channel_multipliers: []
attention: []
class_dropout: 0.2
mean_flow: false
max_guidance: 4.0"""
UNET = DIT.replace("dit", "unet", 1).replace("channel_multipliers: []", "channel_multipliers: [1, 2]")
FLOW = DIT.replace("mean_flow: false", "mean_flow: true")
TIMES = {"logit_std": 1.2, "instant_share": 0.75, "spans_from": 0.5}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (DIT, DiTModel(hidden_size=8, num_heads=2)),
        (UNET, UNetModel(hidden_size=8, channel_multipliers=(1, 2))),
        (FLOW, DiTModel(hidden_size=8, num_heads=2, mean_flow=MeanFlow(instant_share=0.75, spans_from=0.5))),
    ],
    ids=["dit", "unet", "mean flow"],
)
def test_a_full_configuration_of_format_1_becomes_a_variant(model: str, expected: Any) -> None:
    values = PATHS | {"prior": "diffusion", "model": yaml.safe_load(model), "times": TIMES}
    config = parse_prior_training(TRAINING.migrate(values))
    assert config.model == expected
    assert config.class_dropout == 0.2
    assert config.times.logit_std == 1.2


def test_a_partial_configuration_of_format_1_has_the_same_meaning() -> None:
    assert TRAINING.migrate({"model": {"mean_flow": True, "max_guidance": 3.0}}) == {
        "model": {"mean_flow": {"max_guidance": 3.0}}
    }
    assert TRAINING.migrate({"model": {"mean_flow": False}}) == {"model": {"mean_flow": None}}
    assert TRAINING.migrate({"times": {"spans_from": 0.5}}) == {
        "times": {},
        "model": {"mean_flow": {"spans_from": 0.5}},
    }
    assert TRAINING.migrate({"model": {"class_dropout": 0.3}}) == {"model": {}, "class_dropout": 0.3}
