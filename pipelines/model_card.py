"""The model card of a pipeline: the README.md in its folder and on the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.prior import Prior
from training_harness.pretrained import count_parameters

CARD_METRICS = {  # key in metrics.json → text and number format in the card
    "psnr": ("reconstruction PSNR on held-out images, dB", ".2f"),
    "codes_used": ("codes used", ".0f"),
    "perplexity": ("codebook perplexity", ".0f"),
    "class_agreement": ("share of samples that a classifier assigns to their own class", ".1%"),
    "frechet": ("Fréchet distance between samples and held-out images", ".2f"),
    "recall": ("recall", ".3f"),
    "precision": ("precision", ".3f"),
}


def pipeline_card(
    tokenizer: Tokenizer,
    prior: Prior,
    label_names: Sequence[str] | None,
    sampling: Any,
    trained_classes: Sequence[int],
    metrics: Mapping[str, Any] | None,
    has_samples: bool,
    repo_id: str | None,
) -> str:
    """Return the YAML header and the text of a pipeline's model card."""
    height, width = tokenizer.config.image_processor.content_size
    example = repr(label_names[(*trained_classes, 0)[0]]) if label_names else "None"
    ids = f"ids 0 to {prior.config.num_classes - 1}" if prior.config.num_classes else "none"
    classes = ", ".join(" ".join(name.split()) for name in label_names) if label_names else ids
    condition = "class-conditional" if prior.config.num_classes else "unconditional"
    image = "\n![samples](samples.png)\n" if has_samples else ""
    kinds = [type(part).__name__ for part in (tokenizer, prior)]
    return f"""---
library_name: latentloom
pipeline_tag: unconditional-image-generation
tags: [image-generation, {condition}, {kinds[0].lower()}, {kinds[1].removesuffix("Prior").lower()}]
---

# Image generator

Samples images of {height}×{width} pixels: {prior.describe(tokenizer.latent_spec())}, and a {kinds[0]}
({count_parameters(tokenizer):,} parameters) turns them into pixels.
{image}
```python
import torch
from latentloom import LatentGenerationPipeline

pipeline = LatentGenerationPipeline.from_pretrained("{repo_id or "path/or/repo-id"}")
images = pipeline({example}, num_images_per_label=4, generator=torch.Generator().manual_seed(0)).images
images[0].save("sample.png")
```

Classes: {classes}. Defaults: {", ".join(f"{k} {v}" for k, v in vars(sampling).items())}.
{metrics_table(metrics or {})}"""


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Return a section with the metrics of `CARD_METRICS` that have a value, or an empty string."""
    rows = [
        f"| {description} | {metrics[name]:{number_format}} |"
        for name, (description, number_format) in CARD_METRICS.items()
        if metrics.get(name) is not None
    ]
    if not rows:
        return ""
    setting = f"N = {metrics.get('num_images')}, seed {metrics.get('seed')}, features: {metrics.get('features')}."
    return "\n".join(["\n## Metrics\n", f"{setting}\n", "| | |", "|---|---|", *rows, ""])
