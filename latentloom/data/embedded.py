"""The data set and the classifier that the package carries."""

from importlib.resources import files
from pathlib import Path

FASHION_MNIST = "fashion-mnist-mini"


def data_path(name: str) -> str:
    """Return the path of an embedded data set, or any other name unchanged."""
    return str(_data_folder(FASHION_MNIST)) if name == FASHION_MNIST else name


def classifier_path() -> Path:
    """Return the folder of a classifier that was trained on all of Fashion-MNIST. Only metrics use it."""
    return _data_folder("fashion-mnist-classifier")


def _data_folder(name: str) -> Path:
    return Path(str(files("latentloom") / "data" / name))
