"""Usage of a codebook on a set of images: the count of each code, by position, and what each code decodes to.

Residual codes are counted level by level, because each level has its own codebook.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stage1_tokenizer.data.image_processor import ImageProcessor
from stage1_tokenizer.metrics import CodebookUsage, codebook_usage
from stage1_tokenizer.tokenizer import Tokenizer

TILE_GRID = 3  # a code is decoded with itself on every side, and the f × f pixels of the middle one are cut out
BATCH = 64


@dataclass(frozen=True)
class LevelUsage:
    """Code usage of one level over all images."""

    codes: Tensor
    """(N, h, w) integers in [0, K)."""
    codebook_size: int

    @cached_property
    def counts(self) -> Tensor:
        """(K,) int64, the number of uses of each code."""
        return torch.bincount(self.codes.flatten(), minlength=self.codebook_size)

    @cached_property
    def usage(self) -> CodebookUsage:
        return codebook_usage(self.counts)

    @cached_property
    def codes_by_count(self) -> Tensor:
        """(K,) int64, the codes from most to least used; equally used codes by index."""
        return self.counts.argsort(descending=True, stable=True)

    @property
    def num_tokens(self) -> int:
        """N · h · w."""
        return self.codes.numel()

    @property
    def num_dead(self) -> int:
        """Number of codes that are never used."""
        return self.codebook_size - self.usage.codes_used


@dataclass(frozen=True)
class PositionUsage:
    """Code usage at each position over all images."""

    perplexity: Tensor
    """(h, w) perplexity of the codes at a position."""
    most_common_share: Tensor
    """(h, w) share of images in [0, 1] that have the position's most common code."""


def usage_by_level(codes: Tensor, codebook_size: int) -> list[LevelUsage]:
    """Split codes into levels.

    Args:
        codes: (N, h, w), or (N, levels, h, w) for residual codes.
        codebook_size: K of each level.
    """
    levels = [codes] if codes.ndim == 3 else list(codes.unbind(1))
    return [LevelUsage(level, codebook_size) for level in levels]


def usage_by_position(codes: Tensor) -> PositionUsage:
    """Compute the code usage at each position.

    Args:
        codes: (N, h, w).
    """
    counts_by_position = [column.unique(return_counts=True)[1] for column in codes.flatten(1).unbind(1)]
    perplexity = torch.tensor([codebook_usage(counts).perplexity for counts in counts_by_position])
    most_common_share = torch.tensor([counts.max().item() / len(codes) for counts in counts_by_position])
    return PositionUsage(perplexity.view(codes.shape[1:]), most_common_share.view(codes.shape[1:]))


def complete_residual_codes(codes: Tensor, level: int, selected: Tensor) -> Tensor:
    """Add to codes of one level the codes of the other levels that occur with them most often.

    Args:
        codes: (N, levels, h, w), the codes of the images.
        level: Index of the level that `selected` belongs to.
        selected: (n,) codes of this level.

    Returns:
        (n, levels) codes. An unused code gets the most common codes of all positions.
    """
    stacks = codes.movedim(1, -1).flatten(0, 2)  # (N·h·w, levels)
    completed = []
    for code in selected:
        with_code = stacks[stacks[:, level] == code]
        combinations, counts = (with_code if len(with_code) else stacks).unique(dim=0, return_counts=True)
        completed.append(combinations[counts.argmax()])
    result = torch.stack(completed)
    result[:, level] = selected
    return result


@torch.inference_mode()
def decode_code_tiles(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """Decode a `TILE_GRID` × `TILE_GRID` grid of each code and cut out the pixels of the middle position.

    Args:
        tokenizer: A tokenizer with a codebook.
        codes: (n,), or (n, levels) for residual codes.

    Returns:
        (n, C, f, f) uint8.
    """
    factor = tokenizer.config.downsampling_factor
    processor = ImageProcessor(
        channels=tokenizer.config.image_channels, content_size=(factor, factor), image_size=(TILE_GRID * factor,) * 2
    )
    tiles = []
    for batch in codes.long().split(BATCH):
        grid = batch[..., None, None].expand(*batch.shape, TILE_GRID, TILE_GRID).to(tokenizer.device)
        tiles.append(processor.postprocess(tokenizer.decode_indices(grid)).cpu())
    return torch.cat(tiles)
