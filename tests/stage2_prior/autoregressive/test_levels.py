"""Residual codes: several levels at each position, predicted one after another."""

import math
from pathlib import Path

import pytest
import torch
from tiny_models import seeded, tiny_prior
from torch.testing import assert_close

from stage2_prior.autoregressive.decoding import decode
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.autoregressive.sampling import SamplingOptions, sample_codes

LEVELS = 3


def random_codes(count: int) -> torch.Tensor:
    return torch.randint(16, (count, LEVELS, 4, 4), generator=seeded(0))


def test_a_level_depends_on_earlier_levels_of_its_position_and_on_all_earlier_positions() -> None:
    prior, labels, grid = tiny_prior(levels=LEVELS), torch.tensor([0]), random_codes(1)
    before = prior.logits(prior.codes_to_tokens(grid), labels)
    for position, level in ((0, 0), (5, 1), (9, 2), (14, 0)):
        altered = grid.clone().flatten(2)
        altered[0, level, position] = (altered[0, level, position] + 1) % 16
        after = prior.logits(prior.codes_to_tokens(altered.view_as(grid)), labels)
        changed = (before != after).any(2)[0]
        first = position * LEVELS + level + 1
        assert not changed[:first].any()
        assert changed[first:].all()


def test_every_level_has_its_own_rows_of_the_table() -> None:
    prior = tiny_prior(levels=LEVELS)
    assert prior.code_embedding.num_embeddings == LEVELS * 16
    embeddings = prior.embed_levels(torch.full((1, 1, LEVELS), 5))[0, 0]
    assert torch.equal(embeddings, prior.code_embedding.weight[[5, 21, 37]])
    assert torch.equal(prior.head_weight(1), prior.head.weight[16:32])


def test_the_loss_is_the_mean_over_positions_and_levels_and_every_weight_has_a_gradient() -> None:
    prior, grid, labels = tiny_prior(levels=LEVELS), random_codes(2), torch.tensor([0, -1])
    tokens = prior.codes_to_tokens(grid)
    expected = -prior.logits(tokens, labels).log_softmax(2).gather(2, tokens[:, :, None]).mean()
    loss = prior(grid, labels)
    assert_close(loss.total, expected)
    loss.total.backward()
    assert not [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.any()]


def test_decoding_levels_equals_a_loop_without_cache() -> None:
    prior, labels = tiny_prior(levels=LEVELS), torch.tensor([0, 1])
    tokens = torch.zeros(2, 16 * LEVELS, dtype=torch.int64)
    uniform = torch.stack([torch.rand(16 * LEVELS, generator=seeded(seed)) for seed in (5, 6)])
    null = torch.full_like(labels, 3)
    with torch.no_grad():
        for i in range(tokens.shape[1]):
            unconditional, conditional = (prior.logits(tokens, y)[:, i] for y in (null, labels))
            tokens[:, i] = sample_codes(unconditional + 2.0 * (conditional - unconditional), uniform[:, i])
    options = SamplingOptions(guidance_scale=2.0)
    assert torch.equal(decode(prior, labels, options, [seeded(5), seeded(6)]), prior.tokens_to_codes(tokens))


def test_an_untrained_prior_with_levels_predicts_uniformly_and_loads_after_saving(tmp_path: Path) -> None:
    prior = tiny_prior(levels=LEVELS, sharpness=1)
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        assert float(prior(random_codes(2), labels).total) == pytest.approx(math.log(16), abs=0.05)
    prior.save_pretrained(tmp_path)
    loaded = AutoregressivePrior.from_pretrained(tmp_path)
    assert torch.equal(loaded(random_codes(2), labels).total, prior(random_codes(2), labels).total)
