"""Imports point one way, and packages do not need optional libraries."""

import ast
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("scripts", "latentloom", "pipelines", "stage2_prior", "stage1_tokenizer", "training_harness")
PACKAGES = LAYERS[1:]
NEVER_IMPORTED = {"scripts", "tests", "benchmarks"}
LAZY_LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "numpy",
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


def imported_names(text: str) -> set[str]:
    """Return the top-level names that a module imports, including imports in functions."""
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
                if first in LAYERS and node.value.replace(".", "").isidentifier() and "." in node.value
                else set()
            )
    return names


def modules(package: str) -> list[Path]:
    """Return the files of a package."""
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths, package
    return paths


@pytest.mark.parametrize("package", LAYERS)
def test_no_module_imports_from_a_higher_package(package):
    above = set(LAYERS[: LAYERS.index(package)]) | (NEVER_IMPORTED - {package})
    for path in modules(package):
        forbidden = imported_names(path.read_text(encoding="utf-8")) & (above | {"."})
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_all_kinds_of_imports_are_detected():
    import_in_function = "def f():\n    from pipelines.hub import push\n"
    assert imported_names(import_in_function) == {"pipelines"}
    assert imported_names("import stage2_prior.train as t, os") == {"stage2_prior", "os"}
    assert imported_names("from . import x") == {"."}
    assert imported_names("NAMES = {'Pipeline': 'pipelines.latent_generation'}") == {"pipelines"}


def import_graph() -> dict[str, set[str]]:
    """Return the imported modules of each module, including imports in functions."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in modules(package)
    }
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        imports: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imports |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & files.keys()
                imports |= submodules or {node.module}
        graph[name] = (imports & files.keys()) - {name}
    return graph


def find_cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of an import cycle, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_modules_have_no_import_cycle():
    graph = import_graph()
    assert len(graph) > 150
    assert find_cycle(graph) == []
    assert find_cycle(graph | {"training_harness.errors": {"stage1_tokenizer.train"}}) != []


def test_the_folders_of_latentloom_have_no_import_cycle():
    folders: dict[str, set[str]] = {}
    for name, imported_modules in import_graph().items():
        if name.startswith("latentloom.") and name.count(".") > 1:
            imported_folders = {
                module.split(".")[1]
                for module in imported_modules
                if module.startswith("latentloom.") and "." in module[11:]
            }
            folders.setdefault(name.split(".")[1], set()).update(imported_folders - {name.split(".")[1]})
    assert {"commands", "jobs", "planning"} <= folders.keys()
    assert find_cycle(folders) == []


def run_code(code: str, *arguments: str) -> str:
    """Run Python code in a new process; return its output."""
    completed = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


PRINT_LOADED_LIBRARIES = f"; import sys; print(*[name for name in {LAZY_LIBRARIES!r} if name in sys.modules])"


def test_importing_the_packages_does_not_import_lazy_libraries():
    names = run_code("".join(f"import {package}; " for package in PACKAGES).rstrip("; ") + PRINT_LOADED_LIBRARIES)
    assert names == ""
    assert run_code("import tyro" + PRINT_LOADED_LIBRARIES) == "tyro"


def test_models_loops_and_pipelines_work_without_optional_libraries():
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
    assert run_code(blocked + use) == "(1, 8, 8)"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_lazy_name_of_a_package_exists(package):
    module = __import__(package)
    for name in [] if not hasattr(module, "__getattr__") else dir(module):
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018
