"""The README.md that a tokenizer's folder carries to the Hub."""

from pathlib import Path

from stage1_tokenizer.tokenizer import Tokenizer
from training_harness.metric_log import read_metrics
from training_harness.pretrained import count_parameters


def tokenizer_card(tokenizer: Tokenizer, metrics: Path) -> str:
    spec = tokenizer.latent_spec()
    rows = [row for row in read_metrics(metrics) if "validation_psnr" in row]
    last = rows[-1] if rows else {}
    size = f"{spec.image_height}×{spec.image_width}, {spec.image_channels} channel{'s' * (spec.image_channels > 1)}"
    return f"""---
library_name: latentloom
tags: [image-tokenizer, vqgan]
---

# Image tokenizer

A VQGAN that turns images ({size}) into {spec.height}×{spec.width} codes of {spec.codebook_size} and back.

```python
from stage1_tokenizer import VQGAN

tokenizer = VQGAN.from_pretrained("path/or/repo-id")
indices = tokenizer.encode_indices(pixel_values)  # (B, {spec.height}, {spec.width}) from (B, {spec.image_channels}, \
{spec.image_height}, {spec.image_width}) in [-1, 1]
images = tokenizer.decode_indices(indices)
```

| | |
|---|---|
| parameters | {count_parameters(tokenizer):,} |
| downsampling factor | {spec.downsampling_factor} |
| validation PSNR | {last.get("validation_psnr", float("nan")):.2f} dB |
| codes used, perplexity | {last.get("codes_used", 0):.0f}, {last.get("perplexity", float("nan")):.0f} of {spec.codebook_size} |
| tokenizer id | `{spec.tokenizer_id}` |
"""
