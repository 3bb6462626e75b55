"""The reference classifier: a small classifier of real images. Its logits and features measure generated images.

    pixels in [0, 1] → convolution → (half size → two convolutions) for each further width → mean over positions → logits

BatchNorm and ReLU follow every convolution. The logits give the class agreement. The activations before the last layer are
the features for distances, precision and recall in `evaluation`. The classifier is trained on real images only, and no
generator is trained with it. Its features are not Inception features, so its distances are not comparable with published FID.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training_harness.errors import UserError
from training_harness.pretrained import StrictConfig, StrictModel, parameter_device, strict_config


class ClassifierOutput(NamedTuple):
    """Logits and features of N images."""

    logits: Tensor  # (N, num_labels) float32
    features: Tensor  # (N, F) float32, ≥ 0; F is the last width


@strict_config
class ReferenceClassifierConfig(StrictConfig):
    """Sizes of the training images and channels of each stage; `id2label` holds the names of the classes.

    `num_labels` is the number of names. If only `num_labels` is set, the names are LABEL_0, LABEL_1 …
    """

    model_type = "latentloom-judge"

    image_channels: int = 1
    image_height: int = 28
    image_width: int = 28
    widths: list[int] | tuple[int, ...] = (32, 64, 96)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.widths = tuple(self.widths)  # a list when it comes from JSON


def convolution_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Create a block (N, in_channels, H, W) → (N, out_channels, H, W) with outputs ≥ 0."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),  # BatchNorm has a bias
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class ReferenceClassifier(StrictModel):
    """Classify images, and return the activations before the last layer as features."""

    config: ReferenceClassifierConfig
    config_class = ReferenceClassifierConfig
    main_input_name = "pixels"

    def __init__(self, config: ReferenceClassifierConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = [convolution_block(config.image_channels, config.widths[0])]
        for in_width, out_width in pairwise(config.widths):
            layers += [
                nn.MaxPool2d(2),
                convolution_block(in_width, out_width),
                convolution_block(out_width, out_width),
            ]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(config.widths[-1], len(config.id2label or {}))
        self.post_init()

    def forward(self, pixels: Tensor) -> ClassifierOutput:
        """Compute logits and features.

        Args:
            pixels: (N, C, H, W) float in [0, 1], with C, H and W of the config.

        Raises:
            UserError: if the images have another shape.
        """
        self._check_shape(pixels)
        features = self.trunk(pixels).mean(dim=(2, 3))  # (N, F)
        return ClassifierOutput(self.head(features), features)

    @torch.inference_mode()
    def classify_images(self, images: Tensor, batch_size: int = 500) -> ClassifierOutput:
        """Compute logits and features in batches.

        The classifier runs in float32 and with the stored BatchNorm statistics, also under autocast and in training mode.

        Args:
            images: (N, C, H, W) uint8 on any device.

        Returns:
            Logits and features of all N images, on the CPU.

        Raises:
            UserError: if there are no images, if they are not uint8, or if they have another shape.
        """
        if images.dtype != torch.uint8 or len(images) == 0:
            raise UserError(
                f"the reference classifier was given {len(images)} images of {images.dtype}; expected at least one image "
                "as torch.uint8 in 0 … 255. Scale and round the images first"
            )
        self._check_shape(images)
        device, was_training = parameter_device(self), self.training
        self.eval()
        with torch.autocast(device.type, enabled=False):
            batches = [self(batch.to(device).float() / 255) for batch in images.split(batch_size)]
        self.train(was_training)
        logits, features = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
        return ClassifierOutput(logits, features)

    def _check_shape(self, images: Tensor) -> None:
        expected = (self.config.image_channels, self.config.image_height, self.config.image_width)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise UserError(
                f"the reference classifier was given images of shape {tuple(images.shape)}; "
                f"expected (N, {', '.join(map(str, expected))}), the shape of its training images"
            )
