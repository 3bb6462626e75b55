"""Gradient checkpointing changes memory use only."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import seeded, tiny_diffusion, tiny_prior, tiny_tokenizer
from torch import Tensor

from training_harness.pretrained import StrictModel


def tokenizer_loss(model: StrictModel) -> Tensor:
    pixel_values = torch.rand(4, 1, 16, 16, generator=seeded(0)) * 2 - 1
    output = model(pixel_values)
    return (output.reconstruction - pixel_values).square().mean() + output.losses["commitment"]


def prior_loss(model: StrictModel) -> Tensor:
    torch.manual_seed(0)  # for dropout
    return model(torch.randint(16, (4, 4, 4), generator=seeded(1)), torch.tensor([0, 1, 2, -1])).total


def diffusion_loss(model: StrictModel) -> Tensor:
    latents, noise = torch.randn(2, 4, 4, 4, 4, generator=seeded(1))
    return model(latents, torch.tensor([0, 1, 2, -1]), torch.tensor([0.2, 0.4, 0.6, 0.9]), noise).total


MODELS_AND_LOSSES: dict[str, tuple[Callable[[], StrictModel], Callable[[StrictModel], Tensor]]] = {
    "tokenizer": (lambda: tiny_tokenizer(blocks=(1, 1, 2), attention=(4,)), tokenizer_loss),
    "prior": (lambda: tiny_prior(dropout=0.2, num_layers=4), prior_loss),
    "diffusion transformer": (lambda: tiny_diffusion(num_layers=4), diffusion_loss),
    "U-Net": (
        lambda: tiny_diffusion(denoiser="unet", num_layers=2, channel_multipliers=(1, 2), attention=(2,)),
        diffusion_loss,
    ),
}


def gradients_and_saved_bytes(stage: str, checkpointing: bool) -> tuple[dict[str, Tensor], int]:
    """Return the gradients by name, and the bytes saved for the backward pass without weights."""
    build, loss_of = MODELS_AND_LOSSES[stage]
    model = build().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved_bytes: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        if (pointer := tensor.untyped_storage().data_ptr()) not in weights:
            saved_bytes[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = loss_of(model)
    size = sum(saved_bytes.values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("stage", MODELS_AND_LOSSES)
def test_gradient_checkpointing_gives_equal_gradients_and_saves_fewer_bytes(stage: str) -> None:
    expected, full_size = gradients_and_saved_bytes(stage, checkpointing=False)
    actual, reduced_size = gradients_and_saved_bytes(stage, checkpointing=True)
    assert expected.keys() == actual.keys()
    assert len(expected) > 10
    for name, gradient in expected.items():
        assert torch.equal(gradient, actual[name]), name
    assert reduced_size < 0.6 * full_size
