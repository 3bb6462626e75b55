"""PSNR and codebook usage equal their formulas, and SSIM and LPIPS equal published libraries."""

import math
from pathlib import Path

import lpips
import pytest
import torch
from tiny_models import seeded
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.models import AlexNet_Weights, alexnet

from stage1_tokenizer.metrics import LPIPS_MIN_SIDE, codebook_usage, load_lpips_distance, psnr, ssim


def sample_images(count: int = 3, channels: int = 3, height: int = 30, width: int = 24) -> Tensor:
    """Create images of a gradient with noise."""
    gradient = torch.arange(height)[:, None] * 3 + torch.arange(width) * 2
    noise = torch.randint(0, 60, (count, channels, height, width), generator=seeded(0))
    return (gradient + noise + 10).to(torch.uint8)


def add_noise(images: Tensor, strength: float) -> Tensor:
    noise = torch.randn(images.shape, generator=seeded(1))
    return (images + strength * noise).round().clamp(0, 255).to(torch.uint8)


def test_psnr_equals_the_formula_for_each_image():
    images = torch.randint(0, 256, (3, 3, 8, 5), dtype=torch.uint8, generator=seeded(0))
    references = torch.randint(0, 256, (3, 3, 8, 5), dtype=torch.uint8, generator=seeded(1))
    for i, value in enumerate(psnr(images, references)):
        values = zip(images[i].flatten(), references[i].flatten(), strict=True)
        error = sum((int(a) - int(b)) ** 2 for a, b in values) / 120
        assert value.item() == pytest.approx(10 * math.log10(255**2 / error))


def test_an_error_of_one_level_is_48_decibel_and_no_error_is_100():
    grey = torch.full((1, 1, 4, 4), 100, dtype=torch.uint8)
    assert psnr(grey, grey + 1).item() == pytest.approx(20 * math.log10(255))
    assert psnr(grey + 1, grey).item() == psnr(grey, grey + 1).item()
    assert psnr(grey, grey).item() == 100


def test_k_equally_frequent_codes_have_perplexity_k_and_one_code_has_1():
    assert codebook_usage(torch.full((64,), 7)) == (64, pytest.approx(64))
    assert codebook_usage(torch.tensor([0, 9, 0, 0])) == (1, pytest.approx(1))
    assert codebook_usage(torch.tensor([3, 3, 0, 3])) == (3, pytest.approx(3))


def test_perplexity_is_the_exponential_of_the_entropy():
    usage = codebook_usage(torch.tensor([1, 2, 5]))
    assert usage.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))))


# SSIM


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 30, 24), (1, 28, 28), (3, 11, 12)])
def test_ssim_equals_torchmetrics_where_the_window_fits(channels: int, height: int, width: int):
    references = sample_images(4, channels, height, width)
    images = add_noise(references, 25)
    images[0], images[1] = references[0], 255 - references[1]  # equal, and anticorrelated
    settings = {"data_range": 255.0, "kernel_size": 11, "sigma": 1.5, "return_full_image": True}
    _, similarity_map = structural_similarity_index_measure(
        images.double(), references.double(), reduction="none", **settings
    )
    # The mean of torchmetrics includes mirrored edges, which Wang et al. leave out.
    expected = similarity_map[..., 5:-5, 5:-5].flatten(1).mean(1)
    values = ssim(images, references)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-8)
    assert values[1] < 0 < values[2]


def test_ssim_is_1_for_equal_images_and_symmetric_and_falls_with_noise():
    images = sample_images()
    assert ssim(images, images).tolist() == pytest.approx([1, 1, 1])
    black = torch.zeros_like(images)
    assert ssim(black, black).tolist() == pytest.approx([1, 1, 1])  # mean and variance are 0
    values = torch.stack([ssim(add_noise(images, strength), images) for strength in (0, 5, 20, 80)])
    assert (values.diff(dim=0) < -0.01).all(), values
    torch.testing.assert_close(ssim(add_noise(images, 20), images), ssim(images, add_noise(images, 20)))


def test_ssim_of_an_image_does_not_depend_on_its_batch():
    images, others = sample_images(), add_noise(sample_images(), 20)
    expected = [ssim(images[i : i + 1], others[i : i + 1]).item() for i in range(3)]
    assert ssim(images, others).tolist() == pytest.approx(expected)
    assert expected[0] != expected[1]


# LPIPS


@pytest.fixture
def backbone_path(tmp_path: Path, monkeypatch) -> Path:
    """Path where LPIPS expects the weights of AlexNet; the file does not exist."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    return path


def test_lpips_is_unavailable_without_the_backbone_weights(backbone_path: Path):
    assert load_lpips_distance() is None
    assert not list(backbone_path.parent.iterdir())  # nothing was downloaded


@pytest.mark.filterwarnings("ignore:.*pretrained:UserWarning", "ignore:Arguments other than a weight enum:UserWarning")
def test_lpips_equals_the_lpips_package_with_the_same_weights(backbone_path: Path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = alexnet(weights=None).state_dict()
    for name in [name for name in weights if name.startswith("classifier")]:
        weights[name] = torch.zeros(1).expand(weights[name].shape)  # LPIPS does not use them: 4 bytes instead of 235 MB
    torch.save(weights, backbone_path)

    distance, images = load_lpips_distance(), sample_images(3, 3, 64, 48)
    others = add_noise(images, 40)
    assert distance is not None
    distances = distance(images, others)
    with torch.inference_mode():
        network = lpips.LPIPS(net="alex", verbose=False)
        expected = network(images / 255, others / 255, normalize=True).flatten()  # the package scales from [0, 1]
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=0)
    assert (distances > 0).all()
    assert distance(images, images).tolist() == [0, 0, 0]
    smallest = add_noise(images, 40)[..., :LPIPS_MIN_SIDE, :LPIPS_MIN_SIDE]
    assert (distance(smallest, images[..., :LPIPS_MIN_SIDE, :LPIPS_MIN_SIDE]) > 0).all()
    grey, others = images[:, :1], others[:, :1]
    torch.testing.assert_close(distance(grey, others), distance(grey.repeat(1, 3, 1, 1), others.repeat(1, 3, 1, 1)))
