"""Tiling gives the untiled result up to rounding, with memory that does not grow with the image."""

import pytest
import torch
from small_parts import error_message, random_pixels, small_config
from tiny_models import seeded
from torch import Tensor, nn

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stage1_tokenizer.networks import tiling
from stage1_tokenizer.networks.blocks import AttentionBlock, Downsample, ResidualBlock, Upsample
from stage1_tokenizer.vqgan import VQGAN
from training_harness.errors import ConfigError, UserError

TOLERANCE = 1e-4  # in standard deviations of the expected values; rounding gives about 5e-6
SIZE = (72, 104)  # height and width of the images: multiples of 8, but not of 32 or 40
F4 = {"channels": (8, 16, 16), "blocks": (1, 2, 1)}
F8 = {"channels": (8, 8, 16, 16), "blocks": (1, 1, 2, 1)}


def randomize_weights(tokenizer: Autoencoder) -> Autoencoder:
    """Randomize all weights, because blocks are initialized as the identity and norms without scale and shift."""
    generator = seeded(2)
    with torch.no_grad():
        for module in tokenizer.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
                module.bias.normal_(0, 0.5, generator=generator)
            elif isinstance(module, nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.5, generator=generator)
    return tokenizer.eval()


def create_vqgan(**fields) -> VQGAN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize_weights(VQGAN(small_config(**fields)))


def create_kl(**fields) -> AutoencoderKL:
    statistics = {"latent_channels": 4, "latent_mean": [0.5, -1.0, 0.0, 2.0], "latent_std": [1.0, 2.0, 0.5, 0.25]}
    return randomize_weights(AutoencoderKL(AutoencoderKLConfig(image_size=(16, 16), **statistics, **fields)))


TOKENIZERS = {
    "VQGAN, f = 4": (create_vqgan, F4 | {"attention": ()}),
    "VQGAN, f = 4, attention at 2 and 4": (create_vqgan, F4 | {"attention": (2, 4)}),
    "VQGAN, f = 8, attention at 8": (create_vqgan, F8 | {"attention": (8,)}),
    "KL, f = 4, attention at 4": (create_kl, F4 | {"attention": (4,)}),
    "KL, f = 8, attention at 4": (create_kl, F8 | {"attention": (4,)}),
    "KL, f = 1": (create_kl, {"channels": (8,), "blocks": (1,), "attention": ()}),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request) -> Autoencoder:
    build, fields = TOKENIZERS[request.param]
    return build(**fields)


@pytest.fixture
def vqgan() -> VQGAN:
    return create_vqgan(**F4, attention=(4,))


def random_latents(tokenizer: Autoencoder, height: int = SIZE[0], width: int = SIZE[1]) -> Tensor:
    factor = tokenizer.config.downsampling_factor
    return torch.randn(2, 4, height // factor, width // factor, generator=seeded(3))


def call_tiled(tokenizer: Autoencoder, tile_size: int, call: str, x: Tensor) -> Tensor:
    tokenizer.enable_tiling(tile_size)
    try:
        return getattr(tokenizer, call)(x)
    finally:
        tokenizer.disable_tiling()


def max_deviation(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference in standard deviations of the expected values."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return ((actual - expected).abs().max() / expected.std()).item()


# Results


tile_sizes = pytest.mark.parametrize(("size", "tile_size"), [(SIZE, 40), ((56, 24), 16), ((24, 32), 8)])


@tile_sizes
@torch.no_grad()
def test_tiled_latents_equal_untiled_latents(tokenizer, size, tile_size):
    x = random_pixels(2, 3, *size)
    untiled = tokenizer.encode_latents(x)
    assert untiled.std() > 0.1
    assert max_deviation(call_tiled(tokenizer, tile_size, "encode_latents", x), untiled) < TOLERANCE


@tile_sizes
@torch.no_grad()
def test_tiled_pixels_equal_untiled_pixels(tokenizer, size, tile_size):
    latents = random_latents(tokenizer, *size)
    untiled = tokenizer.decode_latents(latents)
    assert untiled.std() > 0.1
    assert max_deviation(call_tiled(tokenizer, tile_size, "decode_latents", latents), untiled) < TOLERANCE


@pytest.mark.parametrize("fields", [F4 | {"attention": (4,)}, F8 | {"attention": ()}], ids=["f = 4", "f = 8"])
@torch.no_grad()
def test_tiled_codes_equal_untiled_codes_except_at_ties(fields):
    # Tie: the squared distances of the two nearest codes differ by less than 1e-3, about 100 times the rounding error.
    tokenizer, x = create_vqgan(**fields), random_pixels(2, 3, *SIZE)
    raw = tokenizer.encoder(x)
    tokenizer.quantizer.codebook.copy_(raw.flatten(2).mT.flatten(0, 1)[::7][:16])  # all codes are in use
    untiled = tokenizer.encode_indices(x)
    distances = torch.cdist(raw.flatten(2).mT, tokenizer.quantizer.codebook.expand(2, -1, -1)).square()
    nearest = distances.topk(2, largest=False).values
    ties = (nearest[..., 1] - nearest[..., 0] < 1e-3).view(untiled.shape)
    assert ties.float().mean() < 0.01
    assert len(untiled.unique()) == 16
    indices = call_tiled(tokenizer, 32, "encode_indices", x)
    assert torch.equal(indices[~ties], untiled[~ties])
    pixels = tokenizer.decode_indices(untiled)
    assert max_deviation(call_tiled(tokenizer, 32, "decode_indices", untiled), pixels) < TOLERANCE


@pytest.mark.parametrize(
    ("part", "replacement"),
    [("compute_reach", lambda layers: 0), ("copy_with_global_norms", lambda layers: layers)],
    ids=["without a halo", "with the statistics of each tile"],
)
@torch.no_grad()
def test_tiles_without_a_halo_or_global_norms_differ_from_the_untiled_result(vqgan, monkeypatch, part, replacement):
    x, latents = random_pixels(2, 3, *SIZE), random_latents(vqgan)
    encoded, decoded = vqgan.encode_latents(x), vqgan.decode_latents(latents)
    monkeypatch.setattr(tiling, part, replacement)
    assert max_deviation(call_tiled(vqgan, 32, "encode_latents", x), encoded) > 100 * TOLERANCE
    assert max_deviation(call_tiled(vqgan, 32, "decode_latents", latents), decoded) > 100 * TOLERANCE


@torch.no_grad()
def test_tiled_bfloat16_is_as_close_to_float32_as_untiled_bfloat16(vqgan):
    latents = random_latents(vqgan)
    indices = torch.randint(16, latents[:, 0].shape, generator=seeded(4))
    exact = vqgan.decode_indices(indices)
    vqgan.bfloat16()
    untiled, tiles = vqgan.decode_indices(indices), call_tiled(vqgan, 32, "decode_indices", indices)
    assert tiles.dtype == untiled.dtype == torch.bfloat16
    assert (tiles - exact).square().mean() < 1.1 * (untiled - exact).square().mean()


# Parts


@pytest.mark.parametrize(
    ("layers", "scale"),
    [
        ([nn.Conv2d(4, 4, 3, padding=1)], 1),
        ([ResidualBlock(4), nn.Conv2d(4, 4, 1)], 1),
        ([ResidualBlock(4), Downsample(4, 4), ResidualBlock(4), Downsample(4, 4)], 1 / 4),
        ([ResidualBlock(4), Upsample(4, 4), ResidualBlock(4), Upsample(4, 4), ResidualBlock(4)], 4),
    ],
    ids=["a convolution", "a block", "an encoder's", "a decoder's"],
)
def test_the_computed_reach_equals_the_reach_of_the_gradient(layers, scale):
    network = tiling.copy_with_global_norms(nn.Sequential(*layers))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.1)
        elif isinstance(module, tiling.GlobalNorm):
            module.affine = torch.ones(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)
    x = torch.ones(1, 4, 64, 64, dtype=torch.float64, requires_grad=True)
    core = slice(int(24 * scale), int(40 * scale))
    network.double()(x)[..., core, core].sum().backward()
    assert x.grad is not None
    dependent = x.grad[0, 0].abs().amax(1).nonzero().flatten()
    assert (24 - dependent[0], dependent[-1] - 39) == (tiling.compute_reach(network), tiling.compute_reach(network))


def test_the_norm_of_parts_equals_the_norm_of_the_whole_feature_map_far_from_zero():
    x = torch.randn(2, 8, 30, 20, generator=seeded(5)) + torch.linspace(-1000, 1000, 16).view(2, 8, 1, 1)
    norm = nn.GroupNorm(4, 8)
    nn.init.normal_(norm.weight, generator=seeded(6))
    global_norm = tiling.GlobalNorm(norm)
    global_norm.compute_statistics(part for rows in x.split(13, -2) for part in rows.split(9, -1))
    assert max_deviation(global_norm(x), norm.double()(x.double()).float()) < TOLERANCE


@torch.no_grad()
def test_each_norm_needs_one_pass_up_to_it_and_the_output_needs_one_more():
    tokenizer = create_vqgan(**F4, attention=())
    downs = [layer for layer in tokenizer.encoder if isinstance(layer, Downsample)]
    call_counts = {tokenizer.encoder[0]: 0, downs[0].conv: 0, downs[1].conv: 0}

    def count(module, arguments, output):
        original = next(layer for layer in call_counts if layer.weight is module.weight)
        call_counts[original] += 1

    for module in call_counts:
        module.register_forward_hook(count)
    call_tiled(tokenizer, 32, "encode_indices", random_pixels(1, 3, 64, 96))
    # 6 tiles; two norms in the block before the first downsampling, four in the two blocks before the second one.
    assert list(call_counts.values()) == [(2 + 4 + 1) * 6, (4 + 1) * 6, 6]


# Memory


@torch.no_grad()
def largest_map_values(tokenizer: Autoencoder, tile_size: int | None, height: int, width: int) -> int:
    """Return the number of values of the largest input or output of a convolution outside attention."""
    largest = 0

    def record_size(module, arguments, output):
        nonlocal largest
        largest = max(largest, arguments[0].numel(), output.numel())

    attention = {c for block in tokenizer.modules() if isinstance(block, AttentionBlock) for c in block.modules()}
    convolutions = [c for c in tokenizer.modules() if isinstance(c, nn.Conv2d) and c not in attention]
    handles = [convolution.register_forward_hook(record_size) for convolution in convolutions]
    if tile_size:
        tokenizer.enable_tiling(tile_size)
    tokenizer.decode_indices(tokenizer.encode_indices(random_pixels(1, 3, height, width)))
    tokenizer.disable_tiling()
    for handle in handles:
        handle.remove()
    return largest


def test_no_feature_map_grows_with_the_image_under_tiling(vqgan):
    sizes = [(96, 96), (160, 224)]
    small, large = (largest_map_values(vqgan, None, *size) for size in sizes)
    assert large / small == 160 * 224 / 96**2
    small, large = (largest_map_values(vqgan, 16, *size) for size in sizes)
    assert small == large
    halo = tiling.compute_reach(nn.Sequential(*vqgan.encoder)) + 4
    assert large <= 16 * (16 + 2 * halo) ** 2


# Interface


@pytest.mark.parametrize("tile_size", [18, 0, -16, 16.0, "16"])
def test_a_tile_size_that_is_no_multiple_of_f_gives_one_line(vqgan, tile_size):
    with pytest.raises(ConfigError) as caught:
        vqgan.enable_tiling(tile_size)
    message = error_message(caught)
    assert f"tile_size is {tile_size!r}" in message
    assert "multiple of the downsampling factor 4" in message
    assert vqgan.tile_size is None


@torch.no_grad()
def test_disabled_tiling_and_images_of_one_tile_give_bitwise_untiled_results(vqgan):
    x, small = random_pixels(2, 3, *SIZE), random_pixels(2, 3, 32, 24)
    before = [vqgan.encode_latents(x), vqgan.decode_indices(vqgan.encode_indices(x)), vqgan.encode_latents(small)]
    assert not torch.equal(call_tiled(vqgan, 32, "encode_latents", x), before[0])  # tiling is active
    after = [vqgan.encode_latents(x), vqgan.decode_indices(vqgan.encode_indices(x))]
    after.append(call_tiled(vqgan, 32, "encode_latents", small))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_tiling_refuses_gradients_in_one_line_and_works_with_a_frozen_model(vqgan):
    x, raw = random_pixels(1, 3, *SIZE), random_latents(vqgan)
    for call, values in (("encode_indices", x), ("decode_latents", raw)):
        with pytest.raises(UserError) as caught:
            call_tiled(vqgan, 32, call, values)
        assert "torch.no_grad()" in error_message(caught)
    vqgan.requires_grad_(False)
    assert max_deviation(call_tiled(vqgan, 32, "encode_latents", x), vqgan.encode_latents(x)) < TOLERANCE
    with pytest.raises(UserError):
        call_tiled(vqgan, 32, "encode_latents", x.requires_grad_())


def test_training_mode_does_not_tile_and_has_gradients(vqgan):
    raw = random_latents(vqgan)
    vqgan.train().enable_tiling(16)
    output = Autoencoder._decode(vqgan, raw)
    assert torch.equal(output, vqgan.decoder(raw))
    output.sum().backward()
    assert vqgan.decoder.last_layer.grad is not None
