r"""Encoding and decoding by tiles, for images larger than memory allows: the result is the whole image's, without seams.

A tile is computed from a window that exceeds its core by what the layers reach, and the core alone is kept. From the last
layer to the first, the reach in input positions is

    r ← s r + p   at a convolution of stride s, padding p, kernel 2 p + s,      r ← ⌈r / 2⌉   at an upsampling

Windows end where the image does, so that zeros are padded exactly where they are for the whole. Two layers see all of a map:

- Group norm. Its mean and variance are those of the whole map, from the n_t values of each core t,

      μ = Σ n_t μ_t / n,     σ² = Σ n_t (σ_t² + (μ_t − μ)²) / n

  found norm by norm, since each norm's input depends on the norms before it. Of k norms, evenly spread, the i-th costs a pass
  through i / (k + 1) of the layers: k / 2 passes, and one more for the output.
- Self-attention. Its map is assembled and goes through it whole.

Memory is O(tile), save for the input, the output, what attention takes, and one map at the latents' resolution: the layers are
cut there too, or each norm at low resolution would send the whole image through all the layers at high resolution.
"""

import copy
from collections.abc import Iterable
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stage1_tokenizer.networks.blocks import AttentionBlock, Downsample, Upsample
from training_harness.errors import UserError
from training_harness.precision import upcast


class Span(NamedTuple):
    """A tile along one axis, in positions of a segment's input."""

    start: int  # of the core
    stop: int
    window: slice  # the core and what its output depends on, as far as the map goes

    def core(self, length: int) -> slice:
        """The core's place in a map of `length` positions that was computed from the window, at any resolution."""
        extent = self.window.stop - self.window.start
        return slice(*((at - self.window.start) * length // extent for at in (self.start, self.stop)))


class Tile(NamedTuple):
    rows: Span
    columns: Span

    def window(self, x: Tensor) -> Tensor:
        return x[..., self.rows.window, self.columns.window]

    def core(self, x: Tensor) -> Tensor:
        return x[..., self.rows.core(x.shape[-2]), self.columns.core(x.shape[-1])]


def spans(length: int, side: int, halo: int) -> list[Span]:
    """Cores of `side` positions that cover the axis; the last may be shorter."""
    edges = [*range(0, length, side), length]
    return [Span(a, b, slice(max(0, a - halo), min(length, b + halo))) for a, b in pairwise(edges)]


class GlobalNorm(nn.Module):
    """A group norm by the statistics of the whole map, whatever part of it comes through."""

    affine: tuple[Tensor, Tensor] | None = None  # scale and shift, both (B, C, 1, 1)

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def measure(self, cores: Iterable[Tensor]) -> None:
        """Takes the statistics of a map from its parts (B, C, h, w)."""
        weight, bias = (parameter.view(self.norm.num_groups, -1) for parameter in (self.norm.weight, self.norm.bias))
        counts, moments = [], []
        for core in cores:
            groups = upcast(core).unflatten(1, weight.shape).flatten(2)  # (B, groups, n)
            counts.append(groups.shape[2])
            moments.append(torch.stack(torch.var_mean(groups, dim=2, correction=0)))
        share = (torch.tensor(counts, dtype=torch.float64) / sum(counts)).view(-1, 1, 1)
        variances, means = torch.stack(moments, 1).cpu().double()  # (tiles, B, groups); MPS knows no float64
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        deviation = (variance + self.norm.eps).sqrt()
        mean, deviation = (value.to(groups.dtype).to(groups.device).unsqueeze(2) for value in (mean, deviation))
        scale, shift = weight / deviation, bias - weight * mean / deviation  # (B, groups, C / groups)
        self.affine = scale.flatten(1)[..., None, None], shift.flatten(1)[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        if self.affine is None:
            raise Reached(self, x)
        scale, shift = self.affine
        return torch.addcmul(shift, upcast(x), scale).to(torch.promote_types(x.dtype, self.norm.weight.dtype))


class Reached(BaseException):  # no error: nothing that catches `Exception` on the way may stop it
    """Thrown by a norm without statistics: what comes after it cannot be computed yet."""

    def __init__(self, norm: GlobalNorm, x: Tensor) -> None:
        super().__init__()
        self.norm, self.input = norm, x


def with_global_norms(layers: nn.Sequential) -> nn.Sequential:
    """The same layers on the same weights, but for their norms. The model itself stays as it is for whoever else calls it."""
    shared = {id(tensor): tensor for tensor in (*layers.parameters(), *layers.buffers())}
    twin = copy.deepcopy(layers, shared)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.GroupNorm):
            twin.set_submodule(name, GlobalNorm(module))
    return twin


def input_of(norm: GlobalNorm, layers: nn.Sequential, window: Tensor) -> Tensor:
    """What arrives at the first norm without statistics, which has to be `norm`."""
    try:
        layers(window)
    except Reached as reached:
        if reached.norm is norm:
            return reached.input
    raise RuntimeError(f"{norm.norm} is not the next norm that the layers use; expected the order of their modules()")


def reach(layers: nn.Sequential) -> int:
    """Input positions beyond its edge on which a core's output depends."""
    positions = 0
    for module in reversed(list(layers.modules())):  # an Upsample stands before its convolution, and so comes after it
        if isinstance(module, nn.Conv2d):
            positions = positions * module.stride[0] + int(module.padding[0])
        elif isinstance(module, Upsample):
            positions = -(-positions // 2)
    return positions


def largest_map(layers: nn.Sequential, positions: int) -> int:
    """Values of the largest map that an image goes through, from the positions of the input."""
    largest = 0
    for module in layers.modules():
        if isinstance(module, Upsample):
            positions *= 4
        elif isinstance(module, nn.Conv2d):
            before, positions = positions, positions // module.stride[0] ** 2
            largest = max(largest, before * module.in_channels, positions * module.out_channels)
    return largest


def segments(layers: nn.Sequential) -> list[nn.Sequential]:
    """The layers cut at attention, and where the resolution of the latents begins or ends."""
    downs, ups = ([i for i, layer in enumerate(layers) if isinstance(layer, kind)] for kind in (Downsample, Upsample))
    cuts = {0, len(layers), *(i + 1 for i in downs[-1:]), *ups[:1]}
    for i, layer in enumerate(layers):
        if isinstance(layer, AttentionBlock):
            cuts |= {i, i + 1}
    return [nn.Sequential(*list(layers)[a:b]) for a, b in pairwise(sorted(cuts))]


def tile_by_tile(layers: nn.Sequential, x: Tensor, side: int) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layers.parameters())):
        raise UserError(
            "the image is larger than a tile and gradients are on, which tiles cannot give; expected a call within "
            "torch.no_grad(), or disable_tiling() and the whole image at once"
        )
    layers = with_global_norms(layers)
    norms = [module for module in layers.modules() if isinstance(module, GlobalNorm)]
    step = 2 ** sum(isinstance(layer, Downsample) for layer in layers)  # windows begin where strides do
    halo = -(-reach(layers) // step) * step
    tiles = [Tile(*pair) for pair in product(*(spans(length, side, halo) for length in x.shape[-2:]))]
    for norm in norms:
        norm.measure(tile.core(input_of(norm, layers, tile.window(x))) for tile in tiles)
    output = x.new_empty(0)
    for tile in tiles:
        core = tile.core(layers(tile.window(x)))
        up, down = core.shape[-1], tile.columns.stop - tile.columns.start  # the resolution changes by up / down
        if not output.numel():
            output = core.new_empty(*core.shape[:2], *(length * up // down for length in x.shape[-2:]))
        row, column = (span.start * up // down for span in tile)
        output[..., row : row + core.shape[-2], column : column + up] = core
    return output


def apply_tiled(layers: nn.Sequential, x: Tensor, side: int) -> Tensor:
    """`layers(x)` to float rounding, in the memory of one tile and its halo.

    Args:     x (B, C, H, W); side of a tile in positions of x, a multiple of the layers' strides together.
    Raises:   UserError when x has to be tiled and gradients would be needed.
    Segments whose maps are no larger as a whole than a tile's at full resolution are not tiled: a small image none of them.
    """
    budget = largest_map(layers, side * side)
    for segment in segments(layers):
        fits = largest_map(segment, x.shape[-2] * x.shape[-1]) <= budget
        output = segment(x) if fits or isinstance(segment[0], AttentionBlock) else tile_by_tile(segment, x, side)
        side = side * output.shape[-1] // x.shape[-1]
        x = output
    return x
