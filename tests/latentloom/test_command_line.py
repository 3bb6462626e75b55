"""The command line: help, imports, errors and output."""

import importlib
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from command_line import CHECKOUT, latentloom, run_python

from latentloom import __version__
from latentloom.cli import VERBS
from latentloom.commands import train_prior
from latentloom.recipes import recipe_names, recipe_values
from training_harness.errors import UserError
from training_harness.signals import Interrupted

CLI = ("-m", "latentloom.cli")
HEAVY = ("torch", "transformers", "datasets", "accelerate", "matplotlib", "numpy", "tyro")
SHARED = {"arguments", "option-help", "sampling-arguments", "training-arguments", "variants"}  # used by several verbs
OPTIONS = {
    "quickstart": "--prior --output --minutes --max-steps --seed --num-images",
    "train": "--data --output --recipe --tokenizer-recipe --max-steps --checkpoint-every --seed --resolution "
    "--image-channels --minutes --mixed-precision --compile --gradient-checkpointing --report-to --dry-run",
    "train-tokenizer": "--data --output --recipe --max-steps --checkpoint-every --seed --resolution --image-channels "
    "--config --minutes --model.codebook-size --optimizer.learning-rate --resume --dry-run --overfit-batch --compile",
    "tokenize": "--tokenizer --data --output --contents --flip",
    "train-prior": "--codes --output --recipe --max-steps --checkpoint-every --seed --config --minutes "
    "--model.hidden-size --optimizer.learning-rate --sampling.guidance-scale",
    "sweep": "--codes --data --output --recipe --config --search --trials --max-steps --minutes --seed --resolution",
    "sample": "--pipeline --classes --num-images --seed --output --guidance-scale --temperature --top-k --top-p",
    "reconstruct": "--tokenizer --data --num-images --output",
    "inspect-tokenizer": "--tokenizer --data --num-images --output --seed",
    "inspect-prior": "--pipeline --data --num-images --num-samples --max-training-images --output --seed",
    "evaluate": "--pipeline --tokenizer --samples --reference --features --num-images --save-samples --output",
    "report": "--output",
    "push": "--pipeline --repo-id --private",
}


def test_help_answers_in_under_a_second_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from latentloom.cli import main; status = main(['--help']); "
        f"print(status, sorted(set({HEAVY}) & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):  # the fastest of three, because other programs may run at the same time
        begin = time.perf_counter()
        done = run_python("-c", program)
        seconds.append(time.perf_counter() - begin)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert all(verb in done.stdout for verb in VERBS)
    assert min(seconds) < 1


def test_every_verb_has_a_module_and_every_module_a_verb() -> None:
    folder = CHECKOUT / "latentloom" / "commands"
    modules = {path.stem.replace("_", "-") for path in folder.glob("*.py")} - {"--init--", *SHARED}
    assert modules == set(VERBS) == set(OPTIONS)
    for verb in VERBS:
        module = importlib.import_module(f"latentloom.commands.{verb.replace('-', '_')}")
        assert (module.__doc__ or "").startswith(f"latentloom {verb}: ")


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_lists_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        latentloom(verb, "--help")
    assert ended.value.code == 0
    listed = re.findall(r"--[\w.-]+", capsys.readouterr().out)
    assert set(OPTIONS[verb].split()) <= set(listed)


@pytest.mark.parametrize(
    ("verb", "stages"),
    {"train": ("tokenizer", "prior"), "train-tokenizer": ("tokenizer",), "train-prior": ("prior",)}.items(),
)
def test_help_names_the_recipes(verb: str, stages: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        latentloom(verb, "--help")
    listed = " ".join(re.sub(r"[│|]", " ", capsys.readouterr().out).split())
    for stage in stages:
        assert ", ".join(recipe_names(stage)) in listed


def test_help_shows_the_defaults_of_the_recipe_that_was_named(capsys: pytest.CaptureFixture[str]) -> None:
    for name in recipe_names("prior"):
        with pytest.raises(SystemExit):
            latentloom("train-prior", "--recipe", name, "--help")
        listed = " ".join(re.sub(r"[│|]", " ", capsys.readouterr().out).split())
        assert f"extends a finished run. (default: {recipe_values(name, 'prior')['max_steps']})" in listed


def test_the_version_equals_the_version_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert latentloom("--version") == 0
    assert capsys.readouterr().out == f"latentloom {__version__}\n"
    assert tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_debug_shows_the_traceback_of_an_error() -> None:
    """test_bad_input checks that errors have no traceback without --debug."""
    with pytest.raises(UserError, match=r"no pipeline at \./nowhere"):
        latentloom("sample", "--pipeline", "./nowhere", "--output", "./nowhere-either", "--debug")
    with pytest.raises(UserError, match="unknown verb 'smaple'"):
        latentloom("--debug", "smaple")


def test_only_the_main_process_prints(
    finished_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config", str(finished_job / "prior" / "config.yaml")]
    for rank, prints in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        train_prior.main(words)
        assert bool(capsys.readouterr().out) == prints


def test_no_verb_imports_datasets_or_matplotlib_early_and_training_prints_no_bars_without_a_terminal(
    real_images: Path, tmp_path: Path
) -> None:
    """Warnings and advice that libraries print while they are imported do not fill a log either."""
    modules = ", ".join(f"latentloom.commands.{verb.replace('-', '_')}" for verb in VERBS)
    program = (
        f"import sys, {modules}\nassert not {{'datasets', 'matplotlib'}} & set(sys.modules)\n"
        "from latentloom.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    words = ["train", "--data", real_images, "--output", tmp_path / "job", "--resolution", 16, "--batch-size", 8]
    done = run_python("-c", program, *words, "--max-steps", 1, "--num-images", 20, MPLBACKEND="unknown")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\r" not in done.stdout


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
        (Interrupted(15, "saved step 7"), 143, "saved step 7"),
        (OSError(28, "No space left on device", "run/model"), 2, "error: run/model: No space left on device; expected"),
    ],
    ids=["Ctrl-C", "SIGTERM", "full disk"],
)
def test_what_ends_a_command_is_one_line_and_an_exit_status(
    raised: BaseException,
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(_: object) -> None:
        raise raised

    monkeypatch.setattr("latentloom.commands.sample.main", end)
    assert latentloom("sample") == status
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1
    if isinstance(raised, OSError):
        with pytest.raises(OSError, match="No space"):
            latentloom("sample", "--debug")


@pytest.mark.parametrize("arguments", [(), ("-h",), ("help",)], ids=str)
def test_the_usage_lists_every_verb(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert latentloom(*arguments) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^  (\S+)  +\S", printed, flags=re.MULTILINE) == list(VERBS)


def test_the_script_equals_the_module() -> None:
    script = Path(sys.executable).with_name("latentloom")
    if not script.exists():
        pytest.skip("latentloom is not installed beside this Python")
    printed = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    assert printed == run_python(*CLI, "--help").stdout
