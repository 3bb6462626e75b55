"""Blocks that are computed again in the backward pass change memory alone."""

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
    torch.manual_seed(0)  # of dropout
    return model(torch.randint(16, (4, 4, 4), generator=seeded(1)), torch.tensor([0, 1, 2, -1])).total


def diffusion_loss(model: StrictModel) -> Tensor:
    latents, noise = torch.randn(2, 4, 4, 4, 4, generator=seeded(1))
    return model(latents, torch.tensor([0, 1, 2, -1]), torch.tensor([0.2, 0.4, 0.6, 0.9]), noise).total


CASES: dict[str, tuple[Callable[[], StrictModel], Callable[[StrictModel], Tensor]]] = {
    "tokenizer": (lambda: tiny_tokenizer(blocks=(1, 1, 2), attention=(4,)), tokenizer_loss),
    "prior": (lambda: tiny_prior(dropout=0.2, num_layers=4), prior_loss),
    "diffusion transformer": (lambda: tiny_diffusion(num_layers=4), diffusion_loss),
    "U-Net": (
        lambda: tiny_diffusion(denoiser="unet", num_layers=2, channel_multipliers=(1, 2), attention=(2,)),
        diffusion_loss,
    ),
}


def gradients_and_kept(stage: str, recomputed: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and the bytes that the forward pass keeps for the backward pass, weights left out."""
    build, loss_of = CASES[stage]
    model = build().train()
    if recomputed:
        model.enable_gradient_checkpointing()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(model)
    size = sum(kept.values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("stage", CASES)
def test_the_gradients_are_the_same_to_the_last_bit_and_fewer_bytes_are_kept(stage: str) -> None:
    plain, whole = gradients_and_kept(stage, recomputed=False)
    again, less = gradients_and_kept(stage, recomputed=True)
    assert plain.keys() == again.keys()
    assert len(plain) > 10
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name
    assert less < 0.6 * whole
