"""Save a pipeline to a folder, file by file, and load it from there.

    model_index.json   tokenizer/   prior/   README.md   samples.png   metrics.json

The index is written last and lists the other files with their sizes. It shows whether a folder is complete. Files that the
index does not list belong to the user: they are neither moved nor deleted.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from pipelines.model_card import pipeline_card
from stage1_tokenizer.data.image_grids import save_image
from stage1_tokenizer.registry import TOKENIZERS
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.migration import SAMPLING
from stage2_prior.prior import Prior
from stage2_prior.registry import PRIORS
from training_harness.configuration import from_mapping
from training_harness.errors import UserError
from training_harness.files import update_folder, write_json
from training_harness.model_cards import CARD_FILE, write_card

INDEX, SAMPLES, METRICS = "model_index.json", "samples.png", "metrics.json"
PARTS = ("tokenizer", "prior")
TOKENIZER_CLASSES = {kind.__name__: kind for kind in TOKENIZERS.values()}


class PipelineParts(NamedTuple):
    """The arguments of a pipeline's constructor."""

    tokenizer: Tokenizer
    prior: Prior
    label_names: tuple[str, ...] | None
    sampling: Any  # an instance of the prior's `options_class`
    trained_classes: tuple[int, ...]  # ids of the classes that had training images


def save_parts(
    folder: Path,
    parts: PipelineParts,
    class_name: str,
    metrics: Mapping[str, Any] | None,
    samples: Image.Image | None,
    repo_id: str | None,
) -> None:
    """Write a pipeline into a folder and replace an earlier pipeline there; other files stay.

    Raises:
        UserError: if a file with one of the pipeline's names exists and no pipeline wrote it.
    """
    check_pipeline_folder(folder)
    with update_folder(folder, last=INDEX) as temporary:
        parts.tokenizer.save_pretrained(temporary / "tokenizer")
        parts.prior.save_pretrained(temporary / "prior")
        if samples is not None:
            save_image(samples, temporary / SAMPLES)
        if metrics is not None:
            write_json(temporary / METRICS, metrics)
        write_card(folder, temporary, pipeline_card(*parts, metrics, samples is not None, repo_id))
        index: dict[str, Any] = {
            "_class_name": class_name,
            "tokenizer": type(parts.tokenizer).__name__,
            "prior": type(parts.prior).__name__,
            "label_names": list(parts.label_names) if parts.label_names else None,
            "sampling": dataclasses.asdict(parts.sampling),
        }
        if len(parts.trained_classes) < parts.prior.config.num_classes:
            index["trained_classes"] = list(parts.trained_classes)  # without this key: all classes
        _remove_stale_files(folder.expanduser(), temporary)
        # If writing stops here, an earlier index must not describe a mixture of two pipelines.
        write_json(folder.expanduser() / INDEX, index | {"incomplete": True})
        write_json(temporary / INDEX, index | {"files": _file_sizes(temporary)})


def _remove_stale_files(folder: Path, new_folder: Path) -> None:
    """Remove the metrics and samples of an earlier pipeline that the new pipeline lacks; keep the user's own files."""
    if not (folder / INDEX).exists():
        return
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for name in (SAMPLES, METRICS):
        path = folder / name
        if path.is_file() and not (new_folder / name).exists():
            size = index.get("files", {}).get(name, path.stat().st_size)  # earlier versions list no files
            if size == path.stat().st_size:
                path.unlink()


def _file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file except the model card, which users edit."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CARD_FILE)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def check_pipeline_folder(folder: Path) -> None:
    """Check that a pipeline can be written into a folder without overwriting the user's files.

    Raises:
        UserError: if it cannot.
    """
    folder = folder.expanduser()
    if folder.is_file():
        raise UserError(f"{folder} is a file; expected a folder; choose another one")
    if (folder / INDEX).exists():
        return
    taken = [name for name in (*PARTS, SAMPLES, METRICS) if (folder / name).exists()]
    if taken:
        raise UserError(
            f"{folder} holds {', '.join(taken)}, which no pipeline wrote; expected those names to be free; choose another folder"
        )


def load_parts(folder: Path, dtype: torch.dtype | None) -> PipelineParts:
    """Load what `save_parts` wrote.

    Raises:
        UserError: if a file is missing, is incomplete, or does not match the other files.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        tokenizer_class, prior_class = TOKENIZER_CLASSES[index["tokenizer"]], PRIORS[index["prior"]]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder / INDEX} is not the index of a pipeline ({type(error).__name__}: {error}); expected a file written by "
            "save_pretrained; copy or save the folder again"
        ) from None
    _check_complete(folder, index)
    tokenizer = tokenizer_class.from_pretrained(folder / "tokenizer", dtype=dtype)
    prior = prior_class.from_pretrained(folder / "prior", dtype=dtype)
    names = index.get("label_names")
    sampling = from_mapping(prior.options_class, SAMPLING.migrate(index.get("sampling") or {}), "sampling.")
    trained_classes = tuple(index.get("trained_classes") or range(prior.config.num_classes))
    return PipelineParts(tokenizer, prior, tuple(names) if names else None, sampling, trained_classes)


def _check_complete(folder: Path, index: Mapping[str, Any]) -> None:
    if index.get("incomplete"):
        raise UserError(
            f"{folder} holds an incomplete pipeline: saving was cut short; expected a complete one; save it again"
        )
    for part in PARTS:
        if not (folder / part / "config.json").is_file():  # otherwise transformers looks for it on the Hub
            raise UserError(
                f"{folder / part} holds no config.json; expected a pipeline written by save_pretrained; copy or save "
                "the folder again"
            )
    for name, size in index.get("files", {}).items():
        actual_size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual_size != size and name.endswith(".safetensors"):  # users may edit a config.json
            problem = "is missing" if actual_size is None else f"has {actual_size} bytes"
            raise UserError(f"{folder / name} {problem}; expected {size} bytes; copy or save the folder again")
