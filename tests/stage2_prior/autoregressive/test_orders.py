"""Prediction orders: permutations, dependencies of the logits, and random orders in training."""

import math

import pytest
import torch
from tiny_models import seeded, tiny_prior
from torch.testing import assert_close

from stage2_prior.autoregressive.orders import OrderConfig, invert_order, order_known_first, random_orders
from training_harness.batch_order import BatchOrder
from training_harness.errors import ConfigError


def any_order_prior(**fields: object) -> torch.nn.Module:
    return tiny_prior(learned_positions=True, random_order=1.0, **fields)


def test_inverting_an_order_gives_its_inverse() -> None:
    orders = torch.rand(5, 16, generator=seeded(0)).argsort(1)
    positions = torch.arange(16).expand(5, -1)
    assert torch.equal(invert_order(orders).gather(1, orders), positions)
    assert torch.equal(orders.gather(1, invert_order(orders)), positions)


@pytest.mark.parametrize("levels", [1, 3])
def test_tokens_to_codes_inverts_codes_to_tokens_in_any_order(levels: int) -> None:
    prior = tiny_prior(levels=levels)
    shape = (4, 4) if levels == 1 else (levels, 4, 4)
    codes = torch.randint(16, (2, *shape), generator=seeded(1))
    orders = torch.rand(2, 16, generator=seeded(2)).argsort(1)
    for order in (None, orders):
        tokens = prior.codes_to_tokens(codes, order)
        assert tokens.shape == (2, 16 * levels)
        assert torch.equal(prior.tokens_to_codes(tokens, order), codes)
    first = codes.flatten(-2)[..., orders[0, 0]][0]  # all levels of the first position
    assert torch.equal(prior.codes_to_tokens(codes, orders)[0, :levels], first.view(-1))


def test_known_positions_come_first_and_both_parts_are_in_raster_order() -> None:
    known_mask = torch.tensor([[False, True, False, True], [True, True, True, True], [False, False, False, False]])
    assert order_known_first(known_mask).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_a_logit_depends_only_on_the_codes_before_it_in_the_order() -> None:
    prior, labels = any_order_prior(), torch.tensor([1])
    codes, order = torch.randint(16, (1, 4, 4), generator=seeded(0)), torch.rand(1, 16, generator=seeded(3)).argsort(1)
    logits_before = prior.logits(prior.codes_to_tokens(codes, order), labels, order)
    for step in (0, 7, 14):
        altered = codes.flatten(1).clone()
        position = order[0, step]
        altered[0, position] = (altered[0, position] + 1) % 16
        logits_after = prior.logits(prior.codes_to_tokens(altered.view(1, 4, 4), order), labels, order)
        assert torch.equal(logits_before[:, : step + 1], logits_after[:, : step + 1])
        assert (logits_before[:, step + 1 :] != logits_after[:, step + 1 :]).any(2).all()


def test_explicit_raster_order_equals_the_default_order() -> None:
    prior, labels = any_order_prior(), torch.tensor([0, 2])
    codes = torch.randint(16, (2, 4, 4), generator=seeded(0))
    raster = torch.arange(16).expand(2, -1)
    assert_close(prior(codes, labels, raster).total, prior(codes, labels).total, rtol=0, atol=1e-5)


def test_the_logits_depend_on_the_position_to_predict() -> None:
    # The two orders have the same past and different next positions. Without learned positions their logits would be equal.
    prior, labels, codes = any_order_prior(), torch.tensor([0]), torch.randint(16, (1, 4, 4), generator=seeded(0))
    one, other = torch.arange(16)[None], torch.arange(16)[None].clone()
    other[0, 5], other[0, 9] = 9, 5
    logits = [prior.logits(prior.codes_to_tokens(codes, order), labels, order)[0, 5] for order in (one, other)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_the_share_of_random_orders_changes_from_random_to_final() -> None:
    order = OrderConfig(random=1.0, final=0.2, anneal=(0.5, 0.75))
    assert [round(order.random_share_at(step, 400), 3) for step in (1, 200, 250, 300, 400)] == [1.0, 1.0, 0.6, 0.2, 0.2]
    assert OrderConfig().random_share_at(7, 10) == 0.0


def test_random_orders_have_the_given_share_and_are_permutations() -> None:
    uniform = torch.from_numpy(BatchOrder(4000, 4000, seed=0).random_numbers(0, 17))
    orders = random_orders(uniform, 0.3)
    assert orders is not None
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(4000, -1))
    raster = (orders == torch.arange(16)).all(1).double().mean().item()
    assert raster == pytest.approx(0.7, abs=6 * math.sqrt(0.21 / 4000))  # one seed in 10⁹ is outside
    random = orders[(orders != torch.arange(16)).any(1)]
    first = torch.bincount(random[:, 0], minlength=16) / len(random)
    assert (first - 1 / 16).abs().max() < 6 * math.sqrt(1 / 16 / len(random))
    assert random_orders(uniform, 0.0) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"random": 1.5}, r"order.random is 1.5; expected a share"),
        ({"final": -0.1}, r"order.final is -0.1; expected a share"),
        ({"anneal": (0.8, 0.5)}, r"order.anneal is \(0.8, 0.5\); expected two rising"),
    ],
)
def test_shares_outside_their_range_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OrderConfig(**fields)
