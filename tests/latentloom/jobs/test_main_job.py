"""From a folder of pictures to a pipeline on the Hub: each verb in turn, and both stages in one command."""

import hashlib
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import CHECKOUT, digests, in_new_process, latentloom
from hub_stand_in import StandInHub
from PIL import Image
from safetensors.torch import load_file
from small_parts import write_pictures

from latentloom.commands import quickstart
from latentloom.jobs import main_job
from latentloom.planning.recipe_selection import select_recipes, working_size
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.statistics import DatasetStatistics
from stage1_tokenizer.vqgan import VQGAN
from stage2_prior.autoregressive.model import AutoregressivePrior

STEPS = 4  # of the finished job
JOB = {"tokenizer", "codes", "prior", "pipeline", "samples.png", "reconstructions.png", "curves.png", "metrics.json"}
RUN = {"config.yaml", "environment.json", "run.json", "metrics.jsonl", "samples", "checkpoints", "model"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def metrics_of(job: Path) -> dict:
    return json.loads((job / "metrics.json").read_text())


def quick(data: Path, output: Path, steps: int = 2) -> list[object]:
    """`train` on 16×16 pixels, so 4×4 codes, for a few small steps."""
    small = ["--resolution", 16, "--batch-size", 8, "--num-images", 20]
    return ["train", "--data", data, "--output", output, "--max-steps", steps, *small]


def test_train_leaves_the_folders_pictures_and_figures_that_the_design_lists(finished_job: Path) -> None:
    assert names(finished_job) == JOB
    assert names(finished_job / "tokenizer") == RUN
    assert names(finished_job / "prior") == RUN | {"pipeline"}
    assert {"model_index.json", "tokenizer", "prior", "README.md"} <= names(finished_job / "pipeline")
    assert {"manifest.json", "tokenizer", "train-00000.arrow", "validation-00000.arrow", "skipped.jsonl"} == names(
        finished_job / "codes"
    )
    assert names(finished_job / "tokenizer" / "checkpoints") == {f"step_{STEPS:06d}"}
    assert names(finished_job / "tokenizer" / "samples") == {f"step_{STEPS:06d}.png"}
    metrics = metrics_of(finished_job)
    for name in ("psnr", "codes_used", "perplexity", "frechet", "recall", "seconds"):
        assert isinstance(metrics[name], int | float), name
    assert 0 <= metrics["class_agreement"] <= 1  # by a probe: no judge knows these classes
    assert set(metrics["phases"]) == {"train_tokenizer", "tokenize", "train_prior", "sample", "evaluate"}
    assert all(phase["images_per_second"] > 0 for phase in metrics["phases"].values())
    assert metrics["steps"] == {"tokenizer": STEPS, "prior": STEPS}
    for picture in ("samples.png", "reconstructions.png", "curves.png"):
        pixels = np.asarray(Image.open(finished_job / picture).convert("L"))
        assert len(np.unique(pixels)) > 20, f"{picture} shows next to nothing"


def test_the_pipeline_of_a_job_samples_bitwise_the_same_images_in_a_new_process(finished_job: Path) -> None:
    folder = finished_job / "pipeline"
    here = LatentGenerationPipeline.from_pretrained(folder)(
        ["class 3", 5], 2, generator=torch.Generator().manual_seed(7), output_type="np"
    ).images
    there = in_new_process(
        "-c",
        f"""
import hashlib, torch
from pipelines import LatentGenerationPipeline
pipeline = LatentGenerationPipeline.from_pretrained({str(folder)!r})
images = pipeline(["class 3", 5], 2, generator=torch.Generator().manual_seed(7), output_type="np").images
print(hashlib.sha256(images.tobytes()).hexdigest())""",
    )
    assert there.stdout.strip() == hashlib.sha256(here.tobytes()).hexdigest(), there.stderr
    assert len({image.tobytes() for image in here}) == 4  # or a pipeline that ignores its seed would pass


def test_a_finished_job_that_is_run_again_says_so_and_changes_no_file(
    finished_job: Path, real_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(finished_job)
    assert latentloom(*quick(real_images, finished_job, steps=STEPS)) == 0
    said = capsys.readouterr()
    assert "has finished its 4 steps of the tokenizer and 4 steps of the prior; give a larger --max-steps" in said.out
    assert "will take" not in said.out  # no time is announced, or measured, for a job that is done
    assert f"PSNR {metrics_of(finished_job)['psnr']:.2f} dB" in said.out
    assert digests(finished_job) == before


@pytest.mark.parametrize("verb", ["train-tokenizer", "tokenize", "train-prior"])
def test_a_finished_stage_that_is_run_again_says_so_and_changes_no_file(
    verb: str, finished_job: Path, real_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(finished_job)
    words = {
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
    assert latentloom(verb, *words) == 0
    assert re.search(r"has finished its 4 steps|holds these codes already", capsys.readouterr().out)
    assert digests(finished_job) == before


def test_a_larger_max_steps_extends_a_job_and_renews_what_depends_on_its_tokenizer(
    job: Path, real_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = digests(job / "prior")
    before = VQGAN.from_pretrained(job / "tokenizer" / "model").config.tokenizer_id
    assert latentloom(*quick(real_images, job, steps=STEPS + 2)) == 0
    assert "the prior starts again" in capsys.readouterr().out
    assert metrics_of(job)["steps"] == {"tokenizer": STEPS + 2, "prior": STEPS + 2}
    resumed = [json.loads(line) for line in (job / "tokenizer" / "metrics.jsonl").read_text().splitlines()]
    assert [row["resumed_from"] for row in resumed if "resumed_from" in row] == [STEPS]
    pipeline = LatentGenerationPipeline.from_pretrained(job)
    assert pipeline.tokenizer.config.tokenizer_id == pipeline.prior.config.tokenizer_id != before
    assert names(job) == {*JOB, f"prior-{STEPS}-steps"}
    assert digests(job / f"prior-{STEPS}-steps") == earlier  # moved aside, with its pipeline


def test_a_job_interrupted_before_its_figures_goes_on_there(
    real_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(main_job, "write_results", interrupted)
        assert latentloom(*quick(real_images, tmp_path / "job")) == 130
    assert "run the same command again" in capsys.readouterr().err
    trained = digests(tmp_path / "job" / "prior")
    assert latentloom(*quick(real_images, tmp_path / "job")) == 0
    assert digests(tmp_path / "job" / "prior") == trained
    assert names(tmp_path / "job") == JOB


@pytest.mark.parametrize("saved", [AutoregressivePrior, LatentGenerationPipeline], ids=["model", "pipeline"])
def test_an_extension_interrupted_while_it_saves_is_not_taken_for_finished(
    saved: type, finished_job: Path, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = ["train-prior", "--config", finished_job / "prior" / "config.yaml"]
    words += ["--output", job / "prior", "--max-steps", STEPS + 1]
    with monkeypatch.context() as patch:
        patch.setattr(saved, "save_pretrained", interrupted)
        assert latentloom(*words) == 130
    assert latentloom(*words) == 0
    weights = [
        (run / "model.safetensors").read_bytes()
        for run in (job / "prior" / "model", job / "prior" / "pipeline" / "prior")
    ]
    assert weights[0] == weights[1]
    assert weights[0] != (finished_job / "prior" / "model" / "model.safetensors").read_bytes()


def test_a_run_repeats_bitwise_from_its_own_config_in_another_folder(finished_job: Path, tmp_path: Path) -> None:
    for stage, verb in (("tokenizer", "train-tokenizer"), ("prior", "train-prior")):
        assert latentloom(verb, "--config", finished_job / stage / "config.yaml", "--output", tmp_path / stage) == 0
        weights, again = (load_file(run / stage / "model" / "model.safetensors") for run in (finished_job, tmp_path))
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        kept, written = (yaml.safe_load((run / stage / "config.yaml").read_text()) for run in (finished_job, tmp_path))
        assert {name for name in kept if kept[name] != written[name]} == {"output"}


def test_another_seed_gives_another_run(finished_job: Path, tmp_path: Path) -> None:
    config = finished_job / "tokenizer" / "config.yaml"
    assert latentloom("train-tokenizer", "--config", config, "--output", tmp_path / "run", "--seed", 1) == 0
    ids = [
        VQGAN.from_pretrained(run / "model").config.tokenizer_id
        for run in (finished_job / "tokenizer", tmp_path / "run")
    ]
    assert ids[0] != ids[1]


def test_every_verb_does_its_part_on_real_images(
    real_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tok, codes, prior = tmp_path / "tok", tmp_path / "codes", tmp_path / "prior"
    steps = ("--max-steps", 3, "--checkpoint-every", 2, "--sample-every", 2, "--log-every", 1)
    assert latentloom("train-tokenizer", "--data", real_images, "--output", tok, "--resolution", 16, *steps) == 0
    assert f"next: latentloom tokenize --tokenizer {tok}" in capsys.readouterr().out
    assert names(tok) == RUN
    assert names(tok / "checkpoints") == {"step_000002", "step_000003"}
    assert names(tok / "samples") == {"step_000002.png", "step_000003.png"}
    assert {"config.json", "model.safetensors", "README.md"} <= names(tok / "model")

    assert (
        latentloom("tokenize", "--tokenizer", tok, "--data", real_images, "--output", codes, "--contents", "both") == 0
    )
    assert latentloom("train-prior", "--codes", codes, "--output", prior, "--recipe", "ar-tiny", *steps) == 0
    assert names(prior) == RUN | {"pipeline"}

    out = tmp_path / "samples"
    words = ["--pipeline", prior, "--classes", "class 7", "2", "--num-images", 3, "--seed", 5]
    assert latentloom("sample", *words, "--output", out) == 0
    assert names(out) == {"grid.png", "samples.json", "00000-class-7.png", "00001-class-7.png", "00002-class-2.png"}
    assert Image.open(out / "00000-class-7.png").size == (16, 16)
    assert latentloom("sample", *words, "--output", tmp_path / "again") == 0
    assert digests(out) == digests(tmp_path / "again")
    assert latentloom("sample", *words[:-1], 6, "--output", tmp_path / "other") == 0
    assert digests(out) != digests(tmp_path / "other")

    rebuilt = tmp_path / "rebuilt"
    assert (
        latentloom("reconstruct", "--tokenizer", tok, "--data", real_images, "--num-images", 4, "--output", rebuilt)
        == 0
    )
    assert names(rebuilt) == {"grid.png", *(f"{i:05d}.png" for i in range(4))}

    figures = tmp_path / "figures.json"
    capsys.readouterr()
    words = ["--reference", real_images, "--num-images", 20, "--output", figures]
    assert latentloom("evaluate", "--pipeline", prior, *words) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(figures.read_text())
    assert {"psnr", "codes_used", "perplexity", "frechet", "recall", "features"} <= json.loads(
        figures.read_text()
    ).keys()
    assert latentloom("evaluate", "--tokenizer", tok, "--reference", real_images) == 0
    assert "psnr" in json.loads(capsys.readouterr().out)


def test_a_pushed_pipeline_samples_by_its_repository_name(finished_job: Path, tmp_path: Path) -> None:
    samples = ["--num-images", 3, "--output"]
    with StandInHub() as hub:
        environment = hub.environment(tmp_path / "home")
        words = ["push", "--pipeline", finished_job, "--repo-id", "stand-in/clothes"]
        pushed = in_new_process("-m", "latentloom.cli", *words, **environment)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.startswith("pushed: ")
        files = hub.repos["stand-in/clothes"].files
        words = ["sample", "--pipeline", "stand-in/clothes", *samples, tmp_path / "from-hub"]
        sampled = in_new_process("-m", "latentloom.cli", *words, **environment)
        assert sampled.returncode == 0, sampled.stderr
    assert latentloom("sample", "--pipeline", finished_job, *samples, tmp_path / "from-folder") == 0
    assert digests(tmp_path / "from-hub") == digests(tmp_path / "from-folder")
    weights = (finished_job / "pipeline" / "prior" / "model.safetensors").read_bytes()
    assert files["prior/model.safetensors"] == weights
    assert {"README.md", "samples.png", "metrics.json", "model_index.json", "tokenizer/config.json"} <= files.keys()


def test_quickstart_does_the_whole_job_in_the_minutes_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a few of the embedded images; the slow test in test_wheel takes them all."""
    whole = quickstart.load_source("fashion-mnist-mini")
    parts = {name: getattr(whole, name).select(range(190)) for name in ("train", "validation", "test")}
    monkeypatch.setattr(quickstart, "load_source", lambda _: replace(whole, **parts))
    output = tmp_path / "quickstart"
    assert latentloom("quickstart", "--output", output, "--minutes", 0.02, "--num-images", 40) == 0
    said = capsys.readouterr().out
    assert names(output) == JOB
    assert 0 <= metrics_of(output)["class_agreement"] <= 1
    assert metrics_of(output)["num_reference_images"] == 190
    for what in ("samples.png", "reconstructions.png", "curves.png", "PSNR", "class agreement"):
        assert what in said
    commands = [line.split()[:2] for line in said.split("next:")[1].strip().splitlines()]
    assert commands == [["latentloom", "train"], ["latentloom", "sample"], ["latentloom", "push"]]
    fits = re.findall(r"(\d+) steps of \d+ images, [\d.]+ s each, fit into", said)
    steps = [metrics_of(output)["steps"][stage] for stage in ("tokenizer", "prior")]
    assert list(map(int, fits)) == steps

    before = digests(output)
    assert latentloom("quickstart", "--output", output, "--minutes", 99, "--num-images", 40) == 0  # they are set once
    assert "has finished" in capsys.readouterr().out
    assert digests(output) == before


def test_train_takes_colour_pictures_that_are_not_square(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pictures(tmp_path / "pictures", count=40, size=(64, 96))
    job = tmp_path / "job"
    assert (
        latentloom("train", "--data", data, "--output", job, "--max-steps", 1, "--batch-size", 8, "--num-images", 8)
        == 0
    )
    said = capsys.readouterr().out
    assert "37 training images, RGB, used at 64×96: the commonest size" in said
    assert "tokenizer vqgan-f8: 96 codes an image at a downsampling factor of 8" in said
    assert "prior ar-tiny: small, for " in said
    assert re.search(r"training will take about \d+ minutes on this machine: 1 steps of the tokenizer", said)
    pipeline = LatentGenerationPipeline.from_pretrained(job)
    assert pipeline("a", output_type="np").images.shape == (1, 64, 96, 3)


@pytest.mark.parametrize("tokenizer", [pytest.param("vqgan-f4", marks=pytest.mark.slow), "kl"])
def test_changing_the_recipe_changes_the_kind_of_prior_and_nothing_else(
    tokenizer: str, real_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    recipes = ["--recipe", "diffusion-tiny", "--tokenizer-recipe", tokenizer]
    assert latentloom(*quick(real_images, job), *recipes) == 0
    assert names(job) == JOB
    assert metrics_of(job)["sampling"]["sampler"] == "dpm-solver++"
    assert "nan" not in capsys.readouterr().out
    samples = ["sample", "--pipeline", job / "pipeline", "--num-images", 3, "--output", tmp_path / "samples"]
    assert latentloom(*samples, "--sampler", "ddim", "--num-inference-steps", 3, "--guidance-interval", 0.2, 0.9) == 0
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 3
    assert latentloom(*samples, "--overwrite", "--top-k", 3) == 2
    assert "top_k is no option of a DiffusionPrior; expected any of: num_inference_steps, " in capsys.readouterr().err


def test_train_learns_on_pixels_where_the_tokenizer_has_nothing_to_learn(
    real_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*quick(real_images, tmp_path / "job"), "--resolution", 8, "--recipe", "diffusion-ddpm-pixels"]
    assert latentloom(*words, "--dry-run") == 0
    assert "prior diffusion-ddpm-pixels\n" in capsys.readouterr().out
    assert latentloom(*words) == 0
    assert names(tmp_path / "job") == JOB
    assert re.search(r"minutes on this machine: 2 steps of the prior \([\d.]+ min\); --", capsys.readouterr().out)
    assert metrics_of(tmp_path / "job")["reconstruction_frechet"] < 1e-6


def test_train_leaves_a_pipeline_that_restores_pictures(
    real_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    assert latentloom(*quick(real_images, job), "--recipe", "diffusion-tiny-upscale") == 0
    assert names(job) == JOB
    assert min(metrics_of(job)[name] for name in ("degraded_psnr", "restored_psnr")) > 0
    with Image.open(next(real_images.rglob("*.png"))) as picture:
        picture.resize((picture.width // 2, picture.height // 2)).save(tmp_path / "small.png")
    sample = ["sample", "--pipeline", job / "pipeline", "--num-images", 2]
    assert latentloom(*sample, "--image", tmp_path / "small.png", "--output", tmp_path / "restored") == 0
    assert names(tmp_path / "restored") == {
        "grid.png",
        "samples.json",
        "00000.png",
        "00001.png",
    }  # of no class that nobody named
    report = ["evaluate", "--pipeline", job / "pipeline", "--reference", real_images, "--num-images", 10]
    assert latentloom(*report, "--output", tmp_path / "figures.json") == 0
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["restored_psnr"] > 0
    assert latentloom(*sample, "--output", tmp_path / "none") == 2
    assert "no image was passed; expected one. Pass `image=` or `--image`" in capsys.readouterr().err


def test_train_takes_a_flat_folder_without_labels(real_images: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for path in sorted(real_images.rglob("*.png"))[:30]:
        (tmp_path / "flat" / path.name).write_bytes(path.read_bytes())
    assert latentloom(*quick(tmp_path / "flat", tmp_path / "job")) == 0
    pipeline = LatentGenerationPipeline.from_pretrained(tmp_path / "job")
    assert pipeline.prior.config.num_classes == 0
    assert pipeline.label_names is None
    out = tmp_path / "samples"
    assert latentloom("sample", "--pipeline", tmp_path / "job", "--num-images", 2, "--output", out) == 0
    assert names(out) == {"grid.png", "samples.json", "00000.png", "00001.png"}
    varied = ["sample", "--pipeline", tmp_path / "job", "--num-images", 2, "--image", out / "00000.png"]
    assert latentloom(*varied, "--output", tmp_path / "varied") == 0
    assert names(tmp_path / "varied") == {"grid.png", "samples.json", "00000.png", "00001.png"}
    assert metrics_of(tmp_path / "job")["num_reference_images"] < 4  # too few for a distance,
    assert metrics_of(tmp_path / "job")["recall"] is None  # which must not cost the user the rest of the job


def test_a_corrupt_picture_is_skipped_counted_and_listed(
    real_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    for path in sorted(real_images.rglob("*.png"))[:40]:
        (data / path.parent.name).mkdir(parents=True, exist_ok=True)
        (data / path.parent.name / path.name).write_bytes(path.read_bytes())
    broken = sorted(data.rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:100])
    assert latentloom(*quick(data, tmp_path / "job")) == 0
    assert re.search(r"skipped 1 of \d+ images that cannot be read, such as class", capsys.readouterr().err)
    listed = [json.loads(line) for line in (tmp_path / "job" / "codes" / "skipped.jsonl").read_text().splitlines()]
    assert [row["source_id"] for row in listed] == [broken.relative_to(data).as_posix()]
    manifest = json.loads((tmp_path / "job" / "codes" / "manifest.json").read_text())
    assert sum(split["rows"] for split in manifest["splits"].values()) == 39


def test_without_classes_asked_for_every_class_is_sampled_whatever_its_name(real_images: Path, tmp_path: Path) -> None:
    """Folders named 1, 2, 3 have the ids 0, 1, 2: a name that looks like another's id must not take its place."""
    for i, path in enumerate(sorted(real_images.rglob("*.png"))[:30]):
        place = tmp_path / "data" / str(1 + i % 3) / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    assert latentloom(*quick(tmp_path / "data", tmp_path / "job", steps=1)) == 0
    out = tmp_path / "samples"
    assert latentloom("sample", "--pipeline", tmp_path / "job", "--num-images", 5, "--output", out) == 0
    classes = sorted(path.stem.split("-")[1] for path in out.glob("0*.png"))
    assert classes == ["1", "1", "2", "2", "3"]


def test_the_choice_follows_size_count_and_machine_and_says_why() -> None:
    def seen(height: int, width: int, channels: int = 3) -> DatasetStatistics:
        size = (height, width)
        return DatasetStatistics(10, 0, size, size, size, channels)

    small = select_recipes(seen(28, 28, 1), 10_000, "cpu")
    assert (small.tokenizer, small.prior) == ("vqgan-f4", "ar-tiny")
    assert small.reasons == (
        "10000 training images, grey, used at 28×28: the commonest size",
        "tokenizer vqgan-f4: 49 codes an image at a downsampling factor of 4",
        "prior ar-tiny: small, for a CPU",
    )
    large = select_recipes(seen(128, 128), 50_000, "cuda")
    assert (large.tokenizer, large.prior) == ("vqgan-f16", "ar-small")
    assert select_recipes(seen(128, 128), 500, "cuda").prior == "ar-tiny"
    assert select_recipes(seen(28, 28, 1), 10_000, "cpu", prior="diffusion-tiny").tokenizer == "kl-f8"
    assert select_recipes(seen(128, 128), 10_000, "cuda", prior="diffusion-dit-s").tokenizer == "kl-f16"
    assert select_recipes(seen(28, 28, 1), 10_000, "cpu", prior="diffusion-ddpm-pixels").tokenizer == "identity"
    asked = select_recipes(seen(128, 128), 500, "cpu", size=(64, 96), tokenizer="vqgan-f4", prior="ar-small")
    assert (asked.size, asked.tokenizer, asked.prior) == ((64, 96), "vqgan-f4", "ar-small")
    assert all(line.endswith("as asked") for line in asked.reasons)
    photograph = select_recipes(seen(3000, 4000), 500, "cpu")
    assert photograph.size == (192, 256)
    assert "the commonest size 3000×4000, reduced; --resolution sets another" in photograph.reasons[0]


@pytest.mark.parametrize("size", [(3000, 4000), (4032, 3024), (1080, 1920), (257, 257), (300, 40_000)])
def test_photographs_are_reduced_to_at_most_256_codes_in_about_their_shape(size: tuple[int, int]) -> None:
    height, width = working_size(size)
    assert height % 16 == width % 16 == 0
    assert min(height, width) >= 16
    assert max(height, width) == 256
    if max(size) < 3 * min(size):
        assert height / width == pytest.approx(size[0] / size[1], rel=0.08)
    assert working_size((256, 100)) == (256, 100)


def launched(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "accelerate.commands.launch", "--num_processes", 2, "--num_machines", 1, "--cpu"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    return in_new_process(*launch, CHECKOUT / "scripts" / script, *words, timeout=240, PYTHONPATH=str(CHECKOUT))


def test_two_processes_train_one_tokenizer(real_images: Path, tmp_path: Path) -> None:
    words = ["--data", real_images, "--output", tmp_path / "run", "--resolution", 16, "--batch-size", 8]
    done = launched("train_tokenizer.py", *words, "--max-steps", 3, "--log-every", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: latentloom tokenize") == 1  # and not once a process
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "l1" in row] == [1, 2, 3]
    VQGAN.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.slow
def test_two_processes_bound_by_minutes_train_a_prior_that_loads(finished_job: Path, tmp_path: Path) -> None:
    """Each process measures another time a step; if they did not agree on the steps, one would wait for the other."""
    words = ["--codes", finished_job / "codes", "--output", tmp_path / "run", "--recipe", "ar-tiny"]
    done = launched("train_prior.py", *words, "--minutes", 0.03)
    assert done.returncode == 0, done.stderr
    pipeline = LatentGenerationPipeline.from_pretrained(tmp_path / "run")
    assert pipeline(0, output_type="np").images.shape == (1, 16, 16, 1)
