"""Files of earlier commits still load, and their runs resume with the same results (`tests/fixtures/README.md`)."""

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from command_line import latentloom
from PIL import Image
from safetensors.torch import load_file
from tiny_models import seeded

from latentloom.commands import arguments
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.codes.writer import write_code_cache
from stage1_tokenizer.data.sources import open_source
from stage1_tokenizer.registry import saved_tokenizer
from training_harness.metric_log import read_metrics

FIXTURES = Path(__file__).parent / "fixtures" / "53679bd"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
TENSORS = load_file(FIXTURES / "expected.safetensors")
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the fixtures to the current folder: their paths are relative to it."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    for name in ("model/config.json", "pipeline/model_index.json"):  # restore the order of modification times
        for path in tmp_path.glob(f"*/*/*/{name}"):
            path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", EXPECTED["tokenizers"])
def test_a_tokenizer_has_the_same_id_codes_and_pixels(name: str) -> None:
    tokenizer = saved_tokenizer(FIXTURES / "tokenizers" / name)
    stored = EXPECTED["tokenizers"][name]["tokenizer_id"]
    assert tokenizer.config.tokenizer_id == tokenizer.compute_id() == stored
    pixels = torch.rand(4, tokenizer.config.image_channels, 16, 16, generator=seeded(1)) * 2 - 1
    expected = {key.removeprefix(f"tokenizers.{name}."): value for key, value in TENSORS.items() if f".{name}." in key}
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.encode_latents(pixels), expected["latents"], **CLOSE)
        torch.testing.assert_close(tokenizer(pixels).reconstruction, expected["reconstruction"], **CLOSE)
        if "indices" in expected:
            assert torch.equal(tokenizer.encode_indices(pixels), expected["indices"])
            torch.testing.assert_close(tokenizer.decode_indices(expected["indices"]), expected["decoded"], **CLOSE)


@pytest.mark.parametrize("name", EXPECTED["pipelines"])
def test_a_pipeline_generates_the_same_samples(name: str) -> None:
    pipeline = LatentGenerationPipeline.from_pretrained(FIXTURES / "pipelines" / name)
    pipeline.set_progress_bar_config(disable=True)
    image = Image.open(FIXTURES / "images" / "disc" / "00.png")
    conditions = {"image": image} if name == "diffusion-restore" else {}
    classes = ["tree", "disc"] if pipeline.label_names else None
    samples = pipeline(classes, 1 if classes else 2, generator=seeded(0), output_type="pt", **conditions).images
    torch.testing.assert_close(samples, TENSORS[f"pipelines.{name}.samples"], rtol=0, atol=1e-3)
    if (expected := TENSORS.get(f"pipelines.{name}.edited")) is not None:
        mask = np.zeros((16, 16), np.uint8)
        mask[4:12, 4:12] = 255
        inpainting = {"image": image, "mask_image": Image.fromarray(mask)}
        edited = pipeline(["tree"], generator=seeded(0), output_type="pt", **inpainting).images
        torch.testing.assert_close(edited, expected, rtol=0, atol=1e-3)


CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "indices": ("ema", {"contents": "indices"}),
    "latents": ("kl", {"contents": "latents", "views": ("original", "flip")}),
    "both": ("residual", {"contents": "both"}),
    "degraded": ("kl", {"contents": "latents", "degradation": "downscale-2x"}),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_code_cache_matches_its_request_and_has_the_same_codes(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, fields = CACHES[name]
    tokenizer = saved_tokenizer(folder / "tokenizers" / kind)
    source = open_source("images")
    stored = CodeCache(folder / "codes" / name)
    stored.verify()
    write_code_cache(tokenizer, folder / "tokenizers" / kind, source, folder / "codes" / name, **fields)
    assert "already" in capsys.readouterr().out
    write_code_cache(tokenizer, folder / "tokenizers" / kind, source, folder / "again", **fields)
    rewritten = CodeCache(folder / "again")
    rows = np.arange(len(stored.train))
    assert stored.train.source_ids(rows) == rewritten.train.source_ids(rows)
    assert torch.equal(stored.train.labels(rows), rewritten.train.labels(rows))
    if fields["contents"] != "latents":
        assert torch.equal(stored.train.indices(rows), rewritten.train.indices(rows))
    if fields["contents"] != "indices":
        column = "degraded" if name == "degraded" else "latents"
        torch.testing.assert_close(
            stored.train.latents(rows, column), rewritten.train.latents(rows, column), rtol=0, atol=2e-3
        )


def check_rows(actual: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    """Check that the first rows are equal; later ones differ by rounding that grows in training (see test_golden_losses)."""
    assert [row["step"] for row in actual] == [row["step"] for row in expected]
    for row, expected_row in zip(actual, expected, strict=True):
        assert row.keys() - {"images_per_second"} == expected_row.keys()
    names = {name for name in expected[0] if name != "step"}
    assert {name: actual[0][name] for name in names} == pytest.approx(
        {n: expected[0][n] for n in names}, rel=1e-3, abs=1e-5
    )
    for name in {name for row in expected for name, value in row.items() if not isinstance(value, str)}:
        means = [fmean(row[name] for row in rows if name in row) for rows in (actual, expected)]
        assert means[0] == pytest.approx(means[1], rel=tolerance, abs=1e-3), name


@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_a_stopped_run_resumes_with_the_same_results(name: str, folder: Path) -> None:
    expected = EXPECTED["runs"][name]
    assert latentloom(*expected["command"]) == 0
    rows = read_metrics(folder / "runs" / name / "metrics.jsonl")
    assert {"step": 4, "resumed_from": 4} in rows
    check_rows([row for row in rows if row["step"] > 4], expected["rows"], 0.1 if name == "tokenizer" else 5e-3)


@pytest.fixture
def small_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = json.loads((FIXTURES / "configurations" / "small_recipes.json").read_text())
    monkeypatch.setattr(arguments, "recipe_values", lambda name, stage: json.loads(json.dumps(recipes[name])))


def test_a_job_stopped_in_its_prior_resumes_with_the_same_results(folder: Path, small_recipes: None) -> None:
    expected = EXPECTED["jobs"]["half"]
    tokenizer_log = (folder / "jobs" / "half" / "tokenizer" / "metrics.jsonl").read_text()
    assert latentloom(*expected["command"]) == 0
    assert (folder / "jobs" / "half" / "tokenizer" / "metrics.jsonl").read_text() == tokenizer_log
    rows = read_metrics(folder / "jobs" / "half" / "prior" / "metrics.jsonl")
    check_rows([row for row in rows if row["step"] > 4], expected["rows"], 5e-3)
    metrics = json.loads((folder / "jobs" / "half" / "metrics.json").read_text())
    for field in ("num_images", "num_reference_images", "steps", "features", "reference_hash", "training_hash"):
        assert metrics[field] == expected["metrics"][field], field
    for field in ("psnr", "ssim", "perplexity", "bits_per_token", "class_agreement"):
        assert metrics[field] == pytest.approx(expected["metrics"][field], rel=0.02), field


def test_a_finished_job_is_not_changed(folder: Path, small_recipes: None, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "jobs" / "finished" / "metrics.json").read_text()
    command = [argument.replace("half", "finished") for argument in EXPECTED["jobs"]["half"]["command"]]
    assert latentloom(*command) == 0
    assert "has finished" in capsys.readouterr().out
    assert (folder / "jobs" / "finished" / "metrics.json").read_text() == before


def test_a_search_and_its_best_recipe_load(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latentloom(*EXPECTED["sweeps"]["prior"]["command"]) == 0
    assert "has finished its 2 trials" in capsys.readouterr().out
    options = ["--codes", "codes/indices", "--config", "sweeps/prior/best.yaml", "--max-steps", 2]
    assert latentloom("train-prior", *options, "--output", "runs/best") == 0
