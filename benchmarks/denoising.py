"""A diffusion transformer side by side with diffusers' `DiTTransformer2DModel` of the same size: forward pass and training step.

DiT-S, 12 layers × 384, 6 heads, four latent channels, 1,000 classes, in float32: a forward pass without gradients, and a
forward and backward pass of the mean squared error. The blocks have the same arithmetic. diffusers embeds time and class
again in each block. Ours runs with the matmul precision of its training loop (`training_harness.matmul_precision`), diffusers
with torch's default; "products as ours" is diffusers with our setting. The share is relative to this machine's speed in a
large product.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from frame import OURS, Report, compared, interleaved, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from where_time_goes import by_kind, machine_speed

from stage2_prior.diffusion.config import DiffusionPriorConfig, DiTModel
from stage2_prior.diffusion.dit import DiT
from training_harness.allocator import keep_freed_memory
from training_harness.matmul_precision import reduced_matmul_precision
from training_harness.processes import accelerated_device

Given = tuple[Tensor, Tensor, Tensor]
"""Latents, times in (0, 1] and class ids."""
Predict = Callable[[Any, Given], Tensor]

THEIRS = "diffusers DiT"
CHANNELS, CLASSES = 4, 1000
SHAPES = ((8, 1, 8), (32, 2, 4), (16, 1, 8))  # side of the latents, patch, batch


def our_denoiser(side: int, patch: int) -> DiT:
    model, sizes = DiTModel(patch_size=patch), {"channels": CHANNELS, "height": side, "width": side}
    return DiT(DiffusionPriorConfig(model=model, num_classes=CLASSES, **sizes), model)


def their_denoiser(side: int, patch: int) -> Any:
    sizes = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12}
    return DiTTransformer2DModel(
        **sizes, in_channels=CHANNELS, sample_size=side, patch_size=patch, num_embeds_ada_norm=CLASSES
    )


def forward(model: nn.Module, predict: Predict, given: Given, rounded: bool) -> None:
    with reduced_matmul_precision(given[0].device, enabled=rounded), torch.no_grad():
        predict(model, given)


def training(model: nn.Module, predict: Predict, given: Given, rounded: bool) -> None:
    with reduced_matmul_precision(given[0].device, enabled=rounded):
        F.mse_loss(predict(model, given), given[0]).backward()
        model.zero_grad()


def our_prediction(model: Any, given: Given) -> Tensor:
    return model(*given)


def their_prediction(model: Any, given: Given) -> Tensor:
    latents, times, labels = given
    return model(latents, timestep=(1000 * times).long(), class_labels=labels).sample


def run(quick: bool) -> Report:
    keep_freed_memory()
    torch.manual_seed(0)
    rounds, shapes = (2, SHAPES[:1]) if quick else (7, SHAPES)
    device = accelerated_device()
    with reduced_matmul_precision(device, enabled=True):
        speed = machine_speed(3).product
    rows, figures = [], {}
    for side, patch, batch in shapes:
        numbers = torch.randn(batch, CHANNELS, side, side), torch.linspace(0.1, 0.9, batch), torch.arange(batch)
        latents, times, labels = (x.to(device) for x in numbers)
        given = (latents, times, labels)
        ours, theirs = (make(side, patch).to(device).train() for make in (our_denoiser, their_denoiser))
        with FlopCounterMode(display=False) as counter:
            training(ours, our_prediction, given, True)
        flop = by_kind(counter)["product"]
        for kind, pass_of in (("forward", forward), ("training step", training)):
            takes = {
                OURS: partial(pass_of, ours, our_prediction, given, True),
                THEIRS: partial(pass_of, theirs, their_prediction, given, False),
                f"{THEIRS}, products as ours": partial(pass_of, theirs, their_prediction, given, True),
            }
            found = compared(interleaved(takes, rounds))
            share = flop / (3 if kind == "forward" else 1) / found[OURS]["seconds"] / speed
            shape = f"{side}×{side}, patch {patch}, batch {batch}"
            figures[f"{shape}: {kind}"] = {"share": share, "contenders": found}
            for name, row in found.items():
                low, high = row["quartiles"]
                own = f"{share:.0%}" if name == OURS else ""
                spread = f"{low:.2f} … {high:.2f}"
                rows.append([shape, kind, name, 1e3 * row["seconds"], row["ratio"], spread, own])
    head = ["latents", "", "", "ms", "time, ours = 1", "quartiles", "share"]
    return Report(
        name="denoising",
        title="A diffusion transformer: forward pass and training step",
        text="\n\n".join([(__doc__ or "").partition("\n\n")[2].strip(), table(head, rows)]),
        figures={"product": speed, "shapes": figures},
        peers=("diffusers",),
    )
