"""Reads the code cache that stage one wrote: Arrow files, memory-mapped, as views without a copy."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.codes.manifest import TOKENIZER, codes_fingerprint, read_manifest
from stage1_tokenizer.data.degradation import Degradation
from stage1_tokenizer.latent_spec import LatentSpec
from stage1_tokenizer.registry import saved_tokenizer
from training_harness.errors import UserError
from training_harness.files import compute_sha256


class CodeSplit:
    """One split: `rows` images in the order of the shards."""

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]], spec: LatentSpec) -> None:
        self.spec = spec
        columns = [_open_shard(folder / shard["file"], shard) for shard in shards]
        self._columns = {name: [shard[name] for shard in columns] for name in (columns[0] if columns else ())}
        self._starts = np.cumsum([0] + [len(shard["label"]) for shard in columns])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def select(self, rows: np.ndarray) -> "CodeSplit":
        """A split of the images at `rows` alone, held in memory."""
        import pyarrow as pa

        chosen = copy.copy(self)
        chosen._columns = {name: [self._take(name, rows)] for name in self._columns if name != "source_id"}
        chosen._columns["source_id"] = [pa.array(self.source_ids(rows))]
        chosen._starts = np.array([0, len(rows)])
        return chosen

    def indices(self, rows: np.ndarray) -> Tensor:
        """(B, h, w) int64, or (B, levels, h, w) for residual codes."""
        spec = self.spec
        codes = torch.from_numpy(self._take("indices", rows).astype(np.int64))
        levels = (spec.levels,) if spec.levels > 1 else ()
        return codes.view(len(rows), *levels, spec.height, spec.width)

    def highest_code(self) -> int:
        """−1 where there is none."""
        return max((int(part.max()) for part in self._columns.get("indices", ()) if part.size), default=-1)

    def latents(self, rows: np.ndarray, column: str = "latents") -> Tensor:
        """(B, c, h, w) float32, of the images or, in the column "degraded", of what was made of them."""
        latents = torch.from_numpy(self._take(column, rows).astype(np.float32))
        return latents.view(len(rows), self.spec.channels, self.spec.height, self.spec.width)

    def labels(self, rows: np.ndarray) -> Tensor:
        """(B,) int64; −1 for images without a label."""
        return torch.from_numpy(self._take("label", rows))

    def classes(self) -> tuple[int, ...]:
        """Ids of the classes that have an image, in order."""
        parts = self._columns.get("label", ())
        return tuple(int(label) for label in np.unique(np.concatenate([[-1], *parts])) if label >= 0)

    def source_ids(self, rows: np.ndarray) -> list[str]:
        parts, shards = self._columns["source_id"], np.searchsorted(self._starts, rows, side="right") - 1
        return [parts[n][int(row - self._starts[n])].as_py() for n, row in zip(shards, rows, strict=True)]

    def require(self, name: str) -> None:
        """Raises UserError when the cache was written without the column `name`."""
        if name not in self._columns:
            raise UserError(f"the code cache has no {name}; run: latentloom tokenize --contents {name} …")

    def _take(self, name: str, rows: np.ndarray) -> np.ndarray:
        self.require(name)
        parts = self._columns[name]
        if len(parts) == 1:
            return parts[0][rows]
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        out = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
        for number in np.unique(shard):
            chosen = shard == number
            out[chosen] = parts[number][rows[chosen] - self._starts[number]]
        return out


class CodeCache:
    """A folder of codes with its spec, label names and splits."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError when the folder is no code cache, or a shard is missing or cut short."""
        self.path = Path(path).expanduser()
        self.manifest = read_manifest(self.path)
        self.spec = LatentSpec.from_dict(self.manifest["spec"])
        train, validation = (self.manifest["splits"][name]["shards"] for name in ("train", "validation"))
        names = self.manifest["label_names"]
        self.degradation: Degradation = self.manifest.get("degradation") or "none"
        self.label_names: tuple[str, ...] | None = tuple(names) if names else None
        self.train = CodeSplit(self.path, train, self.spec)
        self.validation = CodeSplit(self.path, validation, self.spec)

    @property
    def fingerprint(self) -> str:
        """A hash of what the cache holds, by which runs know it wherever it lies."""
        return codes_fingerprint(self.manifest)

    @property
    def trained_classes(self) -> tuple[int, ...]:
        """Ids of the classes that have a training image; others have names alone."""
        return self.train.classes()

    @property
    def tokenizer_folder(self) -> Path:
        return self.path / TOKENIZER

    def code_vectors(self) -> Tensor:
        """(levels · K, c) float32: each code's latent, normalised over the training set as the tokenizer does.

        A code of one level among several has what it adds to a latent, less what the codes of its level add on average.
        """
        tokenizer, spec = saved_tokenizer(self.tokenizer_folder), self.spec
        every_code = torch.arange(spec.codebook_size or 0).view(1, 1, -1)
        if spec.levels == 1:
            return tokenizer.indices_to_latents(every_code)[0, :, 0].T.detach()
        levels = []
        for level in range(spec.levels):
            indices = every_code.new_zeros(1, spec.levels, 1, every_code.shape[-1])
            indices[:, level] = every_code
            latents = tokenizer.indices_to_latents(indices)[0, :, 0].T.detach()
            levels.append(latents - latents.mean(0))
        return torch.cat(levels)

    def verify(self) -> None:
        """Compares every shard with its sha256, and codes with the codebook's size; raises UserError for the first that differs."""
        for split in self.manifest["splits"].values():
            for shard in split["shards"]:
                found = compute_sha256(self.path / shard["file"])
                if found != shard["sha256"]:
                    raise UserError(
                        f"{self.path / shard['file']} has sha256 {found[:12]}…; expected {shard['sha256'][:12]}…; "
                        "the file was altered: remove the folder and write it again with `latentloom tokenize`"
                    )
        highest = max(self.train.highest_code(), self.validation.highest_code())
        if self.spec.codebook_size is not None and highest >= self.spec.codebook_size:
            raise UserError(
                f"{self.path} holds the code {highest}; expected 0 to {self.spec.codebook_size - 1}, the codes of its tokenizer; "
                "remove the folder and write it again with `latentloom tokenize`"
            )


def _open_shard(path: Path, shard: dict[str, Any]) -> dict[str, np.ndarray]:
    import pyarrow as pa

    size = path.stat().st_size if path.exists() else 0
    if size != shard["bytes"]:
        raise UserError(
            f"{path} holds {size} bytes; expected {shard['bytes']}; it is missing or cut short: remove the "
            "folder and write it again with `latentloom tokenize`"
        )
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is no Arrow stream ({type(error).__name__}); the file was altered: remove the folder and write "
            "it again with `latentloom tokenize`"
        ) from error
    columns = {}
    for name in table.column_names:
        array = table[name].chunk(0)
        if pa.types.is_fixed_size_list(array.type):
            values = array.flatten().to_numpy(zero_copy_only=True)
            columns[name] = values.reshape(len(array), array.type.list_size)
        else:
            columns[name] = array if name == "source_id" else array.to_numpy(zero_copy_only=True)
    return columns
