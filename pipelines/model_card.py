"""The README.md that a pipeline's folder carries to the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training_harness.pretrained import count_parameters

if TYPE_CHECKING:
    from pipelines.latent_generation import LatentGenerationPipeline

FIGURES = {
    "psnr": ("reconstruction PSNR on held-out images, dB", ".2f"),
    "codes_used": ("codes used", ".0f"),
    "perplexity": ("codebook perplexity", ".0f"),
    "class_agreement": ("samples given their own class by a classifier", ".1%"),
    "frechet": ("Fréchet distance of samples to held-out images", ".2f"),
    "recall": ("recall", ".3f"),
    "precision": ("precision", ".3f"),
}


def pipeline_card(
    pipeline: LatentGenerationPipeline, metrics: dict[str, Any] | None, has_samples: bool, repo_id: str | None
) -> str:
    spec, sampling = pipeline.tokenizer.latent_spec(), pipeline.sampling
    height, width = pipeline.tokenizer.config.image_processor.content_size
    example = repr(pipeline.label_names[(*pipeline.trained_classes, 0)[0]]) if pipeline.label_names else "None"
    ids = f"ids 0 to {pipeline.prior.config.num_classes - 1}" if pipeline.prior.config.num_classes else "none"
    classes = ", ".join(pipeline.label_names) if pipeline.label_names else ids
    condition = "class-conditional" if pipeline.prior.config.num_classes else "unconditional"
    picture = "\n![samples](samples.png)\n" if has_samples else ""
    figures = [
        f"| {words} | {metrics[name]:{form}} |"
        for name, (words, form) in FIGURES.items()
        if metrics and metrics.get(name) is not None
    ]
    measured = ""
    if metrics and figures:
        measured = "\n".join(
            [
                "\n## Figures\n",
                f"N = {metrics.get('num_images')}, seed {metrics.get('seed')}, features: {metrics.get('features')}.\n",
                "| | |\n|---|---|",
                *figures,
                "",
            ]
        )
    kinds = [type(part).__name__ for part in (pipeline.tokenizer, pipeline.prior)]
    return f"""---
library_name: latentloom
pipeline_tag: unconditional-image-generation
tags: [image-generation, {condition}, {kinds[0].lower()}, {kinds[1].removesuffix("Prior").lower()}]
---

# Image generator

Samples images of {height}×{width} pixels: {pipeline.prior.describe(spec)}, and a {kinds[0]}
({count_parameters(pipeline.tokenizer):,} parameters) turns them into pixels.
{picture}
```python
import torch
from latentloom import LatentGenerationPipeline

pipeline = LatentGenerationPipeline.from_pretrained("{repo_id or "path/or/repo-id"}")
images = pipeline({example}, num_images_per_label=4, generator=torch.Generator().manual_seed(0)).images
images[0].save("sample.png")
```

Classes: {classes}. Defaults: {", ".join(f"{k} {v}" for k, v in vars(sampling).items())}.
{measured}"""
