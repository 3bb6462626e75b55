"""Several processes: the configurations for `accelerate launch`, and the main job on two processes.

test_main_job runs `accelerate launch` itself.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command_line import CHECKOUT, hash_files, latentloom
from small_parts import write_images
from small_runs import launcher_environment, set_launch_environment, start_processes, wait_for_exit

from latentloom.cli import main

CONFIGURATIONS = sorted((CHECKOUT / "scripts" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_each_configuration_starts_as_many_processes_as_its_name_says(path: Path) -> None:
    environment = launcher_environment(path)
    count, _, *sharded = path.stem.split("_")
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["num_processes"] == int(count)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if sharded else None)
    if sharded:
        assert environment["FSDP_VERSION"] == "2"


def run_as_rank(rank: int, processes: int, port: int, words: list[str], log: Path) -> None:
    """Run a command in one of several processes, and append its output to a file."""
    set_launch_environment(rank, processes, port)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    sys.exit(main(words))


def run_on_two_processes(*words: object, log: Path) -> str:
    """Run a command on two processes and return their output."""
    log.unlink(missing_ok=True)
    codes = wait_for_exit(start_processes(run_as_rank, 2, [str(word) for word in words], log))
    assert codes == [0, 0], log.read_text(encoding="utf-8")
    return log.read_text(encoding="utf-8")


def test_the_main_job_on_two_processes_writes_each_file_once_and_samples_as_one_process_does(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    steps = ["--max-steps", 4, "--batch-size", 4, "--num-images", 12]
    output = run_on_two_processes("train", "--data", images, "--output", tmp_path / "job", *steps, log=tmp_path / "log")
    assert output.count("images  ") == 1, "each process printed it"
    environment = json.loads((tmp_path / "job" / "tokenizer" / "environment.json").read_text(encoding="utf-8"))
    assert (environment["processes"], environment["distributed_type"]) == (2, "MULTI_CPU")
    metrics = json.loads((tmp_path / "job" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["num_images"] == 12
    assert metrics["steps"] == {"tokenizer": 4, "prior": 4}
    assert not list((tmp_path / "job").rglob("*.partial")), "an incomplete file was left"

    sample = ["sample", "--pipeline", tmp_path / "job" / "pipeline", "--num-images", 5, "--output"]
    run_on_two_processes(*sample, tmp_path / "two", log=tmp_path / "log")
    assert latentloom(*sample, tmp_path / "one") == 0
    assert hash_files(tmp_path / "one") == hash_files(tmp_path / "two")
    assert len(hash_files(tmp_path / "one")) == 7  # with the grid and the list of samples


def test_a_precision_other_than_the_launchers_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "images")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert latentloom("train-tokenizer", "--data", images, "--output", tmp_path / "run", "--max-steps", 1) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: accelerate launch sets mixed precision bf16 and --mixed-precision is no; expected the same; pass "
        "--mixed-precision bf16"
    )
    assert not (tmp_path / "run").exists()
