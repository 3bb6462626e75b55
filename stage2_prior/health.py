"""A sign that a prior learns its training images by heart, with what to do about it."""

OVERFITTING_RISE = 0.01  # of the best validation loss: a rise by more is no noise
RECOMMENDATION = (
    "more images, mirrored ones (latentloom tokenize --flip) or a smaller model help, and --model.dropout 0.1 for an "
    "autoregressive one; so does stopping earlier"
)


def overfitting_message(loss: float, best: float, best_step: int) -> str | None:
    """What is to be said of a validation loss when the best one was found at `best_step`."""
    if loss <= best * (1 + OVERFITTING_RISE):
        return None
    return (
        f"validation has turned: {loss:.3f} after {best:.3f} at step {best_step}, whose checkpoint is kept; the "
        f"prior learns its training images by heart: {RECOMMENDATION}"
    )
