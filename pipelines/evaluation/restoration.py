"""Metrics of a pipeline that restores images, on held-out images degraded like its training images."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipelines.evaluation.evaluator import ImageSet
from pipelines.latent_generation import LatentGenerationPipeline, image_generators, to_uint8
from stage1_tokenizer.data.degradation import degrade_images
from stage1_tokenizer.metrics import psnr
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.prior import KnownCodes

BATCH = 200


class Restorations:
    """Degrade at most `count` held-out images and restore them.

    Iterate over `batches` first; `metrics` covers the images of the batches so far. `labels` are the class ids of the images.
    """

    def __init__(self, pipeline: LatentGenerationPipeline, images: ImageSet, count: int, seed: int) -> None:
        self.pipeline, self.images, self.count = pipeline, images, min(count, len(images))
        self.seed, self._psnr = seed, dict[str, list[Tensor]](degraded_psnr=[], restored_psnr=[])
        labels = images.labels()
        has_classes = labels is not None and pipeline.prior.config.num_classes > 0
        self.labels = torch.tensor(labels if has_classes else [-1] * len(images))[: self.count]

    def batches(self) -> Iterator[Tensor]:
        """Yield restored images (B, C, h, w) uint8."""
        pipeline, processor = self.pipeline, self.pipeline.tokenizer.config.image_processor
        assert isinstance(pipeline.prior, DiffusionPrior)
        generators = image_generators(torch.Generator().manual_seed(self.seed), self.count)
        start = 0
        for positions, originals in self.images.batches(BATCH):
            degraded_images = degrade_images(originals, pipeline.prior.config.degradation, processor, positions)
            batch = slice(start, min(start + len(originals), self.count))
            originals, degraded_images = (x[: batch.stop - start] for x in (originals, degraded_images))
            with torch.inference_mode():
                pixel_values = processor.preprocess(degraded_images.to(pipeline.tokenizer.device))
                latents = pipeline.tokenizer.encode_latents(pixel_values)
            known = KnownCodes.for_restoration(latents)
            restored = to_uint8(pipeline.sample_pixels(self.labels[batch], generators[batch], known=known))
            self._psnr["degraded_psnr"].append(psnr(degraded_images, originals))
            self._psnr["restored_psnr"].append(psnr(restored, originals))
            yield restored
            start = batch.stop
            if start == self.count:
                return

    def metrics(self) -> dict[str, float]:
        """Return the mean PSNR in dB of the degraded and of the restored images."""
        return {name: float(torch.cat(values).mean()) for name, values in self._psnr.items()}
