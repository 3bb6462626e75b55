r"""The autoregressive prior: a decoder-only transformer that predicts codes one position after another.

    p(k | y) = Π_i p(k_{π(i)} | y, k_{π(1)} … k_{π(i−1)}),     L = −mean_i log p(k_{π(i)} | …)

The order π is raster order by default (`orders`). The module `transformer` has the network. A uniform guess has the loss log K.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stage1_tokenizer.latent_spec import LatentSpec
from stage2_prior.autoregressive.decoding import decode
from stage2_prior.autoregressive.orders import order_known_first
from stage2_prior.autoregressive.sampling import SamplingOptions
from stage2_prior.autoregressive.token_loss import head_cross_entropy
from stage2_prior.autoregressive.transformer import CodeTransformer
from stage2_prior.prior import KnownCodes, PriorLoss
from training_harness.errors import UserError
from training_harness.pretrained import count_parameters


class AutoregressivePrior(CodeTransformer):
    options_class = SamplingOptions
    spec_fields = ("codebook_size", "levels", "height", "width", "tokenizer_id")
    output_kind = "tokens"

    def forward(self, codes: Tensor, conditioning: Tensor, orders: Tensor | None = None) -> PriorLoss:
        """Compute the loss of codes, in nats per token.

        Args:
            codes: (B, h, w) int64, or (B, levels, h, w).
            conditioning: (B,) int64 class ids.
            orders: (B, h·w) int64, the i-th position to predict; None means raster order.
        """
        tokens = self.codes_to_tokens(codes, orders)
        states = self.head_inputs(tokens, conditioning, orders)
        losses = [
            head_cross_entropy(
                states[:, :, level].flatten(0, 1), self.head_weight(level), tokens[:, level :: self.levels].flatten()
            )
            for level in range(self.levels)
        ]
        loss = torch.stack(losses).mean() if self.levels > 1 else losses[0]
        return PriorLoss(loss, {"nats_per_token": loss})

    def sample(
        self,
        spec: LatentSpec,
        conditioning: Tensor,
        options: SamplingOptions,
        generators: Sequence[torch.Generator],
        on_step: Callable[[int, Tensor], None] | None = None,
        known: KnownCodes | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        self.check_spec(spec)
        if noise is not None:
            raise UserError(
                "an autoregressive prior samples codes and does not start from noise; expected a prior of latents, such as a "
                "diffusion prior. Leave out `latents` and `--interpolate-to`."
            )
        orders = (
            order_known_first(known.known_mask.flatten(1)) if known is not None and self.supports_any_order else None
        )
        return decode(self, conditioning, options, generators, on_step, known, orders)

    @property
    def supports_any_order(self) -> bool:
        return self.config.random_order > 0

    def num_steps(self, spec: LatentSpec, options: SamplingOptions) -> int:
        return self.config.num_positions

    def describe(self, spec: LatentSpec) -> str:
        levels = f" with {spec.levels} levels" if spec.levels > 1 else ""
        return (
            f"an autoregressive prior ({count_parameters(self):,} parameters) samples {spec.height}×{spec.width} codes from a "
            f"codebook of {spec.codebook_size}{levels}"
        )
