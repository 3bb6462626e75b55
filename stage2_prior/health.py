"""Warning about a prior that overfits, with a recommendation."""

OVERFITTING_RISE = 0.01  # share of the best validation loss; smaller rises may be noise
RECOMMENDATION = (
    "Use more images, add mirrored ones (latentloom tokenize --flip), train a smaller model or fewer steps, or pass "
    "--model.dropout 0.1 for an autoregressive prior"
)


def overfitting_message(loss: float, best: float, best_step: int) -> str | None:
    """Return a warning when the validation loss is above the best one, from step `best_step`, by more than noise."""
    if loss <= best * (1 + OVERFITTING_RISE):
        return None
    return (
        f"the validation loss rises: {loss:.3f} after {best:.3f} at step {best_step}, so the prior overfits its training images; "
        f"the checkpoint of step {best_step} is kept. {RECOMMENDATION}."
    )
