"""Filling a masked region, compared with the exact distribution of a prior that is small enough to enumerate."""

from itertools import product

import pytest
import torch
from tiny_models import seeded, tiny_prior

from stage2_prior.autoregressive.decoding import decode
from stage2_prior.autoregressive.orders import order_known_first
from stage2_prior.autoregressive.sampling import SamplingOptions
from stage2_prior.prior import KnownCodes

SIZE, NUM_SAMPLES = 4, 2000
KNOWN_CODES = torch.tensor([[0, 3, 1, 2, 2, 0]])  # 2 × 3 positions
KNOWN_MASK = torch.tensor([[True, False, False, True, True, True]])


def make_prior(**fields: object) -> torch.nn.Module:
    return tiny_prior(codebook_size=SIZE, height=2, width=3, sharpness=60, **fields)


def exact_distribution(prior: torch.nn.Module, orders: torch.Tensor | None = None) -> torch.Tensor:
    """Return p(region | known codes) for the SIZE² fillings of the two masked positions."""
    fillings = torch.tensor(list(product(range(SIZE), repeat=2)))
    grids = KNOWN_CODES.repeat(len(fillings), 1)
    grids[:, 1:3] = fillings
    labels = torch.zeros(len(fillings), dtype=torch.int64)
    batch_orders = None if orders is None else orders.expand(len(fillings), -1)
    tokens = prior.codes_to_tokens(grids.view(-1, 2, 3), batch_orders)
    with torch.no_grad():
        log_likelihood = (
            prior.logits(tokens, labels, batch_orders).log_softmax(2).gather(2, tokens[:, :, None]).sum((1, 2))
        )
    return log_likelihood.double().softmax(0)


def sampled_distribution(prior: torch.nn.Module, count: int, orders: torch.Tensor | None = None) -> torch.Tensor:
    """Return the shares of the fillings in NUM_SAMPLES sampled images."""
    known = KnownCodes(
        KNOWN_CODES.view(1, 2, 3).expand(NUM_SAMPLES, -1, -1), KNOWN_MASK.view(1, 2, 3).expand(NUM_SAMPLES, -1, -1)
    )
    options = SamplingOptions(num_candidates=count)
    batch_orders = None if orders is None else orders.expand(NUM_SAMPLES, -1)
    generators = [seeded(i) for i in range(NUM_SAMPLES)]
    labels = torch.zeros(NUM_SAMPLES, dtype=torch.int64)
    codes = decode(prior, labels, options, generators, known=known, orders=batch_orders).flatten(1)
    assert torch.equal(codes[:, KNOWN_MASK[0]], KNOWN_CODES[:, KNOWN_MASK[0]].expand(NUM_SAMPLES, -1)), (
        "known codes must not change"
    )
    return torch.bincount(codes[:, 1] * SIZE + codes[:, 2], minlength=SIZE**2).double() / NUM_SAMPLES


def total_variation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the total variation distance."""
    return float((a - b).abs().sum() / 2)


def test_many_candidates_sample_from_the_exact_distribution_and_one_candidate_does_not() -> None:
    prior = make_prior()
    expected, naive = exact_distribution(prior), sampled_distribution(prior, 1)
    error = total_variation(naive, expected)
    assert error > 0.2, "the known codes after the region must matter"
    # The error falls as one over the number of candidates, down to the error of 2,000 samples.
    assert total_variation(sampled_distribution(prior, 4), expected) < error / 2
    assert total_variation(sampled_distribution(prior, 32), expected) < error / 5


def test_an_any_order_prior_fills_a_masked_region_from_its_conditional_distribution() -> None:
    prior = make_prior(learned_positions=True, random_order=1.0)
    orders = order_known_first(KNOWN_MASK)
    sampled, expected = sampled_distribution(prior, 8, orders), exact_distribution(prior, orders)
    assert total_variation(sampled, expected) < 0.06  # 16 fillings, 2,000 samples


@pytest.mark.parametrize("count", [1, 5])
def test_completely_known_codes_are_returned_unchanged(count: int) -> None:
    prior, codes = tiny_prior(), torch.randint(16, (2, 4, 4), generator=seeded(0))
    known = KnownCodes(codes, torch.ones(2, 4, 4, dtype=torch.bool))
    options = SamplingOptions(num_candidates=count, guidance_scale=2.0)
    assert torch.equal(decode(prior, torch.tensor([0, 1]), options, [seeded(0), seeded(1)], known=known), codes)


def test_image_i_is_filled_the_same_alone_and_in_a_batch_with_other_masks() -> None:
    prior, codes = tiny_prior(), torch.randint(16, (4, 4, 4), generator=seeded(0))
    known_mask = torch.rand(4, 4, 4, generator=seeded(1)) < 0.5
    options, labels = SamplingOptions(num_candidates=4, guidance_scale=1.5), torch.tensor([0, 1, 2, 0])
    together = decode(prior, labels, options, [seeded(i) for i in range(4)], known=KnownCodes(codes, known_mask))
    for i in range(4):
        single = KnownCodes(codes[i : i + 1], known_mask[i : i + 1])
        assert torch.equal(decode(prior, labels[i : i + 1], options, [seeded(i)], known=single), together[i : i + 1])
    assert (together == codes)[known_mask].all()
    assert not (together == codes)[~known_mask].all()


def test_the_last_step_reports_the_returned_codes() -> None:
    prior, codes = tiny_prior(), torch.randint(16, (8, 4, 4), generator=seeded(0))
    known_mask = torch.rand(8, 4, 4, generator=seeded(1)) < 0.5
    options, labels, reported = SamplingOptions(num_candidates=4), torch.arange(8) % 3, list[torch.Tensor]()
    generators = [seeded(i) for i in range(8)]
    result = decode(
        prior, labels, options, generators, lambda i, grid: reported.append(grid), KnownCodes(codes, known_mask)
    )
    assert torch.equal(reported[-1], result)


def test_an_empty_known_mask_equals_plain_sampling() -> None:
    prior, labels = tiny_prior(), torch.tensor([0, 1])
    nothing = KnownCodes(torch.zeros(2, 4, 4, dtype=torch.int64), torch.zeros(2, 4, 4, dtype=torch.bool))
    options = SamplingOptions(guidance_scale=2.0)
    samples = [decode(prior, labels, options, [seeded(0), seeded(1)], known=known) for known in (None, nothing)]
    assert torch.equal(*samples)
