"""`--dry-run`: what a run would take, said before its first step; nothing is written."""

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
    """What the run of `config` on so many training images would take, as text and in seconds."""
    found = estimate_memory(config, build_step)
    seconds = measure_step_seconds(config, build_step)
    total = seconds * config.max_steps
    a_step = config.batch_size * config.accumulation_steps * number_of_processes()
    work = found.flop * config.batch_size * config.accumulation_steps  # of this process
    rows = [
        ("parameters", f"{sum(found.parameters.values()):,}: {_join_values(found.parameters, '{:,}'.format)}"),
        ("memory", f"about {format_bytes(found.total_bytes(config.batch_size))}: {_format_memory(found, config)}"),
        ("to lower it", ", ".join(recommend_memory_savings(config, build_step, accelerated_device().type != "cpu"))),
        (
            "compute",
            f"{_format_operations(work)} a step, forward and backward: {_format_operations(work / seconds)} a second",
        ),
        ("data", f"{images:,} images an epoch of {-(-images // a_step):,} steps of {a_step} images"),
        ("length", f"{config.max_steps:,} steps, {config.max_steps * a_step / images:.1f} epochs"),
        (
            "time",
            f"{_format_duration(total)}, at {1000 * seconds:.3g} ms a step (mean of {MEASURED_STEPS}), without previews",
        ),
        ("rate", f"{a_step / seconds:,.0f} images a second on {accelerated_device().type}"),
    ]
    return "\n".join([title, *(f"  {name:<12}{text}" for name, text in rows)]), total


def _format_memory(found: MemoryEstimate, config: RunConfig) -> str:
    parts: dict[str, Any] = {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimiser": found.optimizer,
        "average": found.ema_weights,
        f"activations of {config.batch_size} images": config.batch_size * found.activations,
    }
    return _join_values(parts, format_bytes)


def _join_values(values: dict[str, Any], shown: Callable[[Any], str]) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def _format_operations(count: float) -> str:
    scale, unit = next((scale, unit) for scale, unit in UNITS if count >= scale)
    return f"{count / (scale or 1e6):.3g} {unit}"


def _format_duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def format_total_time(seconds: Sequence[float]) -> str:
    return f"in all {_format_duration(sum(seconds))} of training; nothing was written; leave out --dry-run to begin"
