"""A tokenizer's stored configuration: sections, migration of format 1, and an id that does not change."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from tiny_models import tiny_tokenizer

from stage1_tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, AutoencoderKLModel
from stage1_tokenizer.identity import IdentityConfig, IdentityModel
from stage1_tokenizer.migration import FORMAT_1_QUANTIZER, TRAINING
from stage1_tokenizer.quantizers import (
    BSQConfig,
    EMAVectorQuantizerConfig,
    FSQConfig,
    ResidualQuantizerConfig,
    SimVQConfig,
)
from stage1_tokenizer.registry import saved_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining
from stage1_tokenizer.vqgan import VQGAN, VQGANConfig, VQGANModel
from training_harness.configuration import from_mapping
from training_harness.errors import ConfigError
from training_harness.pretrained import strict_config

SHAPE: dict[str, Any] = {"channels": (4, 8), "blocks": (0, 0), "latent_channels": 4}


def test_the_field_names_of_format_1_still_make_a_configuration() -> None:
    flat = VQGANConfig(**SHAPE, image_size=(8, 8), codebook_size=16, quantizer={"name": "bsq", "depth": 4})
    assert flat.model == VQGANModel(**SHAPE, codebook_size=16, quantizer=BSQConfig())
    assert flat.model == VQGANConfig(model=flat.model).model
    assert AutoencoderKLConfig(**SHAPE).model == AutoencoderKLModel(**SHAPE)
    assert IdentityConfig().model == IdentityModel()
    with pytest.raises(ConfigError, match="unknown field 'channel' in a VQGANConfig; did you mean 'channels'"):
        VQGANConfig(channel=(4, 8))


def test_a_saved_configuration_has_the_model_section_of_the_training_configuration(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["latentloom_format"] == 2
    assert not {"channels", "codebook_size", "quantizer"} & stored.keys()
    training = from_mapping(TokenizerTraining, {"output": "run", "data": "x", "model": stored["model"]})
    assert training.model == tokenizer.config.model == saved_tokenizer(tmp_path).config.model


FORMAT_1_SECTIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "vqgan": (
        {
            "name": "vqgan",
            **SHAPE,
            "codebook_size": 16,
            "quantizer": FORMAT_1_QUANTIZER | {"depth": 9},
            "prior": "none",
        },
        VQGANModel(**SHAPE, codebook_size=16),
    ),
    "residual": (
        {"quantizer": FORMAT_1_QUANTIZER | {"name": "residual", "depth": 9}},
        VQGANModel(quantizer=ResidualQuantizerConfig(depth=9)),
    ),
    "simvq": ({"quantizer": FORMAT_1_QUANTIZER | {"name": "simvq"}}, VQGANModel(quantizer=SimVQConfig())),
    "fsq": (
        {"latent_channels": 3, "quantizer": FORMAT_1_QUANTIZER | {"name": "fsq", "levels": [8, 8, 8]}},
        VQGANModel(latent_channels=3, quantizer=FSQConfig(levels=(8, 8, 8))),
    ),
    "kl": (
        {"name": "kl", **SHAPE, "codebook_size": 16, "quantizer": FORMAT_1_QUANTIZER, "prior": "standard_normal"},
        AutoencoderKLModel(**SHAPE, prior="standard_normal"),
    ),
    "identity": (
        {"name": "identity", **SHAPE, "codebook_size": 1, "quantizer": FORMAT_1_QUANTIZER, "prior": "none"},
        IdentityModel(),
    ),
}


@pytest.mark.parametrize(("model", "expected"), FORMAT_1_SECTIONS.values(), ids=FORMAT_1_SECTIONS.keys())
def test_a_format_1_section_becomes_its_variant(model: dict[str, Any], expected: Any) -> None:
    values = TRAINING.migrate({"output": "run", "data": "x", "model": model})
    assert from_mapping(TokenizerTraining, values).model == expected


def test_options_that_format_1_rejected_are_still_rejected() -> None:
    for quantizer in ({"name": "ema", "levels": [8, 8]}, {"name": "lfq", "normalize": True}):
        values = TRAINING.migrate({"output": "run", "data": "x", "model": {"quantizer": quantizer}})
        with pytest.raises(ConfigError, match="unknown field"):
            from_mapping(TokenizerTraining, values)


# The id


def test_the_id_is_equal_for_nested_and_flat_options() -> None:
    nested = VQGANConfig(model=VQGANModel(**SHAPE, quantizer=EMAVectorQuantizerConfig(usage_decay=0.5)))
    flat = VQGANConfig(**SHAPE, quantizer=FORMAT_1_QUANTIZER | {"usage_decay": 0.5})
    assert nested.id_quantizer is flat.id_quantizer is None
    assert nested.id_fields() == flat.id_fields()
    assert nested.id_fields().keys() == {
        *("image_channels", "image_size", "content_size", "latent_mean", "latent_std"),
        *("channels", "blocks", "attention", "latent_channels", "codebook_size", "quantizer"),
    }


def test_the_id_of_a_partial_section_survives_saving_and_changes_with_the_quantizer(
    tmp_path: Path,
) -> None:
    tokenizer = tiny_tokenizer(quantizer={"name": "vq", "usage_decay": 0.5})
    whole_section = tiny_tokenizer(quantizer=FORMAT_1_QUANTIZER | {"name": "vq", "usage_decay": 0.5})
    assert tokenizer.compute_id() != whole_section.compute_id()
    tokenizer.save_pretrained(tmp_path)
    assert saved_tokenizer(tmp_path).compute_id() == tokenizer.config.tokenizer_id == tokenizer.compute_id()
    quantizer = replace(tokenizer.config.model.quantizer, usage_decay=0.7)
    tokenizer.config.model = replace(tokenizer.config.model, quantizer=quantizer)
    assert tokenizer.config.id_fields()["quantizer"]["usage_decay"] == 0.7


@dataclass(frozen=True, kw_only=True)
class LaterQuantizer(EMAVectorQuantizerConfig):
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class LaterModel(VQGANModel):
    name: Literal["vqgan"] = "vqgan"
    width: int = 1
    quantizer: LaterQuantizer = field(default_factory=LaterQuantizer)  # type: ignore[assignment]


@strict_config
class LaterConfig(VQGANConfig):
    model_options: ClassVar[Any] = LaterModel

    model: LaterModel = field(default_factory=LaterModel)
    crop: int = 0


def test_a_new_field_changes_the_id_only_when_it_is_not_the_default() -> None:
    tokenizer = tiny_tokenizer()
    current_id = tokenizer.compute_id()

    def compute_later_id(crop: int = 0, **options: Any) -> str:
        model = tokenizer.config.model
        shape = {name: getattr(model, name) for name in (*SHAPE, "codebook_size")}
        images = {name: getattr(tokenizer.config, name) for name in ("image_channels", "image_size", "content_size")}
        statistics = {name: getattr(tokenizer.config, name) for name in ("latent_mean", "latent_std")}
        config = LaterConfig(model=LaterModel(**shape | options), crop=crop, **images, **statistics)
        later = VQGAN(config)
        later.load_state_dict(tokenizer.state_dict())
        return later.compute_id()

    others = [
        compute_later_id(crop=1),
        compute_later_id(width=2),
        compute_later_id(quantizer=LaterQuantizer(shared=True)),
    ]
    assert compute_later_id() == current_id
    assert len({current_id, *others}) == 4


def test_the_prior_enters_the_id_of_a_tokenizer_that_samples_without_stage_two() -> None:
    without_prior, with_prior = (
        AutoencoderKL(AutoencoderKLConfig(model=AutoencoderKLModel(prior=p))) for p in ("none", "standard_normal")
    )
    assert "model.prior" not in without_prior.config.id_fields()
    assert with_prior.config.id_fields()["model.prior"] == "standard_normal"
