"""Each quantizer equals the definition of its paper, and all quantizers have the same interface."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_parts import error_message
from tiny_models import seeded
from torch import Tensor

from stage1_tokenizer.quantizers import QUANTIZERS, AnyQuantizerConfig, LFQConfig, Quantizer, VectorQuantizerConfig, ibq
from stage1_tokenizer.quantizers.binary import code_probabilities
from stage1_tokenizer.quantizers.vector_quantizer import kmeans, rotate_gradient
from training_harness.configuration import build_section
from training_harness.errors import ConfigError

# K, latent channels and options of each case
SIZES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "vq": (12, 5, {}),
    "ema": (12, 5, {}),
    "vq, normalised": (12, 5, {"name": "vq", "normalize": True}),
    "ema, normalised": (12, 5, {"name": "ema", "normalize": True}),
    "vq, rotation": (12, 5, {"name": "vq", "gradient": "rotation"}),
    "simvq": (12, 5, {}),
    "ibq": (12, 5, {}),
    "fsq": (60, 3, {"levels": (5, 4, 3)}),
    "lfq": (32, 5, {}),
    "bsq": (32, 5, {}),
    "residual": (12, 5, {"depth": 3}),
}


def build_quantizer(case: str, **fields: Any) -> Quantizer:
    size, channels, options = SIZES[case]
    config = build_section(AnyQuantizerConfig, {"name": case} | options | fields, "model.quantizer")
    config.check(size, channels)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        quantizer = QUANTIZERS[config.name](config, size, channels)
        quantizer.train()(
            latents(channels, seed=7, batch=400)
        )  # initializes codebooks from a batch, without equal codes
    return quantizer.eval()


def latents(channels: int = 5, seed: int = 0, batch: int = 3) -> Tensor:
    return torch.randn(batch, channels, 4, 2, generator=seeded(seed))


@pytest.mark.parametrize("case", SIZES)
def test_lookup_of_the_indices_equals_the_quantized_latents(case: str) -> None:
    q = build_quantizer(case)
    z = latents(q.channels)
    output = q(z)
    shape = (3, q.depth, 4, 2) if q.depth > 1 else (3, 4, 2)
    assert output.indices.shape == shape
    assert output.indices.dtype == torch.int64
    assert 0 <= output.indices.min() <= output.indices.max() < q.codebook_size
    assert len(output.indices.unique()) > 3
    assert torch.equal(q.quantize(z), output.indices)
    assert torch.allclose(q.lookup(output.indices), output.quantized, atol=1e-5)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in output.losses.values())


@pytest.mark.parametrize("case", SIZES)
def test_the_latents_of_an_index_quantize_to_that_index(case: str) -> None:
    q = build_quantizer(case)
    if q.depth > 1:  # the sum of several codes may have other nearest codes
        q = q.levels[0]
    indices = torch.arange(q.codebook_size).view(1, -1, 1)
    restored = q.quantize(q.indices_to_latents(indices))
    if case == "ibq":  # a code may have a larger inner product with a longer code than with itself
        assert (restored == indices).float().mean() > 0.2
    else:
        assert torch.equal(restored, indices)


@pytest.mark.parametrize("case", SIZES)
def test_the_gradient_reaches_the_latents(case: str) -> None:
    q, upstream = build_quantizer(case), torch.randn(3, SIZES[case][1], 4, 2, generator=seeded(8))
    z = latents(q.channels).requires_grad_()
    q(z).quantized.backward(upstream)
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert (z.grad != 0).float().mean() > 0.9
    if case in ("vq", "ema", "simvq", "residual", "lfq"):
        assert torch.equal(z.grad, upstream), "straight through"


@pytest.mark.parametrize("case", SIZES)
def test_codes_are_computed_in_float32_under_autocast(case: str) -> None:
    q = build_quantizer(case)
    z = latents(q.channels, batch=40)
    with torch.autocast("cpu", torch.bfloat16):
        output = q(z)
        indices, codes = q.quantize(z), q.lookup(output.indices)
    assert torch.equal(output.indices, q(z).indices)
    assert torch.equal(indices, output.indices)
    assert output.quantized.dtype == codes.dtype == torch.float32


@pytest.mark.parametrize("case", SIZES)
def test_evaluation_mode_changes_no_state_and_a_saved_state_gives_the_same_codes(case: str) -> None:
    q = build_quantizer(case)
    before = {name: value.clone() for name, value in q.state_dict().items()}
    z = latents(q.channels)
    output = q(z)
    assert all(torch.equal(before[name], value) for name, value in q.state_dict().items())
    restored = QUANTIZERS[q.config.name](q.config, q.codebook_size, q.channels).eval()
    restored.load_state_dict(before)
    assert torch.equal(restored(z).quantized, output.quantized)


@pytest.mark.parametrize("case", [case for case in SIZES if case not in ("fsq", "residual")])
def test_the_commitment_gradient_reaches_only_the_latents_and_the_codebook_gradient_only_the_codes(case: str) -> None:
    q, z = build_quantizer(case), latents(SIZES[case][1]).requires_grad_()
    losses = q(z).losses
    for name, moves_latents in (("commitment", True), ("codebook", False)):
        if name in losses:
            latent_gradient, *code_gradients = torch.autograd.grad(
                losses[name], [z, *q.parameters()], allow_unused=True, retain_graph=True
            )
            assert (latent_gradient is not None and bool(latent_gradient.any())) == moves_latents, name
            assert any(g is not None and bool(g.any()) for g in code_gradients) != moves_latents, name


@pytest.mark.parametrize("case", SIZES)
def test_nan_and_infinite_latents_give_indices_in_range(case: str) -> None:
    q = build_quantizer(case).train()
    for bad in (math.nan, math.inf, -math.inf):
        indices = q(torch.full((1, q.channels, 4, 2), bad)).indices
        assert 0 <= indices.min() <= indices.max() < q.codebook_size


def test_a_large_first_batch_gives_every_entry_a_different_vector() -> None:
    q = QUANTIZERS["vq"](VectorQuantizerConfig(), 24, 5).train()
    q(latents(batch=3))  # as many vectors as entries
    assert len(q.codebook.detach().unique(dim=0)) == 24


# The rotation trick


def test_the_rotation_maps_the_latent_to_its_code_and_rotates_the_gradient() -> None:
    z, codes = (torch.randn(6, 5, generator=seeded(seed), dtype=torch.float64) for seed in (1, 2))
    z.requires_grad_()
    upstream = torch.randn(6, 5, generator=seeded(3), dtype=torch.float64)
    rotated = rotate_gradient(z, codes)
    assert torch.allclose(rotated, codes, atol=1e-12)
    rotated.backward(upstream)
    assert z.grad is not None
    for i in range(6):
        unit, target = F.normalize(z[i].detach(), dim=0), F.normalize(codes[i], dim=0)
        r = F.normalize(unit + target, dim=0)
        rotation = torch.eye(5, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(target, unit)
        assert torch.allclose(rotation @ rotation.T, torch.eye(5, dtype=torch.float64), atol=1e-12)
        scale = codes[i].norm() / z[i].detach().norm()
        assert torch.allclose(scale * rotation @ z[i].detach(), codes[i], atol=1e-12)
        assert torch.allclose(z.grad[i], scale * rotation.T @ upstream[i], atol=1e-12)


# Unit sphere


@pytest.mark.parametrize("case", ["vq, normalised", "ema, normalised"])
def test_normalized_codes_have_length_1_and_ignore_the_length_of_the_latents(case: str) -> None:
    q, z = build_quantizer(case), latents()
    output = q(z)
    assert torch.allclose(output.quantized.norm(dim=1), torch.ones(3, 4, 2), atol=1e-5)
    assert torch.equal(q.quantize(10 * z), output.indices)
    cosine = F.cosine_similarity(z[:, None], F.normalize(q.codebook, dim=1)[None, :, :, None, None], dim=2)
    assert torch.equal(cosine.argmax(1), output.indices)


# SimVQ


def test_simvq_moves_every_code_through_its_layer_and_freezes_the_codebook() -> None:
    q = build_quantizer("simvq").train()
    assert [name for name, _ in q.named_parameters()] == ["basis"]
    before = q.codebook.detach().clone()
    q(latents()).losses["codebook"].backward()
    with torch.no_grad():
        q.basis -= 0.1 * q.basis.grad
    assert ((q.codebook - before).abs().amax(1) > 0).all()


# Finite scalar quantization


def test_fsq_rounds_each_channel_to_equally_spaced_values_in_minus_1_to_1() -> None:
    q = build_quantizer("fsq")
    values = q.lookup(torch.arange(60).view(1, -1, 1))[0, :, :, 0]
    for channel, expected in enumerate(([-1, -0.5, 0, 0.5, 1], [-1, -0.5, 0, 0.5], [-1, 0, 1])):
        assert values[channel].unique().tolist() == pytest.approx(expected)
    assert len(values.unique(dim=1).T) == 60
    assert q.quantize(torch.full((1, 3, 1, 1), -50.0)).item() == 0
    assert q.quantize(torch.full((1, 3, 1, 1), 50.0)).item() == 59
    assert q(latents(3)).losses == {}


def test_the_first_channel_of_fsq_is_the_least_significant_digit() -> None:
    q = build_quantizer("fsq")
    digits = torch.tensor([[(i % 5, i // 5 % 4, i // 20)] for i in range(60)])
    centred = (digits - torch.tensor([2, 2, 1])) / torch.tensor([2, 2, 1])
    assert torch.allclose(q.lookup(torch.arange(60).view(60, 1, 1))[..., 0, 0], centred[:, 0])


# Binary quantization


@pytest.mark.parametrize("case", ["lfq", "bsq"])
def test_the_bits_of_an_index_are_the_signs_of_the_latent(case: str) -> None:
    q, z = build_quantizer(case), latents()
    bits = (z > 0).long()
    expected = sum(bits[:, i] * 2**i for i in range(5))
    assert torch.equal(q(z).indices, expected)
    length = 1 if case == "lfq" else 5**-0.5
    assert torch.allclose(q.lookup(expected), (2.0 * bits - 1) * length)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_the_entropy_of_lfq_equals_the_entropy_of_a_softmax_over_all_codes(temperature: float) -> None:
    q, z = build_quantizer("lfq", entropy_temperature=temperature), latents()
    codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5))).flip(
        1
    )  # the first bit is the least significant
    vectors = z.movedim(1, -1).reshape(-1, 5)
    assignment = (-torch.cdist(vectors.double(), codes.double()).square() / temperature).softmax(1)
    mean_entropy = -torch.special.xlogy(assignment, assignment).sum(1).mean()
    mean = assignment.mean(0)
    batch_entropy = -torch.special.xlogy(mean, mean).sum()
    assert q(z).losses["entropy"].item() == pytest.approx((mean_entropy - batch_entropy).item(), abs=1e-5)
    assert torch.allclose(code_probabilities((4 * vectors / temperature).sigmoid()).double(), mean, atol=1e-6)


def test_the_entropy_of_bsq_is_a_sum_over_bits() -> None:
    q, z = build_quantizer("bsq"), latents()
    bits = (2 * F.normalize(z, dim=1)).sigmoid().movedim(1, -1).reshape(-1, 5).double()

    def entropy(p: Tensor) -> Tensor:
        return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p))

    expected = entropy(bits).sum(1).mean() - entropy(bits.mean(0)).sum()
    assert q(z).losses["entropy"].item() == pytest.approx(expected.item(), abs=1e-5)


# Index backpropagation


@pytest.mark.parametrize("elements", [1, 60, 1 << 22])
def test_ibq_has_the_gradient_of_the_soft_assignment_for_any_chunk_size(
    monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr(ibq, "CHUNK_ELEMENTS", elements)
    q = build_quantizer("ibq", entropy_temperature=0.7)
    z = latents().requires_grad_()
    assignment = (z.movedim(1, -1).reshape(-1, 5) @ q.codebook.T / 0.7).softmax(1)
    mean = assignment.mean(0)
    expected = (mean * mean.log()).sum() - (assignment * assignment.log()).sum(1).mean()
    entropy = q(z).losses["entropy"]
    assert entropy.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = (torch.autograd.grad(loss, [z, q.codebook]) for loss in (entropy, expected))
    for gradient, expected_gradient in zip(*gradients, strict=True):
        assert torch.allclose(gradient, expected_gradient, atol=1e-6)

    upstream = torch.randn(3, 5, 4, 2, generator=seeded(8))
    ours = latents().requires_grad_()
    q(ours).quantized.backward(upstream)
    codebook_gradient, q.codebook.grad = q.codebook.grad, None

    theirs = latents().requires_grad_()
    vectors = theirs.movedim(1, -1).reshape(-1, 5)
    soft = (vectors @ q.codebook.T / 0.7).softmax(1)
    hard = F.one_hot(soft.argmax(1), 12).float()
    quantized = (hard + soft - soft.detach()) @ q.codebook
    quantized.backward(upstream.movedim(1, -1).reshape(-1, 5))
    assert ours.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert torch.allclose(codebook_gradient, q.codebook.grad, atol=1e-5)
    assert (codebook_gradient.abs().amax(1) > 0).all(), "unused codes have a gradient too"


# Residual quantization


def test_each_level_quantizes_the_residual_and_reduces_the_error() -> None:
    q, z = build_quantizer("residual"), latents()
    residual, errors = z, []
    for level, indices in zip(q.levels, q(z).indices.unbind(1), strict=True):
        vectors = residual.movedim(1, -1).reshape(-1, 5)
        assert torch.equal(torch.cdist(vectors, level.codebook).argmin(1), indices.flatten())
        residual = residual - level.lookup(indices)
        errors.append(residual.square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert torch.allclose(z - residual, q.lookup(q.quantize(z)), atol=1e-5)


# Initialization


def test_kmeans_never_increases_the_error_and_finds_separate_clusters() -> None:
    centres = 10 * torch.randn(4, 3, generator=seeded(0))
    vectors = (centres[:, None] + 0.01 * torch.randn(4, 50, 3, generator=seeded(1))).flatten(0, 1)
    start = centres + torch.randn(4, 3, generator=seeded(2))
    errors = [torch.cdist(vectors, kmeans(vectors, start, n)).amin(1).square().mean().item() for n in range(5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(3 * 0.01**2, rel=0.2)


def test_a_kmeans_codebook_is_closer_to_the_first_batch() -> None:
    errors = {}
    for iterations in (0, 10):
        config = VectorQuantizerConfig(kmeans_iterations=iterations)
        q = QUANTIZERS["vq"](config, 12, 5).train()
        z = latents(batch=20)
        errors[iterations] = q(z).losses["commitment"].item()
    assert errors[10] < 0.95 * errors[0]


# Invalid options


@pytest.mark.parametrize(
    ("fields", "size", "channels", "expected_text"),
    [
        ({"name": "fsq", "levels": (8, 5)}, 64, 2, "expected 40 and 2"),
        ({"name": "fsq", "levels": (8, 5)}, 40, 3, "expected 40 and 2"),
        ({"name": "fsq", "levels": ()}, 40, 2, "model.quantizer.levels is []"),
        ({"name": "fsq"}, 40, 2, "missing field 'model.quantizer.levels'; expected"),
        (
            {"name": "vq", "levels": (8, 5)},
            40,
            2,
            "'model.quantizer.levels' for the quantizer vq; expected it only with fsq",
        ),
        (
            {"name": "vq", "level": 3},
            40,
            2,
            "unknown field 'model.quantizer.level' for the quantizer vq; expected one of",
        ),
        ({"name": "emma"}, 40, 2, "model.quantizer.name is 'emma'; did you mean 'ema'?"),
        ({"name": "fsq", "levels": (8, 1)}, 8, 2, "two or more values"),
        ({"name": "lfq"}, 500, 9, "expected 2^channels codes"),
        ({"name": "bsq"}, 512, 8, "Use 512 and 9"),
        ({"name": "lfq", "normalize": True}, 512, 9, "for the quantizer lfq; expected it only with ema, vq, residual"),
        ({"name": "simvq", "gradient": "rotation"}, 512, 9, "'model.quantizer.gradient' for the quantizer simvq"),
        ({"usage_decay": 1.5}, 512, 9, "model.quantizer.usage_decay is 1.5"),
        ({"restart_threshold": -0.1}, 512, 9, "restart_threshold is -0.1"),
        ({"name": "bsq"}, 2**36, 36, "model.codebook_size is 68719476736; expected at most 16777216"),
        ({"name": "residual", "depth": 0}, 512, 9, "model.quantizer.depth is 0"),
        ({"name": "ibq", "entropy_temperature": 0.0}, 512, 9, "model.quantizer.entropy_temperature is 0.0"),
    ],
)
def test_inconsistent_options_give_one_line(
    fields: dict[str, Any], size: int, channels: int, expected_text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_section(AnyQuantizerConfig, fields, "model.quantizer").check(size, channels)
    assert expected_text in error_message(caught)


def test_the_codebook_size_that_the_message_recommends_is_valid() -> None:
    LFQConfig().check(512, 9)
    assert math.log2(512) == 9
