"""The README.md that a prior's folder carries to the Hub."""

from pathlib import Path

from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.diffusion.config import UNetModel
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.prior import Prior
from training_harness.metric_log import read_metrics
from training_harness.pretrained import count_parameters


def prior_card(prior: Prior, metrics: Path) -> str:
    config, model, last = prior.config, prior.config.model, dict[str, float]()
    for row in read_metrics(metrics):
        last |= {name: value for name, value in row.items() if name.startswith("validation_")}
    kind, what, loss = _describe_prior(prior, last)
    sizes = {"layers": model.num_layers, "width": model.hidden_size}
    if not isinstance(model, UNetModel):
        sizes["heads"] = model.num_heads
    classes = f"{config.num_classes} classes" if config.num_classes else "no classes"
    return f"""---
library_name: latentloom
tags: [image-generation, {kind.lower()}]
---

# {kind} prior

{what}, with {classes}. It samples images together with its tokenizer, as a `LatentGenerationPipeline`.

| | |
|---|---|
| parameters | {count_parameters(prior):,} |
| {", ".join(sizes)} | {", ".join(map(str, sizes.values()))} |
| validation loss | {loss} |
| tokenizer id | `{config.tokenizer_id}` |
"""


def _describe_prior(prior: Prior, last: dict[str, float]) -> tuple[str, str, str]:
    """The kind, what it is, and its last validation loss."""
    config, nothing = prior.config, float("nan")
    if isinstance(prior, AutoregressivePrior):
        nats, bits = (last.get(f"validation_{name}", nothing) for name in ("nats_per_token", "bits_per_image"))
        what = f"A decoder-only transformer over {config.height}×{config.width} image codes of {config.codebook_size}"
        return "Autoregressive", what, f"{nats:.3f} nats a token, {bits:.0f} bits an image"
    assert isinstance(prior, DiffusionPrior)
    network = "transformer" if config.model.name == "dit" else "U-Net"
    what = f"A diffusion {network} over {config.height}×{config.width} latents of {config.channels} channels"
    return "Diffusion", what, f"{last.get('validation_squared_error', nothing):.4f} squared error of its prediction"
