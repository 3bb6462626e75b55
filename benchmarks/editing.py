"""Filling masked regions of held-out images: in raster order, with candidates, and in any order.

A square in the middle of each test image of the embedded set is filled through the pipeline, given the image's class: by
`ar-tiny` in raster order with one candidate, which sees nothing below the square; by the same prior with several candidates,
weighted by the codes that follow; and by `ar-tiny-any-order`, which reads all known codes first. Kept pixels are those of the
original. The reference classifier has seen none of the images. Fréchet distance and agreement are those of the edited images.
The seam is the mean step between neighbours across the square's edge, minus the same of the originals, in levels of 255: 0
means no visible seam. The error is the one of the filled pixels against the original. A good filling need not have a small
error.
"""

from pathlib import Path
from typing import Any

import torch
from frame import Report, table
from quickstart_codes import codes_folder, trained_prior
from tokenizer_quality import benchmark_images
from torch import Tensor

from pipelines.evaluation.frechet import frechet_distance
from pipelines.evaluation.linear_probe import class_agreement
from pipelines.latent_generation import LatentGenerationPipeline, to_uint8
from stage1_tokenizer.data.image_grids import image_grid, save_image

HOLE = slice(6, 22)  # pixels, of rows and of columns
SHOWN = 12
NAIVE, ANY_ORDER = "raster order, 1 candidate", "any order, 1 candidate"


def seam(pictures: Tensor) -> Tensor:
    """Mean |step| (N,) across the four edges of the hole, of uint8 (N, 1, h, w)."""
    x, first, last = pictures[:, 0].float(), HOLE.start, HOLE.stop
    steps = [(x[:, at - 1, HOLE] - x[:, at, HOLE]).abs() for at in (first, last)]
    steps += [(x[:, HOLE, at - 1] - x[:, HOLE, at]).abs() for at in (first, last)]
    return torch.cat(steps, 1).mean(1)


def run(quick: bool) -> Report:
    share, count, seed = (0.05, 100, 0) if quick else (1.0, 2000, 0)
    codes, pictures = codes_folder(share, seed), benchmark_images("embedded")
    originals, labels = pictures.originals[:count], torch.tensor(pictures.test.labels()[:count])
    classifier, side = pictures.extractor, pictures.size
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[HOLE, HOLE] = True
    raster, anywhere = (
        LatentGenerationPipeline.from_pretrained(trained_prior(codes, name, share, seed))
        for name in ("ar-tiny", "ar-tiny-any-order")
    )
    tried: dict[str, tuple[LatentGenerationPipeline, dict[str, Any]]] = {NAIVE: (raster, {"num_candidates": 1})}
    for candidates in (2,) if quick else (4, 8):
        tried[f"raster order, {candidates} candidates"] = raster, {"num_candidates": candidates}
    tried[ANY_ORDER] = anywhere, {}
    rows, shown = {}, {"original": originals[:SHOWN], "hole": originals[:SHOWN].masked_fill(mask, 127)}
    for name, (pipeline, options) in tried.items():
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(
            labels.tolist(),
            image=list(originals),
            mask_image=mask.numpy(),
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **options,
        ).images
        edited = to_uint8(drawn)
        assert torch.equal(edited.masked_select(~mask), originals.masked_select(~mask))
        seen = classifier.extract(edited)
        error = (edited.float() - originals.float())[..., HOLE, HOLE].abs().mean()
        rows[name] = {
            "frechet": frechet_distance(seen.features, pictures.real),
            "agreement": class_agreement(seen.class_logits, labels),
            "seam": (seam(edited) - seam(originals)).mean().item(),
            "error": error.item(),
        }
        shown[name] = edited[:SHOWN]
        print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
    head = ["", "Fréchet distance", "agreement", "seam", "error"]
    body = table(head, [[name, *row.values()] for name, row in rows.items()])
    size = HOLE.stop - HOLE.start
    words = (
        f"{count:,} test images, a masked square of {size} pixels a side in {side}, the recipe's guidance; seed {seed}."
    )

    def chart(path: Path) -> None:
        save_image(image_grid(torch.cat(list(shown.values())), SHOWN, list(shown), scale=2), path)

    return Report(
        name="editing",
        title="Filling masked regions of held-out images",
        text="\n\n".join([(__doc__ or "").partition("\n\n")[2].strip(), words, body]),
        figures={"seed": seed, "num_images": count, "hole": [HOLE.start, HOLE.stop], "rows": rows},
        chart=chart,
    )
