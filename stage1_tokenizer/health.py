"""Warnings about problems in a tokenizer's training, each with a recommendation.

At each validation the run checks for a collapsed codebook, a discriminator that is too strong, and reconstructions that became
worse after the adversarial loss began. Each warning is printed once per run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the report imports this module and works without torch
    from torch import Tensor

    from stage1_tokenizer.quantizers import QuantizerConfig

LOW_USAGE = 0.10  # share of the codes; a codebook with a lower usage has collapsed
MIN_ASSIGNMENTS_PER_CODE = 4  # with fewer encoded positions per code, unused codes mean nothing
MIN_DISCRIMINATOR_LOSS = 0.05  # a perfect discriminator has 0; guessing has 1 (hinge) or 0.69 (the other losses)
MAX_PSNR_DROP = 1.0  # dB below the best PSNR before the adversarial loss began


class Health:
    """The state of the checks between two validations. Checkpoints contain it."""

    def __init__(self) -> None:
        self.discriminator_loss_sum: Tensor | float = 0.0  # since the last validation
        self.discriminator_loss_count = 0
        self.best_psnr = -math.inf  # before the adversarial loss began
        self.issued_warnings: set[str] = set()

    def record_discriminator_loss(self, loss: Tensor) -> None:
        self.discriminator_loss_sum = (
            self.discriminator_loss_sum + loss.detach()
        )  # stays on the GPU: no synchronization
        self.discriminator_loss_count += 1

    def new_warnings(
        self,
        psnr: float,
        usage: dict[str, float],
        assignments: int,
        codebook_size: int | None,
        quantizer: QuantizerConfig | None,
        ramp_factor: float,
    ) -> dict[str, str]:
        """Check the metrics of a validation, and return the new warnings by topic.

        Args:
            psnr: validation PSNR in dB.
            usage: result of `CodeUsage.compute_and_reset`.
            assignments: number of positions that `usage` was computed from.
            ramp_factor: factor of the adversarial loss at this step; 0 before it begins.
        """
        warnings = {
            "codebook": codebook_warning(usage, assignments, codebook_size, quantizer),
            "discriminator": discriminator_warning(self._compute_mean_loss()),
            "reconstruction": reconstruction_warning(psnr, self.best_psnr) if ramp_factor > 0 else None,
        }
        if ramp_factor == 0:
            self.best_psnr = max(self.best_psnr, psnr)
        new = {
            topic: text for topic, text in warnings.items() if text is not None and topic not in self.issued_warnings
        }
        self.issued_warnings |= new.keys()
        return new

    def _compute_mean_loss(self) -> float | None:
        """Compute the discriminator's mean loss since the last validation, and start a new mean."""
        count = self.discriminator_loss_count
        mean = float(self.discriminator_loss_sum) / count if count else None
        self.discriminator_loss_sum, self.discriminator_loss_count = 0.0, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {
            "discriminator": float(self.discriminator_loss_sum),
            "judged": self.discriminator_loss_count,
            "best_psnr": self.best_psnr,
            "said": sorted(self.issued_warnings),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discriminator_loss_sum, self.discriminator_loss_count = state["discriminator"], state["judged"]
        self.best_psnr, self.issued_warnings = state["best_psnr"], set(state["said"])


def codebook_warning(
    usage: dict[str, float], assignments: int, codebook_size: int | None, quantizer: QuantizerConfig | None
) -> str | None:
    if quantizer is None or not codebook_size or assignments < MIN_ASSIGNMENTS_PER_CODE * codebook_size:
        return None
    codes_used = usage.get("codes_used_at_fewest_level", usage["codes_used"])
    if codes_used >= LOW_USAGE * codebook_size:
        return None
    location = "" if codes_used == usage["codes_used"] else " at one level"
    restart_threshold = getattr(quantizer, "restart_threshold", None)
    return (
        f"the codebook has collapsed: {codes_used:.0f} of {codebook_size} codes were used{location} since the last validation. "
        f"Train with {usage_recommendation(quantizer.name, restart_threshold, codebook_size)}"
    )


def usage_recommendation(quantizer: str | None, restart_threshold: float | None, codebook_size: int) -> str:
    """Return the options that help a quantizer to use more codes, as the end of the sentence "Train with …"."""
    smaller = max(2, 2 ** math.floor(math.log2(codebook_size / 4))) if codebook_size >= 8 else 2
    slower_or_smaller = f"a lower --optimizer.learning-rate, or a smaller codebook (--model.codebook-size {smaller})"
    if quantizer == "fsq":
        return "fewer or smaller --model.quantizer.levels, such as 8 5 5, or a lower --optimizer.learning-rate"
    if quantizer in ("lfq", "bsq", "ibq"):
        return "a larger --reconstruction.entropy, which spreads the latents over more codes"
    if quantizer == "simvq":
        return slower_or_smaller
    if restart_threshold == 0:
        return "--model.quantizer.restart-threshold 0.3, which restarts unused codes"
    if quantizer == "vq":
        return "--model.quantizer.name ema, which moves codes to their latents without a gradient"
    return f"a higher --model.quantizer.restart-threshold (0.5), {slower_or_smaller}"


def discriminator_warning(mean_loss: float | None) -> str | None:
    if mean_loss is None or mean_loss >= MIN_DISCRIMINATOR_LOSS:
        return None
    return (
        f"the discriminator is too strong: its mean loss since the last validation is {mean_loss:.3g}, so the decoder learns "
        "little from it. Train with a lower --adversarial.learning-rate, a later --adversarial.start, or --adversarial.r1 1"
    )


def reconstruction_warning(psnr: float, best_psnr: float) -> str | None:
    if not math.isfinite(best_psnr) or psnr >= best_psnr - MAX_PSNR_DROP:
        return None
    return (
        f"reconstructions became worse after the adversarial loss began: PSNR {psnr:.2f} dB, and {best_psnr:.2f} dB before. "
        "Train with a lower --adversarial.weight, or a longer --adversarial.warmup and --adversarial.ramp"
    )
