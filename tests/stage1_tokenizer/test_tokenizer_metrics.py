"""PSNR and codebook usage against their formulas, SSIM and LPIPS against the libraries that publish them."""

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


def pictures(count: int = 3, channels: int = 3, height: int = 30, width: int = 24) -> Tensor:
    """Slopes with noise on them."""
    slopes = torch.arange(height)[:, None] * 3 + torch.arange(width) * 2
    noise = torch.randint(0, 60, (count, channels, height, width), generator=seeded(0))
    return (slopes + noise + 10).to(torch.uint8)


def noisy(images: Tensor, strength: float) -> Tensor:
    noise = torch.randn(images.shape, generator=seeded(1))
    return (images + strength * noise).round().clamp(0, 255).to(torch.uint8)


def test_psnr_equals_the_formula_for_each_image():
    images = torch.randint(0, 256, (3, 3, 8, 5), dtype=torch.uint8, generator=seeded(0))
    references = torch.randint(0, 256, (3, 3, 8, 5), dtype=torch.uint8, generator=seeded(1))
    for i, value in enumerate(psnr(images, references)):
        error = (
            sum((int(a) - int(b)) ** 2 for a, b in zip(images[i].flatten(), references[i].flatten(), strict=True)) / 120
        )
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
    used = codebook_usage(torch.tensor([1, 2, 5]))
    assert used.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))))


# -- SSIM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 30, 24), (1, 28, 28), (3, 11, 12)])
def test_ssim_equals_torchmetrics_where_the_window_fits(channels: int, height: int, width: int):
    references = pictures(4, channels, height, width)
    images = noisy(references, 25)
    images[0], images[1] = references[0], 255 - references[1]  # equal, and anticorrelated
    settings = {"data_range": 255.0, "kernel_size": 11, "sigma": 1.5, "return_full_image": True}
    _, places = structural_similarity_index_measure(images.double(), references.double(), reduction="none", **settings)
    expected = (
        places[..., 5:-5, 5:-5].flatten(1).mean(1)
    )  # its mean is over mirrored edges too, which Wang et al. leave out
    found = ssim(images, references)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    assert found[1] < 0 < found[2]


def test_ssim_is_1_for_equal_images_and_symmetric_and_falls_with_noise():
    images = pictures()
    assert ssim(images, images).tolist() == pytest.approx([1, 1, 1])
    black = torch.zeros_like(images)
    assert ssim(black, black).tolist() == pytest.approx([1, 1, 1])  # neither mean nor variance
    steps = torch.stack([ssim(noisy(images, strength), images) for strength in (0, 5, 20, 80)])
    assert (steps.diff(dim=0) < -0.01).all(), steps
    torch.testing.assert_close(ssim(noisy(images, 20), images), ssim(images, noisy(images, 20)))


def test_ssim_of_an_image_does_not_depend_on_its_batch():
    images, others = pictures(), noisy(pictures(), 20)
    alone = [ssim(images[i : i + 1], others[i : i + 1]).item() for i in range(3)]
    assert ssim(images, others).tolist() == pytest.approx(alone)
    assert alone[0] != alone[1]


# -- LPIPS ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def backbone(tmp_path: Path, monkeypatch) -> Path:
    """Where LPIPS looks for AlexNet's weights; nothing lies there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    return path


def test_lpips_is_unavailable_without_the_backbone_weights(backbone: Path):
    assert load_lpips_distance() is None
    assert not list(backbone.parent.iterdir())  # and nothing was fetched


@pytest.mark.filterwarnings("ignore:.*pretrained:UserWarning", "ignore:Arguments other than a weight enum:UserWarning")
def test_lpips_equals_the_lpips_package_with_the_same_weights(backbone: Path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = alexnet(weights=None).state_dict()
    for name in [name for name in weights if name.startswith("classifier")]:
        weights[name] = torch.zeros(1).expand(weights[name].shape)  # not in use: 4 bytes in the file in place of 235 MB
    torch.save(weights, backbone)

    distance, images, others = load_lpips_distance(), pictures(3, 3, 64, 48), noisy(pictures(3, 3, 64, 48), 40)
    assert distance is not None
    found = distance(images, others)
    with torch.inference_mode():
        network = lpips.LPIPS(net="alex", verbose=False)
        expected = network(images / 255, others / 255, normalize=True).flatten()  # the package's own way from [0, 1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert (found > 0).all()
    assert distance(images, images).tolist() == [0, 0, 0]
    smallest = noisy(images, 40)[..., :LPIPS_MIN_SIDE, :LPIPS_MIN_SIDE]
    assert (distance(smallest, images[..., :LPIPS_MIN_SIDE, :LPIPS_MIN_SIDE]) > 0).all()
    grey, others = images[:, :1], others[:, :1]
    torch.testing.assert_close(distance(grey, others), distance(grey.repeat(1, 3, 1, 1), others.repeat(1, 3, 1, 1)))
