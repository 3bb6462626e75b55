"""The tokenizer's methods agree with each other, and a saved model loads unchanged or gives a one-line error."""

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
def saved_folder(tokenizer: VQGAN, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copied_folder(saved_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_folder, tmp_path / "model"))


def denormalize(tokenizer: VQGAN, normalized: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (tokenizer.config.latent_mean, tokenizer.config.latent_std))
    return normalized * std + mean


# Methods


@pytest.mark.parametrize("size", [(16, 16), (64, 96), (4, 20)])
@torch.no_grad()
def test_decoded_indices_equal_the_reconstruction_at_any_multiple_of_f(tokenizer, size):
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
def test_decoded_indices_equal_the_reconstruction_for_every_quantizer(name):
    sizes = {"fsq": (16, 2), "lfq": (16, 4), "bsq": (16, 4)}
    size, channels = sizes.get(name, (16, 4))
    quantizer = {"name": name} | ({"levels": (4, 4)} if name == "fsq" else {})
    statistics = {"latent_mean": [0.5] * channels, "latent_std": [2.0] * channels}
    tokenizer = small_tokenizer(codebook_size=size, latent_channels=channels, quantizer=quantizer, **statistics)
    x = random_pixels()
    output, indices = tokenizer(x), tokenizer.encode_indices(x)
    assert torch.equal(indices, output.indices)
    assert torch.allclose(tokenizer.decode_indices(indices), output.reconstruction, atol=1e-5)
    if name not in ("ibq", "residual"):  # their codes may quantize to other codes
        assert torch.allclose(
            tokenizer.decode_latents(tokenizer.indices_to_latents(indices)), output.reconstruction, atol=1e-4
        )
    known = torch.ones(6, 4, 4, dtype=torch.bool)
    assert torch.equal(tokenizer.decode_indices(indices, known), tokenizer.decode_indices(indices))
    known[:, 2:] = False
    partial = torch.where(known if indices.ndim == 3 else known[:, None], indices, -1)
    vectors = tokenizer.quantizer.lookup(indices)
    vectors[:, :, 2:] = 0.5
    assert torch.allclose(tokenizer.decode_indices(partial, known), tokenizer.decoder(vectors), atol=1e-5)


@torch.no_grad()
def test_latents_decode_as_their_nearest_codes(tokenizer):
    x = random_pixels()
    assert len(tokenizer.encode_indices(x).unique()) > 4
    assert torch.allclose(tokenizer.decode_latents(tokenizer.encode_latents(x)), tokenizer(x).reconstruction, atol=1e-5)


@torch.no_grad()
def test_latents_of_indices_are_the_codes_with_the_normalization_of_the_encoder_s_latents(tokenizer):
    x = random_pixels()
    indices, encoded = tokenizer.encode_indices(x), tokenizer.encode_latents(x)
    assert torch.allclose(denormalize(tokenizer, encoded), tokenizer.encoder(x), atol=1e-5)
    code_latents = tokenizer.indices_to_latents(indices)
    assert torch.allclose(denormalize(tokenizer, code_latents), tokenizer.quantizer.lookup(indices), atol=1e-5)
    assert torch.allclose(tokenizer.decode_latents(code_latents), tokenizer.decode_indices(indices), atol=1e-5)


@torch.no_grad()
def test_latents_need_statistics_and_codes_do_not():
    tokenizer = small_tokenizer(latent_mean=None, latent_std=None)
    x = random_pixels()
    assert torch.allclose(tokenizer.decode_indices(tokenizer.encode_indices(x)), tokenizer(x).reconstruction, atol=1e-5)
    for call in (tokenizer.encode_latents, lambda x: tokenizer.indices_to_latents(tokenizer.encode_indices(x))):
        with pytest.raises(UserError) as caught:
            call(x)
        assert "no latent statistics; train it with" in str(caught.value)


@torch.no_grad()
def test_the_codes_of_an_image_do_not_depend_on_its_batch(tokenizer):
    x = random_pixels(5)
    indices = tokenizer.encode_indices(x)
    assert all(torch.equal(tokenizer.encode_indices(x[i : i + 1])[0], indices[i]) for i in range(5))


def test_missing_latent_statistics_give_an_error_with_the_command():
    tokenizer = small_tokenizer(latent_mean=None, latent_std=None)
    with pytest.raises(UserError) as caught:
        tokenizer.encode_latents(random_pixels())
    assert "train-tokenizer" in str(caught.value)


@pytest.mark.parametrize(("size", "nearest"), [((18, 16), "16×16 or 20×16"), ((28, 30), "28×28 or 28×32")])
def test_a_size_that_is_no_multiple_of_f_gives_an_error_with_the_nearest_sizes(tokenizer, size, nearest):
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


# Blocks


@pytest.mark.parametrize("block", [ResidualBlock, AttentionBlock])
@torch.no_grad()
def test_a_block_is_initialized_as_the_identity_plus_a_constant_and_can_learn(block):
    # The weights of the last convolution are initialized to 0: x + bias.
    layer, x = block(8), torch.randn(2, 8, 4, 6)
    shift = layer(x) - x
    assert torch.allclose(shift, shift[:1, :, :1, :1].expand_as(shift), atol=1e-6)
    (layer.conv2 if block is ResidualBlock else layer.out).weight.normal_()
    assert not torch.allclose(layer(x) - x, shift, atol=1e-2)


@torch.no_grad()
def test_attention_depends_on_every_position():
    layer, x = AttentionBlock(8), torch.randn(1, 8, 3, 5)
    layer.out.weight.normal_()
    altered = x.clone()
    altered[..., -1, -1] += 1
    assert not torch.equal(layer(x)[..., 0, 0], layer(altered)[..., 0, 0])


def test_upsample_equals_nearest_neighbour_and_a_convolution_in_values_and_gradients():
    layer = Upsample(6, 5).double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, generator=seeded(0)).requires_grad_()
    enlarged = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    expected, actual = layer.conv(enlarged), layer(x)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn(actual.shape, dtype=torch.float64, generator=seeded(1))
    parameters = (x, layer.conv.weight, layer.conv.bias)
    gradients = (torch.autograd.grad(output, parameters, upstream) for output in (actual, expected))
    for gradient, expected_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (6, 1), (8, 2), (16, 4), (64, 16), (128, 32), (192, 32)])
def test_groups_divide_the_channels_and_have_at_least_four_channels(channels, groups):
    assert group_norm(channels).num_groups == groups


# Saving and loading


@torch.no_grad()
def test_a_loaded_model_gives_bitwise_equal_outputs(tokenizer, saved_folder):
    loaded, x = VQGAN.from_pretrained(saved_folder), random_pixels()
    assert not loaded.training
    assert torch.equal(loaded(x).reconstruction, tokenizer(x).reconstruction)
    assert torch.equal(loaded.encode_latents(x), tokenizer.encode_latents(x))
    assert torch.equal(loaded.quantizer.usage, tokenizer.quantizer.usage)
    assert loaded.config.image_processor == tokenizer.config.image_processor


def test_the_folder_has_only_a_config_and_safetensors(saved_folder):
    assert sorted(path.name for path in saved_folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_id_survives_saving_and_float16_and_changes_with_one_weight_or_field(tmp_path):
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


def test_an_unknown_key_gives_an_error_with_the_nearest_field(copied_folder):
    with pytest.raises(ConfigError) as caught:
        small_config(codebok_size=32)
    assert "'codebok_size'" in str(caught.value)
    assert "did you mean 'codebook_size'?" in error_message(caught)
    path = copied_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_chanels": 4}))
    with pytest.raises(UserError, match="did you mean 'latent_channels'"):
        VQGAN.from_pretrained(copied_folder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_config(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def remove_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["decoder.0.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def convert_to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: truncate(folder / "model.safetensors"),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: truncate(folder / "config.json"),
        change_config(codebook_size=32),
        change_config(blocks=[0, 1, 2]),
        change_config(codebook_size="many"),
        change_config(quantizer={"name": "f"}),
        remove_weight,
        convert_to_pickle,
        shutil.rmtree,
    ],
    ids=[
        "no weights",
        "truncated weights",
        "empty weights",
        "no config",
        "truncated config",
        "weights of another shape",
        "weights of a shallower model",
        "a string instead of a number",
        "an unknown quantizer",
        "a missing weight",
        "pickled weights",
        "no folder",
    ],
)
def test_a_folder_without_an_intact_model_gives_one_line(copied_folder, damage):
    damage(copied_folder)
    with pytest.raises(UserError) as caught:
        VQGAN.from_pretrained(copied_folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(copied_folder) in message


@pytest.mark.parametrize(
    "fields", [{"blocks": (0, 1)}, {"attention": (8,)}, {"image_size": (16, 18)}], ids=lambda fields: str(fields)
)
def test_contradictory_fields_give_one_line(fields):
    with pytest.raises(ConfigError) as caught:
        small_config(**fields)
    error_message(caught)


@pytest.mark.parametrize("wrong", [-1, 16])
def test_indices_out_of_range_give_one_line(tokenizer, wrong):
    assert tokenizer.codebook_size == 16
    indices = torch.zeros(1, 2, 2, dtype=torch.long)
    indices[0, 1, 0] = wrong
    for call in (tokenizer.decode_indices, tokenizer.indices_to_latents):
        with pytest.raises(
            UserError, match=rf"indices range from {min(wrong, 0)} to {max(wrong, 0)}; expected 0 to 15"
        ):
            call(indices)
