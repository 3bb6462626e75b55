"""The autoregressive prior as a model: dependencies, equality with Llama, saving, and errors."""

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
    """Rename our blocks, last norm and code embedding to the names in transformers."""
    renamed = {"embed_tokens.weight": state["code_embedding.weight"], "norm.weight": state["norm.weight"]}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, number, part = name.split(".", 2)
            renamed[f"layers.{number}.{LLAMA_NAMES[part.removesuffix('.weight')]}.weight"] = tensor
    return renamed


def test_a_prior_without_rotary_positions_knows_positions_only_from_learned_ones() -> None:
    # With more layers, the causal mask also gives positions.
    prior = tiny_prior(positions="none", learned_positions=True, num_layers=1)
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


def test_the_last_code_is_no_input_and_every_logit_depends_on_the_class() -> None:
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
    with torch.no_grad():  # gains of 1 would hide a missing or misplaced norm
        for norm in (module for module in ours.modules() if isinstance(module, torch.nn.RMSNorm)):
            norm.weight.copy_(1 + 0.3 * torch.randn(norm.weight.shape, generator=seeded(5)))
    theirs.load_state_dict(rename_to_llama(ours.state_dict()), strict=True)
    x = torch.randn(2, 17, 32, generator=seeded(0))
    with torch.no_grad():
        expected = theirs(inputs_embeds=x).last_hidden_state
        assert_close(ours.hidden_states(x), expected, rtol=0, atol=1e-5)
        two_dimensional = tiny_prior(positions="2d", qk_norm=False, rope_theta=500.0)
        two_dimensional.load_state_dict(ours.state_dict())
        assert (two_dimensional.hidden_states(x) - expected).abs().max() > 1e-2  # positions matter here


@pytest.mark.parametrize("use_plain", [True, False])
def test_grouped_queries_equal_a_prior_with_a_copy_of_the_keys_for_each_head(
    use_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "prefers_plain_attention", lambda *_: use_plain)
    shared = tiny_prior(num_heads=4, num_key_value_heads=2)
    separate = tiny_prior(num_heads=4)
    weights = shared.state_dict()
    for name in [name for name in weights if name.endswith((".key.weight", ".value.weight"))]:
        # heads 0 and 1 share the first key head
        weights[name] = weights[name].view(2, 8, -1).repeat_interleave(2, 0).flatten(0, 1)
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
def test_hidden_states_do_not_depend_on_caches_or_on_how_the_sequence_is_split(chunks: tuple[int, ...]) -> None:
    prior = tiny_prior()
    x = torch.randn(2, 16, 32, generator=seeded(1))
    caches = prior.new_caches(2)
    with torch.no_grad():
        parts = [prior.hidden_states(part, caches=caches) for part in x.split(chunks, dim=1)]
        assert_close(torch.cat(parts, dim=1), prior.hidden_states(x), rtol=0, atol=1e-5)


def test_a_full_cache_refuses_another_token_and_names_the_size_it_needs() -> None:
    cache = KVCache(batch=2, heads=1, max_tokens=3, head_dim=4, like=torch.zeros(1))
    keys = torch.randn(2, 1, 3, 4, generator=seeded(0))
    stored_keys, *_ = cache.append(keys, keys)
    assert torch.equal(stored_keys, keys)
    with pytest.raises(ValueError, match="received token 3 but has 3 slots; build it with max_tokens=4"):
        cache.append(keys[:, :, :1], keys[:, :, :1])
    assert cache.tokens == 3


def test_the_loss_is_the_mean_cross_entropy_and_every_weight_has_a_gradient() -> None:
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
def test_an_untrained_prior_predicts_nearly_uniform_probabilities(codebook_size: int) -> None:
    prior = tiny_prior(codebook_size=codebook_size, sharpness=1)
    grid = torch.randint(codebook_size, (64, 4, 4), generator=seeded(0))
    with torch.no_grad():
        assert float(prior(grid, torch.zeros(64, dtype=torch.int64)).total) == pytest.approx(
            math.log(codebook_size), abs=0.05
        )


@pytest.mark.parametrize("channels", [4, 32])
def test_similar_codes_start_with_similar_embeddings_and_similar_rows_of_the_head(channels: int) -> None:
    prior, vectors = tiny_prior(), torch.randn(16, channels, generator=seeded(1))
    prior.initialize_from_code_vectors(vectors)
    distances = torch.cdist(vectors, vectors)
    for rows, std in ((prior.code_embedding.weight, 0.3), (prior.head.weight, 0.05)):
        actual = torch.cdist(rows, rows).detach()
        torch.testing.assert_close(actual / actual.max(), distances / distances.max(), rtol=0, atol=1e-5)
        assert float(rows.detach().square().mean().sqrt()) == pytest.approx(
            std * float(vectors.square().mean().sqrt()), rel=1e-4
        )


def test_code_vectors_with_more_channels_than_the_prior_are_projected_to_the_same_scale() -> None:
    prior, vectors = tiny_prior(), torch.randn(16, 200, generator=seeded(1))
    prior.initialize_from_code_vectors(vectors)
    assert float(prior.code_embedding.weight.detach().square().mean().sqrt()) == pytest.approx(0.3, rel=0.15)


def test_a_different_spec_is_refused_with_a_list_of_all_differences() -> None:
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
        ({"hidden_size": 24, "num_heads": 4}, "expected a multiple of 16, for 2d"),  # 6 channels: no pairs for two axes
        ({"hidden_size": 20, "num_heads": 4, "positions": "1d"}, "expected a multiple of 8, for 1d"),
        ({"positions": "none"}, "no code would have a position"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"random_order": -0.5}, "random_order is -0.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3 for 4 heads; expected a number that divides the heads"),
        ({"hiden_size": 64}, "hiden_size.*did you mean 'hidden_size'"),
    ],
)
def test_an_invalid_configuration_raises_an_error_of_one_line(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        AutoregressivePriorConfig(**fields)
    assert "\n" not in str(caught.value)


def test_heads_of_six_channels_are_enough_for_one_axis() -> None:
    assert AutoregressivePriorConfig(hidden_size=24, num_heads=4, positions="1d").model.head_dim == 6


def test_a_saved_prior_loads_with_the_same_bits(tmp_path: Path) -> None:
    prior = tiny_prior(dropout=0.1, tokenizer_id="abc")
    prior.save_pretrained(tmp_path)
    loaded = AutoregressivePrior.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.to_diff_dict() == prior.config.to_diff_dict()
    assert loaded.state_dict().keys() == prior.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in prior.state_dict().items())
    labels = torch.tensor([0, 1])
    assert torch.equal(loaded.logits(random_codes(2), labels), prior.logits(random_codes(2), labels))


def test_a_saved_prior_with_an_unknown_key_or_weights_of_another_shape_is_refused(tmp_path: Path) -> None:
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
def test_plain_attention_equals_torch_s_attention_in_value_and_gradient(causal: bool) -> None:
    query, key, value = (torch.randn(2, 3, 7, 8, generator=seeded(i)).requires_grad_() for i in range(3))
    ours = plain_attention(query, key, value, causal=causal)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    assert_close(ours, theirs)
    weights = torch.randn(ours.shape, generator=seeded(3))
    gradients = [torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (ours, theirs)]
    for our_grad, their_grad in zip(*gradients, strict=True):
        assert_close(our_grad, their_grad)


def test_a_grid_of_another_shape_is_refused_even_with_the_same_number_of_codes() -> None:
    with pytest.raises(SpecMismatchError, match="is 2×8; expected 4×4, which the prior was trained on"):
        tiny_prior()(random_codes(2).view(2, 2, 8), torch.zeros(2, dtype=torch.long))
