"""The tokenizer's calls agree with one another, and what is saved is what loads, or one line says why not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_parts import error_message, random_pixels, small_config, small_tokenizer
from tiny_models import seeded

from stage1_tokenizer.latent_spec import LatentSpec
from stage1_tokenizer.networks.blocks import AttentionBlock, ResidualBlock, Upsample, group_norm
from stage1_tokenizer.quantizers import QUANTIZERS
from stage1_tokenizer.vqgan import VQGAN
from training_harness.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def tokenizer() -> VQGAN:
    return small_tokenizer()


@pytest.fixture(scope="module")
def saved(tokenizer: VQGAN, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def raw_latents(tokenizer: VQGAN, normalized: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (tokenizer.config.latent_mean, tokenizer.config.latent_std))
    return normalized * std + mean


# The calls


@pytest.mark.parametrize("size", [(16, 16), (64, 96), (4, 20)])
@torch.no_grad()
def test_decoding_the_codes_of_a_picture_is_its_reconstruction_at_any_multiple_of_f(tokenizer, size):
    x = random_pixels(2, 3, *size)
    indices, output = tokenizer.encode_indices(x), tokenizer(x)
    assert indices.dtype == torch.int64
    assert indices.shape == (2, size[0] // 4, size[1] // 4)
    assert torch.equal(indices, output.indices)
    assert output.reconstruction.shape == x.shape
    assert torch.allclose(tokenizer.decode_indices(indices), output.reconstruction, atol=1e-5)
    shuffled = (indices + 1) % 16
    assert not torch.allclose(tokenizer.decode_indices(shuffled), output.reconstruction, atol=1e-2)


@pytest.mark.parametrize("name", QUANTIZERS)
@torch.no_grad()
def test_decoding_the_codes_of_a_picture_is_its_reconstruction_whatever_the_quantizer(name):
    sizes = {"fsq": (16, 2), "lfq": (16, 4), "bsq": (16, 4)}
    size, channels = sizes.get(name, (16, 4))
    quantizer = {"name": name} | ({"levels": (4, 4)} if name == "fsq" else {})
    statistics = {"latent_mean": [0.5] * channels, "latent_std": [2.0] * channels}
    tokenizer = small_tokenizer(codebook_size=size, latent_channels=channels, quantizer=quantizer, **statistics)
    x = random_pixels()
    output, indices = tokenizer(x), tokenizer.encode_indices(x)
    assert torch.equal(indices, output.indices)
    assert torch.allclose(tokenizer.decode_indices(indices), output.reconstruction, atol=1e-5)
    if name not in ("ibq", "residual"):  # of which a latent that is a code may have another
        assert torch.allclose(
            tokenizer.decode_latents(tokenizer.indices_to_latents(indices)), output.reconstruction, atol=1e-4
        )
    known = torch.ones(6, 4, 4, dtype=torch.bool)
    assert torch.equal(tokenizer.decode_indices(indices, known), tokenizer.decode_indices(indices))
    known[:, 2:] = False
    other = torch.where(known if indices.ndim == 3 else known[:, None], indices, -1)
    vectors = tokenizer.quantizer.lookup(indices)
    vectors[:, :, 2:] = 0.5
    assert torch.allclose(tokenizer.decode_indices(other, known), tokenizer.decoder(vectors), atol=1e-5)


@torch.no_grad()
def test_latents_decode_to_what_their_nearest_codes_do(tokenizer):
    x = random_pixels()
    assert len(tokenizer.encode_indices(x).unique()) > 4
    assert torch.allclose(tokenizer.decode_latents(tokenizer.encode_latents(x)), tokenizer(x).reconstruction, atol=1e-5)


@torch.no_grad()
def test_latents_of_indices_are_the_codes_normalized_as_the_encoder_s_are(tokenizer):
    x = random_pixels()
    indices, encoded = tokenizer.encode_indices(x), tokenizer.encode_latents(x)
    assert torch.allclose(raw_latents(tokenizer, encoded), tokenizer.encoder(x), atol=1e-5)
    of_codes = tokenizer.indices_to_latents(indices)
    assert torch.allclose(raw_latents(tokenizer, of_codes), tokenizer.quantizer.lookup(indices), atol=1e-5)
    assert torch.allclose(tokenizer.decode_latents(of_codes), tokenizer.decode_indices(indices), atol=1e-5)


@torch.no_grad()
def test_latents_without_statistics_are_refused_and_codes_need_none():
    tokenizer = small_tokenizer(latent_mean=None, latent_std=None)
    x = random_pixels()
    assert torch.allclose(tokenizer.decode_indices(tokenizer.encode_indices(x)), tokenizer(x).reconstruction, atol=1e-5)
    for call in (tokenizer.encode_latents, lambda x: tokenizer.indices_to_latents(tokenizer.encode_indices(x))):
        with pytest.raises(UserError) as caught:
            call(x)
        assert "no latent statistics; train it with" in str(caught.value)


@torch.no_grad()
def test_a_picture_s_codes_do_not_depend_on_its_batch(tokenizer):
    x = random_pixels(5)
    together = tokenizer.encode_indices(x)
    assert all(torch.equal(tokenizer.encode_indices(x[i : i + 1])[0], together[i]) for i in range(5))


def test_latents_without_statistics_are_an_error_that_says_how_to_get_them():
    tokenizer = small_tokenizer(latent_mean=None, latent_std=None)
    with pytest.raises(UserError) as caught:
        tokenizer.encode_latents(random_pixels())
    assert "train-tokenizer" in str(caught.value)


@pytest.mark.parametrize(("size", "nearest"), [((18, 16), "16×16 or 20×16"), ((28, 30), "28×28 or 28×32")])
def test_a_size_that_f_does_not_divide_names_the_nearest_sizes_that_work(tokenizer, size, nearest):
    for call in (tokenizer, tokenizer.encode_indices, tokenizer.encode_latents):
        with pytest.raises(UserError) as caught:
            call(random_pixels(1, 3, *size))
        assert nearest in error_message(caught)


def test_the_spec_follows_from_the_image_size(tokenizer):
    default, wide = tokenizer.latent_spec(), tokenizer.latent_spec(64, 96)
    assert (default.height, default.width, default.tokens) == (4, 4, 16)
    assert (wide.height, wide.width, wide.image_height, wide.image_width) == (16, 24, 64, 96)
    assert default.downsampling_factor == 4
    assert default.codebook_size == 16
    assert wide.differences(default) == [
        "height 16 ≠ 4",
        "width 24 ≠ 4",
        "image_height 64 ≠ 16",
        "image_width 96 ≠ 16",
    ]
    assert LatentSpec.from_dict(json.loads(json.dumps(wide.to_dict()))) == wide


# The parts


@pytest.mark.parametrize("block", [ResidualBlock, AttentionBlock])
@torch.no_grad()
def test_a_block_starts_as_a_shift_that_ignores_its_input_and_can_learn(block):
    # The last convolution's weights begin at 0: x + bias.
    layer, x = block(8), torch.randn(2, 8, 4, 6)
    shift = layer(x) - x
    assert torch.allclose(shift, shift[:1, :, :1, :1].expand_as(shift), atol=1e-6)
    (layer.conv2 if block is ResidualBlock else layer.out).weight.normal_()
    assert not torch.allclose(layer(x) - x, shift, atol=1e-2)


@torch.no_grad()
def test_attention_sees_every_position():
    layer, x = AttentionBlock(8), torch.randn(1, 8, 3, 5)
    layer.out.weight.normal_()
    altered = x.clone()
    altered[..., -1, -1] += 1
    assert not torch.equal(layer(x)[..., 0, 0], layer(altered)[..., 0, 0])


def test_an_upsampling_is_nearest_neighbour_and_a_convolution_values_and_gradients_alike():
    layer = Upsample(6, 5).double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, generator=seeded(0)).requires_grad_()
    enlarged = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    expected, found = layer.conv(enlarged), layer(x)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn(found.shape, dtype=torch.float64, generator=seeded(1))
    parameters = (x, layer.conv.weight, layer.conv.bias)
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters, gradient),
        torch.autograd.grad(expected, parameters, gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (6, 1), (8, 2), (16, 4), (64, 16), (128, 32), (192, 32)])
def test_groups_divide_the_channels_and_hold_at_least_four(channels, groups):
    assert group_norm(channels).num_groups == groups


# Saving and loading


@torch.no_grad()
def test_what_is_loaded_gives_bitwise_the_outputs_of_what_was_saved(tokenizer, saved):
    loaded, x = VQGAN.from_pretrained(saved), random_pixels()
    assert not loaded.training
    assert torch.equal(loaded(x).reconstruction, tokenizer(x).reconstruction)
    assert torch.equal(loaded.encode_latents(x), tokenizer.encode_latents(x))
    assert torch.equal(loaded.quantizer.usage, tokenizer.quantizer.usage)
    assert loaded.config.image_processor == tokenizer.config.image_processor


def test_the_folder_holds_a_config_and_safetensors_alone(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_the_id_survives_saving_and_half_precision_and_changes_with_one_weight_or_field(tmp_path):
    tokenizer = small_tokenizer()
    first = tokenizer.compute_id()
    tokenizer.config.tokenizer_id = first
    assert tokenizer.compute_id() == first
    tokenizer.save_pretrained(tmp_path / "full")
    loaded = VQGAN.from_pretrained(tmp_path / "full")
    assert loaded.compute_id() == first == loaded.latent_spec().tokenizer_id

    loaded.half().save_pretrained(tmp_path / "half")
    half = VQGAN.from_pretrained(tmp_path / "half")
    assert next(half.parameters()).dtype == torch.float16
    assert half.latent_spec() == tokenizer.latent_spec()

    with torch.no_grad():
        tokenizer.decoder.last_layer.view(-1)[0] += 1e-3
    assert tokenizer.compute_id() != first
    assert small_tokenizer(latent_mean=[0.0] * 4).compute_id() != first
    assert small_tokenizer().compute_id() == first


def test_an_unknown_key_is_refused_with_the_nearest_field(copied):
    with pytest.raises(ConfigError) as caught:
        small_config(codebok_size=32)
    assert "'codebok_size'" in str(caught.value)
    assert "did you mean 'codebook_size'?" in error_message(caught)
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_chanels": 4}))
    with pytest.raises(UserError, match="did you mean 'latent_channels'"):
        VQGAN.from_pretrained(copied)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_config(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["decoder.0.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: truncate(folder / "model.safetensors"),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: truncate(folder / "config.json"),
        with_config(codebook_size=32),
        with_config(blocks=[0, 1, 2]),
        with_config(codebook_size="many"),
        with_config(quantizer={"name": "f"}),
        without_a_weight,
        pickled,
        shutil.rmtree,
    ],
    ids=[
        "no weights",
        "weights cut short",
        "empty weights",
        "no config",
        "config cut short",
        "weights of another shape",
        "weights of a shallower model",
        "a word for a number",
        "a quantizer that does not exist",
        "a weight missing",
        "weights that would be unpickled",
        "no folder",
    ],
)
def test_a_folder_that_does_not_hold_a_whole_model_is_one_line(copied, harm):
    harm(copied)
    with pytest.raises(UserError) as caught:
        VQGAN.from_pretrained(copied)
    message = str(caught.value)
    assert "\n" not in message
    assert str(copied) in message


@pytest.mark.parametrize(
    "fields", [{"blocks": (0, 1)}, {"attention": (8,)}, {"image_size": (16, 18)}], ids=lambda fields: str(fields)
)
def test_fields_that_contradict_each_other_are_one_line(fields):
    with pytest.raises(ConfigError) as caught:
        small_config(**fields)
    error_message(caught)


@pytest.mark.parametrize("wrong", [-1, 16])
def test_codes_that_the_codebook_does_not_have_are_one_line(tokenizer, wrong):
    assert tokenizer.codebook_size == 16
    indices = torch.zeros(1, 2, 2, dtype=torch.long)
    indices[0, 1, 0] = wrong
    for call in (tokenizer.decode_indices, tokenizer.indices_to_latents):
        with pytest.raises(UserError, match=rf"codes from {min(wrong, 0)} to {max(wrong, 0)} .* expected 0 to 15"):
            call(indices)
