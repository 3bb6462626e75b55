"""Imports point one way, packages stand without optional libraries, and the front door opens quickly."""

import ast
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ("scripts", "latentloom", "pipelines", "stage2_prior", "stage1_tokenizer", "training_harness")
PACKAGES = HOUSE[1:]
NEVER_IMPORTED = {"scripts", "tests", "benchmarks"}
LATE = (
    "datasets",
    "matplotlib",
    "tyro",
    "diffusers",
    "tensorboard",
    "wandb",
    "trackio",
    "torchmetrics",
    "torch_fidelity",
    "lpips",
)


def imported(text: str) -> set[str]:
    """Top-level names that a module imports anywhere in it, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else (node.module or "").split(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # lazy names are strings
            first = node.value.split(".")[0]
            names |= (
                {first}
                if first in HOUSE and node.value.replace(".", "").isidentifier() and "." in node.value
                else set()
            )
    return names


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, package
    return found


@pytest.mark.parametrize("package", HOUSE)
def test_no_module_imports_from_a_package_above_its_own(package):
    above = set(HOUSE[: HOUSE.index(package)]) | (NEVER_IMPORTED - {package})
    for path in modules(package):
        wrong = imported(path.read_text(encoding="utf-8")) & (above | {"."})
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_an_import_against_the_rule_would_be_seen():
    late = "def f():\n    from pipelines.hub import push\n"
    assert imported(late) == {"pipelines"}
    assert imported("import stage2_prior.train as t, os") == {"stage2_prior", "os"}
    assert imported("from . import x") == {"."}
    assert imported("NAMES = {'Pipeline': 'pipelines.latent_generation'}") == {"pipelines"}


def import_graph() -> dict[str, set[str]]:
    """Every module of the packages with the modules that it imports, at any place in it."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in modules(package)
    }
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names} & files.keys()
                found |= whole or {node.module}
        graph[name] = (found & files.keys()) - {name}
    return graph


def circle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """The names of a circle, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_one_another_in_a_circle():
    graph = import_graph()
    assert len(graph) > 150
    assert circle_in(graph) == []
    assert circle_in(graph | {"training_harness.errors": {"stage1_tokenizer.train"}}) != []


def test_the_folders_of_latentloom_do_not_import_one_another_in_a_circle():
    rooms: dict[str, set[str]] = {}
    for name, imported_modules in import_graph().items():
        if name.startswith("latentloom.") and name.count(".") > 1:
            others = {
                other.split(".")[1]
                for other in imported_modules
                if other.startswith("latentloom.") and "." in other[11:]
            }
            rooms.setdefault(name.split(".")[1], set()).update(others - {name.split(".")[1]})
    assert {"commands", "jobs", "planning"} <= rooms.keys()
    assert circle_in(rooms) == []


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REPORT = f"; import sys; print(*[name for name in {LATE!r} if name in sys.modules])"


def test_importing_every_package_brings_none_of_the_libraries_that_are_needed_late():
    names = python("".join(f"import {package}; " for package in PACKAGES).rstrip("; ") + REPORT)
    assert names == ""
    assert python("import tyro" + REPORT) == "tyro"


def test_models_loops_and_pipelines_import_and_a_model_runs_where_optional_libraries_cannot_be_imported():
    blocked = "import sys\nfor name in ('datasets', 'tyro', 'matplotlib', 'diffusers'): sys.modules[name] = None\n"
    use = """
import torch
import stage1_tokenizer.train, stage1_tokenizer.codes.writer, stage1_tokenizer.data.image_loader, stage1_tokenizer.data.statistics
import stage2_prior.train, stage1_tokenizer.codes.reader, stage2_prior.autoregressive.sampling
import pipelines.latent_generation, pipelines.evaluation.evaluator, pipelines.evaluation.features
from latentloom import VQGAN, VQGANConfig
from stage1_tokenizer import open_source, train_tokenizer
tokenizer = VQGAN(VQGANConfig(image_size=(16, 16), channels=(4, 4), blocks=(0, 0)))
print(tuple(tokenizer.encode_indices(torch.zeros(1, 3, 16, 16)).shape))
"""
    assert python(blocked + use) == "(1, 8, 8)"


def test_the_help_of_the_command_loads_no_large_library():
    code = "import sys\nfrom latentloom.cli import main\nmain(['--help'])\nprint('loaded:', *sorted(sys.modules))"
    usage, loaded = python(code).split("loaded: ")
    assert "train-tokenizer" in usage
    assert not {"torch", "transformers", "numpy", "accelerate", "datasets", "tyro", "matplotlib"} & set(loaded.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_lazy_name_of_a_package_is_there(package):
    module = __import__(package)
    for name in [] if not hasattr(module, "__getattr__") else dir(module):
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018
