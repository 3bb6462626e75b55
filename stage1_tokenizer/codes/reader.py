"""Read a code cache: memory-mapped Arrow files, as views without a copy."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.codes.manifest import TOKENIZER_FOLDER, codes_fingerprint, read_manifest
from stage1_tokenizer.data.degradation import Degradation
from stage1_tokenizer.latent_spec import LatentSpec
from stage1_tokenizer.registry import saved_tokenizer
from training_harness.errors import UserError
from training_harness.files import compute_sha256


class CodeSplit:
    """The rows of one split, in the order of its shards. Arguments named `rows` are arrays of row numbers."""

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]], spec: LatentSpec) -> None:
        """Map the shards of a split.

        Args:
            folder: the folder of the code cache.
            shards: the manifest's entries of the split.
            spec: the tokenizer's latent spec.

        Raises:
            UserError: a shard is missing, cut short or no Arrow file.
        """
        self.spec = spec
        columns = [_open_shard(folder / shard["file"], shard) for shard in shards]
        self._columns = {name: [shard[name] for shard in columns] for name in (columns[0] if columns else ())}
        self._starts = np.cumsum([0] + [len(shard["label"]) for shard in columns])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def select(self, rows: np.ndarray) -> "CodeSplit":
        """Copy the given rows into a new split in memory."""
        import pyarrow as pa

        subset = copy.copy(self)
        subset._columns = {name: [self._read_rows(name, rows)] for name in self._columns if name != "source_id"}
        subset._columns["source_id"] = [pa.array(self.source_ids(rows))]
        subset._starts = np.array([0, len(rows)])
        return subset

    def indices(self, rows: np.ndarray) -> Tensor:
        """Read indices: (B, h, w) int64, or (B, levels, h, w) for residual codes."""
        spec = self.spec
        codes = torch.from_numpy(self._read_rows("indices", rows).astype(np.int64))
        levels = (spec.levels,) if spec.levels > 1 else ()
        return codes.view(len(rows), *levels, spec.height, spec.width)

    def max_code(self) -> int:
        """Return the largest index of the split; −1 if there is none."""
        return max((int(part.max()) for part in self._columns.get("indices", ()) if part.size), default=-1)

    def latents(self, rows: np.ndarray, column: str = "latents") -> Tensor:
        """Read latents: (B, c, h, w) float32, of the images, or of the degraded images from the column "degraded"."""
        latents = torch.from_numpy(self._read_rows(column, rows).astype(np.float32))
        return latents.view(len(rows), self.spec.channels, self.spec.height, self.spec.width)

    def labels(self, rows: np.ndarray) -> Tensor:
        """Read labels: (B,) int64; −1 for images without a label."""
        return torch.from_numpy(self._read_rows("label", rows))

    def classes(self) -> tuple[int, ...]:
        """Return the sorted ids of the classes with images."""
        parts = self._columns.get("label", ())
        return tuple(int(label) for label in np.unique(np.concatenate([[-1], *parts])) if label >= 0)

    def source_ids(self, rows: np.ndarray) -> list[str]:
        """Read the source ids of the images."""
        parts, shards = self._columns["source_id"], np.searchsorted(self._starts, rows, side="right") - 1
        return [parts[n][int(row - self._starts[n])].as_py() for n, row in zip(shards, rows, strict=True)]

    def require_column(self, name: str) -> None:
        """Raise UserError if the cache was written without the column `name`."""
        if name not in self._columns:
            raise UserError(f"the code cache has no {name}; run: latentloom tokenize --contents {name} …")

    def _read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        self.require_column(name)
        parts = self._columns[name]
        if len(parts) == 1:
            return parts[0][rows]
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        values = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
        for number in np.unique(shard):
            in_shard = shard == number
            values[in_shard] = parts[number][rows[in_shard] - self._starts[number]]
        return values


class CodeCache:
    """A folder of codes, with spec, label names and splits."""

    def __init__(self, path: str | Path) -> None:
        """Open a code cache.

        Raises:
            UserError: the folder is no code cache, or a shard is missing or cut short.
        """
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
        """A hash of the content. Runs recognise the cache by it, also in another folder."""
        return codes_fingerprint(self.manifest)

    @property
    def trained_classes(self) -> tuple[int, ...]:
        """Ids of the classes with training images."""
        return self.train.classes()

    @property
    def tokenizer_folder(self) -> Path:
        """The model folder of the tokenizer that wrote the codes."""
        return self.path / TOKENIZER_FOLDER

    def code_vectors(self) -> Tensor:
        """Return the normalised latent of each code: (levels · K, c) float32.

        For residual codes it is the code's contribution to a latent, minus the mean contribution of the codes of its level.
        """
        tokenizer, spec = saved_tokenizer(self.tokenizer_folder), self.spec
        all_codes = torch.arange(spec.codebook_size or 0).view(1, 1, -1)
        if spec.levels == 1:
            return tokenizer.indices_to_latents(all_codes)[0, :, 0].T.detach()
        levels = []
        for level in range(spec.levels):
            indices = all_codes.new_zeros(1, spec.levels, 1, all_codes.shape[-1])
            indices[:, level] = all_codes
            latents = tokenizer.indices_to_latents(indices)[0, :, 0].T.detach()
            levels.append(latents - latents.mean(0))
        return torch.cat(levels)

    def verify(self) -> None:
        """Check every shard's sha256, and that the codebook has all indices.

        Raises:
            UserError: a shard was altered, or an index is too large.
        """
        for split in self.manifest["splits"].values():
            for shard in split["shards"]:
                digest = compute_sha256(self.path / shard["file"])
                if digest != shard["sha256"]:
                    raise UserError(
                        f"{self.path / shard['file']} has sha256 {digest[:12]}…; expected {shard['sha256'][:12]}…; "
                        "the file was altered: remove the folder and write it again with `latentloom tokenize`"
                    )
        max_code = max(self.train.max_code(), self.validation.max_code())
        if self.spec.codebook_size is not None and max_code >= self.spec.codebook_size:
            raise UserError(
                f"{self.path} holds the code {max_code}; expected 0 to {self.spec.codebook_size - 1}, the codes of its tokenizer; "
                "remove the folder and write it again with `latentloom tokenize`"
            )


def _open_shard(path: Path, shard: dict[str, Any]) -> dict[str, np.ndarray]:
    """Map a shard's columns, (rows, …) each."""
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
