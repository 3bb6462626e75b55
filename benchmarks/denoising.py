"""A diffusion transformer compared with diffusers' `DiTTransformer2DModel` of the same size: forward pass and training step.

DiT-S, 12 layers × 384, 6 heads, four latent channels, 1,000 classes, in float32: a forward pass without gradients, and a
forward and backward pass of the mean squared error. The blocks have the same arithmetic. diffusers embeds time and class
again in each block. Ours runs with the matmul precision of its training loop (`training_harness.matmul_precision`), diffusers
with PyTorch's default. "our matmul precision" is diffusers with our setting. The share is relative to this machine's speed in a
large matrix product.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from frame import OURS, Report, compare_times, markdown_table, time_interleaved
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from where_time_goes import flop_by_kind, measure_machine_speed

from stage2_prior.diffusion.config import DiffusionPriorConfig, DiTModel
from stage2_prior.diffusion.dit import DiT
from training_harness.allocator import keep_freed_memory
from training_harness.matmul_precision import reduced_matmul_precision
from training_harness.processes import accelerated_device

Inputs = tuple[Tensor, Tensor, Tensor]
"""Latents (B, 4, h, w), times in (0, 1] (B,) and class ids (B,)."""
Predict = Callable[[Any, Inputs], Tensor]

THEIRS = "diffusers DiT"
CHANNELS, CLASSES = 4, 1000
SHAPES = ((8, 1, 8), (32, 2, 4), (16, 1, 8))  # side of the latents, patch size, batch size


def build_our_denoiser(side: int, patch: int) -> DiT:
    model, sizes = DiTModel(patch_size=patch), {"channels": CHANNELS, "height": side, "width": side}
    return DiT(DiffusionPriorConfig(model=model, num_classes=CLASSES, **sizes), model)


def build_their_denoiser(side: int, patch: int) -> Any:
    sizes = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12}
    return DiTTransformer2DModel(
        **sizes, in_channels=CHANNELS, sample_size=side, patch_size=patch, num_embeds_ada_norm=CLASSES
    )


def run_forward(model: nn.Module, predict: Predict, inputs: Inputs, reduced_precision: bool) -> None:
    with reduced_matmul_precision(inputs[0].device, enabled=reduced_precision), torch.no_grad():
        predict(model, inputs)


def run_training_step(model: nn.Module, predict: Predict, inputs: Inputs, reduced_precision: bool) -> None:
    with reduced_matmul_precision(inputs[0].device, enabled=reduced_precision):
        F.mse_loss(predict(model, inputs), inputs[0]).backward()
        model.zero_grad()


def predict_with_ours(model: Any, inputs: Inputs) -> Tensor:
    return model(*inputs)


def predict_with_theirs(model: Any, inputs: Inputs) -> Tensor:
    latents, times, labels = inputs
    return model(latents, timestep=(1000 * times).long(), class_labels=labels).sample


def run(quick: bool) -> Report:
    keep_freed_memory()
    torch.manual_seed(0)
    rounds, shapes = (2, SHAPES[:1]) if quick else (7, SHAPES)
    device = accelerated_device()
    with reduced_matmul_precision(device, enabled=True):
        speed = measure_machine_speed(3).matmul
    rows, results = [], {}
    for side, patch, batch in shapes:
        tensors = torch.randn(batch, CHANNELS, side, side), torch.linspace(0.1, 0.9, batch), torch.arange(batch)
        latents, times, labels = (x.to(device) for x in tensors)
        inputs = (latents, times, labels)
        ours, theirs = (make(side, patch).to(device).train() for make in (build_our_denoiser, build_their_denoiser))
        with FlopCounterMode(display=False) as counter:
            run_training_step(ours, predict_with_ours, inputs, True)
        flop = flop_by_kind(counter)["matmul"]
        for kind, run_pass in (("forward", run_forward), ("training step", run_training_step)):
            contenders = {
                OURS: partial(run_pass, ours, predict_with_ours, inputs, True),
                THEIRS: partial(run_pass, theirs, predict_with_theirs, inputs, False),
                f"{THEIRS}, our matmul precision": partial(run_pass, theirs, predict_with_theirs, inputs, True),
            }
            comparison = compare_times(time_interleaved(contenders, rounds))
            share = flop / (3 if kind == "forward" else 1) / comparison[OURS]["seconds"] / speed
            shape = f"{side}×{side}, patch {patch}, batch {batch}"
            results[f"{shape}: {kind}"] = {"share": share, "contenders": comparison}
            for name, row in comparison.items():
                low, high = row["quartiles"]
                share_cell = f"{share:.0%}" if name == OURS else ""
                spread = f"{low:.2f} … {high:.2f}"
                rows.append([shape, kind, name, 1e3 * row["seconds"], row["ratio"], spread, share_cell])
    head = ["latents", "", "", "ms", "time, ours = 1", "quartiles", "share"]
    return Report(
        name="denoising",
        title="A diffusion transformer: forward pass and training step",
        text="\n\n".join([(__doc__ or "").partition("\n\n")[2].strip(), markdown_table(head, rows)]),
        results={"matmul": speed, "shapes": results},
        peers=("diffusers",),
    )
