"""PSNR and codebook usage against their formulas."""

import math

import pytest
import torch
from tiny_models import seeded

from stage1_tokenizer.metrics import codebook_usage, psnr


def test_psnr_is_the_formula_image_by_image():
    images = torch.randint(0, 256, (3, 3, 8, 5), dtype=torch.uint8, generator=seeded(0))
    references = torch.randint(0, 256, (3, 3, 8, 5), dtype=torch.uint8, generator=seeded(1))
    for i, value in enumerate(psnr(images, references)):
        error = (
            sum((int(a) - int(b)) ** 2 for a, b in zip(images[i].flatten(), references[i].flatten(), strict=True)) / 120
        )
        assert value.item() == pytest.approx(10 * math.log10(255**2 / error))


def test_one_level_everywhere_is_48_decibel_and_no_difference_100():
    grey = torch.full((1, 1, 4, 4), 100, dtype=torch.uint8)
    assert psnr(grey, grey + 1).item() == pytest.approx(20 * math.log10(255))
    assert psnr(grey + 1, grey).item() == psnr(grey, grey + 1).item()
    assert psnr(grey, grey).item() == 100


def test_equal_use_of_k_codes_has_perplexity_k_and_of_one_code_one():
    assert codebook_usage(torch.full((64,), 7)) == (64, pytest.approx(64))
    assert codebook_usage(torch.tensor([0, 9, 0, 0])) == (1, pytest.approx(1))
    assert codebook_usage(torch.tensor([3, 3, 0, 3])) == (3, pytest.approx(3))


def test_perplexity_is_the_exponential_of_the_entropy():
    used = codebook_usage(torch.tensor([1, 2, 5]))
    assert used.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))))
