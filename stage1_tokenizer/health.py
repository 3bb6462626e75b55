"""Signs that a tokenizer's training goes wrong, each with what to do about it.

Looked at when the run validates: how much of the codebook was used since the last time, whether the discriminator has won
outright, and whether reconstructions have become worse since the decoder hears of it. Each is said once a run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the report reads run folders with these words and without torch
    from torch import Tensor

    from stage1_tokenizer.quantizers import QuantizerConfig

LOW_USAGE = 0.10  # of K: below it a codebook has collapsed
MIN_ASSIGNMENTS_PER_CODE = 4  # choices a code, before anything is said of those that were not used
WON = 0.05  # mean loss of a discriminator that is never wrong; 1 (hinge) or 0.69 is that of one that guesses
WORSE = 1.0  # dB of PSNR lost since the decoder hears of the discriminator


class Health:
    """What must be remembered between two looks; part of a checkpoint."""

    def __init__(self) -> None:
        self.discriminator: Tensor | float = 0.0  # sum of its losses since the last look
        self.judged = 0
        self.best_psnr = -math.inf  # before the decoder heard of the discriminator
        self.said: set[str] = set()

    def record_discriminator(self, loss: Tensor) -> None:
        self.discriminator = self.discriminator + loss.detach()  # no number is asked of a GPU here
        self.judged += 1

    def warnings(
        self,
        psnr: float,
        usage: dict[str, float],
        choices: int,
        codebook_size: int | None,
        quantizer: QuantizerConfig | None,
        adversarial_share: float,
    ) -> dict[str, str]:
        """What is to be said of the figures found at this step, by what it is about."""
        found = {
            "codebook": codebook_warning(usage, choices, codebook_size, quantizer),
            "discriminator": discriminator_warning(self._mean_loss()),
            "reconstruction": reconstruction_warning(psnr, self.best_psnr) if adversarial_share > 0 else None,
        }
        if adversarial_share == 0:
            self.best_psnr = max(self.best_psnr, psnr)
        new = {name: text for name, text in found.items() if text is not None and name not in self.said}
        self.said |= new.keys()
        return new

    def _mean_loss(self) -> float | None:
        """Of the discriminator since the last look."""
        mean = float(self.discriminator) / self.judged if self.judged else None
        self.discriminator, self.judged = 0.0, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {
            "discriminator": float(self.discriminator),
            "judged": self.judged,
            "best_psnr": self.best_psnr,
            "said": sorted(self.said),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discriminator, self.judged = state["discriminator"], state["judged"]
        self.best_psnr, self.said = state["best_psnr"], set(state["said"])


def codebook_warning(
    usage: dict[str, float], choices: int, codebook_size: int | None, quantizer: QuantizerConfig | None
) -> str | None:
    if quantizer is None or not codebook_size or choices < MIN_ASSIGNMENTS_PER_CODE * codebook_size:
        return None
    used = usage.get("codes_used_at_fewest_level", usage["codes_used"])
    if used >= LOW_USAGE * codebook_size:
        return None
    where = "" if used == usage["codes_used"] else " at a level"
    restart_threshold = getattr(quantizer, "restart_threshold", None)
    return (
        f"the codebook has collapsed: {used:.0f} of {codebook_size} codes were used{where} since the last validation; "
        f"train with {usage_recommendation(quantizer.name, restart_threshold, codebook_size)}"
    )


def usage_recommendation(quantizer: str | None, restart_threshold: float | None, codebook_size: int) -> str:
    """What to train with, so that a quantizer uses more of its codes."""
    smaller = max(2, 2 ** math.floor(math.log2(codebook_size / 4))) if codebook_size >= 8 else 2
    slower_or_smaller = f"a lower --optimizer.learning-rate, or a smaller codebook (--model.codebook-size {smaller})"
    if quantizer == "fsq":
        return "fewer or smaller --model.quantizer.levels, such as 8 5 5, or a lower --optimizer.learning-rate"
    if quantizer in ("lfq", "bsq", "ibq"):
        return "a larger --reconstruction.entropy, which spreads the choice over more codes"
    if quantizer == "simvq":
        return slower_or_smaller
    if restart_threshold == 0:
        return "--model.quantizer.restart-threshold 0.3: codes that nothing chooses then start anew"
    if quantizer == "vq":
        return "--model.quantizer.name ema, whose codes follow the latents by themselves"
    return f"a higher --model.quantizer.restart-threshold (0.5), {slower_or_smaller}"


def discriminator_warning(mean_loss: float | None) -> str | None:
    if mean_loss is None or mean_loss >= WON:
        return None
    return (
        f"the discriminator wins outright: its loss was {mean_loss:.3g} since the last validation, so the decoder learns little "
        "from it; train with a lower --adversarial.learning-rate, a later --adversarial.start, or --adversarial.r1 1"
    )


def reconstruction_warning(psnr: float, best: float) -> str | None:
    if not math.isfinite(best) or psnr >= best - WORSE:
        return None
    return (
        f"reconstructions have become worse since the decoder hears of the discriminator: PSNR {psnr:.2f} dB, before it "
        f"{best:.2f} dB; train with a lower --adversarial.weight, or a longer --adversarial.warmup and --adversarial.ramp"
    )
