"""Estimate the memory and the floating-point operations of a training step from tensor shapes alone.

    memory ≈ weights + gradients + optimizer state + EMA weights + images · (activations kept for the backward pass)

Networks are built and run with PyTorch's fake tensors, which have shapes but no values. So a prior with billions of parameters
is counted in seconds on any machine. Temporary tensors, caches and the CUDA context add about a tenth.
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
"""Function that builds the untrained networks and the step of a training configuration."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory in bytes, number of parameters, and floating-point operations of a training step."""

    parameters: dict[str, int]
    """Number of parameters by part of the network."""
    weights: int
    gradients: int
    optimizer: int
    ema_weights: int
    activations: int
    """Bytes per image that are kept for the backward pass."""
    flop: int
    """Operations of the forward and the backward pass per image."""

    def total_bytes(self, batch_size: int) -> int:
        """Return the memory of a step of `batch_size` images."""
        return self.weights + self.gradients + self.optimizer + self.ema_weights + batch_size * self.activations


def estimate_memory(config: RunConfig, build_step: StepBuilder) -> MemoryEstimate:
    """Estimate the memory of a training step of `config` without allocating it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _measure_step(build_step(config))


def _measure_step(timed_step: TimedStep) -> MemoryEstimate:
    networks = list(timed_step.networks.values())
    for network in networks:  # a quantizer in training mode looks for unused codes in values, which fake tensors lack
        getattr(network, "quantizer", nn.Identity()).eval()
    trained = sum(count_parameters(network) for network in networks)
    buffers = sum(buffer.nbytes for network in networks for buffer in network.buffers())
    bytes_for_one, flop_for_one = _count_activations_and_flop(timed_step, 1)
    bytes_for_two, _ = _count_activations_and_flop(timed_step, 2)
    activations = bytes_for_two - bytes_for_one
    if timed_step.config.mixed_precision != "no":  # float16 and bfloat16 take half the bytes
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
    """Count the parameters of each child of the main network, and of each other network as a whole."""
    (_, main_network), *others = timed_step.networks.items()
    modules = [*main_network.named_children(), *others]
    return {name: count for name, module in modules if (count := count_parameters(module))}


def _count_activations_and_flop(timed_step: TimedStep, images: int) -> tuple[int, int]:
    """Count the bytes that the forward pass keeps, without the weights, and the operations of both passes."""
    weights = {p.untyped_storage()._cdata for network in timed_step.networks.values() for p in network.parameters()}
    saved: dict[int, Tensor] = {}  # keeps each tensor alive, because a freed storage's address is used again

    def record(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            loss = timed_step.compute_loss(images)
        size = sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in weights)
        loss.backward()
    return size, counter.get_total_flops()


def _count_optimizer_bytes(timed_step: TimedStep) -> int:
    """Count the optimizer's state: Muon keeps one float32 per matrix weight, every other parameter group two."""
    main_bytes = sum(
        (4 if group.get("orthogonalize") else 8) * p.numel()
        for group in timed_step.optimizer.param_groups
        for p in group["params"]
    )
    others = list(timed_step.networks.values())[1:]  # the discriminator has its own Adam
    return main_bytes + 8 * sum(map(count_parameters, others))


def recommend_memory_savings(config: RunConfig, build_step: StepBuilder, on_accelerator: bool) -> list[str]:
    """List options that lower the memory of a step, each with the memory it leads to: `--batch-size 8 (1.2 GiB)`."""

    def memory_with(**changes: object) -> int:
        changed_config = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
        return estimate_memory(changed_config, build_step).total_bytes(changed_config.batch_size)

    options = []
    if config.batch_size > 1:
        half = config.batch_size // 2
        flags = f"--batch-size {half} --accumulation-steps {2 * config.accumulation_steps}"
        options.append(f"{flags} ({format_bytes(memory_with(batch_size=half))})")
    if not config.gradient_checkpointing:
        options.append(f"--gradient-checkpointing ({format_bytes(memory_with(gradient_checkpointing=True))})")
    if on_accelerator and config.mixed_precision == "no":
        options.append(f"--mixed-precision bf16 ({format_bytes(memory_with(mixed_precision='bf16'))})")
    if on_accelerator and config.ema.device == "same":  # type: ignore[attr-defined]
        ema_weights = estimate_memory(config, build_step).ema_weights
        options.append(f"--ema.device cpu ({format_bytes(memory_with() - ema_weights)})")
    return options


@contextmanager
def explain_out_of_memory(config: RunConfig, build_step: StepBuilder) -> Iterator[None]:
    """Turn a failed allocation in the block into a UserError that lists the options that lower the memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not _is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # frees the tensors of the step: counting needs some memory too
        device = accelerated_device()
        device_name = (
            "this machine" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
        )
        memory = format_bytes(estimate_memory(config, build_step).total_bytes(config.batch_size))
        options = ", or ".join(recommend_memory_savings(config, build_step, device.type != "cpu"))
        raise UserError(
            f"out of memory on {device_name} with batches of {config.batch_size} images; a step needs about {memory}. "
            f"To lower it, pass {options}"
        ) from error


def measure_step_seconds(config: RunConfig, build_step: StepBuilder, at_least: float = 0.0) -> float:
    """Measure the seconds of a step before a run; see `TimedStep.measure_seconds`."""
    with explain_out_of_memory(config, build_step):
        return build_step(config).measure_seconds(at_least)


def _is_out_of_memory(error: BaseException) -> bool:
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(
        error
    )  # the message of PyTorch's allocator on CPUs


def format_bytes(size: float) -> str:
    """Format a number of bytes in MiB or GiB with three digits."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**29 else f"{size / 2**20:.3g} MiB"
