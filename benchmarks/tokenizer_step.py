"""A stage-one training step compared with one of diffusers' VQModel, without a discriminator.

Batches of 32 grey images of 32×32, f = 4, K = 512 codes of 16 channels, channels 32, 64, 64, no attention. The architectures
differ: VQModel has one more block for each level of its decoder and two more around the code grid. It downsamples with 3×3
convolutions instead of 4×4, and changes its width inside blocks. Ours has the numbers of blocks that come closest to its
arithmetic, in total and by resolution. Both minimize the mean squared error and ‖z − sg[e]‖² + ¼ ‖sg[z] − e‖² with fused
AdamW. No code is restarted.

The training loop is `train_tokenizer`. It uses channels-last and, where the machine gains from it, reduced matmul precision.
Besides the step itself it includes data loading, moving average, checks for non-finite numbers, and the log. The plain loop is
the usual first version: forward pass, loss, backward pass, clipping, optimizer step. It trains both networks, with and without
these two settings. The process keeps freed memory for all of them, because the training loop requests it; alone, VQModel would
run without that. A round runs each loop for the same number of steps. The first steps are not timed. A ratio is VQModel's time
over ours.
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
from frame import OURS, Report, compare_times, markdown_table, synchronize
from loop_cost import record_our_loop
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
COMMITMENT, CODEBOOK = 1.0, 0.25  # the weights of VQModel
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
    """Memory layout and matmul precision of a plain loop."""

    channels_last: bool
    reduced_precision: bool

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "contiguous"
        return f"{layout}, {'reduced precision' if self.reduced_precision else 'float32'}"


PLAIN, FULL = Setting(False, False), Setting(True, True)
SETTINGS = (PLAIN, Setting(True, False), Setting(False, True), FULL)


class Network(NamedTuple):
    """A new model, and its loss for pixel values (B, C, H, W)."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]


def build_our_network() -> Network:
    model = VQGAN(CONFIG).train()

    def loss(pixel_values: Tensor) -> Tensor:
        output = model(pixel_values)
        codebook_terms = COMMITMENT * output.losses["commitment"] + CODEBOOK * output.losses["codebook"]
        return F.mse_loss(output.reconstruction, pixel_values) + codebook_terms

    return Network(model, loss)


def build_their_network() -> Network:
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


NETWORKS: dict[str, Callable[[], Network]] = {OURS: build_our_network, PEER: build_their_network}


def upsample_by_convolution() -> Any:
    """Make our blocks upsample by a convolution of enlarged maps, as VQModel does and as ours do with reduced precision."""
    return patch("stage1_tokenizer.networks.blocks.uses_bf16_convolution", return_value=True)


def count_step_flop(network: Network) -> int:
    """Count the FLOP of matrix products and convolutions in the forward and backward pass."""
    with FlopCounterMode(display=False) as counter, upsample_by_convolution():
        network.loss(torch.zeros(BATCH, 1, SIZE, SIZE)).backward()
    return counter.get_total_flops()


def count_convolution_flop(network: Network) -> Counter[int]:
    """Count the forward FLOP of convolutions by the side of their output map."""
    flop_by_side: Counter[int] = Counter()

    def count_layer(layer: nn.Module, _: Any, output: Tensor) -> None:
        flop_by_side[output.shape[-1]] += 2 * layer.weight.numel() * output[:, 0].numel()

    hooks = [each.register_forward_hook(count_layer) for each in network.model.modules() if isinstance(each, nn.Conv2d)]
    with torch.no_grad(), upsample_by_convolution():
        network.loss(torch.zeros(BATCH, 1, SIZE, SIZE))
    for hook in hooks:
        hook.remove()
    return flop_by_side


def build_plain_loop(network: Network, setting: Setting, pixel_values: Tensor) -> Callable[[int], list[float]]:
    """Return a function that trains for more steps and returns the time at the end of each."""
    device, (model, compute_loss) = accelerated_device(), network
    model.to(device, memory_format=setting.layout)
    optimizer_options = {
        "lr": OPTIMIZER.learning_rate,
        "betas": OPTIMIZER.betas,
        "weight_decay": OPTIMIZER.weight_decay,
    }
    optimizer = torch.optim.AdamW(model.parameters(), **optimizer_options, fused=True)
    order, step_numbers = BatchOrder(len(pixel_values), BATCH, 0), count()

    def train(steps: int) -> list[float]:
        ends = []
        with reduced_matmul_precision(device, setting.reduced_precision):
            for _ in range(steps):
                batch = pixel_values[order.batch_indices(next(step_numbers))].to(device)
                compute_loss(batch.contiguous(memory_format=setting.layout)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                synchronize()
                ends.append(time.perf_counter())
        return ends

    return train


def build_training_loop(folder: Path, train: ImageLoader, validation: ImageLoader) -> Callable[[int], list[float]]:
    """Return a function that trains ours from scratch and returns the time at the end of each step."""
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
    run_numbers = count()

    def run(steps: int) -> list[float]:
        run_config = dataclasses.replace(config, output=folder / str(next(run_numbers)), max_steps=steps)
        return record_our_loop(lambda: train_tokenizer(run_config, CONFIG, train, validation))[0]

    return run


def time_in_turn(loops: dict[str, Callable[[int], list[float]]], steps: int, rounds: int) -> dict[str, list[float]]:
    """Time the loops in turns; return the seconds per step of each loop in each round."""
    names, seconds = list(loops), {name: list[float]() for name in loops}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            ends = loops[name](WARM_UP + steps)
            seconds[name].append((ends[-1] - ends[WARM_UP - 1]) / steps)
    return seconds


def name_plain_loop(network: str, setting: Setting) -> str:
    """Return the name of a network's plain loop."""
    return f"{network}, plain loop, {setting}"


def format_ratio(comparison: dict[str, Any]) -> str:
    """Format a ratio with its quartiles."""
    low, high = comparison["quartiles"]
    return f"{comparison['ratio']:.2f} ({low:.2f} … {high:.2f})"


def compare_arithmetic() -> tuple[str, dict[str, Any]]:
    """Return table and numbers of the arithmetic of both networks."""
    rows, results = [], {}
    for name, build in NETWORKS.items():
        network = build()
        flop, by_side = count_step_flop(network), count_convolution_flop(network)
        parameters = sum(p.numel() for p in network.model.parameters())
        rows.append([name, flop / 1e9, *(by_side[side] / 1e9 for side in sorted(by_side, reverse=True)), parameters])
        results[name] = {"flop_per_step": flop, "forward_convolutions": dict(by_side), "parameters": parameters}
    sides = [f"at {side}×{side}" for side in sorted(by_side, reverse=True)]
    return markdown_table(
        ["", "GFLOP per step", f"of them forward {sides[0]}", *sides[1:], "parameters"], rows
    ), results


def run(quick: bool) -> Report:
    steps, rounds = (2, 1) if quick else (12, 9)
    keep_freed_memory()
    source, processor = load_source(FASHION_MNIST), CONFIG.image_processor
    train, validation = ImageLoader(source.train, processor), ImageLoader(source.validation, processor)
    pixel_values = processor.preprocess(train[range(len(train))])
    with TemporaryDirectory() as temporary:
        loops = {OURS: build_training_loop(Path(temporary), train, validation)}
        for setting in SETTINGS:
            for name, build in NETWORKS.items():
                loops[name_plain_loop(name, setting)] = build_plain_loop(build(), setting, pixel_values)
        seconds = time_in_turn(loops, steps, rounds)

    comparison = compare_times(seconds)
    same_setting = {
        each: compare_times(seconds, reference=name_plain_loop(OURS, each))[name_plain_loop(PEER, each)]
        for each in SETTINGS
    }
    rows = []
    for setting in SETTINGS:
        theirs = comparison[name_plain_loop(PEER, setting)]
        milliseconds = [1e3 * comparison[name_plain_loop(name, setting)]["seconds"] for name in (PEER, OURS)]
        rows.append([str(setting), *milliseconds, format_ratio(same_setting[setting]), format_ratio(theirs)])
    arithmetic_table, arithmetic = compare_arithmetic()
    share = arithmetic[OURS]["flop_per_step"] / arithmetic[PEER]["flop_per_step"]
    our_milliseconds = 1e3 * comparison[OURS]["seconds"]
    plain_ratio, full_ratio = (format_ratio(comparison[name_plain_loop(PEER, setting)]) for setting in (PLAIN, FULL))
    text = "\n\n".join(
        [
            (__doc__ or "").partition("\n\n")[2].strip(),
            arithmetic_table,
            f"Our step has {share:.1%} of the arithmetic of VQModel's step when it upsamples in the same way. Without reduced "
            "precision it needs less, because upsampling and its convolution are one transposed convolution. Our training "
            f"loop takes {our_milliseconds:.0f} ms per step; VQModel in a plain loop takes {plain_ratio} times as long, and "
            f"{full_ratio} times with the same two settings.",
            markdown_table(
                ["plain loop", "VQModel, ms", "ours, ms", "ratio (quartiles)", "ratio to our training loop"], rows
            ),
        ]
    )
    same_settings = {str(setting): each for setting, each in same_setting.items()}
    results = {"arithmetic": arithmetic, "timing": comparison, "same_settings": same_settings}
    return Report("tokenizer_step", "A stage-one training step", text, results, ["diffusers"])
