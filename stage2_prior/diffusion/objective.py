"""Stage two's loop for a diffusion prior: what the network predicts of latents at times that are drawn."""

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

VALIDATION_BATCH, BANDS = 250, 5
MEASURED = 2000  # images, evenly spaced, whose latents are looked at before training


class DiffusionObjective:
    def __init__(self, config: DiffusionTraining, codes: CodeCache) -> None:
        """Raises UserError for codes that the prior could not learn."""
        codes.train.require("latents")
        if config.degradation != codes.degradation:
            raise UserError(
                f"{codes.path} has the degradation {codes.degradation} and the prior is to undo {config.degradation}; expected the "
                f"same; run: latentloom tokenize --degradation {config.degradation} …"
            )
        self.config, self.codes = config, codes
        self.prior_config = config.prior_config(codes.spec, len(codes.label_names or ()))
        self.prior_config.check_sampling(config.sampling)
        # for the label, the time, and the span's other end and its guidance
        self.draws = 4 if config.model.mean_flow else 2
        self.schedule = NoiseSchedule(config.model.schedule, config.model.zero_terminal_snr)

    def new_prior(self) -> DiffusionPrior:
        return DiffusionPrior(self.prior_config)

    def warnings(self) -> list[str]:
        split = self.codes.train
        rows = np.linspace(0, len(split) - 1, min(MEASURED, len(split)), dtype=np.int64)
        text = normalization_warning(split.latents(rows))
        return [] if text is None else [text]

    def inputs(self, rows: np.ndarray, draws: Tensor, step: int) -> tuple[Tensor | None, ...]:
        split = self.codes.train
        labels = drop_classes(split.labels(rows), draws[:, 0], self.config.class_dropout)
        latents = split.latents(rows)
        times = self.schedule.training_times(self.config.times.shares(draws[:, 1].float()))
        ends = guidance = None
        mean_flow = self.config.model.mean_flow
        if mean_flow and step >= mean_flow.spans_from * self.config.max_steps:
            times, ends = mean_flow.spans(times, self.config.times.shares(draws[:, 2].float()))
            guidance = 1 + (mean_flow.max_guidance - 1) * draws[:, 3].float()
        weights = self.config.times.weights(self.schedule.levels(times), self.config.model.prediction)
        return latents, labels, times, torch.randn(latents.shape), weights, self.degraded(split, rows), ends, guidance

    def degraded(self, split: CodeSplit, rows: np.ndarray) -> Tensor | None:
        return None if self.config.degradation == "none" else split.latents(rows, "degraded")

    @torch.no_grad()
    def validation(self, prior: DiffusionPrior) -> dict[str, float]:
        """Squared errors at evenly spread times, with the same noise whenever it is measured; and in five bands of time."""
        split, limit = self.codes.validation, min(self.config.validation_images, len(self.codes.validation))
        generator = torch.Generator().manual_seed(0)
        shape = (limit, self.prior_config.channels, self.prior_config.height, self.prior_config.width)
        noise, places = torch.randn(shape, generator=generator), torch.randperm(limit, generator=generator)
        times = self.schedule.training_times((places + 0.5) / limit)
        own, totals, counts = torch.tensor(process_indices(limit)), torch.zeros(BANDS), torch.zeros(BANDS)
        for rows in own.split(VALIDATION_BATCH):
            given = split.latents(rows.numpy()), split.labels(rows.numpy()), times[rows], noise[rows]
            latents, labels, at, added = (x.to(prior.device) for x in given)
            degraded = self.degraded(split, rows.numpy())
            degraded = degraded if degraded is None else degraded.to(prior.device)
            errors = prior.squared_errors(latents, labels, at, added, degraded).cpu()
            bands = (times[rows] * BANDS).ceil().long().clamp(1, BANDS) - 1
            totals.index_add_(0, bands, errors)
            counts += torch.bincount(bands, minlength=BANDS)
        figures = {"validation_squared_error": mean_over_processes(float(totals.sum()), len(own))}
        if limit >= BANDS:  # each has an image
            for band, (total, count) in enumerate(zip(totals.tolist(), counts.tolist(), strict=True)):
                figures[f"validation_squared_error_t{(band + 0.5) / BANDS:.1f}"] = mean_over_processes(
                    total, int(count)
                )
        return figures
