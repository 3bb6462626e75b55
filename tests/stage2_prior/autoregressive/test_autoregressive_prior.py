"""The autoregressive prior as a model: what it sees, what it equals, what it saves and refuses."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import seeded, tiny_prior, tiny_tokenizer
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaModel

from stage2_prior.autoregressive import blocks
from stage2_prior.autoregressive.config import AutoregressivePriorConfig
from stage2_prior.autoregressive.kv_cache import KVCache
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.layers.attention import plain_attention
from training_harness.errors import ConfigError, SpecMismatchError, UserError

LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


def random_codes(count: int, seed: int = 0) -> Tensor:
    return torch.randint(16, (count, 16), generator=seeded(seed))


def rename_to_llama(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our blocks and last norm under transformers' names; the code embedding stands for Llama's."""
    renamed = {"embed_tokens.weight": state["code_embedding.weight"], "norm.weight": state["norm.weight"]}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, number, part = name.split(".", 2)
            renamed[f"layers.{number}.{LLAMA_NAMES[part.removesuffix('.weight')]}.weight"] = tensor
    return renamed


def test_learnt_positions_alone_are_all_that_a_prior_knows_of_places() -> None:
    prior = tiny_prior(positions="none", learned_positions=True, num_layers=1)  # of several the mask tells places too
    x = torch.randn(2, 16, 32, generator=seeded(0))
    swapped = x[:, [0, 2, 1, *range(3, 16)]]
    with torch.no_grad():
        assert (prior.hidden_states(x)[:, -1] - prior.hidden_states(swapped)[:, -1]).abs().max() > 1e-4
        prior.position_embedding.weight.zero_()
        assert_close(prior.hidden_states(x)[:, -1], prior.hidden_states(swapped)[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["1d", "2d"])
def test_future_tokens_do_not_change_past_logits(positions: str) -> None:
    prior, tokens, labels = tiny_prior(positions=positions), random_codes(3), torch.tensor([0, 1, 2])
    for first_altered in (0, 8, 14):
        altered = tokens.clone()
        altered[:, first_altered:] = (altered[:, first_altered:] + 1) % 16
        before, after = prior.logits(tokens, labels), prior.logits(altered, labels)
        past = slice(None, first_altered + 1)  # logits i predict token i, from the tokens before it
        assert torch.equal(before[:, past], after[:, past])
        later = before[:, first_altered + 1 :] != after[:, first_altered + 1 :]
        assert later.any(2).all(), "a prior that ignores its input would pass"


def test_the_last_code_is_no_input_and_the_class_reaches_every_logit() -> None:
    prior, tokens = tiny_prior(), random_codes(2)
    altered = tokens.clone()
    altered[:, -1] = (altered[:, -1] + 1) % 16
    cat, dog = (torch.full((2,), label) for label in (0, 1))
    assert torch.equal(prior.logits(tokens, cat), prior.logits(altered, cat))
    assert (prior.logits(tokens, cat) != prior.logits(tokens, dog)).any(2).all()


def test_the_prior_equals_transformers_llama_with_the_same_weights() -> None:
    ours = tiny_prior(positions="1d", qk_norm=False, rope_theta=500.0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        rms_norm_eps=ours.config.model.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    theirs = LlamaModel(config).eval()
    with torch.no_grad():  # gains of one would hide a norm that is left out or misplaced
        for norm in (module for module in ours.modules() if isinstance(module, torch.nn.RMSNorm)):
            norm.weight.copy_(1 + 0.3 * torch.randn(norm.weight.shape, generator=seeded(5)))
    theirs.load_state_dict(rename_to_llama(ours.state_dict()), strict=True)
    x = torch.randn(2, 17, 32, generator=seeded(0))
    with torch.no_grad():
        expected = theirs(inputs_embeds=x).last_hidden_state
        assert_close(ours.hidden_states(x), expected, rtol=0, atol=1e-5)
        two_dimensional = tiny_prior(positions="2d", qk_norm=False, rope_theta=500.0)
        two_dimensional.load_state_dict(ours.state_dict())
        assert (two_dimensional.hidden_states(x) - expected).abs().max() > 1e-2  # or positions would not matter here


@pytest.mark.parametrize("use_plain", [True, False])
def test_shared_keys_are_those_of_a_prior_in_which_each_head_has_a_copy(
    use_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "prefers_plain_attention", lambda *_: use_plain)
    shared = tiny_prior(num_heads=4, num_key_value_heads=2)
    separate = tiny_prior(num_heads=4)
    weights = shared.state_dict()
    for name in [name for name in weights if name.endswith((".key.weight", ".value.weight"))]:
        weights[name] = (
            weights[name].view(2, 8, -1).repeat_interleave(2, 0).flatten(0, 1)
        )  # heads 0 and 1 share the first
    separate.load_state_dict(weights)
    grid, labels = random_codes(3).view(3, 4, 4), torch.tensor([0, 2, -1])
    losses = [prior(grid, labels).total for prior in (shared, separate)]
    assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for name, parameter in shared.named_parameters():
        expected_grad = dict(separate.named_parameters())[name].grad
        if name.endswith((".key.weight", ".value.weight")):
            expected_grad = expected_grad.view(2, 2, 8, -1).sum(1).flatten(0, 1)
        assert_close(parameter.grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunks", [(1,) * 16, (16,), (1, 3, 5, 7), (10, 6)])
def test_hidden_states_with_caches_equal_those_without_for_any_cut_of_the_sequence(chunks: tuple[int, ...]) -> None:
    prior = tiny_prior()
    x = torch.randn(2, 16, 32, generator=seeded(1))
    caches = prior.new_caches(2)
    with torch.no_grad():
        parts = [prior.hidden_states(part, caches=caches) for part in x.split(chunks, dim=1)]
        assert_close(torch.cat(parts, dim=1), prior.hidden_states(x), rtol=0, atol=1e-5)


def test_a_full_cache_refuses_another_token_and_says_how_large_it_should_be() -> None:
    cache = KVCache(batch=2, heads=1, max_tokens=3, head_dim=4, like=torch.zeros(1))
    keys = torch.randn(2, 1, 3, 4, generator=seeded(0))
    stored_keys, *_ = cache.append(keys, keys)
    assert torch.equal(stored_keys, keys)
    with pytest.raises(ValueError, match="received token 3 but has 3 slots; build it with max_tokens=4"):
        cache.append(keys[:, :, :1], keys[:, :, :1])
    assert cache.tokens == 3


def test_the_loss_is_the_mean_cross_entropy_of_each_code_and_reaches_every_weight() -> None:
    prior, grid, labels = tiny_prior(), random_codes(3).view(3, 4, 4), torch.tensor([0, 2, -1])
    loss = prior(grid, labels)
    log_probabilities = prior.logits(grid.flatten(1), labels).log_softmax(2)
    expected = [-log_probabilities[b, i, grid.flatten(1)[b, i]] for b in range(3) for i in range(16)]
    assert_close(loss.total, torch.stack(expected).mean())
    assert loss.terms["nats_per_token"] is loss.total
    loss.total.backward()
    without = [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize("codebook_size", [16, 1000])
def test_a_fresh_prior_guesses_uniformly(codebook_size: int) -> None:
    prior = tiny_prior(codebook_size=codebook_size, sharpness=1)
    grid = torch.randint(codebook_size, (64, 4, 4), generator=seeded(0))
    with torch.no_grad():
        assert float(prior(grid, torch.zeros(64, dtype=torch.int64)).total) == pytest.approx(
            math.log(codebook_size), abs=0.05
        )


@pytest.mark.parametrize("channels", [4, 32])
def test_codes_that_are_near_start_with_near_embeddings_and_near_rows_of_the_head(channels: int) -> None:
    prior, vectors = tiny_prior(), torch.randn(16, channels, generator=seeded(1))
    prior.initialize_from_code_vectors(vectors)
    distances = torch.cdist(vectors, vectors)
    for rows, std in ((prior.code_embedding.weight, 0.3), (prior.head.weight, 0.05)):
        actual = torch.cdist(rows, rows).detach()
        torch.testing.assert_close(actual / actual.max(), distances / distances.max(), rtol=0, atol=1e-5)
        assert float(rows.detach().square().mean().sqrt()) == pytest.approx(
            std * float(vectors.square().mean().sqrt()), rel=1e-4
        )


def test_vectors_of_more_channels_than_the_prior_has_are_projected_to_the_same_size() -> None:
    prior, vectors = tiny_prior(), torch.randn(16, 200, generator=seeded(1))
    prior.initialize_from_code_vectors(vectors)
    assert float(prior.code_embedding.weight.detach().square().mean().sqrt()) == pytest.approx(0.3, rel=0.15)


def test_a_spec_that_differs_is_refused_and_every_difference_listed() -> None:
    tokenizer = tiny_tokenizer()
    matching = tiny_prior(tokenizer_id=tokenizer.config.tokenizer_id)
    matching.check_spec(tokenizer.latent_spec())
    other = tiny_prior(codebook_size=32, height=2, tokenizer_id="elsewhere")
    with pytest.raises(SpecMismatchError) as caught:
        other.check_spec(tokenizer.latent_spec())
    message = str(caught.value)
    assert "codebook_size 32 ≠ 16" in message
    assert "height 2 ≠ 4" in message
    assert f"tokenizer_id elsewhere ≠ {tokenizer.config.tokenizer_id}" in message
    assert "width" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "hidden_size is 30 for 4 heads; expected a multiple of 16"),
        ({"hidden_size": 24, "num_heads": 4}, "expected a multiple of 16, for 2d"),  # heads of 6: no two axes of pairs
        ({"hidden_size": 20, "num_heads": 4, "positions": "1d"}, "expected a multiple of 8, for 1d"),
        ({"positions": "none"}, "no code would have a position"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"random_order": -0.5}, "random_order is -0.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3 for 4 heads; expected a number that divides the heads"),
        ({"hiden_size": 64}, "hiden_size.*did you mean 'hidden_size'"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_one_line(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        AutoregressivePriorConfig(**fields)
    assert "\n" not in str(caught.value)


def test_heads_of_six_channels_are_enough_for_one_axis() -> None:
    assert AutoregressivePriorConfig(hidden_size=24, num_heads=4, positions="1d").model.head_dim == 6


def test_a_saved_prior_comes_back_bit_by_bit(tmp_path: Path) -> None:
    prior = tiny_prior(dropout=0.1, tokenizer_id="abc")
    prior.save_pretrained(tmp_path)
    loaded = AutoregressivePrior.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.to_diff_dict() == prior.config.to_diff_dict()
    assert loaded.state_dict().keys() == prior.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in prior.state_dict().items())
    labels = torch.tensor([0, 1])
    assert torch.equal(loaded.logits(random_codes(2), labels), prior.logits(random_codes(2), labels))


def test_a_saved_prior_with_an_unknown_key_or_weights_of_another_size_is_refused(tmp_path: Path) -> None:
    prior = tiny_prior()
    prior.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"num_layers"', '"num_layer"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"num_layer'.*did you mean 'num_layers'"):
        AutoregressivePrior.from_pretrained(tmp_path)
    config.write_text(text.replace('"num_layers": 2', '"num_layers": 3'), encoding="utf-8")
    with pytest.raises(UserError, match=r"missing keys: blocks\.2"):
        AutoregressivePrior.from_pretrained(tmp_path)
    config.write_text(text.replace('"codebook_size": 16', '"codebook_size": 17'), encoding="utf-8")
    with pytest.raises(UserError, match=r"mismatched|size"):
        AutoregressivePrior.from_pretrained(tmp_path)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_plain_products_equals_torch_s_with_its_gradients(causal: bool) -> None:
    query, key, value = (torch.randn(2, 3, 7, 8, generator=seeded(i)).requires_grad_() for i in range(3))
    ours = plain_attention(query, key, value, causal=causal)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    assert_close(ours, theirs)
    weights = torch.randn(ours.shape, generator=seeded(3))
    gradients = [torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (ours, theirs)]
    for separate, other in zip(*gradients, strict=True):
        assert_close(separate, other)


def test_a_grid_that_the_prior_was_not_trained_on_is_refused_though_it_has_as_many_codes() -> None:
    with pytest.raises(SpecMismatchError, match="is 2×8; expected 4×4, which the prior was trained on"):
        tiny_prior()(random_codes(2).view(2, 2, 8), torch.zeros(2, dtype=torch.long))
