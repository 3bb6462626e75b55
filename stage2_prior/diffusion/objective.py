"""Training objective of a diffusion prior: denoise latents at random times."""

import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.codes.reader import CodeCache, CodeSplit
from stage2_prior.conditioning.classes import drop_classes
from stage2_prior.diffusion.health import normalization_warning
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.diffusion.schedule import NoiseSchedule
from stage2_prior.training_config import DiffusionTraining
from training_harness.errors import UserError
from training_harness.processes import mean_over_processes, process_indices

VALIDATION_BATCH = 250
BANDS = 5  # intervals of time with a validation error each
NUM_CHECKED_IMAGES = 2000  # evenly spaced images for the check of the latents before training


class DiffusionObjective:
    def __init__(self, config: DiffusionTraining, codes: CodeCache) -> None:
        """Create the objective for a code cache.

        Raises:
            UserError: The cache has no latents or another degradation, or the sampling options do not fit the prior.
        """
        codes.train.require_column("latents")
        if config.degradation != codes.degradation:
            raise UserError(
                f"{codes.path} has the degradation {codes.degradation} and the configuration {config.degradation}; expected the "
                f"same. Run `latentloom tokenize --degradation {config.degradation} …`."
            )
        self.config, self.codes = config, codes
        self.prior_config = config.prior_config(codes.spec, len(codes.label_names or ()))
        self.prior_config.check_sampling(config.sampling)
        # for the label and the time; for a mean flow also for the other end of the span and the guidance scale
        self.num_random = 4 if config.model.mean_flow else 2
        self.schedule = NoiseSchedule(config.model.schedule, config.model.zero_terminal_snr)

    def new_prior(self) -> DiffusionPrior:
        return DiffusionPrior(self.prior_config)

    def list_warnings(self) -> list[str]:
        split = self.codes.train
        rows = np.linspace(0, len(split) - 1, min(NUM_CHECKED_IMAGES, len(split)), dtype=np.int64)
        warning = normalization_warning(split.latents(rows))
        return [] if warning is None else [warning]

    def prepare_inputs(self, rows: np.ndarray, uniform: Tensor, step: int) -> tuple[Tensor | None, ...]:
        split = self.codes.train
        labels = drop_classes(split.labels(rows), uniform[:, 0], self.config.class_dropout)
        latents = split.latents(rows)
        times = self.schedule.training_times(self.config.times.sample_times(uniform[:, 1].float()))
        ends = guidance = None
        mean_flow = self.config.model.mean_flow
        if mean_flow and step >= mean_flow.spans_from * self.config.max_steps:
            times, ends = mean_flow.make_spans(times, self.config.times.sample_times(uniform[:, 2].float()))
            guidance = 1 + (mean_flow.max_guidance - 1) * uniform[:, 3].float()
        weights = self.config.times.loss_weights(self.schedule.levels(times), self.config.model.prediction)
        noise, degraded = torch.randn(latents.shape), self.degraded_latents(split, rows)
        return latents, labels, times, noise, weights, degraded, ends, guidance

    def degraded_latents(self, split: CodeSplit, rows: np.ndarray) -> Tensor | None:
        return None if self.config.degradation == "none" else split.latents(rows, "degraded")

    @torch.no_grad()
    def validate(self, prior: DiffusionPrior) -> dict[str, float]:
        """Compute squared errors at evenly spaced times, over all times and in five intervals; the noise is always the same."""
        split, limit = self.codes.validation, min(self.config.validation_images, len(self.codes.validation))
        generator = torch.Generator().manual_seed(0)
        shape = (limit, self.prior_config.channels, self.prior_config.height, self.prior_config.width)
        noise, ranks = torch.randn(shape, generator=generator), torch.randperm(limit, generator=generator)
        times = self.schedule.training_times((ranks + 0.5) / limit)
        process_rows, totals, counts = torch.tensor(process_indices(limit)), torch.zeros(BANDS), torch.zeros(BANDS)
        for rows in process_rows.split(VALIDATION_BATCH):
            batch = split.latents(rows.numpy()), split.labels(rows.numpy()), times[rows], noise[rows]
            latents, labels, batch_times, batch_noise = (x.to(prior.device) for x in batch)
            degraded = self.degraded_latents(split, rows.numpy())
            degraded = degraded if degraded is None else degraded.to(prior.device)
            errors = prior.squared_errors(latents, labels, batch_times, batch_noise, degraded).cpu()
            bands = (times[rows] * BANDS).ceil().long().clamp(1, BANDS) - 1
            totals.index_add_(0, bands, errors)
            counts += torch.bincount(bands, minlength=BANDS)
        metrics = {"validation_squared_error": mean_over_processes(float(totals.sum()), len(process_rows))}
        if limit >= BANDS:  # each band has an image
            for band, (total, count) in enumerate(zip(totals.tolist(), counts.tolist(), strict=True)):
                metrics[f"validation_squared_error_t{(band + 0.5) / BANDS:.1f}"] = mean_over_processes(
                    total, int(count)
                )
        return metrics
