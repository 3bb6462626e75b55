"""A codebook as a set of images uses it: how often each code, where on the grid, and what each decodes to.

Residual codes are looked at level by level, since each level has a codebook of its own.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stage1_tokenizer.data.image_processor import ImageProcessor
from stage1_tokenizer.metrics import CodebookUsage, codebook_usage
from stage1_tokenizer.tokenizer import Tokenizer

GRID = 3  # a code is decoded with itself on every side, and its own f × f pixels are cut out
BATCH = 64


@dataclass(frozen=True)
class LevelUsage:
    """The codes of one level, those of all images."""

    codes: Tensor
    """(N, h, w) in [0, K)."""
    codebook_size: int

    @cached_property
    def counts(self) -> Tensor:
        """(K,) int64."""
        return torch.bincount(self.codes.flatten(), minlength=self.codebook_size)

    @cached_property
    def usage(self) -> CodebookUsage:
        return codebook_usage(self.counts)

    @cached_property
    def ranked(self) -> Tensor:
        """(K,) codes, the most used first, those of equal use by their index."""
        return self.counts.argsort(descending=True, stable=True)

    @property
    def choices(self) -> int:
        return self.codes.numel()

    @property
    def dead(self) -> int:
        return self.codebook_size - self.usage.codes_used


@dataclass(frozen=True)
class PositionUsage:
    """(h, w) each: the perplexity of the codes at a position over images, and the share of the most common one."""

    perplexity: Tensor
    most_common: Tensor


def by_level(codes: Tensor, codebook_size: int) -> list[LevelUsage]:
    """codes: (N, h, w), or (N, levels, h, w) of residual codes."""
    levels = [codes] if codes.ndim == 3 else list(codes.unbind(1))
    return [LevelUsage(level, codebook_size) for level in levels]


def usage_by_position(codes: Tensor) -> PositionUsage:
    """codes: (N, h, w)."""
    counts = [column.unique(return_counts=True)[1] for column in codes.flatten(1).unbind(1)]
    perplexity = torch.tensor([codebook_usage(found).perplexity for found in counts])
    most_common = torch.tensor([found.max().item() / len(codes) for found in counts])
    return PositionUsage(perplexity.view(codes.shape[1:]), most_common.view(codes.shape[1:]))


def in_company(codes: Tensor, level: int, chosen: Tensor) -> Tensor:
    """Each of `chosen` on its level, with the residual codes that it most often comes with on the others.

    Args:     codes (N, levels, h, w); chosen (n,) codes of `level`.
    Returns:  (n, levels); a code that nothing chose comes with the most common ones of all.
    """
    stacks = codes.movedim(1, -1).flatten(0, 2)  # (N·h·w, levels)
    common = []
    for code in chosen:
        holding = stacks[stacks[:, level] == code]
        found, counts = (holding if len(holding) else stacks).unique(dim=0, return_counts=True)
        common.append(found[counts.argmax()])
    company = torch.stack(common)
    company[:, level] = chosen
    return company


@torch.inference_mode()
def decoded_codes(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """What codes look like among their own kind: the centre of a grid of `GRID` × `GRID` that holds one code alone.

    Args:     codes (n,), or (n, levels) of residual codes.
    Returns:  (n, C, f, f) uint8.
    """
    factor = tokenizer.config.downsampling_factor
    whole = ImageProcessor(
        channels=tokenizer.config.image_channels, content_size=(factor, factor), image_size=(GRID * factor,) * 2
    )
    parts = []
    for part in codes.long().split(BATCH):
        grid = part[..., None, None].expand(*part.shape, GRID, GRID).to(tokenizer.device)
        parts.append(whole.postprocess(tokenizer.decode_indices(grid)).cpu())
    return torch.cat(parts)
