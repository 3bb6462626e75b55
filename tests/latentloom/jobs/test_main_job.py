"""From a folder of images to a pipeline on the Hub: each command by itself, and both stages in one command."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import CHECKOUT, hash_files, latentloom, run_python
from hub_stand_in import StandInHub
from new_process import run_forked
from PIL import Image
from safetensors.torch import load_file
from small_parts import write_images

from latentloom.commands import quickstart
from latentloom.jobs import main_job
from latentloom.planning.recipe_selection import select_recipes, select_size
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.statistics import DatasetStatistics
from stage1_tokenizer.vqgan import VQGAN
from stage2_prior.autoregressive.model import AutoregressivePrior

STEPS = 4  # training steps of the finished job
JOB_FILES = {
    "tokenizer",
    "codes",
    "prior",
    "pipeline",
    "samples.png",
    "reconstructions.png",
    "curves.png",
    "metrics.json",
}
RUN_FILES = {"config.yaml", "environment.json", "run.json", "metrics.jsonl", "samples", "checkpoints", "model"}


def list_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def read_job_metrics(job: Path) -> dict:
    return json.loads((job / "metrics.json").read_text())


def train_command(data: Path, output: Path, steps: int = 2) -> list[object]:
    """Return the arguments of a short `train` on 16×16 pixels, which have 4×4 codes."""
    small = ["--resolution", 16, "--batch-size", 8, "--num-images", 20]
    return ["train", "--data", data, "--output", output, "--max-steps", steps, *small]


def test_train_writes_the_folders_images_and_metrics_of_the_design(finished_job: Path) -> None:
    assert list_names(finished_job) == JOB_FILES
    assert list_names(finished_job / "tokenizer") == RUN_FILES
    assert list_names(finished_job / "prior") == RUN_FILES | {"pipeline"}
    assert {"model_index.json", "tokenizer", "prior", "README.md"} <= list_names(finished_job / "pipeline")
    assert {"manifest.json", "tokenizer", "train-00000.arrow", "validation-00000.arrow", "skipped.jsonl"} == list_names(
        finished_job / "codes"
    )
    assert list_names(finished_job / "tokenizer" / "checkpoints") == {f"step_{STEPS:06d}"}
    assert list_names(finished_job / "tokenizer" / "samples") == {f"step_{STEPS:06d}.png"}
    metrics = read_job_metrics(finished_job)
    for name in ("psnr", "codes_used", "perplexity", "frechet", "recall", "seconds"):
        assert isinstance(metrics[name], int | float), name
    assert 0 <= metrics["class_agreement"] <= 1  # measured by a probe: the reference classifier has other classes
    assert set(metrics["phases"]) == {"train_tokenizer", "tokenize", "train_prior", "sample", "evaluate"}
    assert all(phase["images_per_second"] > 0 for phase in metrics["phases"].values())
    assert metrics["steps"] == {"tokenizer": STEPS, "prior": STEPS}
    for name in ("samples.png", "reconstructions.png", "curves.png"):
        pixels = np.asarray(Image.open(finished_job / name).convert("L"))
        assert len(np.unique(pixels)) > 20, f"{name} is almost empty"


def test_running_a_finished_job_again_prints_that_and_changes_no_file(
    finished_job: Path, real_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hash_files(finished_job)
    assert latentloom(*train_command(real_images, finished_job, steps=STEPS)) == 0
    printed = capsys.readouterr().out
    assert "has finished its 4 steps of the tokenizer and 4 steps of the prior; pass a larger --max-steps" in printed
    assert "will take" not in printed  # a finished job is neither timed nor announced
    assert f"PSNR {read_job_metrics(finished_job)['psnr']:.2f} dB" in printed
    assert hash_files(finished_job) == before


@pytest.mark.parametrize("verb", ["train-tokenizer", "tokenize", "train-prior"])
def test_running_a_finished_stage_again_prints_that_and_changes_no_file(
    verb: str, finished_job: Path, real_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hash_files(finished_job)
    arguments = {
        "train-tokenizer": ["--config", finished_job / "tokenizer" / "config.yaml"],
        "tokenize": [
            "--tokenizer",
            finished_job / "tokenizer",
            "--data",
            real_images,
            "--output",
            finished_job / "codes",
        ],
        "train-prior": ["--config", finished_job / "prior" / "config.yaml"],
    }[verb]
    assert latentloom(verb, *arguments) == 0
    assert re.search(r"has finished its 4 steps|holds these codes already", capsys.readouterr().out)
    assert hash_files(finished_job) == before


def test_a_larger_max_steps_extends_a_job_and_trains_the_prior_again_on_the_new_codes(
    job: Path, real_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier_prior = hash_files(job / "prior")
    earlier_id = VQGAN.from_pretrained(job / "tokenizer" / "model").config.tokenizer_id
    assert latentloom(*train_command(real_images, job, steps=STEPS + 2)) == 0
    assert "the prior starts again" in capsys.readouterr().out
    assert read_job_metrics(job)["steps"] == {"tokenizer": STEPS + 2, "prior": STEPS + 2}
    log = [json.loads(line) for line in (job / "tokenizer" / "metrics.jsonl").read_text().splitlines()]
    assert [row["resumed_from"] for row in log if "resumed_from" in row] == [STEPS]
    pipeline = LatentGenerationPipeline.from_pretrained(job)
    assert pipeline.tokenizer.config.tokenizer_id == pipeline.prior.config.tokenizer_id != earlier_id
    assert list_names(job) == {*JOB_FILES, f"prior-{STEPS}-steps"}
    assert hash_files(job / f"prior-{STEPS}-steps") == earlier_prior  # moved aside with its pipeline


def test_a_job_interrupted_before_its_evaluation_does_not_train_again(
    real_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(main_job, "write_results", interrupt)
        assert latentloom(*train_command(real_images, tmp_path / "job")) == 130
    assert "run the same command again" in capsys.readouterr().err
    trained_prior = hash_files(tmp_path / "job" / "prior")
    assert latentloom(*train_command(real_images, tmp_path / "job")) == 0
    assert hash_files(tmp_path / "job" / "prior") == trained_prior
    assert list_names(tmp_path / "job") == JOB_FILES


@pytest.mark.parametrize("saved_class", [AutoregressivePrior, LatentGenerationPipeline], ids=["model", "pipeline"])
def test_an_extension_interrupted_during_saving_does_not_count_as_finished(
    saved_class: type, finished_job: Path, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    arguments = ["train-prior", "--config", finished_job / "prior" / "config.yaml"]
    arguments += ["--output", job / "prior", "--max-steps", STEPS + 1]
    with monkeypatch.context() as patch:
        patch.setattr(saved_class, "save_pretrained", interrupt)
        assert latentloom(*arguments) == 130
    assert latentloom(*arguments) == 0
    weights = [
        (run / "model.safetensors").read_bytes()
        for run in (job / "prior" / "model", job / "prior" / "pipeline" / "prior")
    ]
    assert weights[0] == weights[1]
    assert weights[0] != (finished_job / "prior" / "model" / "model.safetensors").read_bytes()


def test_a_run_repeats_bitwise_from_its_config_in_another_folder(finished_job: Path, tmp_path: Path) -> None:
    for stage, verb in (("tokenizer", "train-tokenizer"), ("prior", "train-prior")):
        assert latentloom(verb, "--config", finished_job / stage / "config.yaml", "--output", tmp_path / stage) == 0
        weights, repeated_weights = (
            load_file(run / stage / "model" / "model.safetensors") for run in (finished_job, tmp_path)
        )
        assert weights.keys() == repeated_weights.keys()
        assert all(torch.equal(weights[name], repeated_weights[name]) for name in weights)
        config, repeated_config = (
            yaml.safe_load((run / stage / "config.yaml").read_text()) for run in (finished_job, tmp_path)
        )
        assert {name for name in config if config[name] != repeated_config[name]} == {"output"}


def test_another_seed_trains_another_tokenizer(finished_job: Path, tmp_path: Path) -> None:
    config = finished_job / "tokenizer" / "config.yaml"
    assert latentloom("train-tokenizer", "--config", config, "--output", tmp_path / "run", "--seed", 1) == 0
    ids = [
        VQGAN.from_pretrained(run / "model").config.tokenizer_id
        for run in (finished_job / "tokenizer", tmp_path / "run")
    ]
    assert ids[0] != ids[1]


def test_every_command_works_on_real_images(
    real_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, codes, prior = tmp_path / "tokenizer", tmp_path / "codes", tmp_path / "prior"
    steps = ("--max-steps", 3, "--checkpoint-every", 2, "--sample-every", 2, "--log-every", 1)
    assert latentloom("train-tokenizer", "--data", real_images, "--output", tokenizer, "--resolution", 16, *steps) == 0
    assert f"next: latentloom tokenize --tokenizer {tokenizer}" in capsys.readouterr().out
    assert list_names(tokenizer) == RUN_FILES
    assert list_names(tokenizer / "checkpoints") == {"step_000002", "step_000003"}
    assert list_names(tokenizer / "samples") == {"step_000002.png", "step_000003.png"}
    assert {"config.json", "model.safetensors", "README.md"} <= list_names(tokenizer / "model")

    assert (
        latentloom("tokenize", "--tokenizer", tokenizer, "--data", real_images, "--output", codes, "--contents", "both")
        == 0
    )
    assert latentloom("train-prior", "--codes", codes, "--output", prior, "--recipe", "ar-tiny", *steps) == 0
    assert list_names(prior) == RUN_FILES | {"pipeline"}

    out = tmp_path / "samples"
    arguments = ["--pipeline", prior, "--classes", "class 7", "2", "--num-images", 3, "--seed", 5]
    assert latentloom("sample", *arguments, "--output", out) == 0
    assert list_names(out) == {
        "grid.png",
        "samples.json",
        "00000-class-7.png",
        "00001-class-7.png",
        "00002-class-2.png",
    }
    assert Image.open(out / "00000-class-7.png").size == (16, 16)
    assert latentloom("sample", *arguments, "--output", tmp_path / "again") == 0
    assert hash_files(out) == hash_files(tmp_path / "again")
    assert latentloom("sample", *arguments[:-1], 6, "--output", tmp_path / "another-seed") == 0
    assert hash_files(out) != hash_files(tmp_path / "another-seed")

    reconstructed = tmp_path / "reconstructed"
    assert (
        latentloom(
            "reconstruct", "--tokenizer", tokenizer, "--data", real_images, "--num-images", 4, "--output", reconstructed
        )
        == 0
    )
    assert list_names(reconstructed) == {"grid.png", *(f"{i:05d}.png" for i in range(4))}

    metrics_file = tmp_path / "metrics.json"
    capsys.readouterr()
    without_network = ["--features", "pixels-8x8"]
    arguments = ["--reference", real_images, "--num-images", 20, "--output", metrics_file, *without_network]
    assert latentloom("evaluate", "--pipeline", prior, *arguments) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(metrics_file.read_text())
    assert {"psnr", "codes_used", "perplexity", "frechet", "recall", "features"} <= json.loads(
        metrics_file.read_text()
    ).keys()
    assert latentloom("evaluate", "--tokenizer", tokenizer, "--reference", real_images, *without_network) == 0
    assert "psnr" in json.loads(capsys.readouterr().out)


def test_a_pushed_pipeline_samples_from_its_repository_id(finished_job: Path, tmp_path: Path) -> None:
    samples = ["--num-images", 3, "--output"]
    with StandInHub() as hub:
        environment = hub.environment(tmp_path / "home")
        arguments = ["push", "--pipeline", finished_job, "--repo-id", "stand-in/clothes"]
        pushed = run_forked("-m", "latentloom", *arguments, **environment)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.startswith("pushed: ")
        files = hub.repos["stand-in/clothes"].files
        arguments = ["sample", "--pipeline", "stand-in/clothes", *samples, tmp_path / "from-hub"]
        sampled = run_forked("-m", "latentloom", *arguments, **environment)
        assert sampled.returncode == 0, sampled.stderr
    assert latentloom("sample", "--pipeline", finished_job, *samples, tmp_path / "from-folder") == 0
    assert hash_files(tmp_path / "from-hub") == hash_files(tmp_path / "from-folder")
    weights = (finished_job / "pipeline" / "prior" / "model.safetensors").read_bytes()
    assert files["prior/model.safetensors"] == weights
    assert {"README.md", "samples.png", "metrics.json", "model_index.json", "tokenizer/config.json"} <= files.keys()


def test_quickstart_sets_its_steps_by_minutes_and_does_the_whole_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This test takes a few of the embedded images; the slow test in test_wheel takes all of them."""
    source = quickstart.load_source("fashion-mnist-mini")
    splits = {name: getattr(source, name).select(range(190)) for name in ("train", "validation", "test")}
    monkeypatch.setattr(quickstart, "load_source", lambda _: replace(source, **splits))
    output = tmp_path / "quickstart"
    assert latentloom("quickstart", "--output", output, "--minutes", 0.02, "--num-images", 40) == 0
    printed = capsys.readouterr().out
    assert list_names(output) == JOB_FILES
    assert 0 <= read_job_metrics(output)["class_agreement"] <= 1
    assert read_job_metrics(output)["num_reference_images"] == 190
    for text in ("samples.png", "reconstructions.png", "curves.png", "PSNR", "class agreement"):
        assert text in printed
    commands = [line.split()[:2] for line in printed.split("next:")[1].strip().splitlines()]
    assert commands == [["latentloom", "train"], ["latentloom", "sample"], ["latentloom", "push"]]
    fitting_steps = re.findall(r"(\d+) steps of \d+ images, [\d.]+ s each, fit into", printed)
    steps = [read_job_metrics(output)["steps"][stage] for stage in ("tokenizer", "prior")]
    assert list(map(int, fitting_steps)) == steps

    before = hash_files(output)
    assert (
        latentloom("quickstart", "--output", output, "--minutes", 99, "--num-images", 40) == 0
    )  # the steps are set once
    assert "has finished" in capsys.readouterr().out
    assert hash_files(output) == before


def test_train_takes_colour_images_that_are_not_square(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path / "images", count=40, size=(64, 96))
    job = tmp_path / "job"
    assert (
        latentloom("train", "--data", data, "--output", job, "--max-steps", 1, "--batch-size", 8, "--num-images", 8)
        == 0
    )
    printed = capsys.readouterr().out
    assert "37 training images, RGB, used at 64×96: the most common size" in printed
    assert "tokenizer vqgan-f8: 96 codes per image at a downsampling factor of 8" in printed
    assert "prior ar-tiny: small, for " in printed
    assert re.search(r"training will take about \d+ minutes on this machine: 1 steps of the tokenizer", printed)
    pipeline = LatentGenerationPipeline.from_pretrained(job)
    assert pipeline("a", output_type="np").images.shape == (1, 64, 96, 3)


@pytest.mark.parametrize("tokenizer", [pytest.param("vqgan-f4", marks=pytest.mark.slow), "kl"])
def test_another_recipe_changes_the_kind_of_prior_and_nothing_else(
    tokenizer: str, real_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    recipes = ["--recipe", "diffusion-tiny", "--tokenizer-recipe", tokenizer]
    assert latentloom(*train_command(real_images, job), *recipes) == 0
    assert list_names(job) == JOB_FILES
    assert read_job_metrics(job)["sampling"]["sampler"] == "dpm-solver++"
    assert "nan" not in capsys.readouterr().out
    samples = ["sample", "--pipeline", job / "pipeline", "--num-images", 3, "--output", tmp_path / "samples"]
    assert latentloom(*samples, "--sampler", "ddim", "--num-inference-steps", 3, "--guidance-interval", 0.2, 0.9) == 0
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 3
    assert latentloom(*samples, "--overwrite", "--top-k", 3) == 2
    assert "top_k is no option of a DiffusionPrior; expected any of: num_inference_steps, " in capsys.readouterr().err


def test_train_trains_only_the_prior_on_pixels_with_the_identity_tokenizer(
    real_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*train_command(real_images, tmp_path / "job"), "--resolution", 8, "--recipe", "diffusion-ddpm-pixels"]
    assert latentloom(*arguments, "--dry-run") == 0
    assert "prior diffusion-ddpm-pixels\n" in capsys.readouterr().out
    assert latentloom(*arguments) == 0
    assert list_names(tmp_path / "job") == JOB_FILES
    assert re.search(r"minutes on this machine: 2 steps of the prior \([\d.]+ min\); --", capsys.readouterr().out)
    assert read_job_metrics(tmp_path / "job")["reconstruction_frechet"] < 1e-6


def test_train_writes_a_pipeline_that_restores_images(
    real_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    assert latentloom(*train_command(real_images, job), "--recipe", "diffusion-tiny-upscale") == 0
    assert list_names(job) == JOB_FILES
    assert min(read_job_metrics(job)[name] for name in ("degraded_psnr", "restored_psnr")) > 0
    with Image.open(next(real_images.rglob("*.png"))) as image:
        image.resize((image.width // 2, image.height // 2)).save(tmp_path / "small.png")
    sample = ["sample", "--pipeline", job / "pipeline", "--num-images", 2]
    assert latentloom(*sample, "--image", tmp_path / "small.png", "--output", tmp_path / "restored") == 0
    assert list_names(tmp_path / "restored") == {
        "grid.png",
        "samples.json",
        "00000.png",
        "00001.png",
    }  # no class in the file names: none was named
    evaluate = ["evaluate", "--pipeline", job / "pipeline", "--reference", real_images, "--num-images", 10]
    assert latentloom(*evaluate, "--output", tmp_path / "metrics.json") == 0
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["restored_psnr"] > 0
    assert latentloom(*sample, "--output", tmp_path / "none") == 2
    assert "no image was passed; expected one. Pass `image=` or `--image`" in capsys.readouterr().err


def test_train_takes_a_flat_folder_without_labels(real_images: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for path in sorted(real_images.rglob("*.png"))[:30]:
        (tmp_path / "flat" / path.name).write_bytes(path.read_bytes())
    assert latentloom(*train_command(tmp_path / "flat", tmp_path / "job")) == 0
    pipeline = LatentGenerationPipeline.from_pretrained(tmp_path / "job")
    assert pipeline.prior.config.num_classes == 0
    assert pipeline.label_names is None
    out = tmp_path / "samples"
    assert latentloom("sample", "--pipeline", tmp_path / "job", "--num-images", 2, "--output", out) == 0
    assert list_names(out) == {"grid.png", "samples.json", "00000.png", "00001.png"}
    variations = ["sample", "--pipeline", tmp_path / "job", "--num-images", 2, "--image", out / "00000.png"]
    assert latentloom(*variations, "--output", tmp_path / "variations") == 0
    assert list_names(tmp_path / "variations") == {"grid.png", "samples.json", "00000.png", "00001.png"}
    assert read_job_metrics(tmp_path / "job")["num_reference_images"] < 4  # too few for a Fréchet distance
    assert read_job_metrics(tmp_path / "job")["recall"] is None  # and the job finishes without it


def test_a_corrupt_image_is_skipped_counted_and_listed(
    real_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    for path in sorted(real_images.rglob("*.png"))[:40]:
        (data / path.parent.name).mkdir(parents=True, exist_ok=True)
        (data / path.parent.name / path.name).write_bytes(path.read_bytes())
    corrupt_file = sorted(data.rglob("*.png"))[3]
    corrupt_file.write_bytes(corrupt_file.read_bytes()[:100])
    assert latentloom(*train_command(data, tmp_path / "job")) == 0
    assert re.search(r"skipped 1 of \d+ images that cannot be read, such as class", capsys.readouterr().err)
    skipped = [json.loads(line) for line in (tmp_path / "job" / "codes" / "skipped.jsonl").read_text().splitlines()]
    assert [row["source_id"] for row in skipped] == [corrupt_file.relative_to(data).as_posix()]
    manifest = json.loads((tmp_path / "job" / "codes" / "manifest.json").read_text())
    assert sum(split["rows"] for split in manifest["splits"].values()) == 39


def test_sampling_without_named_classes_samples_every_class(real_images: Path, tmp_path: Path) -> None:
    """Folders named 1, 2, 3 have the ids 0, 1, 2: a name that equals the id of another class must not be read as that id."""
    for i, path in enumerate(sorted(real_images.rglob("*.png"))[:30]):
        target = tmp_path / "data" / str(1 + i % 3) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    assert latentloom(*train_command(tmp_path / "data", tmp_path / "job", steps=1)) == 0
    out = tmp_path / "samples"
    assert latentloom("sample", "--pipeline", tmp_path / "job", "--num-images", 5, "--output", out) == 0
    classes = sorted(path.stem.split("-")[1] for path in out.glob("0*.png"))
    assert classes == ["1", "1", "2", "2", "3"]


def test_recipes_are_selected_by_image_size_count_and_device_with_reasons() -> None:
    def statistics(height: int, width: int, channels: int = 3) -> DatasetStatistics:
        size = (height, width)
        return DatasetStatistics(10, 0, size, size, size, channels)

    small = select_recipes(statistics(28, 28, 1), 10_000, "cpu")
    assert (small.tokenizer, small.prior) == ("vqgan-f4", "ar-tiny")
    assert small.reasons == (
        "10000 training images, grey, used at 28×28: the most common size",
        "tokenizer vqgan-f4: 49 codes per image at a downsampling factor of 4",
        "prior ar-tiny: small, for a CPU",
    )
    on_gpu = select_recipes(statistics(128, 128), 50_000, "cuda")
    assert (on_gpu.tokenizer, on_gpu.prior) == ("vqgan-f16", "ar-small")
    assert select_recipes(statistics(128, 128), 500, "cuda").prior == "ar-tiny"
    assert select_recipes(statistics(28, 28, 1), 10_000, "cpu", prior="diffusion-tiny").tokenizer == "kl-f8"
    assert select_recipes(statistics(128, 128), 10_000, "cuda", prior="diffusion-dit-s").tokenizer == "kl-f16"
    assert select_recipes(statistics(28, 28, 1), 10_000, "cpu", prior="diffusion-ddpm-pixels").tokenizer == "identity"
    chosen = select_recipes(statistics(128, 128), 500, "cpu", size=(64, 96), tokenizer="vqgan-f4", prior="ar-small")
    assert (chosen.size, chosen.tokenizer, chosen.prior) == ((64, 96), "vqgan-f4", "ar-small")
    assert all(line.endswith("as requested") for line in chosen.reasons)
    large_photo = select_recipes(statistics(3000, 4000), 500, "cpu")
    assert large_photo.size == (192, 256)
    assert "the most common size 3000×4000, reduced; pass --resolution to set another size" in large_photo.reasons[0]


@pytest.mark.parametrize("size", [(3000, 4000), (4032, 3024), (1080, 1920), (257, 257), (300, 40_000)])
def test_large_images_are_reduced_to_at_most_256_codes_with_nearly_the_same_aspect_ratio(size: tuple[int, int]) -> None:
    height, width = select_size(size)
    assert height % 16 == width % 16 == 0
    assert min(height, width) >= 16
    assert max(height, width) == 256
    if max(size) < 3 * min(size):
        assert height / width == pytest.approx(size[0] / size[1], rel=0.08)
    assert select_size((256, 100)) == (256, 100)


def run_launched(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "accelerate.commands.launch", "--num_processes", 2, "--num_machines", 1, "--cpu"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    return run_python(*launch, CHECKOUT / "scripts" / script, *arguments, timeout=240, PYTHONPATH=str(CHECKOUT))


@pytest.mark.slow
def test_two_processes_train_one_tokenizer(real_images: Path, tmp_path: Path) -> None:
    arguments = ["--data", real_images, "--output", tmp_path / "run", "--resolution", 16, "--batch-size", 8]
    process = run_launched("train_tokenizer.py", *arguments, "--max-steps", 3, "--log-every", 1)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("next: latentloom tokenize") == 1  # not once per process
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "l1" in row] == [1, 2, 3]
    VQGAN.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.slow
def test_two_processes_with_minutes_train_a_prior_that_loads(finished_job: Path, tmp_path: Path) -> None:
    """Each process measures another time per step; they must agree on the steps, or one waits for the other forever."""
    arguments = ["--codes", finished_job / "codes", "--output", tmp_path / "run", "--recipe", "ar-tiny"]
    process = run_launched("train_prior.py", *arguments, "--minutes", 0.03)
    assert process.returncode == 0, process.stderr
    pipeline = LatentGenerationPipeline.from_pretrained(tmp_path / "run")
    assert pipeline(0, output_type="np").images.shape == (1, 16, 16, 1)
