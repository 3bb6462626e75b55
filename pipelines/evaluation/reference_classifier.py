"""The judge: a small classifier of real images that says what a generated one shows, and where it lies.

    pixels in [0, 1] → convolution → (half size → two convolutions) for each further width → mean over places → logits

Every convolution is followed by BatchNorm and ReLU. The logits give class agreement, the activations before the last
layer give the Fréchet distance and the recall of `evaluation`. The judge is trained on real images alone and takes no
part in training a generator. Its features are not Inception's: a distance in them compares with no published FID.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training_harness.errors import UserError
from training_harness.pretrained import StrictConfig, StrictModel, parameter_device, strict_config


class ClassifierOutput(NamedTuple):
    logits: Tensor  # (N, num_labels) float32
    features: Tensor  # (N, F) float32, ≥ 0; F is the last width


@strict_config
class ReferenceClassifierConfig(StrictConfig):
    """Sizes of the images it was trained on, channels of each stage, and in `id2label` the names of the classes.

    `num_labels` counts the names; given alone it makes them up (LABEL_0, …).
    """

    model_type = "latentloom-judge"

    image_channels: int = 1
    image_height: int = 28
    image_width: int = 28
    widths: list[int] | tuple[int, ...] = (32, 64, 96)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.widths = tuple(self.widths)  # JSON gives a list


def convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    """(N, in_channels, H, W) → (N, out_channels, H, W), ≥ 0."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),  # BatchNorm brings the bias
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class ReferenceClassifier(StrictModel):
    config: ReferenceClassifierConfig
    config_class = ReferenceClassifierConfig
    main_input_name = "pixels"

    def __init__(self, config: ReferenceClassifierConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = [convolution(config.image_channels, config.widths[0])]
        for narrow, wide in pairwise(config.widths):
            layers += [nn.MaxPool2d(2), convolution(narrow, wide), convolution(wide, wide)]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(config.widths[-1], len(config.id2label or {}))
        self.post_init()

    def forward(self, pixels: Tensor) -> ClassifierOutput:
        """What each image shows.

        Args:     pixels: (N, C, H, W) float in [0, 1], of the config's C, H and W.
        Raises:   UserError when the images have another shape.
        """
        self._check_shape(pixels)
        features = self.trunk(pixels).mean(dim=(2, 3))  # (N, F)
        return ClassifierOutput(self.head(features), features)

    @torch.inference_mode()
    def classify_images(self, images: Tensor, batch_size: int = 500) -> ClassifierOutput:
        """What each image shows, in float32 and with the stored BatchNorm statistics whatever the surroundings.

        Args:     images: (N, C, H, W) uint8 on any device.
        Returns:  logits and features of all N images on the CPU.
        Raises:   UserError when the images are not uint8, have another shape, or are none.
        """
        if images.dtype != torch.uint8 or len(images) == 0:
            raise UserError(
                f"the judge was given {len(images)} images of {images.dtype}; expected at least one, "
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
                f"the judge was given images of shape {tuple(images.shape)}; "
                f"expected (N, {', '.join(map(str, expected))}), the kind it was trained on"
            )
