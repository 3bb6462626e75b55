"""What a run's figures mean, in sentences: each says what was found and, where something is wrong, what to do about it."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from latentloom.report.numbers import count, number, percent
from latentloom.report.reading import RunRecord
from latentloom.report.svg_charts import Points
from stage1_tokenizer.health import LOW_USAGE, usage_recommendation
from stage2_prior.health import RECOMMENDATION

LOW_PERPLEXITY = 0.25  # of K: below it a codebook is used unevenly
WORSE = 1e-3  # of the best validation figure: less is noise
WINDOW = 10  # logged losses that are averaged before they are compared
HIGHER_IS_BETTER = ("psnr", "ssim", "agreement", "accuracy")
NEW_OUTPUT = "A changed configuration needs an --output of its own."


Level = Literal["bad", "note", "good"]
LEVELS: tuple[Level, ...] = ("bad", "note", "good")


class Diagnostic(NamedTuple):
    level: Level
    title: str
    text: str


def diagnostics(run: RunRecord) -> list[Diagnostic]:
    """What is wrong first."""
    found = [*codebook(run), *warned(run), *validation(run), *steps_not_taken(run), *spikes(run), *resumptions(run)]
    return sorted(found, key=lambda verdict: LEVELS.index(verdict.level))


def codebook(run: RunRecord) -> Iterator[Diagnostic]:
    used, perplexity, size = run.last("codes_used"), run.last("perplexity"), run.codebook_size
    if used is not None and perplexity is not None and size is not None:
        yield codebook_use(used, perplexity, size, recommendation(run, size))


def codebook_use(used: float, perplexity: float, size: int, recommendation: str) -> Diagnostic:
    found = (
        f"{number(used, 9)} of {number(size, 9)} codes are used ({percent(used / size)}), with a perplexity of "
        f"{number(perplexity)} ({percent(perplexity / size)} of K)"
    )
    if used < LOW_USAGE * size:
        return Diagnostic("bad", "The codebook has collapsed", f"{found}. {recommendation}")
    if perplexity < LOW_PERPLEXITY * size:
        return Diagnostic(
            "bad", "The codebook is used unevenly", f"{found}: a few codes do most of the work. {recommendation}"
        )
    return Diagnostic("good", "The codebook is in good use", f"{found}.")


def recommendation(run: RunRecord, size: int) -> str:
    quantizer, threshold = (run.setting("model", "quantizer", name) for name in ("name", "restart_threshold"))
    advice = codebook_recommendation(quantizer, threshold, size)
    if run.max_steps is not None and run.step < 0.2 * run.max_steps:
        young = "The run is young, and usage often rises: look again later. If it stays, "
        return f"{young}{advice[:1].lower()}{advice[1:]}"
    return advice


def codebook_recommendation(quantizer: str | None, threshold: float | None, size: int) -> str:
    """What to change in a `model.quantizer` of that name and restart threshold, as a configuration holds them."""
    return f"Train with {usage_recommendation(quantizer, threshold, size)}. {NEW_OUTPUT}"


def warned(run: RunRecord) -> Iterator[Diagnostic]:
    """What the run itself warned of, but for what is looked at anew: the codebook, and validation."""
    for row in run.rows:
        if row.get("about") not in (None, "codebook", "validation"):
            text = f"{row['warning']}. {NEW_OUTPUT}"
            yield Diagnostic("bad", f"A warning at step {count_of(row['step'])}", text[0].upper() + text[1:])


def validation_name(run: RunRecord) -> str | None:
    """The figure that the best checkpoint is chosen by."""
    known = ("validation_psnr", "validation_nats_per_token", "validation_squared_error")
    others = sorted(name for name in run.figures if name.startswith("validation_"))
    return next((name for name in (*known, *others) if name in run.figures), None)


def best_of(name: str, points: Points) -> tuple[int, float]:
    """Step and value of the best figure, the first of equals."""
    sign = -1 if any(word in name for word in HIGHER_IS_BETTER) else 1
    return min(points, key=lambda point: sign * point[1])


def validation(run: RunRecord) -> Iterator[Diagnostic]:
    name = validation_name(run)
    if name is None or len(run.figures[name]) < 2:
        return
    points = run.figures[name]
    (step, best), (last_step, last) = best_of(name, points), points[-1]
    unit = {"validation_psnr": " dB", "validation_nats_per_token": " nats a token"}.get(name, "")
    if step == last_step or abs(last - best) <= WORSE * abs(best):
        text = (
            f"Best at step {count_of(step)}: {number(best)}{unit}; at the last one measured it is {number(last)}{unit}."
        )
        if step == last_step:
            text = f"The last one measured, {number(best)}{unit} at step {count_of(step)}, is the best so far."
        yield Diagnostic("good", "Validation does not get worse", text)
    elif name == "validation_psnr":
        yield worse_reconstructions(run, step, best, last)
    else:
        yield worse_on_held_out_images(run, step, best, last, unit)


def worse_reconstructions(run: RunRecord, step: int, best: float, last: float) -> Diagnostic:
    found = f"PSNR was best at step {count_of(step)} with {number(best)} dB and is {number(last)} dB now."
    if "discriminator" in run.figures:
        why = "A discriminator trades some PSNR for sharper pictures: judge by the samples below."
        return Diagnostic("note", "PSNR has fallen since its best", f"{found} {why}")
    advice = "Try a lower --optimizer.learning-rate." + kept(run, step)
    return Diagnostic("bad", "PSNR has fallen since its best", f"{found} {advice}")


def worse_on_held_out_images(run: RunRecord, step: int, best: float, last: float, unit: str) -> Diagnostic:
    found = (
        f"Validation was best at step {count_of(step)} with {number(best)}{unit} and has risen to {number(last)} since"
    )
    training = run.figures.get("nats_per_token") or run.figures.get("squared_error") or run.figures.get("loss") or []
    then = mean_of([value for at, value in training if at <= step][-WINDOW:])
    now = mean_of([value for at, value in training if at > step][-WINDOW:])
    if then is None or now is None or now >= then:
        return Diagnostic("note", "Validation has risen since its best", f"{found}.{kept(run, step)}")
    return Diagnostic(
        "bad",
        "The prior overfits",
        f"{found}, while the training loss fell from {number(then)} to {number(now)}: it learns its training images by heart. "
        f"{RECOMMENDATION[0].upper()}{RECOMMENDATION[1:]}.{kept(run, step)}",
    )


def kept(run: RunRecord, step: int) -> str:
    """How to get the model of the best step, where its checkpoint is there."""
    if step not in run.checkpoints:
        return ""
    return (
        f" The checkpoint of that step is kept: the same command with --resume step_{step:06d} --max-steps {step} makes it the "
        "model in place of the last."
    )


def steps_not_taken(run: RunRecord) -> Iterator[Diagnostic]:
    steps = sorted({row["step"] for row in run.skipped})
    if steps:
        yield Diagnostic(
            "note" if len(steps) <= 0.01 * max(1, run.step) else "bad",
            f"{count(len(steps), 'step')} skipped",
            f"A loss or a gradient was not a finite number, first at step {count_of(steps[0])}. The images of these steps are in "
            "skipped_steps.*.jsonl. If it goes on, lower --optimizer.learning-rate or use --mixed-precision no.",
        )


def spikes(run: RunRecord) -> Iterator[Diagnostic]:
    for name, whose in (("gradient_norm_spike", ""), ("discriminator_gradient_norm_spike", " of the discriminator")):
        if points := run.figures.get(name, []):
            step, value = max(points, key=lambda point: point[1])
            clip = None if whose else run.setting("optimizer", "max_grad_norm")
            clipped = f" Gradients are clipped at {number(clip)}, so one spike does little harm." if clip else ""
            yield Diagnostic(
                "note",
                f"{count(len(points), 'gradient spike')}{whose}",
                f"More than ten times the usual norm; the largest is {number(value)} at step {count_of(step)}.{clipped}",
            )


def resumptions(run: RunRecord) -> Iterator[Diagnostic]:
    if steps := run.resumed:
        named = ", ".join(count_of(step) for step in steps[:5]) + (", …" if len(steps) > 5 else "")
        often = "once" if len(steps) == 1 else f"{count_of(len(steps))} times"
        yield Diagnostic("note", f"Taken up again {often}", f"From step {named}; marked on the curves.")


def mean_of(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def count_of(step: int) -> str:
    return f"{step:,}"
