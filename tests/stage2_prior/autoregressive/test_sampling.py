"""Sampling: code selection, truncation, guidance, and the decode loop with caches."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from tiny_models import seeded, tiny_prior, tiny_tokenizer
from torch import Tensor
from torch.testing import assert_close

from stage2_prior.autoregressive.decoding import decode
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.autoregressive.sampling import SamplingOptions, sample_codes, truncate_logits
from stage2_prior.autoregressive.stepping import PackedStepper
from stage2_prior.prior import UNKNOWN
from training_harness.errors import SpecMismatchError, UserError

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=24, unique=True)
ALMOST_ONE = 1 - 2**-24  # the largest float32 below 1


def decode_tokens(prior: AutoregressivePrior, labels: list[int], seeds: list[int], **options: float) -> Tensor:
    generators = [seeded(seed) for seed in seeds]
    return decode(prior, torch.tensor(labels), SamplingOptions(**options), generators).flatten(1)  # type: ignore[arg-type]


def kept_codes(logits: list[float], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    return set(truncate_logits(torch.tensor([logits]), top_k, top_p, min_p).isfinite()[0].nonzero().flatten().tolist())


# -- code selection ---------------------------------------------------------------------------------------------------


def test_sampled_codes_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.05, 0.3, 0.01, 0.24, 0.4])
    count = 20_000
    uniform = torch.rand(count, generator=seeded(0))
    sampled = torch.bincount(sample_codes(probabilities.log().expand(count, 5), uniform), minlength=5)

    def statistic(expected: Tensor) -> float:
        return float(((sampled - count * expected) ** 2 / (count * expected)).sum())

    # Chance exceeds this threshold for one seed in 10⁹.
    assert statistic(probabilities) < chi2.isf(1e-9, df=4)
    assert statistic(probabilities.flip(0)) > chi2.isf(1e-9, df=4)


def test_evenly_spaced_uniform_numbers_select_codes_in_proportion_to_their_probabilities() -> None:
    probabilities = torch.rand(7, generator=seeded(1)).double()
    probabilities /= probabilities.sum()
    count = 5_000
    uniform = (torch.arange(count) + 0.5) / count
    sampled = torch.bincount(sample_codes(probabilities.log().expand(count, 7), uniform), minlength=7)
    assert (sampled - count * probabilities).abs().max() < 1.01


@given(LOGITS, st.lists(st.floats(0, ALMOST_ONE, width=32), min_size=2, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_larger_uniform_number_never_selects_an_earlier_code(logits: list[float], uniform: list[float]) -> None:
    ordered = torch.tensor(sorted(uniform))
    sampled = sample_codes(torch.tensor(logits).expand(len(uniform), -1), ordered).tolist()
    assert all(a <= b for a, b in pairwise(sampled))
    assert sampled[0] >= 0
    assert sampled[-1] < len(logits)


@given(st.lists(st.booleans(), min_size=1, max_size=600), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_a_masked_code_is_never_selected_by_any_uniform_number(allowed: list[bool], seed: int) -> None:
    assume(any(allowed))
    mask = torch.tensor(allowed)
    logits = (8 * torch.randn(len(allowed), generator=seeded(seed))).masked_fill(~mask, -torch.inf)
    uniform = torch.tensor([0.0, 1e-38, 0.3, 0.5, 1 - 2**-12, ALMOST_ONE, 1.0])  # 1 is outside the valid range
    sampled = sample_codes(logits.expand(len(uniform), -1), uniform)
    assert mask[sampled].all()


# -- truncation -------------------------------------------------------------------------------------------------------


@given(LOGITS, st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_top_k_keeps_the_k_largest(logits: list[float], k: int) -> None:
    by_size = sorted(range(len(logits)), key=lambda i: -logits[i])
    assert kept_codes(logits, top_k=k) == set(by_size[:k] if k else by_size)


def test_top_k_keeps_all_codes_as_probable_as_the_k_th() -> None:
    assert kept_codes([1.0, 3.0, 2.0, 2.0, 0.0], top_k=2) == {1, 2, 3}


@given(LOGITS, st.floats(0.01, 0.999))
@settings(max_examples=100, deadline=None)
def test_top_p_keeps_the_fewest_codes_that_reach_p(logits: list[float], p: float) -> None:
    total = sum(map(math.exp, logits))
    expected, reached = set(), 0.0
    for i in sorted(range(len(logits)), key=lambda i: -logits[i]):
        assume(abs(reached - p) > 1e-5)  # float32 may decide differently here
        if reached >= p:
            break
        expected.add(i)
        reached += math.exp(logits[i]) / total
    assert kept_codes(logits, top_p=p) == expected


def test_top_p_applies_to_the_codes_that_top_k_keeps() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert kept_codes(logits, top_p=0.75) == {0, 1, 2}
    assert kept_codes(logits, top_k=2, top_p=0.55) == {0}  # 4 / 7 of the remaining probability exceeds 0.55
    assert kept_codes(logits, top_k=2, top_p=0.75) == {0, 1}


@given(LOGITS, st.floats(0.001, 1))
@settings(max_examples=100, deadline=None)
def test_min_p_keeps_codes_with_at_least_that_share_of_the_highest_probability(
    logits: list[float], share: float
) -> None:
    top = max(logits)
    for x in logits:
        assume(abs(x - top - math.log(share)) > 1e-5)  # float32 may decide differently here
    assert kept_codes(logits, min_p=share) == {i for i, x in enumerate(logits) if x - top >= math.log(share)}


def test_min_p_compares_with_the_most_probable_code_for_any_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert kept_codes(logits, min_p=0.25) == {0, 1, 2}
    assert kept_codes(logits, top_p=0.7, min_p=0.25) == {0, 1}
    assert kept_codes(logits, top_p=0.99, min_p=0.35) == {0, 1}


def test_the_guidance_scale_grows_to_its_final_value_or_is_constant() -> None:
    schedules = {
        name: SamplingOptions(guidance_scale=3.0, guidance_schedule=name) for name in ("constant", "linear", "cosine")
    }  # type: ignore[arg-type]
    for options in schedules.values():
        assert options.guidance_scale_at(15, 16) == pytest.approx(3.0)
    assert schedules["constant"].guidance_scale_at(0, 16) == 3.0
    assert schedules["linear"].guidance_scale_at(7, 16) == pytest.approx(2.0)
    assert schedules["cosine"].guidance_scale_at(7, 16) == pytest.approx(2.0)
    assert 1 < schedules["cosine"].guidance_scale_at(0, 16) < schedules["linear"].guidance_scale_at(0, 16) < 1.2


def test_a_guidance_schedule_applies_the_scale_of_each_position() -> None:
    prior, labels = tiny_prior(), torch.tensor([0, 1])
    options = SamplingOptions(guidance_scale=4.0, guidance_schedule="linear")
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    uniform = torch.stack([torch.rand(16, generator=seeded(seed)) for seed in (5, 6)])
    with torch.no_grad():
        for i in range(16):
            unconditional, conditional = (prior.logits(tokens, y)[:, i] for y in (torch.full_like(labels, 3), labels))
            tokens[:, i] = sample_codes(
                unconditional + (1 + 3 * (i + 1) / 16) * (conditional - unconditional), uniform[:, i]
            )
    assert torch.equal(decode(prior, labels, options, [seeded(5), seeded(6)]).flatten(1), tokens)


def test_truncation_does_not_change_the_kept_logits_and_treats_rows_independently() -> None:
    logits = torch.randn(4, 16, generator=seeded(0))
    result = truncate_logits(logits, 5, 0.9)
    assert torch.equal(result[result.isfinite()], logits[result.isfinite()])
    for row in range(4):
        assert torch.equal(truncate_logits(logits[row : row + 1], 5, 0.9), result[row : row + 1])


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", -1.0),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("num_candidates", 0),
    ],
)
def test_an_option_outside_its_range_is_refused_with_its_name_and_value(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}; expected"):
        SamplingOptions(**{name: value})  # type: ignore[arg-type]


# -- the decode loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_cached_logits_equal_uncached_ones_at_every_step(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    prior, labels = tiny_prior(), [0, 2, -1]
    steps: list[Tensor] = []
    logits = PackedStepper.logits

    def record_logits(stepper: PackedStepper, states: Tensor, level: int) -> Tensor:
        steps.append(logits(stepper, states, level))
        return steps[-1]

    monkeypatch.setattr(PackedStepper, "logits", record_logits)
    tokens = decode_tokens(prior, labels, [1, 2, 3], guidance_scale=scale)
    cached = torch.stack(steps, dim=1)  # (B or 2 B, h·w, K)
    assert cached.shape == (3 if scale == 1 else 6, 16, 16)
    halves = [labels] if scale == 1 else [labels, [3, 3, 3]]
    for half, half_labels in zip(cached.split(3), halves, strict=True):
        assert_close(half, prior.logits(tokens, torch.tensor(half_labels)), rtol=0, atol=1e-4)


def test_decoding_equals_a_loop_without_cache() -> None:
    prior, labels = tiny_prior(), torch.tensor([0, 1])
    options = {"guidance_scale": 2.0, "temperature": 0.8, "top_k": 9, "top_p": 0.9}
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    uniform = torch.stack([torch.rand(16, generator=seeded(seed)) for seed in (5, 6)])
    null = torch.full_like(labels, 3)
    with torch.no_grad():
        for i in range(16):
            unconditional, conditional = (prior.logits(tokens, y)[:, i] for y in (null, labels))
            logits = truncate_logits((unconditional + 2.0 * (conditional - unconditional)) / 0.8, 9, 0.9)
            tokens[:, i] = sample_codes(logits, uniform[:, i])
    assert torch.equal(decode_tokens(prior, [0, 1], [5, 6], **options), tokens)


def test_guidance_1_samples_the_conditional_model_and_0_the_null_class() -> None:
    prior, seeds = tiny_prior(), list(range(8))
    conditional, null = decode_tokens(prior, [1] * 8, seeds), decode_tokens(prior, [-1] * 8, seeds)
    assert torch.equal(decode_tokens(prior, [1] * 8, seeds, guidance_scale=0.0), null)
    # The null half runs at 1 + 1e-7 and not at 1. Both give the same tokens.
    assert torch.equal(decode_tokens(prior, [1] * 8, seeds, guidance_scale=1.0 + 1e-7), conditional)
    assert not torch.equal(conditional, null)
    assert not torch.equal(decode_tokens(prior, [1] * 8, seeds, guidance_scale=3.0), conditional)


def test_a_low_temperature_and_top_1_both_take_the_most_probable_code() -> None:
    prior = tiny_prior()
    most_probable = decode_tokens(prior, [0, 1], [1, 2], top_k=1)
    assert torch.equal(most_probable, decode_tokens(prior, [0, 1], [3, 4], temperature=1e-6))
    with torch.no_grad():
        assert torch.equal(prior.logits(most_probable, torch.tensor([0, 1])).argmax(2), most_probable)
    assert not torch.equal(most_probable, decode_tokens(prior, [0, 1], [1, 2]))


def test_guidance_has_no_effect_and_no_cost_when_there_are_no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, rows = tiny_prior(), list[int]()
    prefix = AutoregressivePrior.hidden_states
    monkeypatch.setattr(
        AutoregressivePrior, "hidden_states", lambda self, x, *rest: (rows.append(len(x)), prefix(self, x, *rest))[1]
    )
    for labels in ([-1, -1], [3, -1], [0, -1]):
        decode_tokens(prior, labels, [1, 2], guidance_scale=3.0)
    assert rows == [2, 2, 4]
    assert torch.equal(
        decode_tokens(prior, [-1, -1], [1, 2], guidance_scale=3.0), decode_tokens(prior, [-1, -1], [1, 2])
    )


@pytest.mark.slow
def test_99_percent_of_the_tokens_of_a_thousand_images_are_the_same_in_batches_of_1_and_8() -> None:
    prior, labels, seeds = tiny_prior(), [i % 3 for i in range(1000)], list(range(1000))
    separate = torch.cat([decode_tokens(prior, [label], [seed]) for label, seed in zip(labels, seeds, strict=True)])
    eights = [decode_tokens(prior, labels[i : i + 8], seeds[i : i + 8]) for i in range(0, 1000, 8)]
    assert (torch.cat(eights) == separate).float().mean() >= 0.99


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_image_i_is_the_same_alone_and_in_a_batch_of_eight(scale: float) -> None:
    # Rounding may depend on the batch size. The probability that it changes a code is about 10⁻⁵ here.
    prior, labels = tiny_prior(), [i % 3 for i in range(8)]
    together = decode_tokens(prior, labels, list(range(8)), guidance_scale=scale)
    separate = [decode_tokens(prior, [labels[i]], [i], guidance_scale=scale) for i in range(8)]
    assert torch.equal(together, torch.cat(separate))
    assert len({tuple(row.tolist()) for row in together}) == 8


def test_decoding_takes_h_w_random_numbers_from_each_generator_and_none_from_the_global_state() -> None:
    state, generator, reference = torch.get_rng_state(), seeded(4), seeded(4)
    decode(tiny_prior(), torch.tensor([0]), SamplingOptions(), [generator])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(16, generator=reference)
    assert torch.equal(generator.get_state(), reference.get_state())


def test_every_step_is_reported_with_the_codes_so_far() -> None:
    reported: list[tuple[int, Tensor]] = []
    prior = tiny_prior()
    generators = [seeded(0), seeded(1)]
    tokens = decode(
        prior, torch.tensor([0, 1]), SamplingOptions(), generators, lambda i, t: reported.append((i, t.clone()))
    )
    assert [i for i, _ in reported] == list(range(16))
    for i, grid in reported:
        assert torch.equal(grid.flatten(1)[:, : i + 1], tokens.flatten(1)[:, : i + 1])
        assert (grid.flatten(1)[:, i + 1 :] == UNKNOWN).all()


def test_sample_returns_the_grid_in_raster_order_and_refuses_another_spec() -> None:
    tokenizer = tiny_tokenizer()
    prior = tiny_prior(tokenizer_id=tokenizer.config.tokenizer_id)
    labels, options = torch.tensor([0, 1]), SamplingOptions()
    grid = prior.sample(tokenizer.latent_spec(), labels, options, [seeded(0), seeded(1)])
    assert grid.shape == (2, 4, 4)
    assert torch.equal(grid, decode(prior, labels, options, [seeded(0), seeded(1)]))
    with pytest.raises(SpecMismatchError, match="tokenizer_id"):
        prior.sample(tiny_tokenizer(seed=1).latent_spec(), labels, options, [seeded(0), seeded(1)])


def test_sampled_codes_can_be_inputs_of_a_computation_with_gradients() -> None:
    # Tensors from inference mode could not, and the codebook of a vector quantizer is a parameter.
    prior = tiny_prior()
    prior(decode_tokens(prior, [0], [0]).view(1, 4, 4), torch.tensor([0])).total.backward()
    assert prior.code_embedding.weight.grad is not None
