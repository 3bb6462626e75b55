"""Model card (README.md) of a prior."""

from pathlib import Path

from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.diffusion.config import UNetModel
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.prior import Prior
from training_harness.metric_log import read_metrics
from training_harness.pretrained import count_parameters


def prior_card(prior: Prior, metrics: Path) -> str:
    """Return the text of a prior's model card, with the last validation metrics of `metrics`, a metrics.jsonl."""
    config, model, last_metrics = prior.config, prior.config.model, dict[str, float]()
    for row in read_metrics(metrics):
        last_metrics |= {name: value for name, value in row.items() if name.startswith("validation_")}
    kind, description, loss = _describe_prior(prior, last_metrics)
    sizes = {"layers": model.num_layers, "width": model.hidden_size}
    if not isinstance(model, UNetModel):
        sizes["heads"] = model.num_heads
    classes = f"{config.num_classes} classes" if config.num_classes else "no classes"
    return f"""---
library_name: latentloom
tags: [image-generation, {kind.lower()}]
---

# {kind} prior

{description}, with {classes}. Together with its tokenizer, it samples images in a `LatentGenerationPipeline`.

| | |
|---|---|
| parameters | {count_parameters(prior):,} |
| {", ".join(sizes)} | {", ".join(map(str, sizes.values()))} |
| validation loss | {loss} |
| tokenizer id | `{config.tokenizer_id}` |
"""


def _describe_prior(prior: Prior, metrics: dict[str, float]) -> tuple[str, str, str]:
    """Return the kind of prior, a description, and its validation loss."""
    config, missing = prior.config, float("nan")
    if isinstance(prior, AutoregressivePrior):
        nats, bits = (metrics.get(f"validation_{name}", missing) for name in ("nats_per_token", "bits_per_image"))
        grid, size = f"{config.height}×{config.width}", config.codebook_size
        description = f"A decoder-only transformer over {grid} image codes from a codebook of {size}"
        return "Autoregressive", description, f"{nats:.3f} nats per token, {bits:.0f} bits per image"
    assert isinstance(prior, DiffusionPrior)
    network = "transformer" if config.model.name == "dit" else "U-Net"
    description = f"A diffusion {network} over {config.height}×{config.width} latents of {config.channels} channels"
    error = metrics.get("validation_squared_error", missing)
    return "Diffusion", description, f"{error:.4f} squared error of the prediction"
