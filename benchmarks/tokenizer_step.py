"""A stage-one training step against one of diffusers' VQModel, without a discriminator.

Batches of 32 grey images of 32×32, f = 4, K = 512 codes of 16 channels, channels 32, 64, 64, no attention. The architectures
differ: VQModel has one more block for each level of its decoder and two more around the code grid, downsamples with 3×3
convolutions instead of 4×4, and changes its width inside blocks. Ours has the numbers of blocks that come closest to its
arithmetic, in total and by resolution. Both minimize the mean squared error and ‖z − sg[e]‖² + ¼ ‖sg[z] − e‖² with fused
AdamW. No code is restarted.

The training loop is `train_tokenizer`: channels-last, reduced matmul precision where the machine gains from it, and besides
the step itself data loading, moving average, checks for non-finite numbers, and the log. The plain loop is the usual first
version: forward pass, loss, backward pass, clipping, optimizer step. It trains both networks, with and without these two
settings. The process keeps freed memory for all of them, as the training loop asks for; on its own, VQModel would run without
that. A round runs each for the same number of steps. The first steps do not count. A ratio is VQModel's time over ours.
"""

import dataclasses
import gc
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from frame import OURS, Report, compared, synchronize, table
from loop_cost import ours
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latentloom.data.embedded import FASHION_MNIST
from latentloom.jobs.stages import load_source
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.losses.reconstruction import ReconstructionConfig
from stage1_tokenizer.train import train_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining
from stage1_tokenizer.vqgan import VQGAN, VQGANConfig
from training_harness.allocator import keep_freed_memory
from training_harness.batch_order import BatchOrder
from training_harness.matmul_precision import reduced_matmul_precision
from training_harness.optimization import OptimizerConfig
from training_harness.processes import accelerated_device

PEER = "diffusers VQModel"
SIZE, BATCH, WARM_UP = 32, 32, 3
CHANNELS, BLOCKS, LATENTS, CODES = (32, 64, 64), (2, 1, 5), 16, 512
COMMITMENT, CODEBOOK = 1.0, 0.25  # as VQModel weighs them
QUANTIZER = {"name": "vq", "restart_threshold": 0.0}
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0)
CONFIG = VQGANConfig(
    image_channels=1,
    image_size=(SIZE, SIZE),
    content_size=(28, 28),
    channels=CHANNELS,
    blocks=BLOCKS,
    latent_channels=LATENTS,
    codebook_size=CODES,
    quantizer=QUANTIZER,
)


class Setting(NamedTuple):
    channels_last: bool
    rounded: bool

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        return f"{'channels last' if self.channels_last else 'contiguous'}, {'rounded' if self.rounded else 'float32'}"


PLAIN, FULL = Setting(False, False), Setting(True, True)
SETTINGS = (PLAIN, Setting(True, False), Setting(False, True), FULL)


class Network(NamedTuple):
    """A new model, and what it is to minimise for pixel values (B, C, H, W)."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]


def our_network() -> Network:
    model = VQGAN(CONFIG).train()

    def loss(pixel_values: Tensor) -> Tensor:
        output = model(pixel_values)
        of_codes = COMMITMENT * output.losses["commitment"] + CODEBOOK * output.losses["codebook"]
        return F.mse_loss(output.reconstruction, pixel_values) + of_codes

    return Network(model, loss)


def their_network() -> Network:
    from diffusers import VQModel

    levels = len(CHANNELS)
    model: Any = VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENTS,
        num_vq_embeddings=CODES,
        norm_num_groups=8,
        mid_block_add_attention=False,
    ).train()

    def loss(pixel_values: Tensor) -> Tensor:
        output = model(pixel_values)
        return F.mse_loss(output.sample, pixel_values) + output.commit_loss

    return Network(model, loss)


NETWORKS: dict[str, Callable[[], Network]] = {OURS: our_network, PEER: their_network}


def as_written() -> Any:
    """Within it our upsamplings are convolutions of enlarged maps, as VQModel's are and as they are where products are rounded."""
    return patch("stage1_tokenizer.networks.blocks.uses_bf16_convolution", return_value=True)


def flop_a_step(network: Network) -> int:
    """Forward and backward, of products and convolutions."""
    with FlopCounterMode(display=False) as counter, as_written():
        network.loss(torch.zeros(BATCH, 1, SIZE, SIZE)).backward()
    return counter.get_total_flops()


def convolution_flop(network: Network) -> Counter[int]:
    """Forward, by the side of the map that a convolution gives."""
    found: Counter[int] = Counter()

    def note(layer: nn.Module, _: Any, output: Tensor) -> None:
        found[output.shape[-1]] += 2 * layer.weight.numel() * output[:, 0].numel()

    hooks = [each.register_forward_hook(note) for each in network.model.modules() if isinstance(each, nn.Conv2d)]
    with torch.no_grad(), as_written():
        network.loss(torch.zeros(BATCH, 1, SIZE, SIZE))
    for hook in hooks:
        hook.remove()
    return found


def plain_loop(network: Network, setting: Setting, pixel_values: Tensor) -> Callable[[int], list[float]]:
    """Trains for so many steps, going on where the last call ended; returns when each of them did."""
    device, (model, loss_of) = accelerated_device(), network
    model.to(device, memory_format=setting.layout)
    rates = {"lr": OPTIMIZER.learning_rate, "betas": OPTIMIZER.betas, "weight_decay": OPTIMIZER.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), **rates, fused=True)
    order, numbers = BatchOrder(len(pixel_values), BATCH, 0), count()

    def train(steps: int) -> list[float]:
        ends = []
        with reduced_matmul_precision(device, setting.rounded):
            for _ in range(steps):
                batch = pixel_values[order.batch_indices(next(numbers))].to(device)
                loss_of(batch.contiguous(memory_format=setting.layout)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                synchronize()
                ends.append(time.perf_counter())
        return ends

    return train


def training_loop(folder: Path, train: ImageLoader, validation: ImageLoader) -> Callable[[int], list[float]]:
    """Ours, anew at each call."""
    config = TokenizerTraining(
        data=FASHION_MNIST,
        output=folder,
        batch_size=BATCH,
        sample_every=10**9,
        checkpoint_every=10**9,
        model=CONFIG.model,
        reconstruction=ReconstructionConfig(l1=0.0, l2=1.0, commitment=COMMITMENT, codebook=CODEBOOK),
        optimizer=OPTIMIZER,
    )
    numbers = count()

    def run(steps: int) -> list[float]:
        changed = dataclasses.replace(config, output=folder / str(next(numbers)), max_steps=steps)
        return ours(lambda: train_tokenizer(changed, CONFIG, train, validation))[0]

    return run


def in_turn(loops: dict[str, Callable[[int], list[float]]], steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each in each round."""
    names, seconds = list(loops), {name: list[float]() for name in loops}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            ends = loops[name](WARM_UP + steps)
            seconds[name].append((ends[-1] - ends[WARM_UP - 1]) / steps)
    return seconds


def plain(network: str, setting: Setting) -> str:
    return f"{network}, plain loop, {setting}"


def ratio(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{found['ratio']:.2f} ({low:.2f} … {high:.2f})"


def arithmetic() -> tuple[str, dict[str, Any]]:
    """Table and figures of what the two networks compute."""
    rows, figures = [], {}
    for who, build in NETWORKS.items():
        network = build()
        flop, by_side = flop_a_step(network), convolution_flop(network)
        parameters = sum(p.numel() for p in network.model.parameters())
        rows.append([who, flop / 1e9, *(by_side[side] / 1e9 for side in sorted(by_side, reverse=True)), parameters])
        figures[who] = {"flop_a_step": flop, "forward_convolutions": dict(by_side), "parameters": parameters}
    sides = [f"at {side}×{side}" for side in sorted(by_side, reverse=True)]
    return table(["", "GFLOP a step", f"of them forward {sides[0]}", *sides[1:], "parameters"], rows), figures


def run(quick: bool) -> Report:
    steps, rounds = (2, 1) if quick else (12, 9)
    keep_freed_memory()
    source, processor = load_source(FASHION_MNIST), CONFIG.image_processor
    train, validation = ImageLoader(source.train, processor), ImageLoader(source.validation, processor)
    pixel_values = processor.preprocess(train[range(len(train))])
    with TemporaryDirectory() as temporary:
        loops = {OURS: training_loop(Path(temporary), train, validation)}
        for setting in SETTINGS:
            for who, build in NETWORKS.items():
                loops[plain(who, setting)] = plain_loop(build(), setting, pixel_values)
        seconds = in_turn(loops, steps, rounds)

    found = compared(seconds)
    alike = {each: compared(seconds, ours=plain(OURS, each))[plain(PEER, each)] for each in SETTINGS}
    rows = []
    for setting in SETTINGS:
        theirs = found[plain(PEER, setting)]
        milliseconds = [1e3 * found[plain(who, setting)]["seconds"] for who in (PEER, OURS)]
        rows.append([str(setting), *milliseconds, ratio(alike[setting]), ratio(theirs)])
    compute, computed = arithmetic()
    share = computed[OURS]["flop_a_step"] / computed[PEER]["flop_a_step"]
    own = 1e3 * found[OURS]["seconds"]
    first, same = (ratio(found[plain(PEER, setting)]) for setting in (PLAIN, FULL))
    text = "\n\n".join(
        [
            (__doc__ or "").partition("\n\n")[2].strip(),
            compute,
            f"Our step has {share:.1%} of the arithmetic of VQModel's step when it upsamples in the same way. Without rounded "
            "products it needs less, since upsampling and its convolution are one transposed convolution. Our training loop takes "
            f"{own:.0f} ms a step; VQModel in a plain loop takes {first} times as long, and {same} times with the same two "
            "settings.",
            table(["plain loop", "VQModel, ms", "ours, ms", "ratio (quartiles)", "ratio to our training loop"], rows),
        ]
    )
    same_settings = {str(setting): each for setting, each in alike.items()}
    figures = {"arithmetic": computed, "timing": found, "same_settings": same_settings}
    return Report("tokenizer_step", "A stage-one training step", text, figures, ["diffusers"])
