"""Diagnostics of a run: what its metrics mean, in sentences, and what to do about each problem."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from latentloom.report.numbers import format_count, format_number, format_percent
from latentloom.report.reading import RunRecord
from latentloom.report.svg_charts import Points
from stage1_tokenizer.health import LOW_USAGE, usage_recommendation
from stage2_prior.health import RECOMMENDATION

LOW_PERPLEXITY = 0.25  # of K: below it a codebook is used unevenly
RELATIVE_TOLERANCE = 1e-3  # of the best validation metric: a smaller change is noise
SMOOTHING_WINDOW = 10  # logged losses that are averaged before two of them are compared
HIGHER_IS_BETTER = ("psnr", "ssim", "agreement", "accuracy")
NEW_OUTPUT_HINT = "Use a new --output when the configuration changes."


Level = Literal["bad", "note", "good"]
LEVELS: tuple[Level, ...] = ("bad", "note", "good")


class Diagnostic(NamedTuple):
    """One statement about a run or a model."""

    level: Level
    title: str
    text: str


def diagnostics(run: RunRecord) -> list[Diagnostic]:
    """List the diagnostics of a run, problems first."""
    all_diagnostics = [
        *codebook_diagnostics(run),
        *warning_diagnostics(run),
        *validation_diagnostics(run),
        *skipped_step_diagnostics(run),
        *gradient_spike_diagnostics(run),
        *resumption_diagnostics(run),
    ]
    return sorted(all_diagnostics, key=lambda diagnostic: LEVELS.index(diagnostic.level))


def codebook_diagnostics(run: RunRecord) -> Iterator[Diagnostic]:
    used, perplexity, size = run.last_value("codes_used"), run.last_value("perplexity"), run.codebook_size
    if used is not None and perplexity is not None and size is not None:
        yield codebook_usage_diagnostic(used, perplexity, size, run_codebook_recommendation(run, size))


def codebook_usage_diagnostic(used: float, perplexity: float, size: int, recommendation: str) -> Diagnostic:
    """Assess how much of a codebook is used.

    Args:
        used: Number of codes that were used at least once.
        perplexity: Perplexity of the code usage, in [1, size].
        size: Codebook size K.
        recommendation: Sentence that is added when the usage is low.
    """
    usage = (
        f"{format_number(used, 9)} of {format_number(size, 9)} codes are used ({format_percent(used / size)}), with a "
        f"perplexity of {format_number(perplexity)} ({format_percent(perplexity / size)} of K)"
    )
    if used < LOW_USAGE * size:
        return Diagnostic("bad", "The codebook has collapsed", f"{usage}. {recommendation}")
    if perplexity < LOW_PERPLEXITY * size:
        return Diagnostic(
            "bad", "The codebook is used unevenly", f"{usage}: a few codes are used most of the time. {recommendation}"
        )
    return Diagnostic("good", "The codebook is used well", f"{usage}.")


def run_codebook_recommendation(run: RunRecord, size: int) -> str:
    quantizer, threshold = (run.setting("model", "quantizer", name) for name in ("name", "restart_threshold"))
    recommendation = codebook_recommendation(quantizer, threshold, size)
    if run.max_steps is not None and run.step < 0.2 * run.max_steps:
        early = "The run is at an early step, and usage often rises later. If it stays low, "
        return f"{early}{recommendation[:1].lower()}{recommendation[1:]}"
    return recommendation


def codebook_recommendation(quantizer: str | None, threshold: float | None, size: int) -> str:
    """Recommend a change for a quantizer that uses few of its codes.

    Args:
        quantizer: The configuration's `model.quantizer.name`.
        threshold: The configuration's `model.quantizer.restart_threshold`.
        size: Codebook size K.
    """
    return f"Train with {usage_recommendation(quantizer, threshold, size)}. {NEW_OUTPUT_HINT}"


def warning_diagnostics(run: RunRecord) -> Iterator[Diagnostic]:
    """Repeat the logged warnings, except those about the codebook and validation, which are assessed again here."""
    for row in run.rows:
        if row.get("about") not in (None, "codebook", "validation"):
            text = f"{row['warning']}. {NEW_OUTPUT_HINT}"
            yield Diagnostic("bad", f"A warning at step {format_step(row['step'])}", text[0].upper() + text[1:])


def validation_name(run: RunRecord) -> str | None:
    """Return the name of the metric that selects the best checkpoint, or None without validation."""
    preferred = ("validation_psnr", "validation_nats_per_token", "validation_squared_error")
    others = sorted(name for name in run.metrics if name.startswith("validation_"))
    return next((name for name in (*preferred, *others) if name in run.metrics), None)


def best_point(name: str, points: Points) -> tuple[int, float]:
    """Return step and value of the best point of a metric, the first of equal ones."""
    sign = -1 if any(word in name for word in HIGHER_IS_BETTER) else 1
    return min(points, key=lambda point: sign * point[1])


def validation_diagnostics(run: RunRecord) -> Iterator[Diagnostic]:
    name = validation_name(run)
    if name is None or len(run.metrics[name]) < 2:
        return
    points = run.metrics[name]
    (step, best), (last_step, last) = best_point(name, points), points[-1]
    unit = {"validation_psnr": " dB", "validation_nats_per_token": " nats a token"}.get(name, "")
    if step == last_step or abs(last - best) <= RELATIVE_TOLERANCE * abs(best):
        text = f"Best value: {format_number(best)}{unit} at step {format_step(step)}. Last value: {format_number(last)}{unit}."
        if step == last_step:
            text = f"The last value, {format_number(best)}{unit} at step {format_step(step)}, is the best so far."
        yield Diagnostic("good", "Validation does not get worse", text)
    elif name == "validation_psnr":
        yield falling_psnr_diagnostic(run, step, best, last)
    else:
        yield rising_validation_diagnostic(run, step, best, last, unit)


def falling_psnr_diagnostic(run: RunRecord, step: int, best: float, last: float) -> Diagnostic:
    values = (
        f"PSNR was best at step {format_step(step)} with {format_number(best)} dB and is {format_number(last)} dB now."
    )
    if "discriminator" in run.metrics:
        reason = "A discriminator trades some PSNR for sharper images: compare the samples below."
        return Diagnostic("note", "PSNR has fallen since its best", f"{values} {reason}")
    recommendation = "Try a lower --optimizer.learning-rate." + best_checkpoint_hint(run, step)
    return Diagnostic("bad", "PSNR has fallen since its best", f"{values} {recommendation}")


def rising_validation_diagnostic(run: RunRecord, step: int, best: float, last: float, unit: str) -> Diagnostic:
    """Tell overfitting, where the training loss falls while validation rises, from a rise of both."""
    values = (
        f"Validation was best at step {format_step(step)} with {format_number(best)}{unit} and has risen to "
        f"{format_number(last)} since"
    )
    training = run.metrics.get("nats_per_token") or run.metrics.get("squared_error") or run.metrics.get("loss") or []
    loss_at_best = mean_or_none([value for at, value in training if at <= step][-SMOOTHING_WINDOW:])
    loss_now = mean_or_none([value for at, value in training if at > step][-SMOOTHING_WINDOW:])
    if loss_at_best is None or loss_now is None or loss_now >= loss_at_best:
        return Diagnostic("note", "Validation has risen since its best", f"{values}.{best_checkpoint_hint(run, step)}")
    return Diagnostic(
        "bad",
        "The prior overfits",
        f"{values}, while the training loss fell from {format_number(loss_at_best)} to {format_number(loss_now)}. "
        f"{RECOMMENDATION[0].upper()}{RECOMMENDATION[1:]}.{best_checkpoint_hint(run, step)}",
    )


def best_checkpoint_hint(run: RunRecord, step: int) -> str:
    """Say how to get the model of the best step; empty when its checkpoint does not exist."""
    if step not in run.checkpoints:
        return ""
    return (
        f" The checkpoint of that step exists. To use it as the final model, run the same command with --resume step_{step:06d} "
        f"--max-steps {step}."
    )


def skipped_step_diagnostics(run: RunRecord) -> Iterator[Diagnostic]:
    steps = sorted({row["step"] for row in run.skipped_rows})
    if steps:
        yield Diagnostic(
            "note" if len(steps) <= 0.01 * max(1, run.step) else "bad",
            f"{format_count(len(steps), 'step')} skipped",
            f"A loss or a gradient was not finite, first at step {format_step(steps[0])}. skipped_steps.*.jsonl lists the images "
            "of these steps. If more steps are skipped, lower --optimizer.learning-rate or use --mixed-precision no.",
        )


def gradient_spike_diagnostics(run: RunRecord) -> Iterator[Diagnostic]:
    for name, network in (("gradient_norm_spike", ""), ("discriminator_gradient_norm_spike", " of the discriminator")):
        if points := run.metrics.get(name, []):
            step, value = max(points, key=lambda point: point[1])
            clip = None if network else run.setting("optimizer", "max_grad_norm")
            clipped = f" Gradients are clipped at {format_number(clip)}, so one spike does little harm." if clip else ""
            yield Diagnostic(
                "note",
                f"{format_count(len(points), 'gradient spike')}{network}",
                f"More than ten times the usual norm; the largest is {format_number(value)} at step {format_step(step)}.{clipped}",
            )


def resumption_diagnostics(run: RunRecord) -> Iterator[Diagnostic]:
    if steps := run.resumed_steps:
        listed = ", ".join(format_step(step) for step in steps[:5]) + (", …" if len(steps) > 5 else "")
        times = "once" if len(steps) == 1 else f"{format_step(len(steps))} times"
        yield Diagnostic("note", f"Resumed {times}", f"From step {listed}; the curves mark these steps.")


def mean_or_none(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def format_step(step: int) -> str:
    return f"{step:,}"
