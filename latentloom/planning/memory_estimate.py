"""What a training step takes: memory by part and floating-point operations, counted on shapes alone.

    memory ≈ weights + gradients + optimiser state + average + images · (activations kept for the backward pass)

Networks are built and run with torch's fake tensors, which know shapes and hold no numbers, so that a prior of billions of
parameters is counted in seconds on any machine. Temporary tensors, caches and the CUDA context come on top: about a tenth.
"""

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from latentloom.planning.step_timing import TimedStep
from training_harness.errors import UserError
from training_harness.pretrained import count_parameters
from training_harness.processes import accelerated_device
from training_harness.run_config import RunConfig

StepBuilder = Callable[[Any], TimedStep]
"""Builds the rehearsal of a configuration."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, but for `parameters` by part and `flop` of forward and backward pass an image."""

    parameters: dict[str, int]
    weights: int
    gradients: int
    optimizer: int
    ema_weights: int
    activations: int
    """Kept for the backward pass, an image."""
    flop: int

    def total_bytes(self, batch_size: int) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema_weights + batch_size * self.activations


def estimate_memory(config: RunConfig, build_step: StepBuilder) -> MemoryEstimate:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _measure_step(build_step(config))


def _measure_step(timed_step: TimedStep) -> MemoryEstimate:
    networks = list(timed_step.networks.values())
    for network in networks:  # what it learns from the numbers themselves, such as dead codes, has none here
        getattr(network, "quantizer", nn.Identity()).eval()
    trained = sum(count_parameters(network) for network in networks)
    buffers = sum(buffer.nbytes for network in networks for buffer in network.buffers())
    kept_for_one, flop_for_one = _count_activations_and_flop(timed_step, 1)
    kept_for_two, _ = _count_activations_and_flop(timed_step, 2)
    activations = kept_for_two - kept_for_one
    if timed_step.config.mixed_precision != "no":
        activations //= 2
    return MemoryEstimate(
        parameters=_count_parameters_by_part(timed_step),
        weights=4 * trained + buffers,
        gradients=4 * trained,
        optimizer=_count_optimizer_bytes(timed_step),
        ema_weights=4 * count_parameters(networks[0]),
        activations=activations,
        flop=flop_for_one,
    )


def _count_parameters_by_part(timed_step: TimedStep) -> dict[str, int]:
    """Of each part of the network that the stage is about, and of the others as wholes."""
    (_, own), *others = timed_step.networks.items()
    found = [*own.named_children(), *others]
    return {name: count for name, network in found if (count := count_parameters(network))}


def _count_activations_and_flop(timed_step: TimedStep, images: int) -> tuple[int, int]:
    """Bytes that the forward pass keeps for the backward pass, weights left out, and operations of both passes."""
    weights = {p.untyped_storage()._cdata for network in timed_step.networks.values() for p in network.parameters()}
    kept: dict[int, Tensor] = {}  # by storage; held, or a storage's place would be taken by the next

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = timed_step.loss(images)
        size = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
        loss.backward()
    return size, counter.get_total_flops()


def _count_optimizer_bytes(timed_step: TimedStep) -> int:
    """Muon keeps one number a weight for its matrices, everything else two."""
    own = sum(
        (4 if group.get("orthogonalize") else 8) * p.numel()
        for group in timed_step.optimizer.param_groups
        for p in group["params"]
    )
    others = list(timed_step.networks.values())[1:]  # the discriminator has an Adam of its own
    return own + 8 * sum(map(count_parameters, others))


def recommend_memory_savings(config: RunConfig, build_step: StepBuilder, on_accelerator: bool) -> list[str]:
    """What lowers the memory of a step, each with what would then be needed: `--batch-size 8 (1.2 GiB)`."""

    def needed(**changes: object) -> int:
        changed = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
        return estimate_memory(changed, build_step).total_bytes(changed.batch_size)

    found = []
    if config.batch_size > 1:
        half = config.batch_size // 2
        flags = f"--batch-size {half} --accumulation-steps {2 * config.accumulation_steps}"
        found.append(f"{flags} ({format_bytes(needed(batch_size=half))})")
    if not config.gradient_checkpointing:
        found.append(f"--gradient-checkpointing ({format_bytes(needed(gradient_checkpointing=True))})")
    if on_accelerator and config.mixed_precision == "no":
        found.append(f"--mixed-precision bf16 ({format_bytes(needed(mixed_precision='bf16'))})")
    if on_accelerator and config.ema.device == "same":  # type: ignore[attr-defined]
        less = estimate_memory(config, build_step).ema_weights
        found.append(f"--ema.device cpu ({format_bytes(needed() - less)})")
    return found


@contextmanager
def explain_out_of_memory(config: RunConfig, build_step: StepBuilder) -> Iterator[None]:
    """Turns a failed allocation within it into a UserError that says what lowers the memory, and by how much."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not _is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # lets go of what the step held: counting takes a little memory too
        device = accelerated_device()
        place = "this machine" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
        needed = format_bytes(estimate_memory(config, build_step).total_bytes(config.batch_size))
        ways = ", or ".join(recommend_memory_savings(config, build_step, device.type != "cpu"))
        raise UserError(
            f"out of memory on {place} with batches of {config.batch_size} images, of which a step takes about {needed}; "
            f"expected room for it; lower it by {ways}"
        ) from error


def measure_step_seconds(config: RunConfig, build_step: StepBuilder, at_least: float = 0.0) -> float:
    """Of a step, before a run; see `TimedStep.seconds_per_step`."""
    with explain_out_of_memory(config, build_step):
        return build_step(config).seconds_per_step(at_least)


def _is_out_of_memory(error: BaseException) -> bool:
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)  # of torch's allocator on CPUs


def format_bytes(size: float) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**29 else f"{size / 2**20:.3g} MiB"
