"""The model card of a tokenizer, the README.md of its folder."""

from collections.abc import Mapping
from pathlib import Path

from stage1_tokenizer.tokenizer import Tokenizer
from training_harness.metric_log import read_metrics
from training_harness.pretrained import count_parameters


def tokenizer_card(tokenizer: Tokenizer, metrics_path: Path) -> str:
    """Return the model card as Markdown, with the last validation metrics of `metrics.jsonl`."""
    spec = tokenizer.latent_spec()
    rows = [row for row in read_metrics(metrics_path) if "validation_psnr" in row]
    metrics = rows[-1] if rows else {}
    size = f"{spec.image_height}×{spec.image_width}, {spec.image_channels} channel{'s' * (spec.image_channels > 1)}"
    class_name, grid = type(tokenizer).__name__, f"{spec.height}×{spec.width}"
    pixels = f"(B, {spec.image_channels}, {spec.image_height}, {spec.image_width}) in [-1, 1]"
    if spec.codebook_size is None:
        codes, call, shape = f"continuous latents of {grid}×{spec.channels}", "latents", f"(B, {spec.channels}, "
    else:
        codes = f"{grid} codes from a codebook of {spec.codebook_size}"
        codes = codes if spec.levels == 1 else f"{codes} at each of {spec.levels} levels"
        call, shape = "indices", "(B, " if spec.levels == 1 else f"(B, {spec.levels}, "
    usage = "" if spec.codebook_size is None else usage_row(metrics, spec.codebook_size)
    return f"""---
library_name: latentloom
tags: [image-tokenizer, {class_name.lower()}]
---

# Image tokenizer

A {class_name} that encodes images ({size}) as {codes} and decodes them again.

```python
from stage1_tokenizer import {class_name}

tokenizer = {class_name}.from_pretrained("path/or/repo-id")
{call} = tokenizer.encode_{call}(pixel_values)  # {shape}{spec.height}, {spec.width}) from {pixels}
images = tokenizer.decode_{call}({call})
```

| | |
|---|---|
| parameters | {count_parameters(tokenizer):,} |
| downsampling factor | {spec.downsampling_factor} |
| validation PSNR | {metrics.get("validation_psnr", float("nan")):.2f} dB |
{usage}| tokenizer id | `{spec.tokenizer_id}` |
"""


def usage_row(metrics: Mapping[str, float], codebook_size: int) -> str:
    """Return the table row for the codebook usage."""
    codes_used, perplexity = metrics.get("codes_used", 0), metrics.get("perplexity", float("nan"))
    return f"| codes used, perplexity | {codes_used:.0f}, {perplexity:.0f} of {codebook_size} |\n"
