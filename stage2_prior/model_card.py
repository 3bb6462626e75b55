"""The README.md that a prior's folder carries to the Hub."""

from pathlib import Path

from stage2_prior.autoregressive.model import AutoregressivePrior
from training_harness.metric_log import read_metrics
from training_harness.pretrained import count_parameters


def prior_card(prior: AutoregressivePrior, metrics: Path) -> str:
    config = prior.config
    rows = [row for row in read_metrics(metrics) if "validation_nats_per_token" in row]
    last = rows[-1] if rows else {}
    classes = f"{config.num_classes} classes" if config.num_classes else "no classes"
    return f"""---
library_name: latentloom
tags: [image-generation, autoregressive]
---

# Autoregressive prior

A decoder-only transformer over {config.height}×{config.width} image codes of {config.codebook_size}, with {classes}. It
samples images together with its tokenizer, as a `LatentGenerationPipeline`.

| | |
|---|---|
| parameters | {count_parameters(prior):,} |
| layers, width, heads | {config.num_layers}, {config.hidden_size}, {config.num_heads} |
| validation loss | {last.get("validation_nats_per_token", float("nan")):.3f} nats a token, \
{last.get("validation_bits_per_image", float("nan")):.0f} bits an image |
| tokenizer id | `{config.tokenizer_id}` |
"""
