"""A diffusion transformer side by side with diffusers' `DiTTransformer2DModel` of the same size: forward pass and training step.

DiT-S, 12 layers × 384, 6 heads, four latent channels, 1,000 classes, in float32: a forward pass without gradients, and forward and
backward pass of the mean squared error. The arithmetic of the blocks is the same; diffusers embeds time and class anew in each
block. Ours runs with the products that its training loop sets (`training_harness.machine`), diffusers' as torch comes; "products as
ours" is diffusers with the same setting. The share is that of the speed this machine reaches in a large product.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from frame import OURS, Report, compared, interleaved, table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from where_time_goes import by_kind, machine_speed

from stage2_prior.diffusion.config import DiffusionPriorConfig
from stage2_prior.diffusion.dit import DiT
from training_harness.allocator import keep_freed_memory
from training_harness.machine import rounded_products
from training_harness.processes import accelerated_device

THEIRS = "diffusers DiT"
CHANNELS, CLASSES = 4, 1000
SHAPES = ((8, 1, 8), (32, 2, 4), (16, 1, 8))  # side of the latents, patch, batch


def our_denoiser(side: int, patch: int) -> DiT:
    sizes = {"channels": CHANNELS, "height": side, "width": side, "num_classes": CLASSES, "patch_size": patch}
    return DiT(DiffusionPriorConfig(**sizes))


def their_denoiser(side: int, patch: int) -> Any:
    sizes = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12}
    return DiTTransformer2DModel(
        **sizes, in_channels=CHANNELS, sample_size=side, patch_size=patch, num_embeds_ada_norm=CLASSES
    )


def forward(predict: Callable[[], torch.Tensor], rounded: bool) -> Callable[[], None]:
    def run_it() -> None:
        with rounded_products(accelerated_device(), enabled=rounded), torch.no_grad():
            predict()

    return run_it


def training(
    model: nn.Module, predict: Callable[[], torch.Tensor], target: torch.Tensor, rounded: bool
) -> Callable[[], None]:
    def run_it() -> None:
        with rounded_products(accelerated_device(), enabled=rounded):
            F.mse_loss(predict(), target).backward()
            model.zero_grad()

    return run_it


def run(quick: bool) -> Report:
    keep_freed_memory()
    torch.manual_seed(0)
    rounds, shapes = (2, SHAPES[:1]) if quick else (7, SHAPES)
    with rounded_products(accelerated_device(), enabled=True):
        speed = machine_speed(3).product
    rows, figures = [], {}
    for side, patch, batch in shapes:
        latents, labels = torch.randn(batch, CHANNELS, side, side), torch.arange(batch)
        times = torch.linspace(0.1, 0.9, batch)
        steps = (1000 * times).long()
        ours, theirs = our_denoiser(side, patch).train(), their_denoiser(side, patch).train()

        def predicted(ours: DiT = ours, given: Any = (latents, times, labels)) -> torch.Tensor:
            return ours(*given)

        def theirs_predicted(theirs: Any = theirs, given: Any = (latents, steps, labels)) -> torch.Tensor:
            return theirs(given[0], timestep=given[1], class_labels=given[2]).sample

        with FlopCounterMode(display=False) as counter:
            F.mse_loss(predicted(), latents).backward()
        flop = by_kind(counter)["product"]
        for kind in ("forward", "training step"):
            takes: dict[str, Callable[[], None]] = {}
            for name, model, predict, rounded in (
                (OURS, ours, predicted, True),
                (THEIRS, theirs, theirs_predicted, False),
                (f"{THEIRS}, products as ours", theirs, theirs_predicted, True),
            ):
                takes[name] = (
                    forward(predict, rounded) if kind == "forward" else training(model, predict, latents, rounded)
                )
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
