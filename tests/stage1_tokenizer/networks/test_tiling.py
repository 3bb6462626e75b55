"""Tiles give what the whole image gives, to rounding, in memory that does not grow with the image."""

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

TOLERANCE = 1e-4  # of the standard deviation of what is compared; 5e-6 is what rounding leaves
SIZE = (72, 104)  # of the pictures: multiples of 8, and neither of 32 nor of 40
F4 = {"channels": (8, 16, 16), "blocks": (1, 2, 1)}
F8 = {"channels": (8, 8, 16, 16), "blocks": (1, 1, 2, 1)}


def shaken(tokenizer: Autoencoder) -> Autoencoder:
    """Every weight drawn anew: blocks would start as the identity, and norms without scale or shift."""
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


def vqgan(**fields) -> VQGAN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(VQGAN(small_config(**fields)))


def kl(**fields) -> AutoencoderKL:
    statistics = {"latent_channels": 4, "latent_mean": [0.5, -1.0, 0.0, 2.0], "latent_std": [1.0, 2.0, 0.5, 0.25]}
    return shaken(AutoencoderKL(AutoencoderKLConfig(image_size=(16, 16), **statistics, **fields)))


TOKENIZERS = {
    "VQGAN, f = 4": (vqgan, F4 | {"attention": ()}),
    "VQGAN, f = 4, attention at 2 and 4": (vqgan, F4 | {"attention": (2, 4)}),
    "VQGAN, f = 8, attention at 8": (vqgan, F8 | {"attention": (8,)}),
    "KL, f = 4, attention at 4": (kl, F4 | {"attention": (4,)}),
    "KL, f = 8, attention at 4": (kl, F8 | {"attention": (4,)}),
    "KL, f = 1": (kl, {"channels": (8,), "blocks": (1,), "attention": ()}),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request) -> Autoencoder:
    build, fields = TOKENIZERS[request.param]
    return build(**fields)


@pytest.fixture
def plain() -> VQGAN:
    return vqgan(**F4, attention=(4,))


def some_latents(tokenizer: Autoencoder, height: int = SIZE[0], width: int = SIZE[1]) -> Tensor:
    factor = tokenizer.config.downsampling_factor
    return torch.randn(2, 4, height // factor, width // factor, generator=seeded(3))


def tiled(tokenizer: Autoencoder, tile_size: int, call: str, x: Tensor) -> Tensor:
    tokenizer.enable_tiling(tile_size)
    try:
        return getattr(tokenizer, call)(x)
    finally:
        tokenizer.disable_tiling()


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest one, in standard deviations of what was expected."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return ((found - expected).abs().max() / expected.std()).item()


# What tiles give


TILES = pytest.mark.parametrize(("size", "tile_size"), [(SIZE, 40), ((56, 24), 16), ((24, 32), 8)])


@TILES
@torch.no_grad()
def test_the_latents_of_tiles_are_those_of_the_whole_image(tokenizer, size, tile_size):
    x = random_pixels(2, 3, *size)
    whole = tokenizer.encode_latents(x)
    assert whole.std() > 0.1
    assert deviation(tiled(tokenizer, tile_size, "encode_latents", x), whole) < TOLERANCE


@TILES
@torch.no_grad()
def test_the_pixels_of_tiles_are_those_of_the_whole_image(tokenizer, size, tile_size):
    latents = some_latents(tokenizer, *size)
    whole = tokenizer.decode_latents(latents)
    assert whole.std() > 0.1
    assert deviation(tiled(tokenizer, tile_size, "decode_latents", latents), whole) < TOLERANCE


@pytest.mark.parametrize("fields", [F4 | {"attention": (4,)}, F8 | {"attention": ()}], ids=["f = 4", "f = 8"])
@torch.no_grad()
def test_the_codes_of_tiles_are_those_of_the_whole_image_but_where_two_codes_are_equally_near(fields):
    # A tie: the two nearest codes differ in squared distance by less than 1e-3, some hundred times what rounding moves it.
    tokenizer, x = vqgan(**fields), random_pixels(2, 3, *SIZE)
    raw = tokenizer.encoder(x)
    tokenizer.quantizer.codebook.copy_(raw.flatten(2).mT.flatten(0, 1)[::7][:16])  # so that all codes are in use
    whole = tokenizer.encode_indices(x)
    distances = torch.cdist(raw.flatten(2).mT, tokenizer.quantizer.codebook.expand(2, -1, -1)).square()
    nearest = distances.topk(2, largest=False).values
    ties = (nearest[..., 1] - nearest[..., 0] < 1e-3).view(whole.shape)
    assert ties.float().mean() < 0.01
    assert len(whole.unique()) == 16
    indices = tiled(tokenizer, 32, "encode_indices", x)
    assert torch.equal(indices[~ties], whole[~ties])
    pixels = tokenizer.decode_indices(whole)
    assert deviation(tiled(tokenizer, 32, "decode_indices", whole), pixels) < TOLERANCE


@pytest.mark.parametrize(
    ("part", "replacement"),
    [("reach", lambda layers: 0), ("with_global_norms", lambda layers: layers)],
    ids=["without a halo", "with each tile's own statistics"],
)
@torch.no_grad()
def test_naive_tiles_do_not_give_what_the_whole_image_gives(plain, monkeypatch, part, replacement):
    x, latents = random_pixels(2, 3, *SIZE), some_latents(plain)
    encoded, decoded = plain.encode_latents(x), plain.decode_latents(latents)
    monkeypatch.setattr(tiling, part, replacement)
    assert deviation(tiled(plain, 32, "encode_latents", x), encoded) > 100 * TOLERANCE
    assert deviation(tiled(plain, 32, "decode_latents", latents), decoded) > 100 * TOLERANCE


@torch.no_grad()
def test_tiles_in_bfloat16_are_as_near_to_float32_as_the_whole_image_in_bfloat16(plain):
    latents = some_latents(plain)
    indices = torch.randint(16, latents[:, 0].shape, generator=seeded(4))
    exact = plain.decode_indices(indices)
    plain.bfloat16()
    whole, tiles = plain.decode_indices(indices), tiled(plain, 32, "decode_indices", indices)
    assert tiles.dtype == whole.dtype == torch.bfloat16
    assert (tiles - exact).square().mean() < 1.1 * (whole - exact).square().mean()


# Its parts


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
def test_the_reach_of_layers_is_the_distance_of_the_last_input_that_moves_a_core(layers, scale):
    network = tiling.with_global_norms(nn.Sequential(*layers))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.1)
        elif isinstance(module, tiling.GlobalNorm):
            module.affine = torch.ones(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)
    x = torch.ones(1, 4, 64, 64, dtype=torch.float64, requires_grad=True)
    core = slice(int(24 * scale), int(40 * scale))
    network.double()(x)[..., core, core].sum().backward()
    assert x.grad is not None
    moved = x.grad[0, 0].abs().amax(1).nonzero().flatten()
    assert (24 - moved[0], moved[-1] - 39) == (tiling.reach(network), tiling.reach(network))


def test_the_norm_of_parts_is_the_norm_of_the_whole_even_far_from_zero():
    x = torch.randn(2, 8, 30, 20, generator=seeded(5)) + torch.linspace(-1000, 1000, 16).view(2, 8, 1, 1)
    norm = nn.GroupNorm(4, 8)
    nn.init.normal_(norm.weight, generator=seeded(6))
    whole = tiling.GlobalNorm(norm)
    whole.measure(part for rows in x.split(13, -2) for part in rows.split(9, -1))
    assert deviation(whole(x), norm.double()(x.double()).float()) < TOLERANCE


@torch.no_grad()
def test_a_norm_costs_a_pass_that_ends_there_and_the_output_one_more():
    tokenizer = vqgan(**F4, attention=())
    downs = [layer for layer in tokenizer.encoder if isinstance(layer, Downsample)]
    passes = {tokenizer.encoder[0]: 0, downs[0].conv: 0, downs[1].conv: 0}

    def count(module, arguments, output):
        counted = next(known for known in passes if known.weight is module.weight)
        passes[counted] += 1

    for module in passes:
        module.register_forward_hook(count)
    tiled(tokenizer, 32, "encode_indices", random_pixels(1, 3, 64, 96))
    # Two norms in the block before the first halving, four in the two blocks between it and the second; 6 tiles.
    assert list(passes.values()) == [(2 + 4 + 1) * 6, (4 + 1) * 6, 6]


# Memory


@torch.no_grad()
def peak_values(tokenizer: Autoencoder, tile_size: int | None, height: int, width: int) -> int:
    """Values of the largest map that comes into or out of a convolution, attention's own aside, in decoding and encoding."""
    largest = 0

    def see(module, arguments, output):
        nonlocal largest
        largest = max(largest, arguments[0].numel(), output.numel())

    attention = {c for block in tokenizer.modules() if isinstance(block, AttentionBlock) for c in block.modules()}
    convolutions = [c for c in tokenizer.modules() if isinstance(c, nn.Conv2d) and c not in attention]
    handles = [convolution.register_forward_hook(see) for convolution in convolutions]
    if tile_size:
        tokenizer.enable_tiling(tile_size)
    tokenizer.decode_indices(tokenizer.encode_indices(random_pixels(1, 3, height, width)))
    tokenizer.disable_tiling()
    for handle in handles:
        handle.remove()
    return largest


def test_no_map_grows_with_the_image_under_tiling(plain):
    sizes = [(96, 96), (160, 224)]
    small, large = (peak_values(plain, None, *size) for size in sizes)
    assert large / small == 160 * 224 / 96**2
    small, large = (peak_values(plain, 16, *size) for size in sizes)
    assert small == large
    halo = tiling.reach(nn.Sequential(*plain.encoder)) + 4
    assert large <= 16 * (16 + 2 * halo) ** 2


# What a user meets


@pytest.mark.parametrize("tile_size", [18, 0, -16, 16.0, "16"])
def test_a_tile_size_that_f_does_not_divide_is_one_line(plain, tile_size):
    with pytest.raises(ConfigError) as caught:
        plain.enable_tiling(tile_size)
    message = error_message(caught)
    assert f"tile_size is {tile_size!r}" in message
    assert "multiple of the downsampling factor 4" in message
    assert plain.tile_size is None


@torch.no_grad()
def test_disabling_restores_the_plain_path_bit_by_bit_and_an_image_of_one_tile_never_leaves_it(plain):
    x, small = random_pixels(2, 3, *SIZE), random_pixels(2, 3, 32, 24)
    before = [plain.encode_latents(x), plain.decode_indices(plain.encode_indices(x)), plain.encode_latents(small)]
    assert not torch.equal(tiled(plain, 32, "encode_latents", x), before[0])  # or the rest would say nothing
    after = [plain.encode_latents(x), plain.decode_indices(plain.encode_indices(x))]
    after.append(tiled(plain, 32, "encode_latents", small))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_tiles_refuse_gradients_in_one_line_and_serve_a_frozen_model(plain):
    x, raw = random_pixels(1, 3, *SIZE), some_latents(plain)
    for call, given in (("encode_indices", x), ("decode_latents", raw)):
        with pytest.raises(UserError) as caught:
            tiled(plain, 32, call, given)
        assert "torch.no_grad()" in error_message(caught)
    plain.requires_grad_(False)
    assert deviation(tiled(plain, 32, "encode_latents", x), plain.encode_latents(x)) < TOLERANCE
    with pytest.raises(UserError):
        tiled(plain, 32, "encode_latents", x.requires_grad_())


def test_in_training_mode_the_image_stays_whole_and_gradients_flow(plain):
    raw = some_latents(plain)
    plain.train().enable_tiling(16)
    output = Autoencoder._decode(plain, raw)
    assert torch.equal(output, plain.decoder(raw))
    output.sum().backward()
    assert plain.decoder.last_layer.grad is not None
