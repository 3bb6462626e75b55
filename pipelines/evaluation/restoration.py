"""A pipeline that restores pictures, measured on held-out ones that are made worse as its training images were."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipelines.evaluation.evaluator import ImageSet
from pipelines.latent_generation import LatentGenerationPipeline, image_generators, to_uint8
from stage1_tokenizer.data.degradation import degraded
from stage1_tokenizer.metrics import psnr
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.prior import KnownCodes

BATCH = 200


class Restorations:
    """At most `count` held-out pictures, restored: `labels` of them, `batches` of uint8 (B, C, h, w), then `metrics`."""

    def __init__(self, pipeline: LatentGenerationPipeline, images: ImageSet, count: int, seed: int) -> None:
        self.pipeline, self.images, self.count = pipeline, images, min(count, len(images))
        self.seed, self._psnr = seed, dict[str, list[Tensor]](degraded_psnr=[], restored_psnr=[])
        labels = images.labels()
        known = labels is not None and pipeline.prior.config.num_classes > 0
        self.labels = torch.tensor(labels if known else [-1] * len(images))[: self.count]

    def batches(self) -> Iterator[Tensor]:
        pipeline, processor = self.pipeline, self.pipeline.tokenizer.config.image_processor
        assert isinstance(pipeline.prior, DiffusionPrior)
        generators = image_generators(torch.Generator().manual_seed(self.seed), self.count)
        begin = 0
        for positions, originals in self.images.batches(BATCH):
            worse = degraded(originals, pipeline.prior.config.degradation, processor, positions)
            part = slice(begin, min(begin + len(originals), self.count))
            originals, worse = (x[: part.stop - begin] for x in (originals, worse))
            with torch.inference_mode():
                given = pipeline.tokenizer.encode_latents(processor.preprocess(worse.to(pipeline.tokenizer.device)))
            known = KnownCodes.for_restoration(given)
            restored = to_uint8(pipeline.sample_pixels(self.labels[part], generators[part], known=known))
            self._psnr["degraded_psnr"].append(psnr(worse, originals))
            self._psnr["restored_psnr"].append(psnr(restored, originals))
            yield restored
            begin = part.stop
            if begin == self.count:
                return

    def metrics(self) -> dict[str, float]:
        """Means over images, in dB, once all batches were drawn: of what was given and of what was made of it."""
        return {name: float(torch.cat(values).mean()) for name, values in self._psnr.items()}
