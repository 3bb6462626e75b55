"""Filling masked regions of held-out images: in raster order, with candidates, and in any order.

The pipeline fills a square in the middle of each test image of the embedded set, with the class of the image. Three methods are
compared. `ar-tiny` in raster order with one candidate does not use the codes below the square. The same prior with several
candidates weights them by the codes that follow. `ar-tiny-any-order` reads all known codes first. Pixels outside the square are
the original ones. The reference classifier was not trained on any of these images. Fréchet distance and agreement are measured
on the edited images. The seam is the mean step between neighbouring pixels across the square's edge, minus the same of the
originals, in levels of 255: 0 means no visible seam. The error is the mean absolute difference between the filled pixels and the
original ones. A good filling need not have a small error.
"""

from pathlib import Path
from typing import Any

import torch
from frame import Report, markdown_table
from quickstart_codes import train_codes, train_prior
from tokenizer_quality import load_benchmark_images
from torch import Tensor

from pipelines.evaluation.frechet import frechet_distance
from pipelines.evaluation.linear_probe import class_agreement
from pipelines.latent_generation import LatentGenerationPipeline, to_uint8
from stage1_tokenizer.data.image_grids import image_grid, save_image

MASKED = slice(6, 22)  # masked rows and columns, in pixels
GRID_COLUMNS = 12
ONE_CANDIDATE, ANY_ORDER = "raster order, 1 candidate", "any order, 1 candidate"


def measure_seam(images: Tensor) -> Tensor:
    """Return the mean absolute step (N,) across the four edges of the square, of uint8 (N, 1, h, w)."""
    x, first, last = images[:, 0].float(), MASKED.start, MASKED.stop
    steps = [(x[:, at - 1, MASKED] - x[:, at, MASKED]).abs() for at in (first, last)]
    steps += [(x[:, MASKED, at - 1] - x[:, MASKED, at]).abs() for at in (first, last)]
    return torch.cat(steps, 1).mean(1)


def run(quick: bool) -> Report:
    share, count, seed = (0.05, 100, 0) if quick else (1.0, 2000, 0)
    codes, images = train_codes(share, seed), load_benchmark_images("embedded")
    originals, labels = images.originals[:count], torch.tensor(images.test.labels()[:count])
    classifier, side = images.extractor, images.size
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[MASKED, MASKED] = True
    raster, any_order = (
        LatentGenerationPipeline.from_pretrained(train_prior(codes, name, share, seed))
        for name in ("ar-tiny", "ar-tiny-any-order")
    )
    methods: dict[str, tuple[LatentGenerationPipeline, dict[str, Any]]] = {
        ONE_CANDIDATE: (raster, {"num_candidates": 1})
    }
    for candidates in (2,) if quick else (4, 8):
        methods[f"raster order, {candidates} candidates"] = raster, {"num_candidates": candidates}
    methods[ANY_ORDER] = any_order, {}
    rows, grid_rows = (
        {},
        {"original": originals[:GRID_COLUMNS], "masked": originals[:GRID_COLUMNS].masked_fill(mask, 127)},
    )
    for name, (pipeline, options) in methods.items():
        pipeline.set_progress_bar_config(disable=True)
        filled = pipeline(
            labels.tolist(),
            image=list(originals),
            mask_image=mask.numpy(),
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **options,
        ).images
        edited = to_uint8(filled)
        assert torch.equal(edited.masked_select(~mask), originals.masked_select(~mask))
        features = classifier.extract(edited)
        error = (edited.float() - originals.float())[..., MASKED, MASKED].abs().mean()
        rows[name] = {
            "frechet": frechet_distance(features.features, images.real),
            "agreement": class_agreement(features.class_logits, labels),
            "seam": (measure_seam(edited) - measure_seam(originals)).mean().item(),
            "error": error.item(),
        }
        grid_rows[name] = edited[:GRID_COLUMNS]
        print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
    head = ["", "Fréchet distance", "agreement", "seam", "error"]
    metrics_table = markdown_table(head, [[name, *row.values()] for name, row in rows.items()])
    size = MASKED.stop - MASKED.start
    setting = f"{count:,} test images, a masked square of {size} pixels per side in {side}, the recipe's guidance; seed {seed}."

    def chart(path: Path) -> None:
        save_image(image_grid(torch.cat(list(grid_rows.values())), GRID_COLUMNS, list(grid_rows), scale=2), path)

    return Report(
        name="editing",
        title="Filling masked regions of held-out images",
        text="\n\n".join([(__doc__ or "").partition("\n\n")[2].strip(), setting, metrics_table]),
        results={"seed": seed, "num_images": count, "masked": [MASKED.start, MASKED.stop], "rows": rows},
        chart=chart,
    )
