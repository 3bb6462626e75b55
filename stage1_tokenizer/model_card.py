"""The README.md that a tokenizer's folder carries to the Hub."""

from collections.abc import Mapping
from pathlib import Path

from stage1_tokenizer.tokenizer import Tokenizer
from training_harness.metric_log import read_metrics
from training_harness.pretrained import count_parameters


def tokenizer_card(tokenizer: Tokenizer, metrics: Path) -> str:
    spec = tokenizer.latent_spec()
    rows = [row for row in read_metrics(metrics) if "validation_psnr" in row]
    last = rows[-1] if rows else {}
    size = f"{spec.image_height}×{spec.image_width}, {spec.image_channels} channel{'s' * (spec.image_channels > 1)}"
    kind, grid = type(tokenizer).__name__, f"{spec.height}×{spec.width}"
    pixels = f"(B, {spec.image_channels}, {spec.image_height}, {spec.image_width}) in [-1, 1]"
    if spec.codebook_size is None:
        what, call, shape = f"continuous latents of {grid}×{spec.channels}", "latents", f"(B, {spec.channels}, "
    else:
        what = f"{grid} codes of {spec.codebook_size}"
        what = what if spec.levels == 1 else f"{what} at each of {spec.levels} levels"
        call, shape = "indices", "(B, " if spec.levels == 1 else f"(B, {spec.levels}, "
    used = "" if spec.codebook_size is None else usage(last, spec.codebook_size)
    return f"""---
library_name: latentloom
tags: [image-tokenizer, {kind.lower()}]
---

# Image tokenizer

A {kind} that turns images ({size}) into {what} and back.

```python
from stage1_tokenizer import {kind}

tokenizer = {kind}.from_pretrained("path/or/repo-id")
{call} = tokenizer.encode_{call}(pixel_values)  # {shape}{spec.height}, {spec.width}) from {pixels}
images = tokenizer.decode_{call}({call})
```

| | |
|---|---|
| parameters | {count_parameters(tokenizer):,} |
| downsampling factor | {spec.downsampling_factor} |
| validation PSNR | {last.get("validation_psnr", float("nan")):.2f} dB |
{used}| tokenizer id | `{spec.tokenizer_id}` |
"""


def usage(row: Mapping[str, float], codebook_size: int) -> str:
    used, perplexity = row.get("codes_used", 0), row.get("perplexity", float("nan"))
    return f"| codes used, perplexity | {used:.0f}, {perplexity:.0f} of {codebook_size} |\n"
