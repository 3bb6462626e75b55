"""The nearest-code search, the gradients and the codebook updates equal the formulas of the paper."""

import pytest
import torch
from tiny_models import seeded

from stage1_tokenizer.quantizers import (
    EMAVectorQuantizer,
    EMAVectorQuantizerConfig,
    VectorQuantizer,
    VectorQuantizerConfig,
    nearest_code,
    vector_quantizer,
)

K, D = 12, 5
QUANTIZERS = {"vq": VectorQuantizer, "ema": EMAVectorQuantizer}


def latents(batch=3, height=4, width=2, seed=0) -> torch.Tensor:
    return torch.randn(batch, D, height, width, generator=seeded(seed))


def as_vectors(z: torch.Tensor) -> torch.Tensor:
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def initialized_quantizer(kind=VectorQuantizer, **options) -> VectorQuantizer:
    """Create a quantizer with a fixed codebook that is in use, so that the first batch does not replace it."""
    config = EMAVectorQuantizerConfig if kind is EMAVectorQuantizer else VectorQuantizerConfig
    q = kind(config(**options), K, D)
    q.codebook.data.copy_(torch.randn(K, D, generator=seeded(9)))
    q.usage.fill_(2.0)
    if kind is EMAVectorQuantizer:
        q.sums.copy_(q.codebook * 2.0)
    return q


# Search


def test_nearest_code_equals_a_loop_over_all_pairs():
    vectors, codebook = torch.randn(40, D, generator=seeded(0)), torch.randn(K, D, generator=seeded(1))
    expected = [min(range(K), key=lambda k: float((v - codebook[k]).double().square().sum())) for v in vectors]
    assert nearest_code(vectors, codebook).tolist() == expected
    assert len(set(expected)) > K // 2


def test_nearest_code_equals_the_argmin_of_float64_distances():
    vectors, codebook = torch.randn(3000, 16, generator=seeded(2)), torch.randn(512, 16, generator=seeded(3))
    assert torch.equal(nearest_code(vectors, codebook), torch.cdist(vectors.double(), codebook.double()).argmin(1))


def test_bfloat16_autocast_does_not_change_the_codes():
    vectors = torch.randn(500, 16, generator=seeded(4)) + 8  # far from the origin, where bfloat16 distances tie
    codebook = torch.randn(256, 16, generator=seeded(5)) + 8
    expected = nearest_code(vectors, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(vectors, codebook), expected)
        bfloat16_codes = (codebook.square().sum(1) - 2 * vectors @ codebook.T).argmin(1)
    assert (bfloat16_codes != expected).float().mean() > 0.2  # a search in bfloat16 gives other codes


@pytest.mark.parametrize("elements", [1, 100, 12 * 7, 1 << 22])
def test_the_chunk_size_does_not_change_the_codes(monkeypatch, elements):
    vectors, codebook = torch.randn(50, D, generator=seeded(6)), torch.randn(K, D, generator=seeded(7))
    expected = torch.cdist(vectors.double(), codebook.double()).argmin(1)
    monkeypatch.setattr(vector_quantizer, "CHUNK_ELEMENTS", elements)
    assert torch.equal(nearest_code(vectors, codebook), expected)


# Output and gradients


@pytest.mark.parametrize("kind", QUANTIZERS.values(), ids=QUANTIZERS)
def test_the_output_equals_the_codes_and_its_gradient_passes_unchanged_to_the_latents(kind):
    q, z = initialized_quantizer(kind).eval(), latents().requires_grad_()
    output = q(z)
    assert torch.equal(output.indices, q.quantize(z))
    assert torch.allclose(output.quantized, q.lookup(output.indices), atol=1e-6)
    assert not torch.allclose(output.quantized, z, atol=0.1)
    upstream = torch.randn(z.shape, generator=seeded(8))
    output.quantized.backward(upstream)
    assert torch.equal(z.grad, upstream)


def test_quantize_and_lookup_keep_the_positions():
    q = initialized_quantizer().eval()
    indices = torch.arange(K).view(1, 3, 4)
    assert torch.equal(q.quantize(q.lookup(indices)), indices)


def test_the_commitment_gradient_reaches_only_the_latents_and_equals_the_formula():
    q, z = initialized_quantizer().eval(), latents().requires_grad_()
    output = q(z)
    output.losses["commitment"].backward()
    assert torch.allclose(z.grad, 2 * (z - q.lookup(output.indices)).detach() / z.numel(), atol=1e-7)
    assert q.codebook.grad is None


def test_the_codebook_gradient_reaches_only_the_selected_entries():
    q, z = initialized_quantizer().eval(), latents(batch=1, height=2).requires_grad_()
    output = q(z)
    output.losses["codebook"].backward()
    expected = torch.zeros(K, D)
    for vector, k in zip(as_vectors(z.detach()), output.indices.flatten(), strict=True):
        expected[k] += 2 * (q.codebook.detach()[k] - vector) / z.numel()
    assert torch.allclose(q.codebook.grad, expected, atol=1e-7)
    assert z.grad is None
    unused = torch.ones(K, dtype=torch.bool).index_fill_(0, output.indices.flatten(), False)
    assert unused.any()
    assert not q.codebook.grad[unused].any()


def test_an_ema_codebook_has_no_parameters_and_no_codebook_loss():
    q = initialized_quantizer(EMAVectorQuantizer)
    assert list(q.parameters()) == []
    assert q(latents().requires_grad_()).losses.keys() == {"commitment"}


# Codebook updates


def test_the_moving_averages_equal_the_formula_of_the_paper():
    decay = 0.8
    q = initialized_quantizer(EMAVectorQuantizer, usage_decay=decay, restart_threshold=0.0).train()
    counts, sums, codebook = q.usage.clone(), q.sums.clone(), q.codebook.clone()
    for seed in range(3):
        z = latents(seed=seed)
        q(z)
        nearest = torch.cdist(as_vectors(z), codebook).argmin(1)
        for k in range(K):
            counts[k] = decay * counts[k] + (1 - decay) * (nearest == k).sum()
            sums[k] = decay * sums[k] + (1 - decay) * as_vectors(z)[nearest == k].sum(0)
        codebook = sums / counts[:, None]
        assert torch.allclose(q.usage, counts, atol=1e-5)
        assert torch.allclose(q.sums, sums, atol=1e-5)
        assert torch.allclose(q.codebook, codebook, atol=1e-5)


@pytest.mark.parametrize("kind", QUANTIZERS.values(), ids=QUANTIZERS)
def test_dead_entries_restart_from_the_batch_with_new_statistics_and_live_entries_do_not_change(kind):
    # A decay of almost 1 keeps the moving averages constant, so only restarts change the state.
    q = initialized_quantizer(kind, usage_decay=1 - 1e-9, restart_threshold=0.3).train()
    dead = torch.tensor([3, 7])
    q.usage[dead] = 0.0
    before, z = q.codebook.detach().clone(), latents()
    q(z)
    uniform = len(as_vectors(z)) / K
    for k in range(K):
        if k in dead:
            assert (q.codebook[k] - as_vectors(z)).abs().amax(1).min() < 1e-6
            assert q.usage[k] == uniform
            if kind is EMAVectorQuantizer:
                assert torch.allclose(q.sums[k], q.codebook[k] * uniform)
        else:
            assert torch.allclose(q.codebook[k], before[k], atol=1e-6)
            assert q.usage[k] == 2.0


def test_every_entry_is_dead_before_the_first_batch():
    q, z = EMAVectorQuantizer(EMAVectorQuantizerConfig(), K, D).train(), latents(batch=8)
    q(z)
    assert q.usage.min() > 0
    assert (q(z).quantized - z).square().mean() < z.square().mean()  # a random codebook would be no closer than 0


def test_a_threshold_of_0_restarts_nothing_after_the_first_batch():
    q = initialized_quantizer(restart_threshold=0.0).train()
    q.usage[3] = 0.0
    before = q.codebook.detach().clone()
    q(latents())
    assert torch.equal(q.codebook, before)


@pytest.mark.parametrize("kind", QUANTIZERS.values(), ids=QUANTIZERS)
def test_evaluation_mode_does_not_change_the_codebook(kind):
    q = kind(EMAVectorQuantizerConfig(), K, D).eval()
    before = {name: value.clone() for name, value in q.state_dict().items()}
    q(latents())
    assert all(torch.equal(before[name], value) for name, value in q.state_dict().items())
    q.train()(latents())
    assert not any(torch.equal(before[name], value) for name, value in q.state_dict().items())


@pytest.mark.parametrize("kind", QUANTIZERS.values())
def test_a_batch_with_infinite_latents_does_not_change_the_codebook(kind):
    q = initialized_quantizer(kind).train()
    before = {name: value.clone() for name, value in q.state_dict().items()}
    infinite = latents()
    infinite[1, 2, 0, 1] = torch.inf
    q(infinite)
    assert all(torch.equal(value, before[name]) for name, value in q.state_dict().items())
    q(latents())
    assert not torch.equal(q.usage, before["usage"]), "finite latents update the codebook"
