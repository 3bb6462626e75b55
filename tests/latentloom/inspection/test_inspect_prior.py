"""The page of a prior: its likelihood metrics are right, and copies of training images are reported."""

import math
from pathlib import Path

import pytest
import torch
from command_line import latentloom
from html_pages import Page
from small_parts import write_images
from tiny_models import seeded, tiny_pipeline, tiny_prior
from torch.testing import assert_close

from latentloom.inspection.prior_measure import Neighbours
from latentloom.inspection.prior_page import copy_diagnostic
from pipelines.evaluation import likelihood
from pipelines.evaluation.likelihood import likelihood_metrics, nearest_grids, negative_log_likelihood
from stage2_prior.autoregressive.model import AutoregressivePrior


@pytest.mark.parametrize("levels", [1, 2])
def test_the_mean_negative_log_likelihood_is_the_loss_in_bits(levels: int) -> None:
    prior, labels = tiny_prior(levels=levels), torch.tensor([0, 1, -1, 2])
    codes = torch.randint(16, (4, 4, 4) if levels == 1 else (4, levels, 4, 4), generator=seeded(0))
    bits = negative_log_likelihood(prior, codes, labels)
    assert bits.shape == codes.shape
    with torch.no_grad():
        nats = prior(codes, labels).total
    assert_close(bits.mean().float(), nats / math.log(2), rtol=1e-4, atol=0)


def test_a_changed_code_changes_the_likelihood_only_from_its_position_on() -> None:
    prior, codes, label = tiny_prior(), torch.randint(16, (1, 4, 4), generator=seeded(0)), torch.tensor([1])
    altered = codes.clone()
    altered[0, 2, 1] = (altered[0, 2, 1] + 1) % 16
    before, after = (
        negative_log_likelihood(prior, codes, label)[0].flatten(),
        negative_log_likelihood(prior, altered, label)[0].flatten(),
    )
    assert torch.equal(before[:9], after[:9])
    assert before[9] != after[9]


def test_likelihoods_with_a_large_vocabulary_are_computed_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, codes = tiny_prior(), torch.randint(16, (7, 4, 4), generator=seeded(0))
    labels, expected = torch.arange(7) % 3, negative_log_likelihood(prior, codes, torch.arange(7) % 3)
    sizes, logits = list[int](), AutoregressivePrior.logits
    monkeypatch.setattr(
        AutoregressivePrior,
        "logits",
        lambda self, tokens, *rest: (sizes.append(len(tokens)), logits(self, tokens, *rest))[1],
    )
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 3 * 16 * 16)
    assert_close(negative_log_likelihood(prior, codes, labels), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [3, 3, 1]


def test_likelihood_metrics_are_means_over_codes_classes_and_positions() -> None:
    bits = torch.tensor([[[1.0, 3.0]], [[2.0, 6.0]], [[4.0, 4.0]]], dtype=torch.float64)
    metrics = likelihood_metrics(bits, torch.tensor([0, 0, 2]), ("a", "b", "c"), codebook_size=64, pixels=8)
    assert metrics["bits_per_token"] == pytest.approx(20 / 6)
    assert metrics["prior_bits_per_image"] == pytest.approx(20 / 3)
    assert metrics["prior_bits_per_pixel"] == pytest.approx(20 / 24)
    assert metrics["bits_per_token_by_class"] == {"a": 3.0, "c": 4.0}
    assert metrics["bits_per_token_by_position"] == [[pytest.approx(7 / 3), pytest.approx(13 / 3)]]
    assert metrics["bits_per_token_uniform"] == 6


def test_the_nearest_grid_shares_the_most_codes_in_whichever_batch_it_is() -> None:
    training = torch.randint(16, (250, 4, 4), generator=seeded(0))
    codes = training[[7, 130, 249]].clone()
    codes[0, 0, :2] = 16  # two of its sixteen codes are in no training grid
    codes[2] = 16
    shares, indices = nearest_grids(codes, iter(training.split(100)))
    assert shares.tolist() == [14 / 16, 1.0, 0.0]
    assert indices[:2].tolist() == [7, 130]


def test_copies_of_training_images_are_reported() -> None:
    held_out = torch.full((100,), 0.4)
    for copied, level in ((0, "good"), (30, "bad")):
        samples = torch.cat([torch.ones(copied), torch.full((100 - copied,), 0.4)])
        diagnostic = copy_diagnostic(Neighbours(samples, held_out, [], 10))
        assert diagnostic.level == level
        assert ("30" in diagnostic.title) == (level == "bad")


def test_inspect_prior_writes_a_reproducible_page_with_the_prior_s_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    for split, count in (("train", 5), ("test", 4)):
        write_images(tmp_path / "data" / split, count)
    arguments = ["--pipeline", tmp_path / "pipeline", "--data", tmp_path / "data", "--num-samples", 6]
    for name in ("a", "b"):
        assert latentloom("inspect-prior", *arguments, "--output", tmp_path / f"{name}.html") == 0
    page, second_page = ((tmp_path / f"{name}.html").read_text(encoding="utf-8") for name in ("a", "b"))
    assert page == second_page, "the same pipeline and images give the same bytes"
    text = " ".join(Page(page).text.split())
    for expected in (
        "Bits a code",
        "uniform guess: 4",
        "Least likely",
        "nearest training image",
        "Does the prior memorize",
    ):
        assert expected in text, expected
    assert "of a sample's codes shared with the nearest training image" in capsys.readouterr().out


def test_a_prior_without_likelihoods_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.latent_generation import LatentGenerationPipeline
    from stage2_prior.standard_normal import StandardNormalPrior

    tokenizer = tiny_pipeline().tokenizer
    LatentGenerationPipeline(tokenizer, StandardNormalPrior.for_spec(tokenizer.latent_spec())).save_pretrained(
        tmp_path / "p"
    )
    write_images(tmp_path / "data", 3)
    arguments = ["--pipeline", tmp_path / "p", "--data", tmp_path / "data", "--output", tmp_path / "a.html"]
    assert latentloom("inspect-prior", *arguments) == 2
    assert "StandardNormalPrior gives codes no probability" in capsys.readouterr().err
