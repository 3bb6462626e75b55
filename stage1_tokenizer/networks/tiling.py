r"""Tiled encoding and decoding of images that do not fit into memory. The result equals the untiled result, without seams.

A tile consists of a core and a window. The window contains the core and all input positions that the core's output depends
on. The layers process the window, and only the core of the output is used. The output depends on r input positions beyond
the edge of the core. From the last layer to the first,

    r ← s r + p   for a convolution of stride s, padding p, kernel 2 p + s,      r ← ⌈r / 2⌉   for an upsampling

A window never exceeds the image, so zero padding appears only at the image's edges. Two types of layers depend on the whole
feature map:

- Group norm. The mean and variance of the whole feature map follow from the n_t values of each core t,

      μ = Σ n_t μ_t / n,     σ² = Σ n_t (σ_t² + (μ_t − μ)²) / n

  They are computed for one norm after the other, because the input of a norm depends on the norms before it. With k evenly
  spaced norms, norm i needs a pass through i / (k + 1) of the layers: k / 2 passes in total, and one more for the output.
- Self-attention. It is applied to the whole feature map.

Memory is O(tile), plus the input, the output, the memory of attention, and one feature map at the latents' resolution. The
layers are also split at that resolution. Otherwise each norm at low resolution would need a pass of the whole image through
all layers at high resolution.
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
    """Extent of a tile along one axis, in positions of a segment's input."""

    start: int  # first position of the core
    stop: int  # end of the core, exclusive
    window: slice  # the core and the positions that its output depends on, clipped to the feature map

    def core(self, length: int) -> slice:
        """Return the slice of the core in the window's output of `length` positions."""
        extent = self.window.stop - self.window.start
        return slice(*((edge - self.window.start) * length // extent for edge in (self.start, self.stop)))


class Tile(NamedTuple):
    rows: Span
    columns: Span

    def crop_window(self, x: Tensor) -> Tensor:
        """Crop the window from the input of the segment."""
        return x[..., self.rows.window, self.columns.window]

    def crop_core(self, x: Tensor) -> Tensor:
        """Crop the core from a feature map that was computed from the window."""
        return x[..., self.rows.core(x.shape[-2]), self.columns.core(x.shape[-1])]


def split_axis(length: int, side: int, halo: int) -> list[Span]:
    """Split an axis into cores of `side` positions, with windows that exceed them by `halo`; the last may be shorter."""
    edges = [*range(0, length, side), length]
    return [Span(a, b, slice(max(0, a - halo), min(length, b + halo))) for a, b in pairwise(edges)]


class GlobalNorm(nn.Module):
    """A group norm that applies the statistics of the whole feature map to any part of it."""

    affine: tuple[Tensor, Tensor] | None = None  # scale and shift, both (B, C, 1, 1)

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def compute_statistics(self, cores: Iterable[Tensor]) -> None:
        """Compute the statistics of a feature map from its parts (B, C, h, w)."""
        weight, bias = (parameter.view(self.norm.num_groups, -1) for parameter in (self.norm.weight, self.norm.bias))
        counts, moments = [], []
        for core in cores:
            groups = upcast(core).unflatten(1, weight.shape).flatten(2)  # (B, groups, n)
            counts.append(groups.shape[2])
            moments.append(torch.stack(torch.var_mean(groups, dim=2, correction=0)))
        shares = (torch.tensor(counts, dtype=torch.float64) / sum(counts)).view(-1, 1, 1)
        variances, means = torch.stack(moments, 1).cpu().double()  # (tiles, B, groups); MPS has no float64
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        deviation = (variance + self.norm.eps).sqrt()
        mean, deviation = (value.to(groups.dtype).to(groups.device).unsqueeze(2) for value in (mean, deviation))
        scale, shift = weight / deviation, bias - weight * mean / deviation  # (B, groups, C / groups)
        self.affine = scale.flatten(1)[..., None, None], shift.flatten(1)[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        if self.affine is None:
            raise MissingStatistics(self, x)
        scale, shift = self.affine
        return torch.addcmul(shift, upcast(x), scale).to(torch.promote_types(x.dtype, self.norm.weight.dtype))


class MissingStatistics(BaseException):  # not an Exception, so that no handler for `Exception` catches it
    """Raised by a norm without statistics. It carries the norm's input and stops the forward pass."""

    def __init__(self, norm: GlobalNorm, x: Tensor) -> None:
        super().__init__()
        self.norm, self.input = norm, x


def copy_with_global_norms(layers: nn.Sequential) -> nn.Sequential:
    """Copy the layers with shared weights, and replace the group norms by `GlobalNorm`. The model does not change."""
    shared = {id(tensor): tensor for tensor in (*layers.parameters(), *layers.buffers())}
    copied = copy.deepcopy(layers, shared)
    for name, module in list(copied.named_modules()):
        if isinstance(module, nn.GroupNorm):
            copied.set_submodule(name, GlobalNorm(module))
    return copied


def compute_norm_input(norm: GlobalNorm, layers: nn.Sequential, window: Tensor) -> Tensor:
    """Compute the input of the first norm without statistics, which must be `norm`."""
    try:
        layers(window)
    except MissingStatistics as stop:
        if stop.norm is norm:
            return stop.input
    raise RuntimeError(f"{norm.norm} is not the next norm that the layers use; expected the order of their modules()")


def compute_reach(layers: nn.Sequential) -> int:
    """Compute r of the module's header, the number of input positions that the output depends on beyond a core's edge."""
    reach = 0
    for module in reversed(list(layers.modules())):  # modules() yields an Upsample before its convolution
        if isinstance(module, nn.Conv2d):
            reach = reach * module.stride[0] + int(module.padding[0])
        elif isinstance(module, Upsample):
            reach = -(-reach // 2)
    return reach


def largest_feature_map(layers: nn.Sequential, positions: int) -> int:
    """Compute the number of values of the largest feature map, for an input of `positions` positions."""
    largest = 0
    for module in layers.modules():
        if isinstance(module, Upsample):
            positions *= 4
        elif isinstance(module, nn.Conv2d):
            input_positions, positions = positions, positions // module.stride[0] ** 2
            largest = max(largest, input_positions * module.in_channels, positions * module.out_channels)
    return largest


def split_segments(layers: nn.Sequential) -> list[nn.Sequential]:
    """Split the layers around attention, and where the resolution of the latents begins or ends."""
    downs, ups = ([i for i, layer in enumerate(layers) if isinstance(layer, kind)] for kind in (Downsample, Upsample))
    cuts = {0, len(layers), *(i + 1 for i in downs[-1:]), *ups[:1]}
    for i, layer in enumerate(layers):
        if isinstance(layer, AttentionBlock):
            cuts |= {i, i + 1}
    return [nn.Sequential(*list(layers)[a:b]) for a, b in pairwise(sorted(cuts))]


def apply_segment_tiled(layers: nn.Sequential, x: Tensor, side: int) -> Tensor:
    """Apply one segment to (B, C, H, W) in tiles of `side`² input positions."""
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layers.parameters())):
        raise UserError(
            "the image is larger than a tile and gradients are enabled, but tiling supports no gradients; expected a call within "
            "torch.no_grad(). Or call disable_tiling() to process the whole image at once"
        )
    layers = copy_with_global_norms(layers)
    norms = [module for module in layers.modules() if isinstance(module, GlobalNorm)]
    step = 2 ** sum(isinstance(layer, Downsample) for layer in layers)  # windows must start at multiples of the stride
    halo = -(-compute_reach(layers) // step) * step
    tiles = [Tile(*spans) for spans in product(*(split_axis(length, side, halo) for length in x.shape[-2:]))]
    for norm in norms:
        norm.compute_statistics(tile.crop_core(compute_norm_input(norm, layers, tile.crop_window(x))) for tile in tiles)
    output = x.new_empty(0)
    for tile in tiles:
        core = tile.crop_core(layers(tile.crop_window(x)))
        up, down = core.shape[-1], tile.columns.stop - tile.columns.start  # the resolution changes by up / down
        if not output.numel():
            output = core.new_empty(*core.shape[:2], *(length * up // down for length in x.shape[-2:]))
        row, column = (span.start * up // down for span in tile)
        output[..., row : row + core.shape[-2], column : column + up] = core
    return output


def apply_tiled(layers: nn.Sequential, x: Tensor, side: int) -> Tensor:
    """Compute `layers(x)` up to float rounding, with the memory of one tile and its halo.

    A segment is not tiled when its feature maps are no larger than the largest feature map of one tile. So a small image is not
    tiled at all.

    Args:
        x: (B, C, H, W).
        side: side of a tile in positions of x, a multiple of the product of the layers' strides.
    Raises:   UserError when x has to be tiled and gradients are enabled.
    """
    max_values = largest_feature_map(layers, side * side)
    for segment in split_segments(layers):
        fits = largest_feature_map(segment, x.shape[-2] * x.shape[-1]) <= max_values
        output = segment(x) if fits or isinstance(segment[0], AttentionBlock) else apply_segment_tiled(segment, x, side)
        side = side * output.shape[-1] // x.shape[-1]
        x = output
    return x
