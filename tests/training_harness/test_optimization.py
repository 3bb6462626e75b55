"""Learning rates equal values computed by hand, and the optimizers equal those of PyTorch."""

import math

import pytest
import torch
from small_parts import error_message, small_config
from tiny_models import seeded
from torch import nn

from stage1_tokenizer.vqgan import VQGAN
from training_harness.ema import EMA, EMAConfig
from training_harness.errors import ConfigError
from training_harness.muon import Muon, orthogonalize
from training_harness.optimization import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    resolve_steps,
    set_learning_rate,
)

# The schedule


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        # of 100 steps: half-way up, at the peak, half-way down, at the end
        (ScheduleConfig(warmup=20, decay="constant"), {10: 0.5, 20: 1, 60: 1, 100: 1}),
        (ScheduleConfig(warmup=0.2, decay="linear"), {1: 0.05, 10: 0.5, 20: 1, 60: 0.5, 100: 0}),
        (ScheduleConfig(warmup=0.2, decay="linear", final=0.1), {10: 0.5, 60: 0.55, 100: 0.1}),
        (ScheduleConfig(warmup=20, decay="cosine"), {20: 1, 40: (1 + math.sqrt(0.5)) / 2, 60: 0.5, 100: 0}),
        (ScheduleConfig(warmup=0, decay="linear"), {1: 0.99, 50: 0.5}),
        (ScheduleConfig(warmup=1.0, decay="cosine"), {50: 0.5, 100: 1}),
    ],
    ids=str,
)
def test_the_learning_rate_equals_values_computed_by_hand(schedule, values):
    assert {step: schedule.at(step, 100) for step in values} == pytest.approx(values)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_to_the_peak_and_then_never_increases(decay):
    rates = [ScheduleConfig(warmup=7, decay=decay).at(step, 50) for step in range(1, 51)]
    assert rates[:7] == sorted(rates[:7])
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert max(rates) == 1
    assert min(rates) >= 0


def test_an_int_is_a_number_of_steps_and_a_float_a_fraction_of_the_run():
    assert (resolve_steps(3, 200), resolve_steps(0.25, 200), resolve_steps(1, 200), resolve_steps(1.0, 200)) == (
        3,
        50,
        1,
        200,
    )


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (ScheduleConfig, {"warmup": 1.5}),
        (ScheduleConfig, {"warmup": -3}),
        (OptimizerConfig, {"learning_rate": 0.0}),
        (OptimizerConfig, {"matrix_learning_rate": -1.0}),
        (OptimizerConfig, {"betas": (0.9, 1.0)}),
        (OptimizerConfig, {"max_grad_norm": -1.0}),
        (OptimizerConfig, {"weight_decay": -0.1}),
        (EMAConfig, {"decay": 1.0}),
    ],
)
def test_an_invalid_value_is_one_line_with_the_field_and_the_value(cls, fields):
    with pytest.raises(ConfigError) as caught:
        cls(**fields)
    ((name, value),) = fields.items()
    assert name in error_message(caught)
    assert str(value) in str(caught.value)


# Parameter groups


class Small(nn.Module):
    end_layers = ("first",)

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.hidden = nn.Embedding(5, 4), nn.Linear(4, 6), nn.Conv2d(6, 6, 3)
        self.norm, self.frozen = nn.LayerNorm(6), nn.Linear(2, 2).requires_grad_(False)


def groups_of(model: nn.Module, config: OptimizerConfig) -> dict[str, dict]:
    """Return the optimizer group of each parameter by name."""
    optimizer = build_optimizer(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_have_weight_decay(name):
    groups = groups_of(Small(), OptimizerConfig(name=name, weight_decay=0.1))
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.1}
    assert decayed == {"first.weight", "hidden.weight"}
    undecayed = {"table.weight", "first.bias", "hidden.bias", "norm.weight", "norm.bias"}
    assert set(groups) - decayed == undecayed  # frozen parameters are in no group


def test_muon_updates_only_hidden_matrices():
    groups = groups_of(Small(), OptimizerConfig(name="muon", learning_rate=0.1, matrix_learning_rate=0.2))
    assert {name for name, group in groups.items() if group["orthogonalize"]} == {"hidden.weight"}
    assert {name: group["peak_lr"] for name, group in groups.items()} == {
        name: 0.2 if name == "hidden.weight" else 0.1 for name in groups
    }


def test_a_learned_codebook_is_an_embedding_and_not_a_matrix():
    groups = groups_of(VQGAN(small_config(quantizer={"name": "vq"})), OptimizerConfig(name="muon", weight_decay=0.1))
    assert not groups["quantizer.codebook"]["orthogonalize"]
    assert groups["quantizer.codebook"]["weight_decay"] == 0


def test_the_learning_rate_is_a_fraction_of_the_peak_of_each_group():
    optimizer = build_optimizer(Small(), OptimizerConfig(name="muon", learning_rate=0.1, matrix_learning_rate=0.2))
    for fraction in (0.5, 1.0, 0.25):
        set_learning_rate(optimizer, fraction)
        assert all(group["lr"] == group["peak_lr"] * fraction for group in optimizer.param_groups)


# Comparison with the optimizers of PyTorch


def random_gradients(shape: tuple[int, ...], steps: int) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=seeded(step)) for step in range(steps)]


def take_steps(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: list[torch.Tensor]) -> torch.Tensor:
    """Take one step for each gradient; return the parameter."""
    for gradient in grads:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(24, 8), (8, 40), (64, 64)])
def test_orthogonalized_matrices_keep_their_singular_vectors_and_have_singular_values_near_one(shape, dtype, error):
    matrix = torch.randn(2, *shape, generator=seeded(0))
    result = orthogonalize(matrix, dtype)
    assert result.dtype == torch.float32
    values = torch.linalg.svdvals(result)
    assert 0.6 < values.median() < values.max() < 1.25
    if (
        shape[0] != shape[1]
    ):  # small singular values of a square matrix start near 0, and five steps are too few for them
        assert values.min() > 0.6
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    diagonal = left.mT @ result @ right.mT
    assert (diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))).abs().max() < 3 * error + 1e-3
    assert torch.allclose(orthogonalize(matrix[1:], dtype), result[1:], atol=error)  # alone or in a batch
    assert torch.linalg.svdvals(matrix).max() > 2


@pytest.mark.parametrize("shape", [(32, 16), (16, 48), (24, 24)])
def test_muon_updates_a_matrix_like_the_muon_of_pytorch(shape):
    # PyTorch iterates in bfloat16 and averages the momentum, which only changes the scale before orthogonalization.
    start = torch.randn(shape, generator=seeded(99))
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    grads = random_gradients(shape, 5)
    update = take_steps(Muon([{"params": [ours], **settings}]), ours, grads) - start
    expected_update = take_steps(torch.optim.Muon([theirs], nesterov=True, **settings), theirs, grads) - start
    assert torch.cosine_similarity(update.flatten(), expected_update.flatten(), dim=0) > 0.995
    assert update.norm() / expected_update.norm() == pytest.approx(1, abs=0.03)


def test_muon_treats_a_kernel_as_a_matrix_of_its_output_channels():
    start = torch.randn(6, 4, 3, 3, generator=seeded(1))
    kernel, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    grads = random_gradients((6, 4, 3, 3), 3)
    kernel_result = take_steps(Muon([{"params": [kernel]}]), kernel, grads)
    matrix_result = take_steps(Muon([{"params": [matrix]}]), matrix, [g.flatten(1) for g in grads])
    assert torch.allclose(kernel_result.flatten(1), matrix_result, atol=1e-6)


def test_muon_gives_equal_results_for_channels_last_kernels():
    start = torch.randn(6, 4, 3, 3, generator=seeded(1))
    grads = random_gradients((6, 4, 3, 3), 3)
    contiguous, channels_last = (
        nn.Parameter(start.clone()),
        nn.Parameter(start.contiguous(memory_format=torch.channels_last)),
    )
    expected = take_steps(Muon([{"params": [contiguous]}]), contiguous, grads)
    actual = take_steps(
        Muon([{"params": [channels_last]}]),
        channels_last,
        [g.contiguous(memory_format=torch.channels_last) for g in grads],
    )
    assert torch.allclose(actual, expected, atol=1e-6)


def test_the_adamw_groups_equal_the_adamw_of_pytorch():
    start = torch.randn(7, 5, generator=seeded(2))
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    grads = random_gradients((7, 5), 10)
    actual = take_steps(Muon([{"params": [ours], "orthogonalize": False, **settings}]), ours, grads)
    assert torch.allclose(actual, take_steps(torch.optim.AdamW([theirs], **settings), theirs, grads), atol=1e-6)
    assert not torch.allclose(actual, start, atol=0.05)


def test_muon_resumes_exactly_from_its_saved_state(tmp_path):
    grads = random_gradients((6, 6), 6)

    def create_optimizer(value: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter, Muon]:
        matrix, bias = nn.Parameter(value.clone()), nn.Parameter(value[0].clone())
        return matrix, bias, Muon([{"params": [matrix]}, {"params": [bias], "orthogonalize": False}])

    def advance(matrix: nn.Parameter, bias: nn.Parameter, optimizer: Muon, gradients: list[torch.Tensor]) -> None:
        for gradient in gradients:
            matrix.grad, bias.grad = gradient.clone(), gradient[0].clone()
            optimizer.step()

    uninterrupted = create_optimizer(torch.ones(6, 6))
    advance(*uninterrupted, grads)
    stopped = create_optimizer(torch.ones(6, 6))
    advance(*stopped, grads[:3])
    torch.save(stopped[2].state_dict(), tmp_path / "state.pt")
    resumed = create_optimizer(torch.zeros(6, 6))
    with torch.no_grad():
        resumed[0].copy_(stopped[0])
        resumed[1].copy_(stopped[1])
    resumed[2].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    advance(*resumed, grads[3:])
    assert torch.equal(resumed[0], uninterrupted[0])
    assert torch.equal(resumed[1], uninterrupted[1])


# Exponential moving average


class ModelWithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("codebook", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))


def test_the_ema_warms_up_and_covers_parameters_float_buffers_and_integer_buffers():
    model = ModelWithBuffers()
    ema = EMA(model, EMAConfig(decay=0.3))
    expected = 0.0
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.fill_(step)
            model.codebook.fill_(2 * step)
            model.count.fill_(step)
        ema.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert torch.allclose(ema.model.weight, torch.full((3,), expected))
        assert torch.allclose(ema.model.codebook, torch.full((2,), 2 * expected))
        assert int(ema.model.count) == step
    assert (1 + 1) / (10 + 1) < 0.3 < (1 + 5) / (10 + 5)  # both branches were tested


def test_the_ema_model_is_a_copy_without_gradients_in_evaluation_mode():
    model = ModelWithBuffers().train()
    ema = EMA(model, EMAConfig(decay=0.9))
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    with torch.no_grad():
        model.weight.fill_(5)
    assert not ema.model.weight.any()
    assert model.weight.requires_grad


def test_a_decay_of_zero_copies_the_weights():
    model = ModelWithBuffers()
    ema = EMA(model, EMAConfig(decay=0.0))
    with torch.no_grad():
        model.weight.fill_(5)
    ema.update(1)
    assert torch.equal(ema.model.weight, model.weight)
