"""Tokenizers without a codebook have the same interface: latents of unit variance, and an error for indices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_parts import error_message, random_pixels, write_images
from tiny_models import seeded, tiny_source, tiny_tokenizer

from stage1_tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, AutoencoderKLModel
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.codes.writer import write_code_cache
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.sources import open_source
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.identity import IdentityConfig, IdentityTokenizer
from stage1_tokenizer.registry import TOKENIZERS, new_tokenizer, saved_tokenizer
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.train import measure_latent_statistics, train_tokenizer
from stage1_tokenizer.training_config import AnyTokenizerModel, TokenizerTraining, build_model_config, complete_config
from training_harness.configuration import build_section
from training_harness.errors import ConfigError, UserError
from training_harness.metric_log import read_metrics

SHAPE = {"image_size": (16, 16), "channels": (8, 8), "blocks": (0, 1), "latent_channels": 4}


def create_tokenizer(kind: str, **fields: Any) -> Tokenizer:
    statistics = {"latent_mean": [0.1] * 4, "latent_std": [0.5] * 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "kl":
            return new_tokenizer(AutoencoderKLConfig(**SHAPE | statistics | fields)).eval()
        pixel_statistics = {"latent_mean": [0.2] * 3, "latent_std": [0.5] * 3}
        return new_tokenizer(IdentityConfig(image_size=(16, 16), **pixel_statistics | fields)).eval()


CONTINUOUS = ("kl", "identity")


@pytest.mark.parametrize("kind", CONTINUOUS)
@torch.no_grad()
def test_decoded_latents_equal_the_reconstruction(kind):
    tokenizer, x = create_tokenizer(kind), random_pixels()
    output = tokenizer(x)
    assert output.indices is None
    torch.testing.assert_close(tokenizer.decode_latents(tokenizer.encode_latents(x)), output.reconstruction)
    spec = tokenizer.latent_spec()
    assert tokenizer.encode_latents(x).shape[1:] == (spec.channels, spec.height, spec.width)
    assert (spec.codebook_size, spec.levels) == (None, 1)


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_the_indices_methods_without_a_codebook_give_one_line(kind):
    tokenizer = create_tokenizer(kind)
    indices = torch.zeros(1, 4, 4, dtype=torch.int64)
    for call, values in (
        ("encode_indices", random_pixels()),
        ("decode_indices", indices),
        ("indices_to_latents", indices),
    ):
        with pytest.raises(UserError) as caught:
            getattr(tokenizer, call)(values)
        assert "no codebook" in error_message(caught)


@pytest.mark.parametrize("kind", TOKENIZERS)
@torch.no_grad()
def test_a_saved_tokenizer_of_every_type_reloads_with_identical_output(kind, tmp_path):
    tokenizer = tiny_tokenizer(image_channels=3) if kind == "vqgan" else create_tokenizer(kind)
    tokenizer.save_pretrained(tmp_path)
    loaded, x = saved_tokenizer(tmp_path), random_pixels()
    assert type(loaded) is type(tokenizer) is TOKENIZERS[kind]
    assert torch.equal(loaded.encode_latents(x), tokenizer.encode_latents(x))
    assert torch.equal(loaded(x).reconstruction, tokenizer(x).reconstruction)
    assert loaded.compute_id() == tokenizer.compute_id()


def test_a_folder_of_another_model_type_gives_one_line(tmp_path):
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        saved_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"the model type in .* is 'llama'"):
        saved_tokenizer(tmp_path)


@torch.no_grad()
def test_the_identity_reconstructs_every_image_bitwise():
    tokenizer = create_tokenizer("identity", latent_mean=[0.0] * 3, latent_std=[1.0] * 3)
    x = random_pixels(2, 3, 15, 9)
    assert len(x) == 2
    assert torch.equal(tokenizer.encode_latents(x), x)
    assert torch.equal(tokenizer(x).reconstruction, x)


@torch.no_grad()
def test_latents_are_sampled_with_a_generator_and_are_the_mean_without_one():
    tokenizer, x = create_tokenizer("kl"), random_pixels()
    tokenizer.encoder[-1].bias[4:] = -1.0  # log σ² far from 0
    mean, log_variance = tokenizer._posterior(x)
    raw_mean = (mean - 0.1) / 0.5
    assert torch.equal(tokenizer.encode_latents(x), raw_mean)
    samples = torch.stack([tokenizer.encode_latents(x, seeded(i)) for i in range(400)])
    torch.testing.assert_close(samples.mean(0), raw_mean, rtol=0, atol=0.35)
    ratio = samples.var(0).mean() / (log_variance.exp() / 0.25).mean()
    assert ratio.item() == pytest.approx(1, abs=0.02)
    assert torch.equal(tokenizer.encode_latents(x, seeded(3)), tokenizer.encode_latents(x, seeded(3)))


def test_the_kl_loss_is_in_nats_per_value_of_the_image():
    tokenizer = create_tokenizer("kl")
    x = random_pixels()
    mean, log_variance = tokenizer._posterior(x)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    assert tokenizer(x).losses["kl"].item() == pytest.approx((divergence.sum() / x.numel()).item(), rel=1e-5)


@torch.no_grad()
def test_sampled_latents_have_zero_mean_and_unit_variance():
    source = tiny_source(train=200)
    tokenizer = create_tokenizer("kl", image_channels=1, content_size=(14, 14), latent_mean=None, latent_std=None)
    tokenizer.encoder[-1].bias.copy_(torch.linspace(-1, 1, 8))
    pixels = ImageLoader(source.train, tokenizer.config.image_processor)
    measure_latent_statistics(tokenizer, pixels)
    x = tokenizer.config.image_processor.preprocess(pixels[range(200)])
    samples = torch.cat([tokenizer.encode_latents(x, seeded(i)) for i in range(20)])
    torch.testing.assert_close(samples.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(samples.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.02)


# Training


def run_training(output: Path, data: Path, **fields: Any) -> tuple[Path, TokenizerTraining]:
    source = open_source(str(data))
    kl_options = {"channels": (8, 8), "blocks": (0, 1), "latent_channels": 4}
    model = build_section(AnyTokenizerModel, kl_options | fields if fields["name"] == "kl" else fields, "model")
    config = TokenizerTraining(
        output=output, data=str(data), model=model, max_steps=6, batch_size=4, sample_every=3, log_every=1
    )
    statistics = dataset_statistics(source.train)
    config = complete_config(config, statistics)
    model_config = build_model_config(config, statistics)
    loaders = [ImageLoader(split, model_config.image_processor) for split in (source.train, source.validation)]
    return train_tokenizer(config, model_config, *loaders), config


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("kinds") / "images")


def test_a_kl_run_logs_its_divergence_and_saves_latent_statistics(tmp_path, data):
    folder, config = run_training(tmp_path / "run", data, name="kl")
    rows = read_metrics(config.output / "metrics.jsonl")
    assert all(row["kl"] >= 0 for row in rows if "l1" in row)
    assert not any("codes_used" in row for row in rows)
    tokenizer = saved_tokenizer(folder)
    assert isinstance(tokenizer, AutoencoderKL)
    assert len(tokenizer.config.latent_mean) == 4
    assert "continuous latents" in (folder / "README.md").read_text()


def test_an_identity_run_measures_its_latent_statistics_and_finishes(tmp_path, data):
    folder, config = run_training(tmp_path / "run", data, name="identity")
    tokenizer = saved_tokenizer(folder)
    assert isinstance(tokenizer, IdentityTokenizer)
    spec = tokenizer.latent_spec()
    assert (spec.channels, spec.height, spec.width, spec.downsampling_factor) == (3, 16, 16, 1)
    assert read_metrics(config.output / "metrics.jsonl")[-1]["validation_psnr"] == 100
    source = open_source(str(data))
    pixels = ImageLoader(source.train, tokenizer.config.image_processor)
    latents = tokenizer.encode_latents(tokenizer.config.image_processor.preprocess(pixels[range(len(pixels))]))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-3)


def test_the_code_cache_of_a_tokenizer_without_a_codebook_has_latents(tmp_path):
    tokenizer = create_tokenizer("kl", image_channels=1, content_size=(14, 14), tokenizer_id="t")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = tiny_source()
    codes = CodeCache(write_code_cache(tokenizer, tmp_path / "tokenizer", source, tmp_path / "codes"))
    latents = codes.train.latents(torch.arange(3).numpy())
    pixels = ImageLoader(source.train, tokenizer.config.image_processor)
    with torch.no_grad():
        expected = tokenizer.encode_latents(tokenizer.config.image_processor.preprocess(pixels[range(3)]))
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)


# Invalid options


@pytest.mark.parametrize(
    ("fields", "expected_text"),
    [
        ({"attention": (32,)}, "model.attention contains 32, and a model of 3 levels has no such downsampling factor"),
        ({"attention": (False, False, True)}, "model.attention[0] is False; expected int"),
        ({"channels": (8, 8)}, "model.channels has 2 entries and model.blocks has 3"),
        ({"channels": (), "blocks": ()}, "model.channels has 0 entries"),
        ({"blocks": (0, -1, 1)}, "0 or more blocks at each level"),
        ({"latent_channels": 0}, "model.latent_channels is 0"),
        ({"codebook_size": 0}, "model.codebook_size is 0"),
        ({"prior": "standard_normal"}, "unknown field 'model.prior' for the model vqgan; expected it only with kl"),
        (
            {"name": "kl", "codebook_size": 8},
            "unknown field 'model.codebook_size' for the model kl; expected it only with vqgan",
        ),
        ({"name": "vae"}, "model.name is 'vae'; expected one of: vqgan, kl, identity"),
    ],
)
def test_inconsistent_fields_give_one_line_that_names_them(fields, expected_text):
    with pytest.raises(ConfigError) as caught:
        build_section(AnyTokenizerModel, fields, "model")
    assert expected_text in error_message(caught)


def test_only_a_standard_normal_prior_samples_without_stage_two():
    assert AutoencoderKLModel(prior="standard_normal").samples_without_prior
    assert not AutoencoderKLModel().samples_without_prior


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("channels", [1, 2, 5])
@torch.no_grad()
def test_factors_from_2_to_32_work_with_any_channels_and_unequal_sides(levels, channels):
    factor = 2 ** (levels - 1)
    shape = {
        "channels": (4,) * levels,
        "blocks": (0,) * (levels - 1) + (1,),
        "attention": (factor,),
        "latent_channels": 4,
    }
    tokenizer = tiny_tokenizer(image_channels=channels, image_size=(2 * factor, 3 * factor), content_size=None, **shape)
    x = random_pixels(2, channels, 2 * factor, 3 * factor)
    indices = tokenizer.encode_indices(x)
    assert indices.shape == (2, 2, 3)
    torch.testing.assert_close(tokenizer.decode_indices(indices), tokenizer(x).reconstruction)
    assert tokenizer.latent_spec().downsampling_factor == factor
