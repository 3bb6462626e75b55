"""`--dry-run`: print the cost of a run without writing anything."""

from collections.abc import Callable, Sequence
from typing import Any

from latentloom.planning.memory_estimate import (
    MemoryEstimate,
    StepBuilder,
    estimate_memory,
    format_bytes,
    measure_step_seconds,
    recommend_memory_savings,
)
from latentloom.planning.step_timing import MEASURED_STEPS
from training_harness.processes import accelerated_device, number_of_processes
from training_harness.run_config import RunConfig

UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (0.0, "MFLOP"))


def dry_run(title: str, config: RunConfig, images: int, build_step: StepBuilder) -> tuple[str, float]:
    """Estimate the cost of the run of `config`.

    Args:
        images: number of training images.

    Returns:
        The estimate as text, and the seconds that the whole run takes.
    """
    estimate = estimate_memory(config, build_step)
    seconds = measure_step_seconds(config, build_step)
    total_seconds = seconds * config.max_steps
    images_per_step = config.batch_size * config.accumulation_steps * number_of_processes()
    flop_per_step = estimate.flop * config.batch_size * config.accumulation_steps  # of this process
    savings = recommend_memory_savings(config, build_step, accelerated_device().type != "cpu")
    rows = [
        ("parameters", f"{sum(estimate.parameters.values()):,}: {_join_values(estimate.parameters, '{:,}'.format)}"),
        (
            "memory",
            f"about {format_bytes(estimate.total_bytes(config.batch_size))}: {_format_memory(estimate, config)}",
        ),
        ("to lower it", ", ".join(savings)),
        (
            "compute",
            f"{_format_operations(flop_per_step)} per step, forward and backward: "
            f"{_format_operations(flop_per_step / seconds)} per second",
        ),
        ("data", f"{images:,} images per epoch, {-(-images // images_per_step):,} steps of {images_per_step} images"),
        ("length", f"{config.max_steps:,} steps, {config.max_steps * images_per_step / images:.1f} epochs"),
        (
            "time",
            f"{_format_duration(total_seconds)}, at {1000 * seconds:.3g} ms per step (mean of {MEASURED_STEPS}), "
            "without previews",
        ),
        ("rate", f"{images_per_step / seconds:,.0f} images per second on {accelerated_device().type}"),
    ]
    return "\n".join([title, *(f"  {name:<12}{text}" for name, text in rows)]), total_seconds


def _format_memory(estimate: MemoryEstimate, config: RunConfig) -> str:
    parts: dict[str, Any] = {
        "weights": estimate.weights,
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer,
        "EMA weights": estimate.ema_weights,
        f"activations of {config.batch_size} images": config.batch_size * estimate.activations,
    }
    return _join_values(parts, format_bytes)


def _join_values(values: dict[str, Any], format_value: Callable[[Any], str]) -> str:
    return ", ".join(f"{name} {format_value(value)}" for name, value in values.items())


def _format_operations(count: float) -> str:
    scale, unit = next((scale, unit) for scale, unit in UNITS if count >= scale)
    return f"{count / (scale or 1e6):.3g} {unit}"


def _format_duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def format_total_time(seconds: Sequence[float]) -> str:
    """Format the last line of `--dry-run` from the seconds of each stage."""
    return (
        f"training takes {_format_duration(sum(seconds))} in total; nothing was written; leave out --dry-run to begin"
    )
