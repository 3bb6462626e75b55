"""A pipeline's folder: written file by file into whatever the user keeps there, and read back.

    model_index.json   tokenizer/   prior/   README.md   samples.png   metrics.json

The index is written last and lists the other files with their sizes, so that a folder whose writing was cut short is recognised.
Files that are not listed belong to the user: they are neither moved nor deleted.
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
    """Writes a pipeline into a folder, in the place of an earlier one; other files of the folder stay.

    Raises:
        UserError when one of its names is taken by something that no pipeline wrote.
    """
    check_pipeline_folder(folder)
    with update_folder(folder, last=INDEX) as beside:
        parts.tokenizer.save_pretrained(beside / "tokenizer")
        parts.prior.save_pretrained(beside / "prior")
        if samples is not None:
            save_image(samples, beside / SAMPLES)
        if metrics is not None:
            write_json(beside / METRICS, metrics)
        write_card(folder, beside, pipeline_card(*parts, metrics, samples is not None, repo_id))
        index: dict[str, Any] = {
            "_class_name": class_name,
            "tokenizer": type(parts.tokenizer).__name__,
            "prior": type(parts.prior).__name__,
            "label_names": list(parts.label_names) if parts.label_names else None,
            "sampling": dataclasses.asdict(parts.sampling),
        }
        if len(parts.trained_classes) < parts.prior.config.num_classes:
            index["trained_classes"] = list(parts.trained_classes)  # absent: all of them
        _remove_stale(folder.expanduser(), beside)
        # An earlier index must not vouch for files of two pipelines, should this be cut short.
        write_json(folder.expanduser() / INDEX, index | {"incomplete": True})
        write_json(beside / INDEX, index | {"files": _sizes(beside)})


def _remove_stale(folder: Path, beside: Path) -> None:
    """Removes the metrics and the samples of an earlier pipeline, where this one has none. A file of the user's own stays."""
    if not (folder / INDEX).exists():
        return
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for name in (SAMPLES, METRICS):
        path = folder / name
        if path.is_file() and not (beside / name).exists():
            size = index.get("files", {}).get(name, path.stat().st_size)  # earlier versions list none
            if size == path.stat().st_size:
                path.unlink()


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file but the card, which users edit."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CARD_FILE)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def check_pipeline_folder(folder: Path) -> None:
    """Raises UserError when a pipeline cannot be written there without harm to what the user keeps."""
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
    """Reads what `save_parts` wrote. Raises UserError when a file is missing, cut short or does not fit the others."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        tokenizer_class, prior_class = TOKENIZER_CLASSES[index["tokenizer"]], PRIORS[index["prior"]]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder / INDEX} is not that of a pipeline ({type(error).__name__}: {error}); expected one written by "
            "save_pretrained; copy or save the folder again"
        ) from None
    _check_complete(folder, index)
    tokenizer = tokenizer_class.from_pretrained(folder / "tokenizer", dtype=dtype)
    prior = prior_class.from_pretrained(folder / "prior", dtype=dtype)
    names = index.get("label_names")
    sampling = from_mapping(prior.options_class, SAMPLING.migrate(index.get("sampling") or {}), "sampling.")
    trained = tuple(index.get("trained_classes") or range(prior.config.num_classes))
    return PipelineParts(tokenizer, prior, tuple(names) if names else None, sampling, trained)


def _check_complete(folder: Path, index: Mapping[str, Any]) -> None:
    if index.get("incomplete"):
        raise UserError(f"{folder} holds a pipeline whose saving was cut short; expected a whole one; save it again")
    for part in PARTS:
        if not (folder / part / "config.json").is_file():  # or transformers would look for it on the Hub
            raise UserError(
                f"{folder / part} holds no config.json; expected a pipeline written by save_pretrained; copy or save "
                "the folder again"
            )
    for name, size in index.get("files", {}).items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size and name.endswith(".safetensors"):  # a config.json may be edited
            raise UserError(
                f"{folder / name} {'is missing' if found is None else f'has {found} bytes'}; expected {size} bytes; copy or save "
                "the folder again"
            )
