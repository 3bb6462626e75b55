"""What the package carries: a real data set and its judge."""

from importlib.resources import files
from pathlib import Path

FASHION_MNIST = "fashion-mnist-mini"


def data_path(name: str) -> str:
    """The path of an embedded data set, or the name as it is."""
    return str(_folder(FASHION_MNIST)) if name == FASHION_MNIST else name


def classifier_path() -> Path:
    """Weights of a classifier trained on all of Fashion-MNIST, for figures alone."""
    return _folder("fashion-mnist-classifier")


def _folder(name: str) -> Path:
    return Path(str(files("latentloom") / "data" / name))
