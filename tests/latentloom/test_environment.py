"""Commands work in the environments of users: launchers, terminals, other packages, read-only folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import CHECKOUT, latentloom
from new_process import run_forked
from PIL import Image

from latentloom.environment import remove_incomplete_launcher_variables
from latentloom.jobs.evaluation import features_folder
from latentloom.jobs.evaluation_plots import plot_metrics_by_class

ALL_VARIABLES = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "is_complete"),
    [
        ({"RANK": "1"}, False),
        ({"LOCAL_RANK": "0"}, False),
        ({"WORLD_SIZE": "4", "RANK": "0"}, False),
        (ALL_VARIABLES | {"RANK": "2"}, False),
        (ALL_VARIABLES | {"LOCAL_RANK": "1"}, True),
    ],
)
def test_launcher_variables_are_removed_unless_all_are_set(
    variables: dict[str, str], is_complete: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*ALL_VARIABLES, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    remove_incomplete_launcher_variables()
    assert {name for name in variables if name in os.environ} == (set(variables) if is_complete else set())
    printed = capsys.readouterr().err
    assert all(name in printed for name in variables) != is_complete


def python(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(path for path in sys.path if path and Path(path) != CHECKOUT)
    installed = {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), paths])} if words[0] == "-m" else {"PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | installed | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_package_in_the_current_folder_with_the_name_of_one_of_ours_works_beside_it(tmp_path: Path) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("mine = True")
    done = python(tmp_path, "-m", "latentloom", "sample", "--pipeline", "./none")
    assert "error: no pipeline at ./none" in done.stderr, done.stderr
    code = f"import sys; sys.path.append({str(CHECKOUT)!r}); import latentloom"
    done = python(tmp_path, "-c", code)
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: latentloom needs its own package pipelines")
    assert str(tmp_path / "pipelines") in done.stderr
    assert python(tmp_path, "-c", "import pipelines; print(pipelines.mine)").stdout == "True\n"


def test_characters_outside_the_encoding_of_the_terminal_are_printed_as_escapes(tmp_path: Path) -> None:
    program = "import sys; sys.stderr.reconfigure(encoding='ascii'); from latentloom.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run_forked("-c", program, "sample", "--pipeline", "./ключ", folder=tmp_path)
    assert done.returncode == 2
    assert "no pipeline at ./\\u043a" in done.stderr


def test_an_unusable_cache_folder_is_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LATENTLOOM_CACHE", str(tmp_path / "file" / "cache"))
    folder = features_folder()
    assert os.access(folder, os.W_OK)
    assert str(folder) in capsys.readouterr().out


def test_plots_accept_class_names_of_any_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://of_another_machine")
    names = ["$x^{", "_private", "two\nlines", "猫", "caf\udce9", "$a$", ""]
    metrics = {"frechet": 1.0, "floor": None, "by_class": {name: {"frechet": i + 1.0} for i, name in enumerate(names)}}
    assert plot_metrics_by_class(metrics, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[1] > 100


def test_a_tilde_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert latentloom("sample", "--pipeline=~/none", "--output=~/out") == 2
    words = ["--tokenizer=~/none", "--data=~", "--output=~/r"]
    assert latentloom("reconstruct", *words) == 2
    assert not any(path.name == "~" for path in (*Path.cwd().iterdir(), *tmp_path.iterdir()))
