"""Plot the training curves of both stages: losses, validation PSNR and codebook usage."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentloom.jobs.plotting import open_plot
from training_harness.metric_log import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_curves(tokenizer_log: Path, prior_log: Path, codebook_size: int | None, path: Path) -> None:
    """Plot both `metrics.jsonl` files into the PNG file `path`.

    Args:
        codebook_size: K, or None when the tokenizer has no codebook.
    """
    stage1, stage2 = read_metrics(tokenizer_log), read_metrics(prior_log)
    tokenizer_trained = any("learning_rate" in row for row in stage1)  # the identity tokenizer is not trained
    columns = 3 if tokenizer_trained else 1
    with open_plot(path, columns, 5 * columns, 4.2) as (_, axes):
        if tokenizer_trained:
            plot_tokenizer_curves(axes[0], axes[1], stage1, codebook_size)
        plot_prior_curves(axes[-1], stage2, codebook_size)


def plot_prior_curves(axes: "Axes", rows: list[dict[str, Any]], codebook_size: int | None) -> None:
    """Plot the training and validation loss of the prior."""
    predicts_tokens = codebook_size is not None and any("nats_per_token" in row for row in rows)
    loss = "nats_per_token" if predicts_tokens else "squared_error"
    axes.plot(*select_series(rows, loss), lw=1, label="training")
    axes.plot(*select_series(rows, f"validation_{loss}"), "o-", ms=3, label="validation (EMA weights)")
    if codebook_size is not None and predicts_tokens:
        axes.axhline(math.log(codebook_size), color="grey", ls=":", label="log K: uniform guess")
    axes.set(
        title="Prior: nats per token" if predicts_tokens else "Prior: squared error of the prediction", xlabel="step"
    )
    axes.legend()


def plot_tokenizer_curves(
    losses: "Axes", quality: "Axes", rows: list[dict[str, Any]], codebook_size: int | None
) -> None:
    """Plot the losses of the tokenizer, and its validation PSNR with the codebook usage."""
    for name in ("l1", "l2", "commitment", "generator", "discriminator"):
        steps, values = select_series(rows, name)
        if len(steps) and any(values):
            losses.plot(steps, values, label=name, lw=1)
    losses.set(title="Tokenizer: losses", xlabel="step", yscale="log")
    losses.legend()

    quality.plot(*select_series(rows, "validation_psnr"), "o-", color="tab:blue", ms=3)
    quality.set(title="Tokenizer: validation PSNR", xlabel="step", ylabel="PSNR, dB")
    if codebook_size is not None:
        quality.set(title="Tokenizer: validation PSNR and codebook usage")
        usage = quality.twinx()
        usage.plot(*select_series(rows, "perplexity"), "s--", color="tab:orange", ms=3, label="perplexity")
        usage.plot(*select_series(rows, "codes_used"), "^:", color="tab:green", ms=3, label="codes used")
        usage.set(ylabel=f"codes of {codebook_size}", ylim=(0, codebook_size * 1.05))
        usage.legend(loc="lower right")


def select_series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps that logged the metric `name`, and its values."""
    logged = [row for row in rows if name in row]
    return [row["step"] for row in logged], [row[name] for row in logged]
