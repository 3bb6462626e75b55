"""Write a code cache: the codes of a data set's images. `stage1_tokenizer.codes.manifest` describes the format."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stage1_tokenizer.codes.manifest import (
    MANIFEST_FILE,
    SKIPPED_FILE,
    TOKENIZER_FOLDER,
    CodeRequest,
    Contents,
    View,
    find_manifest,
    write_manifest,
)
from stage1_tokenizer.data.degradation import Degradation, degrade_images
from stage1_tokenizer.data.image_loader import ImageLoader, LoadedSource, inference_batch_size
from stage1_tokenizer.data.sources import ImageSource
from stage1_tokenizer.tokenizer import Tokenizer
from training_harness.errors import UserError
from training_harness.files import compute_sha256, holds_files, update_folder
from training_harness.progress import progress_bar

SHARD_IMAGES = 100_000  # rows of one shard, approximately


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
    """Encode the training and validation images of a source into a folder. The manifest is written last.

    An equal request that `output` already holds is not encoded again.

    Args:
        tokenizer: the tokenizer.
        tokenizer_folder: its model folder, which is copied into the cache.
        source: the images.
        output: the folder of the code cache.
        contents: by default indices; latents for a tokenizer without a codebook, or with a degradation.
        views: the views of each training image: the original and the mirror image. Validation has originals only.
        degradation: encode a degraded copy of each view too, as latents in the column `degraded`.
        batch_size: images in a batch; by default a number that needs little memory.
        images: the loaders of `source`; by default they are created here.

    Returns:
        The folder of the code cache.

    Raises:
        UserError: `output` holds other files, or the codes of another request.
    """
    output = output.expanduser()
    if stored := find_manifest(output):
        source = source.with_label_order(stored.get("label_names"))
    spec, batch_size = tokenizer.latent_spec(), batch_size or inference_batch_size(tokenizer.config.image_size)
    needs_latents = spec.codebook_size is None or degradation != "none"
    contents = contents or ("latents" if needs_latents else "indices")
    request = CodeRequest.from_source(source, spec, contents, views, degradation)
    if stored:
        if differing := request.differences(stored):
            raise UserError(
                f"{output} holds a code cache with another {', '.join(differing)}; expected the same request and images; "
                "choose another --output"
            )
        print(f"{output} holds these codes already")
        return output
    if holds_files(output):
        raise UserError(f"{output} is not empty and holds no code cache; choose another --output")
    with update_folder(output, last=MANIFEST_FILE) as folder:
        shutil.copytree(tokenizer_folder, folder / TOKENIZER_FOLDER)
        splits, skipped = {}, []
        images = images or LoadedSource(source, tokenizer.config.image_processor)
        for name, loader in (("train", images.train), ("validation", images.validation)):
            split_views = views if name == "train" else ("original",)
            shards = [
                _write_shard(folder / f"{name}-{number:05d}.arrow", rows)
                for number, rows in enumerate(
                    _merge_into_shards(
                        _encode_batches(tokenizer, loader, contents, split_views, degradation, batch_size, name)
                    )
                )
            ]
            splits[name] = {"rows": sum(shard["rows"] for shard in shards), "shards": shards}
            skipped += [{"source_id": error.source_id, "reason": error.reason} for error in loader.read_errors.values()]
            loader.report_skipped()
        (folder / SKIPPED_FILE).write_text("".join(json.dumps(row) + "\n" for row in skipped), encoding="utf-8")
        write_manifest(folder, request, splits)
    return output


@torch.no_grad()
def _encode_batches(
    tokenizer: Tokenizer,
    loader: ImageLoader,
    contents: Contents,
    views: tuple[View, ...],
    degradation: Degradation,
    batch_size: int,
    name: str,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the columns of each batch and view: indices (B, tokens), latents and degraded (B, c·h·w), label and source_id (B,)."""
    processor, spec = tokenizer.config.image_processor, tokenizer.latent_spec()
    labels, ids = loader.labels(), loader.source_ids()
    dtype = np.uint16 if (spec.codebook_size or 0) <= 2**16 else np.int32
    with progress_bar(total=len(loader) * len(views), desc=f"tokenize {name}", unit="image") as bar:
        for positions, images in loader.batches(batch_size):
            for view in views:
                view_images = images.flip(-1) if view == "flip" else images
                pixel_values = processor.preprocess(view_images.to(tokenizer.device))
                columns: dict[str, np.ndarray] = {}
                if contents != "latents":
                    columns["indices"] = tokenizer.encode_indices(pixel_values).flatten(1).cpu().numpy().astype(dtype)
                if contents != "indices":
                    columns["latents"] = tokenizer.encode_latents(pixel_values).flatten(1).half().cpu().numpy()
                if degradation != "none":
                    degraded = degrade_images(view_images, degradation, processor, positions)
                    latents = tokenizer.encode_latents(processor.preprocess(degraded.to(tokenizer.device)))
                    columns["degraded"] = latents.flatten(1).half().cpu().numpy()
                columns["label"] = np.array([-1 if labels is None else labels[i] for i in positions], np.int64)
                columns["source_id"] = np.array([ids[i] for i in positions], object)
                bar.update(len(positions))
                yield columns


def _merge_into_shards(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Concatenate batches to shards of about `SHARD_IMAGES` rows."""
    pending: list[dict[str, np.ndarray]] = []
    rows = 0
    for batch in batches:
        pending.append(batch)
        rows += len(batch["label"])
        if rows >= SHARD_IMAGES:
            yield {name: np.concatenate([part[name] for part in pending]) for name in batch}
            pending, rows = [], 0
    if pending:
        yield {name: np.concatenate([part[name] for part in pending]) for name in pending[0]}


def _write_shard(path: Path, columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """Write an Arrow stream of one record batch; return its entry in the manifest."""
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
