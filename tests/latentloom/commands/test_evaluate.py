"""`latentloom evaluate`: its JSON, the images and arrays beside it, and samples of other programs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import CHECKOUT, latentloom
from PIL import Image
from tiny_models import tiny_pipeline

from latentloom.jobs.evaluation_plots import plot_metrics_by_class
from pipelines.evaluation.pipeline_metrics import bits_per_token
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.sources import open_source
from stage2_prior.autoregressive.sampling import SamplingOptions


def evaluate(output: Path, *words: object) -> dict[str, Any]:
    """Run `latentloom evaluate` and return its metrics."""
    assert latentloom("evaluate", *words, "--output", output) == 0
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write train and test folders of 28×28 images in three classes, 24 and 18 images."""
    folder = tmp_path_factory.mktemp("clothes")
    source = open_source(CHECKOUT / "latentloom" / "data" / "fashion-mnist-mini")
    for name, split, count in (("train", source.train, 8), ("test", source.held_out, 6)):
        for label in (0, 1, 8):
            for i in [i for i in range(400) if split.label(i) == label][:count]:
                path = folder / name / f"kind {label}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                split.image(i).save(path)
    return folder


def test_the_metrics_of_a_pipeline_include_every_setting_and_come_with_a_grid(
    finished_job: Path, real_images: Path, tmp_path: Path
) -> None:
    output, words = tmp_path / "metrics.json", ["--pipeline", finished_job, "--reference", real_images]
    metrics = evaluate(output, *words, "--num-images", 30, "--features", "pixels-8x8", "--seed", 3, "--top-k", 7)
    settings = {
        "features": "pixels-8x8",
        "feature_weights": "none",
        "num_images": 30,
        "num_reference_images": 11,
        "num_training_images": 189,
        "seed": 3,
        "sampler": "AutoregressivePrior",
        "num_inference_steps": 16,
        "image_size": [16, 16],
    }
    assert {name: metrics[name] for name in settings} == settings
    assert metrics["sampling"] == asdict(SamplingOptions(guidance_scale=4.0, guidance_schedule="linear", top_k=7))
    assert len(metrics["classes"]) == 10
    assert {"torch", "python", "latentloom"} <= metrics["versions"].keys()
    assert {"processor", "threads", "device"} <= metrics["machine"].keys()
    assert metrics["reference_hash"] != metrics["training_hash"]
    assert "11 images: distances grow as N falls" in metrics["notes"][0]
    assert 0 < metrics["floor"]["frechet"] < metrics["frechet"]
    assert 0 <= metrics["class_agreement"] <= 1
    assert metrics["bits_per_token"] > 0
    assert len(metrics["by_class"]) == 10
    assert {path.name for path in tmp_path.iterdir()} >= {"metrics.json", "metrics.samples.png"}
    assert Image.open(tmp_path / "metrics.samples.png").size[0] > 3 * 16


def test_classes_are_matched_by_name_and_unknown_ones_count_as_no_class(clothes: Path, tmp_path: Path) -> None:
    """The folders have other class ids than the pipeline: another order, and one more class."""
    pipeline = tiny_pipeline(("kind 1", "kind 8", "kind 7"), image_size=(32, 32), content_size=(28, 28))
    pipeline.save_pretrained(tmp_path / "pipeline")
    words = ["--reference", clothes, "--num-images", 30, "--features", "pixels-8x8"]
    metrics = evaluate(tmp_path / "a.json", "--pipeline", tmp_path / "pipeline", *words)
    assert set(metrics["bits_per_token_by_class"]) == {"kind 1", "kind 8"}
    assert metrics["by_class"] == {}
    source = open_source(clothes).with_label_names(pipeline.label_names)
    assert [source.test.labels.count(label) for label in (-1, 0, 1, 2)] == [6, 6, 6, 0]
    expected = bits_per_token(pipeline, ImageLoader(source.test, pipeline.tokenizer.config.image_processor))
    assert metrics["bits_per_token"] == pytest.approx(expected["bits_per_token"])
    page = tmp_path / "page.html"
    words = ["--data", clothes, "--num-samples", 4, "--output", page]
    assert latentloom("inspect-prior", "--pipeline", tmp_path / "pipeline", *words) == 0


def test_the_same_evaluation_gives_the_same_metrics(finished_job: Path, real_images: Path, tmp_path: Path) -> None:
    words = ["--pipeline", finished_job, "--reference", real_images, "--num-images", 20, "--features", "pixels-8x8"]
    first, again = (evaluate(tmp_path / name, *words) for name in ("a.json", "b.json"))
    assert first == again
    assert evaluate(tmp_path / "c.json", *words, "--seed", 1)["frechet"] != first["frechet"]


def test_test_images_as_samples_have_distance_zero_and_training_images_count_as_copies(
    clothes: Path, tmp_path: Path
) -> None:
    words = ["--reference", clothes, "--features", "pixels-8x8"]
    same = evaluate(tmp_path / "same.json", "--samples", clothes / "test", *words)
    assert same["frechet"] == pytest.approx(0, abs=1e-6)
    assert same["recall"] == same["precision"] == 1
    assert same["memorisation"]["ratio"] == 1
    assert same["class_agreement"] > 0.8
    assert list(same["by_class"]) == ["kind 0", "kind 1", "kind 8"]
    assert (tmp_path / "same.by_class.png").exists()
    copies = evaluate(tmp_path / "copies.json", "--samples", clothes / "train", *words)
    assert copies["memorisation"]["nearest_training_image"] == 0
    assert copies["frechet"] > 0.1


def test_saved_samples_give_the_same_metrics_when_they_are_read_again(
    finished_job: Path, clothes: Path, tmp_path: Path
) -> None:
    """The file holds RGB, as published evaluators read it, and is compared with arrays of the reference."""
    reference = tmp_path / "reference.npz"
    generator = np.random.default_rng(0)
    np.savez(reference, arr_0=generator.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8))
    saved = tmp_path / "samples.npz"
    words = ["--reference", reference, "--features", "pixels-8x8"]
    direct = evaluate(
        tmp_path / "a.json", "--pipeline", finished_job, "--num-images", 20, "--save-samples", saved, *words
    )
    with np.load(saved) as file:
        assert file["arr_0"].shape == (20, 16, 16, 3)
        assert file["arr_0"].dtype == np.uint8
    again = evaluate(tmp_path / "b.json", "--samples", saved, *words)
    for name in ("frechet", "kid", "precision", "recall", "density", "coverage", "reference_hash"):
        assert again[name] == direct[name]


def test_a_tokenizer_is_measured_without_samples(finished_job: Path, clothes: Path, tmp_path: Path) -> None:
    metrics = evaluate(
        tmp_path / "t.json", "--tokenizer", finished_job, "--reference", clothes, "--features", "efficientnet-lite0"
    )
    assert {"psnr", "ssim", "bits_per_pixel", "perplexity", "reconstruction_frechet_floor"} <= metrics.keys()
    assert metrics["features"] == "efficientnet-lite0"
    assert len(metrics["feature_weights"]) == 16
    assert "224×224" in metrics["feature_resize"]
    assert metrics["num_reference_images"] == 18
    assert "frechet" not in metrics
    assert not list(tmp_path.glob("*.png"))


def test_samples_with_a_broken_file_are_refused_and_counted(
    clothes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "samples"
    for i, path in enumerate(sorted((clothes / "test").rglob("*.png"))):
        data = path.read_bytes()
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.png").write_bytes(data if i else data[: len(data) // 2])
    assert latentloom("evaluate", "--samples", folder, "--reference", clothes, "--features", "pixels-8x8") == 2
    assert "17 of 18 samples could be read" in capsys.readouterr().err


def test_metrics_by_class_are_plotted_only_if_there_are_any(tmp_path: Path) -> None:
    rows = {"cat": {"frechet": 3.0, "recall": None}, "dog": {"frechet": 1.0, "recall": None}}
    assert plot_metrics_by_class({"by_class": rows, "frechet": 2.0, "floor": {"frechet": 0.5}}, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 200
    assert not plot_metrics_by_class({"by_class": {"cat": {"frechet": None}}}, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_grey_samples_from_an_array_are_grey_again_so_that_the_classifier_can_read_them(tmp_path: Path) -> None:
    source = open_source(CHECKOUT / "latentloom" / "data" / "fashion-mnist-mini")
    images = np.stack([np.asarray(source.held_out.image(i)) for i in range(30)])
    samples = tmp_path / "samples.npz"
    np.savez(samples, arr_0=np.repeat(images[..., None], 3, axis=3))
    metrics = evaluate(
        tmp_path / "a.json", "--samples", samples, "--reference", "fashion-mnist-mini", "--max-training-images", 100
    )
    assert metrics["features"] == "fashion-mnist-classifier"
    assert metrics["precision"] == 1  # the samples are reference images
    assert metrics["memorisation"]["ratio"] == pytest.approx(1, abs=0.2)


def test_a_folder_from_sample_is_measured_without_changes(
    finished_job: Path, real_images: Path, tmp_path: Path
) -> None:
    samples = tmp_path / "samples"
    assert latentloom("sample", "--pipeline", finished_job, "--num-images", 20, "--output", samples) == 0
    words = ["--samples", samples, "--reference", tmp_path / "reference", "--features", "pixels-8x8"]
    for i, path in enumerate(sorted(real_images.rglob("*.png"))[::9]):
        for split in ("train", "test"):
            target = tmp_path / "reference" / split / path.parent.name / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).resize((16, 16)).save(target)
    metrics = evaluate(tmp_path / "a.json", *words)
    assert metrics["num_images"] == 20  # without the grid
    assert len(metrics["by_class"]) == 10  # their classes are in samples.json
    (samples / "samples.json").unlink()  # earlier versions did not write it
    assert evaluate(tmp_path / "b.json", *words)["frechet"] == metrics["frechet"]


def test_grey_samples_are_compared_in_rgb_with_a_colour_reference(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(24):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        for folder, pixels in (("images/train", image), ("images/test", image), ("grey", image.convert("L"))):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            pixels.save(tmp_path / folder / f"{i}.png")
    words = ["--reference", tmp_path / "images", "--features", "pixels-8x8"]
    for samples, lower, upper in (("images/test", 0.0, 1e-6), ("grey", 0.1, 100.0)):
        metrics = evaluate(tmp_path / "metrics.json", "--samples", tmp_path / samples, *words)
        assert lower <= metrics["frechet"] < upper
