"""Every command of the README runs unchanged; the long ones run with fewer steps."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import CHECKOUT, latentloom
from hub_stand_in import StandInHub
from new_process import run_forked

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
SMALL = ["--resolution", "16", "--batch-size", "8", "--max-steps", "2"]
SHORTER = {
    "train": [*SMALL, "--num-images", "20"],
    "train-tokenizer": SMALL,
    "train-prior": ["--batch-size", "8", "--max-steps", "2"],
    "evaluate": ["--num-images", "20"],
    "inspect-prior": ["--num-samples", "10"],
    "sweep": ["--trials", "1", "--max-steps", "2"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_readmes_latentloom_commands_run_one_after_another(
    real_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(real_images, tmp_path / "my_images")
    monkeypatch.chdir(tmp_path)
    verbs = []
    with StandInHub() as hub:
        for _, verb, *words in (command for command in commands() if command[0] == "latentloom"):
            verbs.append(verb)
            if verb == "push":  # its client reads the address of the Hub when it is imported
                words = [str(tmp_path / word) if word.startswith("runs/") else word for word in words]
                environment = hub.environment(tmp_path / "home")
                done = run_forked("-m", "latentloom", verb, *words, **environment)
                assert done.returncode == 0, done.stderr
            else:
                assert latentloom(verb, *words, *SHORTER.get(verb, [])) == 0, verb
        assert set(hub.repos) == {"me/my-generator"}
    assert set(verbs) == {
        "train", "train-tokenizer", "tokenize", "train-prior", "sample", "reconstruct", "evaluate", "push",
        "report", "inspect-tokenizer", "inspect-prior", "sweep",
    }  # fmt: skip


def test_the_readmes_python_runs(finished_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    for text, replacement in (
        ("runs/quickstart/pipeline", str(finished_job / "pipeline")),
        ("Sneaker", "class 7"),
        ("Dress", "class 3"),
    ):
        assert text in code
        code = code.replace(text, replacement)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "sneaker.png").is_file()


def test_the_readmes_make_targets_exist_and_every_other_command_is_tested() -> None:
    targets = {command[1] for command in commands() if command[0] == "make"}
    assert targets == {"quickstart", "test"}
    assert all(re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE) for target in targets)
    others = [command for command in commands() if command[0] not in ("make", "latentloom")]
    assert others == [["pip", "install", "."]]  # test_wheel.py tests the installed package


@pytest.mark.slow
def test_make_quickstart_works_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "latentloom"
    subprocess.run(["git", "clone", "--quiet", str(CHECKOUT), str(clone)], check=True)
    python = Path(sys.base_prefix) / "bin" / "python3"
    done = subprocess.run(
        ["make", "quickstart", f"PYTHON={python}"], cwd=clone, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (clone / "runs" / "quickstart" / "samples.png").is_file()
    assert "next:" in done.stdout
