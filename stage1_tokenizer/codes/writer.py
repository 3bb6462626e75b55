"""Writes the code cache: a data set's images as codes, encoded once. `stage1_tokenizer.codes.manifest` states the format."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stage1_tokenizer.codes.manifest import (
    MANIFEST,
    SKIPPED,
    TOKENIZER,
    CodeRequest,
    Contents,
    View,
    stored_manifest,
    write_manifest,
)
from stage1_tokenizer.data.degradation import Degradation, degraded
from stage1_tokenizer.data.image_loader import ImageLoader, LoadedSource, images_at_once
from stage1_tokenizer.data.sources import ImageSource
from stage1_tokenizer.tokenizer import Tokenizer
from training_harness.errors import UserError
from training_harness.files import compute_sha256, holds_files, update_folder
from training_harness.progress import progress_bar

SHARD_IMAGES = 100_000


def write_code_cache(
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    source: ImageSource,
    output: Path,
    *,
    contents: Contents | None = None,
    views: tuple[View, ...] = ("original",),
    degradation: Degradation = "none",
    batch_size: int | None = None,
    images: LoadedSource | None = None,
) -> Path:
    """Encodes train and validation images of `source` into `output`, whose manifest is written last.

    Args:
        tokenizer_folder: the model folder that `tokenizer` was loaded from; it is copied into the cache.
        contents: by default indices, of a tokenizer without a codebook latents.
        batch_size: images that are encoded at once; by default as many as take little memory.
        views: what is encoded of each training image: itself, and its mirror image. Validation has the originals.
        degradation: how a second picture of each view is made, whose latents stand in the column `degraded`.
        images: the splits of `source` where they are loaded already; by default they are read here.
    Raises:
        UserError when `output` holds anything but an earlier cache of the same request.
    """
    output = output.expanduser()
    if held := stored_manifest(output):
        source = source.numbered_as(held.get("label_names"))
    spec, batch_size = tokenizer.latent_spec(), batch_size or images_at_once(tokenizer.config.image_size)
    needs_latents = spec.codebook_size is None or degradation != "none"
    contents = contents or ("latents" if needs_latents else "indices")
    request = CodeRequest.of(source, spec, contents, views, degradation)
    if held:
        if differing := request.differences(held):
            raise UserError(
                f"{output} holds a code cache with another {', '.join(differing)}; expected the same request and images; "
                "choose another --output"
            )
        print(f"{output} holds these codes already")
        return output
    if holds_files(output):
        raise UserError(f"{output} is not empty and holds no code cache; choose another --output")
    with update_folder(output, last=MANIFEST) as folder:
        shutil.copytree(tokenizer_folder, folder / TOKENIZER)
        splits, skipped = {}, []
        images = images or LoadedSource(source, tokenizer.config.image_processor)
        for name, pixels in (("train", images.train), ("validation", images.validation)):
            shown = views if name == "train" else ("original",)
            shards = [
                _write_shard(folder / f"{name}-{number:05d}.arrow", rows)
                for number, rows in enumerate(
                    _shards(_encoded(tokenizer, pixels, contents, shown, degradation, batch_size, name))
                )
            ]
            splits[name] = {"rows": sum(shard["rows"] for shard in shards), "shards": shards}
            skipped += [{"source_id": error.source_id, "reason": error.reason} for error in pixels.skipped.values()]
            pixels.report_skipped()
        (folder / SKIPPED).write_text("".join(json.dumps(row) + "\n" for row in skipped), encoding="utf-8")
        write_manifest(folder, request, splits)
    return output


@torch.no_grad()
def _encoded(
    tokenizer: Tokenizer,
    pixels: ImageLoader,
    contents: Contents,
    views: tuple[View, ...],
    degradation: Degradation,
    batch_size: int,
    name: str,
) -> Iterator[dict[str, np.ndarray]]:
    """Columns of each batch and view: indices (B, tokens), latents and degraded (B, c·h·w), label (B,), source_id (B,)."""
    processor, spec = tokenizer.config.image_processor, tokenizer.latent_spec()
    labels, ids = pixels.labels(), pixels.source_ids()
    dtype = np.uint16 if (spec.codebook_size or 0) <= 2**16 else np.int32
    with progress_bar(total=len(pixels) * len(views), desc=f"tokenize {name}", unit="image") as bar:
        for positions, images in pixels.batches(batch_size):
            for view in views:
                shown = images.flip(-1) if view == "flip" else images
                pixel_values = processor.preprocess(shown.to(tokenizer.device))
                columns: dict[str, np.ndarray] = {}
                if contents != "latents":
                    columns["indices"] = tokenizer.encode_indices(pixel_values).flatten(1).cpu().numpy().astype(dtype)
                if contents != "indices":
                    columns["latents"] = tokenizer.encode_latents(pixel_values).flatten(1).half().cpu().numpy()
                if degradation != "none":
                    worse = degraded(shown, degradation, processor, positions)
                    encoded = tokenizer.encode_latents(processor.preprocess(worse.to(tokenizer.device)))
                    columns["degraded"] = encoded.flatten(1).half().cpu().numpy()
                columns["label"] = np.array([-1 if labels is None else labels[i] for i in positions], np.int64)
                columns["source_id"] = np.array([ids[i] for i in positions], object)
                bar.update(len(positions))
                yield columns


def _shards(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Batches put together into shards of about `SHARD_IMAGES` rows."""
    held: list[dict[str, np.ndarray]] = []
    rows = 0
    for batch in batches:
        held.append(batch)
        rows += len(batch["label"])
        if rows >= SHARD_IMAGES:
            yield {name: np.concatenate([part[name] for part in held]) for name in batch}
            held, rows = [], 0
    if held:
        yield {name: np.concatenate([part[name] for part in held]) for name in held[0]}


def _write_shard(path: Path, columns: dict[str, np.ndarray]) -> dict[str, Any]:
    import pyarrow as pa

    arrays = {
        name: pa.array(values)
        if values.ndim == 1
        else pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        for name, values in columns.items()
    }
    batch = pa.RecordBatch.from_pydict(arrays)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    size, digest = path.stat().st_size, compute_sha256(path)
    return {"file": path.name, "rows": batch.num_rows, "bytes": size, "sha256": digest}
