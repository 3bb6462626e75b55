"""One picture of both stages' training: losses and the use of the codebook."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentloom.jobs.plotting import open_plot
from training_harness.metric_log import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_curves(tokenizer_log: Path, prior_log: Path, codebook_size: int | None, path: Path) -> None:
    """Draws `curves.png` from two `metrics.jsonl`."""
    stage1, stage2 = read_metrics(tokenizer_log), read_metrics(prior_log)
    learnt = any("learning_rate" in row for row in stage1)  # the identity has nothing to learn
    columns = 3 if learnt else 1
    with open_plot(path, columns, 5 * columns, 4.2) as (_, axes):
        if learnt:
            plot_tokenizer_curves(axes[0], axes[1], stage1, codebook_size)
        plot_prior_curves(axes[-1], stage2, codebook_size)


def plot_prior_curves(axes: "Axes", rows: list[dict[str, Any]], codebook_size: int | None) -> None:
    of_tokens = codebook_size is not None and any("nats_per_token" in row for row in rows)
    loss = "nats_per_token" if of_tokens else "squared_error"
    axes.plot(*select_series(rows, loss), lw=1, label="training")
    axes.plot(*select_series(rows, f"validation_{loss}"), "o-", ms=3, label="validation (averaged weights)")
    if codebook_size is not None and of_tokens:
        axes.axhline(math.log(codebook_size), color="grey", ls=":", label="log K: a uniform guess")
    axes.set(title="Prior: nats a token" if of_tokens else "Prior: squared error of the prediction", xlabel="step")
    axes.legend()


def plot_tokenizer_curves(
    losses: "Axes", quality: "Axes", rows: list[dict[str, Any]], codebook_size: int | None
) -> None:
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
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]
