"""Training objective of an autoregressive prior: predict the next code, in raster order or random orders."""

import math

import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.codes.reader import CodeCache, CodeSplit
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.autoregressive.orders import random_orders
from stage2_prior.conditioning.classes import drop_classes
from stage2_prior.training_config import AutoregressiveTraining
from training_harness.errors import UserError
from training_harness.processes import mean_over_processes, process_indices

VALIDATION_BATCH = 250


class AutoregressiveObjective:
    def __init__(self, config: AutoregressiveTraining, codes: CodeCache) -> None:
        """Create the objective for a code cache.

        Raises:
            UserError: The codes have no codebook or no indices.
        """
        if codes.spec.codebook_size is None:
            raise UserError(
                f"the codes in {codes.path} come from a tokenizer without a codebook; expected discrete codes for an "
                "autoregressive prior. Train a tokenizer with a codebook, such as `--recipe vqgan-f4`, or a prior of latents, "
                "such as `--recipe diffusion-tiny`."
            )
        codes.train.require_column("indices")
        self.config, self.codes = config, codes
        self.prior_config = config.prior_config(codes.spec, len(codes.label_names or ()))
        self.num_random = 2 + self.prior_config.num_positions if config.order.uses_random_orders else 1

    def new_prior(self) -> AutoregressivePrior:
        prior = AutoregressivePrior(self.prior_config)
        prior.initialize_from_code_vectors(self.codes.code_vectors())
        return prior

    def list_warnings(self) -> list[str]:
        return []

    def prepare_inputs(self, rows: np.ndarray, uniform: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        config, split = self.config, self.codes.train
        labels = drop_classes(split.labels(rows), uniform[:, 0], config.class_dropout)
        orders = random_orders(uniform[:, 1:], config.order.random_share_at(step, config.max_steps))
        return split.indices(rows), labels, orders

    def validate(self, prior: AutoregressivePrior) -> dict[str, float]:
        nats = validation_loss(prior, self.codes.validation, self.config.validation_images)
        bits = nats / math.log(2) * self.codes.spec.tokens
        return {"validation_nats_per_token": nats, "validation_bits_per_image": bits}


@torch.no_grad()
def validation_loss(prior: AutoregressivePrior, split: CodeSplit, limit: int) -> float:
    """Compute the loss, in nats per token, on the first `limit` images of a split; each process takes its share."""
    all_rows, total = np.array(process_indices(min(limit, len(split)))), 0.0
    for start in range(0, len(all_rows), VALIDATION_BATCH):
        rows = all_rows[start : start + VALIDATION_BATCH]
        loss = prior(split.indices(rows).to(prior.device), split.labels(rows).to(prior.device))
        total += float(loss.total) * len(rows)
    return mean_over_processes(total, len(all_rows))
