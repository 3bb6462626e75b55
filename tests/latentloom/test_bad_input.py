"""Bad input ends in one line with the value and what to do, exit status 2, and no changed file."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import hash_files, latentloom, without_root_access
from PIL import Image

FILES = {
    "text.npz": "no archive",
    "invalid.yaml": "a: [",
    "list.yaml": "[1, 2]",
    "mistyped.yaml": "max_steps: ten",
    "unknown.yaml": "max_stepz: 3",
    "later.yaml": "format: 99",
}
FILES |= {"codebook.yaml": "model: {codebook_size: 0}", "section.yaml": "model: 5", "noimage/notes.txt": "no picture"}
FILES |= {"project/config.yaml": "name: mine", "project/metrics.jsonl": '{"mine": 1}'}
FILES |= {"corrupt/a.png": "no picture", "corrupt/b.png": "nor this", "full/notes.txt": "mine", "notes.txt": "a file"}

ARRAYS = {
    "floats.npz": {"arr_0": np.zeros((8, 16, 16, 3), np.float32)},
    "few.npz": {"arr_0": np.zeros((5, 16, 16, 3), np.uint8)},
    "large.npz": {"arr_0": np.zeros((8, 32, 32, 3), np.uint8)},
    "other.npz": {"weights": np.zeros(3)},
    "moments.npz": {"mu": np.zeros(4), "sigma": np.eye(4)},
    "flat.npz": {"mu": np.zeros(4), "sigma": np.zeros((4, 3))},
}


def write_user_files(folder: Path, job: Path, images: Path) -> Path:
    """Write files that users may have: images, a job, and files and folders that are neither."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
    for name, array in ARRAYS.items():
        np.savez(folder / name, **array)
    for i, size in enumerate((16, 16, 20)):
        (folder / "mixed").mkdir(exist_ok=True)
        Image.new("L", (size, size)).save(folder / "mixed" / f"{i}.png")
    (folder / "torn").mkdir()
    for i in range(8):
        Image.new("L", (16, 16)).save(folder / "torn" / f"{i}.png")
    (folder / "torn" / "8.png").write_bytes(b"no picture")
    (folder / "images").symlink_to(images)
    shutil.copytree(job, folder / "job", ignore=shutil.ignore_patterns("checkpoints"))
    return folder


@pytest.fixture(scope="module")
def user_files(finished_job: Path, real_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_user_files(tmp_path_factory.mktemp("files"), finished_job, real_images)


@pytest.fixture
def shared_folder(user_files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a shared folder, for commands that are refused and so change nothing."""
    monkeypatch.chdir(user_files)
    return user_files


@pytest.fixture
def folder(finished_job: Path, real_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a new folder, for a test that damages files."""
    monkeypatch.chdir(tmp_path)
    return write_user_files(tmp_path, finished_job, real_images)


def refusal(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """Run a command that must be refused, check all that a refusal promises, and return its error line."""
    before = hash_files(Path.cwd())
    capsys.readouterr()
    status = latentloom(*command.split())
    printed = capsys.readouterr()
    assert status == 2, printed
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.endswith("\n")
    assert hash_files(Path.cwd()) == before
    return printed.err.removeprefix("error: ")


# What is wrong → the command, and two texts of its error line: the problem and the advice.
TOKENIZER = "train-tokenizer --output new --data images"
PRIOR = "train-prior --output new --codes job/codes --recipe ar-tiny"
TRAIN = "train --output new --data images"
SAMPLE = "sample --output new --pipeline job"
EVALUATE = "evaluate --reference images --pipeline job"
INSPECT = "inspect-tokenizer --tokenizer job --data images"
CASES = {
    "a folder that is missing": ("train --output new --data ./nowhere", "./nowhere", "expected a folder"),
    "an empty folder": ("train --output new --data empty", "'empty' is empty", "Put images in it"),
    "a folder without images": ("train --output new --data noimage", "'noimage' holds no image", "Put images in it"),
    "corrupt images alone": ("train --output new --data corrupt", "a.png", "none of 1 images"),
    "corrupt images alone, for one stage": ("train-tokenizer --output new --data corrupt", "a.png", "expected"),
    "a file for a folder of images": ("train --output new --data notes.txt", "notes.txt", "expected a folder"),
    "an unknown verb": ("trian", "unknown verb 'trian'", "did you mean 'train'?"),
    "an option for a verb": ("--data images", "unknown verb '--data'", "expected one of: quickstart, train"),
    "an unknown option": (f"{TRAIN} --max-step 3", "'--max-step'", "did you mean '--max-steps'?"),
    "an unknown option instead of a required one": ("train --data images --outptu new", "'--outptu'", "'--output'"),
    "an unknown nested option": (f"{TOKENIZER} --model.code-size 3", "--model.code-size", "'--model.codebook-size'"),
    "a word too many": (f"{TRAIN} extra", "unknown argument 'extra'", "latentloom train --help"),
    "a required option left out": ("train --data images", "--output missing", "expected a value"),
    "no options at all": ("train-prior", "--output and --codes missing", "latentloom train-prior --help"),
    "two required options left out": ("train", "--data and --output missing", "latentloom train --help"),
    "an option without its value": (f"{TOKENIZER} --config", "--config has no value", "expected one"),
    "a choice that is none": (f"{TOKENIZER} --model.quantizer.name fs", "'fs'", "did you mean 'fsq'"),
    "an unknown recipe": (f"{TOKENIZER} --recipe vqgan-f44", "'vqgan-f44'", "did you mean 'vqgan-f4'?"),
    "a recipe unlike any": (f"{TOKENIZER} --recipe best", "'best'", "expected one of: bsq, ema, fsq"),
    "a prior's recipe for a tokenizer": (
        f"{TOKENIZER} --recipe ar-tiny",
        "ar-tiny is a recipe of the prior",
        "vqgan-f4",
    ),
    "a tokenizer's recipe for a prior": (
        f"{PRIOR} --recipe vqgan-f4",
        "vqgan-f4 is a recipe of the tokenizer",
        "ar-tiny",
    ),
    "an unknown recipe of both": (f"{TRAIN} --recipe ar-tini", "'ar-tini'", "did you mean 'ar-tiny'?"),
    "a recipe of the other stage": (
        f"{TRAIN} --tokenizer-recipe ar-tiny",
        "ar-tiny is a recipe of the prior",
        "takes it as --recipe",
    ),
    "an unknown field": (f"{TOKENIZER} --config unknown.yaml", "'max_stepz'", "did you mean 'max_steps'?"),
    "a mistyped value": (f"{TOKENIZER} --config mistyped.yaml", "max_steps is 'ten'", "expected int"),
    "a mistyped option": (f"{TOKENIZER} --max-steps ten", "--max-steps is 'ten'", "expected INT"),
    "a value for a section": (f"{TOKENIZER} --config section.yaml", "model is 5", "expected a section"),
    "a file of a later format": (
        f"{TOKENIZER} --config later.yaml",
        "later.yaml: format is 99",
        "expected a whole number",
    ),
    "invalid YAML": (f"{TOKENIZER} --config invalid.yaml", "invalid.yaml is not valid YAML", "correct the file"),
    "a list for a configuration": (f"{TOKENIZER} --config list.yaml", "list.yaml holds a list", "expected a mapping"),
    "a configuration that is missing": (f"{TOKENIZER} --config no.yaml", "no.yaml", "expected a YAML file"),
    "a folder for a configuration": (f"{TOKENIZER} --config empty", "empty", "expected"),
    "another stage's configuration": (
        f"{PRIOR} --config job/tokenizer/config.yaml",
        "'model.name'",
        "expected one of",
    ),
    "an empty codebook": (f"{TOKENIZER} --model.codebook-size 0", "model.codebook_size is 0", "expected at least 1"),
    "an empty codebook in YAML": (f"{TOKENIZER} --config codebook.yaml", "model.codebook_size is 0", "at least 1"),
    "levels that do not agree": (f"{TOKENIZER} --model.channels 8 8", "model.channels", "expected one entry per level"),
    "channels that no image has": (f"{TOKENIZER} --image-channels 7", "7", "1 (grey)"),
    "attention where there is no level": (
        f"{TOKENIZER} --model.attention 64",
        "model.attention contains 64",
        "1, 2, 4",
    ),
    "levels that do not multiply to K": (
        f"{TOKENIZER} --recipe fsq --model.codebook-size 500",
        "model.codebook_size is 500",
        "expected 512 and 3",
    ),
    "codes of bits that are no power of two": (
        f"{TOKENIZER} --recipe lfq --model.codebook-size 500",
        "model.codebook_size is 500",
        "expected 2^channels",
    ),
    "a normal prior of codes": (f"{TOKENIZER} --model.prior standard_normal", "model.prior", "give --model.name kl"),
    "a prior of codes for a tokenizer without": (
        f"{TRAIN} --tokenizer-recipe kl",
        "the tokenizer kl has no codes",
        "--tokenizer-recipe vqgan-f4",
    ),
    "random orders without learnt positions": (
        f"{PRIOR} --order.random 0.5 --model.no-learned-positions",
        "model.learned_positions is false",
        "expected learned positions. Pass `--model.learned-positions`",
    ),
    "a share of orders beyond 1": (f"{PRIOR} --order.random 1.5", "order.random is 1.5", "expected a share"),
    "heads that do not share keys evenly": (
        f"{PRIOR} --model.num-key-value-heads 3",
        "model.num_key_value_heads is 3 for 4 heads",
        "divides the heads",
    ),
    "a mask without an image": (
        "sample --pipeline job --mask-image mask.png",
        "mask_image was given without image",
        "give image=",
    ),
    "a strength beyond 1": (
        "sample --pipeline job --image picture.png --strength 1.5",
        "strength is 1.5",
        "expected a share",
    ),
    "an image to edit that is none": (
        "sample --pipeline job --image job/metrics.json",
        "metrics.json could not be read",
        "expected an image",
    ),
    "nothing to inspect of a prior": (
        "inspect-prior --pipeline job --data images --num-samples 0",
        "is 0",
        "at least 1",
    ),
    "a dry run of nothing": (f"{TOKENIZER} --recipe identity --dry-run", "has nothing to learn", "without --dry-run"),
    "a perceptual loss without its weights": (
        f"{TOKENIZER} --perceptual lpips",
        "vgg16",
        "--perceptual efficientnet-lite0",
    ),
    "a size that f does not divide": (
        f"{TOKENIZER} --resolution 30x29 --padding refuse",
        "30x29",
        "Pass --resolution 32x32 or --padding pad",
    ),
    "a size that is none": (f"{TRAIN} --resolution 3x4x5", "--resolution is 3x4x5", "such as 64"),
    "no size at all": (f"{TRAIN} --resolution 0", "--resolution is 0", "such as 64"),
    "negative steps": (f"{TRAIN} --max-steps -1", "--max-steps is -1", "at least 1"),
    "no steps": (f"{PRIOR} --max-steps 0", "--max-steps is 0", "at least 1"),
    "an empty batch": (f"{TRAIN} --batch-size 0", "--batch-size is 0", "at least 1"),
    "negative minutes": (f"{TRAIN} --minutes -2", "--minutes is -2", "expected a positive number"),
    "no minutes": (f"{TOKENIZER} --minutes 0", "--minutes is 0", "expected a positive number"),
    "minutes that are no number": (f"{PRIOR} --minutes nan", "--minutes is nan", "expected a positive number"),
    "minutes without end": (f"{TRAIN} --minutes inf", "--minutes is inf", "expected a positive number"),
    "negative minutes of a quickstart": ("quickstart --output new --minutes -1", "--minutes is -1", "positive"),
    "a negative seed": (f"{TRAIN} --seed -1", "--seed is -1", "expected a whole number from 0"),
    "no samples to measure": (f"{TRAIN} --num-images 0", "--num-images is 0", "expected at least 1"),
    "a hidden size that heads do not divide": (
        f"{PRIOR} --model.hidden-size 30",
        "is 30 for 4 heads",
        "multiple of 16",
    ),
    "no heads": (f"{PRIOR} --model.num-heads 0", "num_heads is 0", "at least 1"),
    "a temperature of none": (f"{PRIOR} --sampling.temperature 0", "temperature is 0", "expected a positive number"),
    "codes that are missing": ("train-prior --output new --codes nowhere", "nowhere", "run: latentloom tokenize"),
    "codes that are images": ("train-prior --output new --codes images", "images", "run: latentloom tokenize"),
    "a pipeline that is missing": ("sample --output new --pipeline ./nowhere", "./nowhere", "model_index.json"),
    "a pipeline that is a folder of images": ("sample --output new --pipeline images", "images", "model_index.json"),
    "a tokenizer that is missing": (
        "tokenize --tokenizer ./nowhere --data images --output new",
        "./nowhere",
        "config.json",
    ),
    "a class name that does not exist": (f"{SAMPLE} --classes zebra", "no class 'zebra'", "expected one of: class 0"),
    "a class id that does not exist": (f"{SAMPLE} --classes 10", "no class '10'", "expected an id from 0 to 9"),
    "a negative class": (f"{SAMPLE} --classes -1", "no class '-1'", "expected"),
    "a negative count": (f"{SAMPLE} --num-images -4", "--num-images is -4", "expected at least 1"),
    "a batch of samples below one": (f"{SAMPLE} --batch-size -1", "--batch-size is -1", "expected at least 1"),
    "a negative seed of samples": (f"{SAMPLE} --seed -1", "--seed is -1", "expected a whole number from 0"),
    "a probability above one": (f"{SAMPLE} --top-p 1.5", "top_p is 1.5", "expected a probability"),
    "nothing to reconstruct": ("reconstruct --tokenizer job --data images --num-images 0", "is 0", "at least 1"),
    "nothing to inspect": ("inspect-tokenizer --tokenizer job --data images --num-images 0", "is 0", "at least 1"),
    "a folder for a page": (f"{INSPECT} --output full", "--output is full", "full/inspection.html"),
    "another ending for a page": (f"{INSPECT} --output page.pdf", "--output is page.pdf", "page.html"),
    "a tokenizer to inspect that is missing": (
        "inspect-tokenizer --tokenizer ./nowhere --data images",
        "./nowhere",
        "config.json",
    ),
    "images to inspect that are missing": ("inspect-tokenizer --tokenizer job --data ./gone", "./gone", "expected"),
    "nothing to evaluate": (
        "evaluate --reference images",
        "--pipeline, --tokenizer and --samples",
        "give the one to measure",
    ),
    "two things to evaluate": ("evaluate --reference images --pipeline job --tokenizer job", "expected one of", "give"),
    "a folder for a file": ("evaluate --reference images --pipeline job --output full", "--output is full", ".json"),
    "another ending for the metrics": (f"{EVALUATE} --output metrics.txt", "--output is metrics.txt", "metrics.json"),
    "another ending for the samples": (f"{EVALUATE} --save-samples a.png", "--save-samples is a.png", "a.npz"),
    "features that are none": (f"{EVALUATE} --features vgg", "'vgg'", "efficientnet-lite0"),
    "a classifier for other images": (
        f"{EVALUATE} --features classifier",
        "no classifier for these images",
        "efficientnet-lite0",
    ),
    "fewer samples than metrics need": ("evaluate --samples few.npz --reference images", "samples: 5", "at least 6"),
    "fewer reference images than metrics need": ("evaluate --pipeline job --reference mixed", "mixed: 1", "at least 6"),
    "samples of mixed sizes": ("evaluate --samples mixed --reference images", "2 sizes", "expected one"),
    "samples of another size": ("evaluate --samples large.npz --reference images", "28×28", "32×32"),
    "samples that are no images": ("evaluate --samples other.npz --reference images", "other.npz", "arr_0"),
    "a reference of another size": ("evaluate --pipeline job --reference large.npz", "32×32", "16×16"),
    "a reference of another range": ("evaluate --pipeline job --reference floats.npz", "float32", "uint8"),
    "a reference of too few images": ("evaluate --pipeline job --reference few.npz", "few.npz: 5", "at least 6"),
    "a reference that is none": ("evaluate --pipeline job --reference other.npz", "weights", "expected arr_0"),
    "a reference that is missing": ("evaluate --pipeline job --reference no.npz", "no.npz", "expected"),
    "a reference that is no archive": ("evaluate --pipeline job --reference text.npz", "text.npz", "expected an .npz"),
    "moments that do not belong together": ("evaluate --pipeline job --reference flat.npz", "(4, 3)", "expected"),
    "moments of another network": (
        "evaluate --pipeline job --reference moments.npz --features pixels-8x8",
        "Inception",
        "--features inception",
    ),
    "an array for a tokenizer": ("evaluate --tokenizer job --reference few.npz", "few.npz", "expected a folder"),
    "a repository's name that is none": ("push --pipeline job --repo-id a/b/c", "a/b/c", "such as me/my-generator"),
    "a pipeline to push that is missing": ("push --pipeline ./nowhere --repo-id me/x", "./nowhere", "model_index.json"),
    "samples into a full folder": (
        "sample --pipeline job --output full",
        "full holds files",
        "choose another --output",
    ),
    "reconstructions into a full folder": (
        "reconstruct --tokenizer job --data images --output full",
        "full holds files",
        "choose another --output",
    ),
    "a run into a full folder": (
        "train-tokenizer --data images --output full",
        "full is not empty",
        "another --output",
    ),
    "a prior into a full folder": (f"{PRIOR} --output full", "full is not empty", "choose another --output"),
    "a job into a full folder": ("train --data images --output full --max-steps 1", "full is not empty", "another"),
    "a quickstart into a full folder": ("quickstart --output full", "full is not empty", "choose another --output"),
    "codes into a full folder": (
        "tokenize --tokenizer job --data images --output full",
        "full is not empty",
        "another",
    ),
    "a run into a file": ("train-tokenizer --data images --output notes.txt", "notes.txt", "expected"),
    "a run below a file": ("train-tokenizer --data images --output notes.txt/run", "notes.txt", "expected"),
    "a run folder of another configuration": (
        "train-tokenizer --config job/tokenizer/config.yaml --output job/tokenizer --seed 3 --model.codebook-size 64",
        "seed is 0 in the run and 3 in this command; model.codebook_size is 512 in the run and 64 in this command",
        "choose another --output",
    ),
    "a job of another configuration": (
        "train --data images --output job --resolution 16 --batch-size 8 --max-steps 4 --seed 3",
        "seed is 0 in the run and 3 in this command",
        "choose another --output",
    ),
    "somebody else's folder with a config.yaml": (
        "train-tokenizer --data images --output project",
        "project is not empty and contains no tokenizer run",
        "choose another --output",
    ),
    "somebody else's folder, in so many minutes": (
        f"{PRIOR} --output project --minutes 1",
        "project is not empty",
        "choose another --output",
    ),
    "a run among its own images": ("train --data images --output images/run", "inside --data images", "elsewhere"),
    "a run of one stage among its images": (f"{TOKENIZER} --output images/run", "inside --data images", "elsewhere"),
    "codes in the current folder": ("tokenize --tokenizer job --data images --output .", "--output is .", "codes"),
    "metrics in the current folder": (f"{EVALUATE} --output .", "--output is .", "such as metrics.json"),
    "a dry run of so many minutes": (f"{TRAIN} --dry-run --minutes 3", "--dry-run was given with --minutes", "one of"),
    "a size of other digits": (f"{TRAIN} --resolution ²", "--resolution is ²", "such as 64"),
    "a learning rate that ends below zero": (f"{PRIOR} --schedule.final -3", "schedule.final is -3", "in [0, 1]"),
    "samples of a tokenizer": (
        "evaluate --tokenizer job --reference images --save-samples a.npz",
        "a tokenizer generates no samples",
        "leave them out",
    ),
    "samples of which one is broken": (
        "evaluate --samples torn --reference images",
        "torn cannot be read",
        "repair or",
    ),
    "a prior's run for a tokenizer": (
        "tokenize --tokenizer job/prior --data images --output new",
        "the model type in job/prior/model is 'latentloom-autoregressive'",
        "latentloom train-tokenizer",
    ),
    "a prior's folder for a tokenizer": (
        "train-tokenizer --data images --output job/prior",
        "job/prior contains a run with another configuration",
        "choose another --output",
    ),
}


@pytest.mark.parametrize(("command", "problem", "advice"), CASES.values(), ids=CASES.keys())
def test_bad_input_is_refused_in_one_line_and_changes_no_file(
    command: str, problem: str, advice: str, shared_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, command)
    assert problem in line
    assert advice in line


def test_an_error_for_a_misspelt_class_suggests_the_nearest_one(
    shared_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latentloom("sample", "--pipeline", "job", "--output", "new", "--classes", "clas 3") == 2
    assert "no class 'clas 3'; did you mean 'class 3'?" in capsys.readouterr().err


DAMAGED = {
    "model_index.json": "model_index.json",
    "prior/config.json": "config.json",
    "prior/model.safetensors": "model.safetensors",
    "tokenizer/config.json": "config.json",
    "tokenizer/model.safetensors": "model.safetensors",
}


@pytest.mark.parametrize("how", ["missing", "cut short", "empty"])
@pytest.mark.parametrize("file", DAMAGED)
def test_a_pipeline_with_a_missing_or_truncated_file_is_refused(
    file: str, how: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "job" / "pipeline" / file
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut short" else b"")
    line = refusal(capsys, "sample --pipeline job/pipeline --output new")
    assert "job/pipeline" in line
    assert DAMAGED[file] in line
    path.write_bytes(content)
    assert latentloom("sample", "--pipeline", "job/pipeline", "--output", "new", "--num-images", 1) == 0


@pytest.mark.parametrize("how", ["missing", "cut short", "altered"])
def test_the_error_for_a_damaged_shard_of_codes_names_the_shard(
    how: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = folder / "job" / "codes" / "train-00000.arrow"
    content = shard.read_bytes()
    if how == "missing":
        shard.unlink()
    elif how == "cut short":
        shard.write_bytes(content[:-100])
    else:
        shard.write_bytes(content[:-2000] + bytes(1) + content[-1999:])
    line = refusal(capsys, PRIOR)
    assert "job/codes/train-00000.arrow" in line
    assert "latentloom tokenize" in line


def test_codes_of_another_tokenizer_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cache of another tokenizer is not overwritten, and a pipeline with another tokenizer does not load."""
    config = "job/tokenizer/config.yaml"
    assert latentloom("train-tokenizer", "--config", config, "--output", "other", "--seed", 1) == 0
    line = refusal(capsys, "tokenize --tokenizer other --data images --output job/codes")
    assert "job/codes holds a code cache with another spec" in line
    assert "choose another --output" in line
    shutil.rmtree(folder / "job" / "pipeline" / "tokenizer")
    shutil.copytree(folder / "other" / "model", folder / "job" / "pipeline" / "tokenizer")
    line = refusal(capsys, "sample --pipeline job/pipeline --output new")
    assert "tokenizer_id" in line
    assert "train a prior on these codes" in line


def test_a_prior_run_does_not_continue_with_the_codes_of_another_tokenizer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of codes has the same name, and the configuration is the same."""
    assert latentloom(*PRIOR.split(), "--max-steps", 1) == 0
    assert latentloom("train-tokenizer", "--config", "job/tokenizer/config.yaml", "--output", "other", "--seed", 1) == 0
    shutil.rmtree(folder / "job" / "codes")
    assert latentloom("tokenize", "--tokenizer", "other", "--data", "images", "--output", "job/codes") == 0
    capsys.readouterr()
    before = hash_files(folder / "new" / "model")
    assert latentloom(*PRIOR.split(), "--max-steps", 2) == 2
    assert "contains a run on other codes (of another tokenizer or other images)" in capsys.readouterr().err
    assert hash_files(folder / "new" / "model") == before


def test_a_refused_configuration_does_not_take_its_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise the corrected command would fail, because the folder held another configuration."""
    refusal(capsys, f"{PRIOR} --model.hidden-size 30")
    assert latentloom(*PRIOR.split(), "--max-steps", 1) == 0


@pytest.mark.parametrize("command", [TOKENIZER, PRIOR, "tokenize --tokenizer job --data images --output new"])
def test_the_error_for_a_folder_without_write_permission_names_it(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "locked").mkdir(mode=0o500)
    with without_root_access():
        line = refusal(capsys, f"{command} --output locked/new")
    assert "locked" in line
    assert "Permission denied" in line


@pytest.mark.parametrize("stage", ["train-tokenizer --data images", "train-prior --codes job/codes"])
def test_a_failed_checkpoint_ends_the_run_in_one_line_and_keeps_the_earlier_checkpoints(
    stage: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"{stage} --output new --batch-size 4 --checkpoint-every 2 --sample-every 2"
    assert latentloom(*command.split(), "--max-steps", 2) == 0
    checkpoints = folder / "new" / "checkpoints"
    before = hash_files(checkpoints)
    checkpoints.chmod(0o500)
    with without_root_access():
        assert latentloom(*command.split(), "--max-steps", 4) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the checkpoint of step 4 could not be saved" in line
    assert "Permission denied" in line
    assert "the newest complete one is of step 2" in line
    assert hash_files(checkpoints) == before
    checkpoints.chmod(0o700)
    assert latentloom(*command.split(), "--max-steps", 4) == 0


def test_a_full_disk_is_an_error_of_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stage1_tokenizer.data.image_grids.save_image", full)
    assert "No space left on device" in refusal(capsys, SAMPLE)
