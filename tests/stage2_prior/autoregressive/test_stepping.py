"""Decode steps with packed weights and CUDA graphs, compared with the modules for all model options."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import seeded, tiny_prior
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from stage2_prior.autoregressive import decoding
from stage2_prior.autoregressive.decoding import decode
from stage2_prior.autoregressive.graph_stepping import GraphStepper
from stage2_prior.autoregressive.packed_linear import pack_gated_linear, pack_linear
from stage2_prior.autoregressive.sampling import SamplingOptions
from stage2_prior.autoregressive.stepping import ModuleStepper, PackedStepper, build_stepper
from training_harness.errors import UserError

SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "without norms of queries and keys": {"qk_norm": False},
    "grouped queries": {"num_heads": 4, "num_key_value_heads": 2, "positions": "1d"},
    "one axis": {"positions": "1d"},
    "learnt positions": {"learned_positions": True},
    "learnt positions alone": {"learned_positions": True, "positions": "none"},
    "tied": {"tie_embeddings": True},
}


def make_prior(**fields: Any) -> Any:
    prior = tiny_prior(**fields)
    with torch.no_grad():  # gains of 1 would hide a missing or misplaced norm
        for norm in (module for module in prior.modules() if isinstance(module, torch.nn.RMSNorm)):
            norm.weight.copy_(1 + 0.3 * torch.randn(norm.weight.shape, generator=seeded(5)))
    return prior


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_packed_steps_equal_the_modules_at_every_position(setting: str, ordered: bool, rows: int) -> None:
    prior = make_prior(**SETTINGS[setting])
    orders = torch.rand(rows, 16, generator=seeded(2)).argsort(1) if ordered else None
    with torch.no_grad():
        packed = PackedStepper(prior, prior.new_caches(rows), orders, rows)
        plain = ModuleStepper(prior, prior.new_caches(rows), orders)
        for i in range(16):
            inputs = torch.randn(rows, 1, 32, generator=seeded(i))
            states = [stepper.step(inputs) for stepper in (packed, plain)]
            assert_close(*states, rtol=0, atol=2e-5)
            assert_close(packed.logits(states[1], 0), plain.logits(states[1], 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_weights_are_refused_where_they_are_not_supported(dtype: torch.dtype) -> None:
    prior = tiny_prior().to(dtype)
    with pytest.raises(
        UserError, match=r"weights is int8 and the prior is on cpu in torch\..*float16; expected a prior on a CPU in"
    ):
        build_stepper(prior, prior.new_caches(1), None, 1, int8=True)


def test_steps_continue_from_a_prefix_that_was_read_in_one_pass() -> None:
    prior = make_prior()
    x = torch.randn(2, 16, 32, generator=seeded(0))
    with torch.no_grad():
        caches = prior.new_caches(2)
        prior.hidden_states(x[:, :7], caches=caches)
        stepper = PackedStepper(prior, caches, None, 2)
        actual = [stepper.step(x[:, i : i + 1]) for i in range(7, 16)]
        assert_close(torch.stack(actual, 1), prior.hidden_states(x)[:, 7:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_graph_steps_equal_the_modules_at_every_position(setting: str, ordered: bool) -> None:
    prior = make_prior(**SETTINGS[setting])
    orders = torch.rand(3, 16, generator=seeded(2)).argsort(1) if ordered else None
    x = torch.randn(3, 16, 32, generator=seeded(0))
    with torch.no_grad():
        caches = prior.new_caches(3)
        for cache in caches:
            cache.data.fill_(torch.nan)  # new memory may have any content
        stepper = GraphStepper(prior, caches, orders)
        prior.hidden_states(x[:, :5], orders, caches)
        actual = [stepper.step(x[:, i : i + 1]) for i in range(5, 16)]
        assert_close(torch.stack(actual, 1), prior.hidden_states(x, orders)[:, 5:], rtol=0, atol=2e-5)


def test_a_graph_step_does_not_wait_for_the_device() -> None:
    # Fake tensors on a GPU, which need not exist. Reading a value from one raises an error.
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        prior = tiny_prior(learned_positions=True)
        caches = prior.new_caches(2)
        stepper = GraphStepper(prior, caches, torch.zeros(2, 16, dtype=torch.int64))
        states = stepper.compute_step()
        assert (states.device.type, states.dtype, states.shape) == ("cuda", torch.float32, (2, 32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_codes_of_a_recorded_graph_equal_the_codes_of_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = tiny_prior().cuda()
    labels, options = torch.tensor([0, 1, 2], device="cuda"), SamplingOptions(guidance_scale=2.0)

    def sample() -> torch.Tensor:
        return decode(prior, labels, options, [seeded(i) for i in range(3)])

    recorded_codes = sample()
    monkeypatch.setattr(
        decoding, "build_stepper", lambda prior, caches, orders, *_: ModuleStepper(prior, caches, orders)
    )
    assert torch.equal(recorded_codes, sample())


def test_only_float32_on_a_cpu_is_packed() -> None:
    prior = tiny_prior()
    assert isinstance(build_stepper(prior, [], None, 1, False), PackedStepper)
    assert isinstance(build_stepper(prior.double(), [], None, 1, False), ModuleStepper)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_a_packed_linear_layer_equals_f_linear(rows: int) -> None:
    weight, x = torch.randn(24, 16, generator=seeded(0)), torch.randn(rows, 16, generator=seeded(1))
    assert_close(pack_linear(weight, rows)(x), F.linear(x, weight))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_a_packed_gated_layer_equals_swiglu(rows: int, int8: bool) -> None:
    gate, up, x = (torch.randn(size, 16, generator=seeded(i)) for i, size in enumerate((24, 24, rows)))
    actual = pack_gated_linear(gate, up, rows, int8)(x)
    rtol, atol = (0.1, 0.2) if int8 else (1e-5, 1e-5)
    assert_close(actual, F.silu(x @ gate.T) * (x @ up.T), rtol=rtol, atol=atol)


def test_weights_for_several_rows_are_reordered_once_where_torch_has_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(24, 16, generator=seeded(0)), torch.randn(3, 16, generator=seeded(1))
    packed, expected = pack_linear(weight, 3), F.linear(x, weight)
    linear_calls: list[object] = []
    monkeypatch.setattr(F, "linear", lambda *arguments: linear_calls.append(arguments) or expected)
    assert_close(packed(x), expected)
    assert bool(linear_calls) == (not torch.backends.mkldnn.is_available())


def test_int8_weights_have_an_error_below_one_percent() -> None:
    weight, x = torch.randn(64, 128, generator=seeded(0)), torch.randn(4, 128, generator=seeded(1))
    exact = F.linear(x, weight)
    error = (pack_linear(weight, 4, int8=True)(x) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-4 < error < 0.01


def test_f_linear_replaces_missing_private_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(24, 16, generator=seeded(0)), torch.randn(3, 16, generator=seeded(1))
    eight = pack_linear(weight, 3, int8=True)(x)

    def raise_missing(*arguments: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", raise_missing, raising=False)
    monkeypatch.setattr(torch, "_weight_int8pack_mm", raise_missing)
    assert torch.equal(pack_linear(weight, 3)(x), F.linear(x, weight))
    assert_close(pack_linear(weight, 3, int8=True)(x), eight, rtol=0.02, atol=0.05)


def test_int8_weights_sample_nearly_the_same_codes() -> None:
    prior, labels = tiny_prior(), torch.arange(12) % 3
    full, eight = (
        decode(prior, labels, SamplingOptions(weights=kind), [seeded(i) for i in range(12)])
        for kind in ("full", "int8")
    )
    assert 0.6 < (full == eight).double().mean() < 1
