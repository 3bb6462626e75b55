"""The format of a code cache: the files of its folder, and the request that it stores.

    codes/manifest.json            LatentSpec, source, label names, splits, views, shards with counts and sha256
    codes/tokenizer/               the tokenizer, so that stage two can save a complete pipeline
    codes/train-00000.arrow        columns indices and/or latents, label, source_id; an Arrow stream of one record batch
    codes/skipped.jsonl            images that could not be read, and why

Each row has the codes of one image, flattened: indices as uint16 if K allows it, else int32; latents as float16. A prior that
restores images also needs the latents of the degraded images, in the column `degraded` (`stage1_tokenizer.data.degradation`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from stage1_tokenizer.data.degradation import Degradation
from stage1_tokenizer.data.sources import ImageSource
from stage1_tokenizer.latent_spec import LatentSpec
from stage1_tokenizer.migration import CODE_CACHE
from training_harness.configuration import fill_defaults
from training_harness.errors import ConfigError, UserError
from training_harness.files import write_json

View = Literal["original", "flip"]
Contents = Literal["indices", "latents", "both"]
MANIFEST_FILE, SKIPPED_FILE, TOKENIZER_FOLDER = "manifest.json", "skipped.jsonl", "tokenizer"


@dataclass(frozen=True, kw_only=True)
class CodeRequest:
    """The request for a code cache. Caches of equal requests have the same codes."""

    spec: LatentSpec
    source: str
    images: dict[str, int]
    """Number of images of each split."""
    fingerprint: dict[str, str]
    """Hash of each split's images (`ImageSplit.fingerprint`)."""
    legacy_fingerprint: dict[str, str]
    """Hash of each split's images as format 1 stores it: only compared with caches of format 1, not stored."""
    contents: Contents
    views: tuple[View, ...]
    degradation: Degradation
    label_names: tuple[str, ...] | None

    @classmethod
    def from_source(
        cls,
        source: ImageSource,
        spec: LatentSpec,
        contents: Contents,
        views: tuple[View, ...],
        degradation: Degradation,
    ) -> Self:
        """Create the request for the training and validation images of a source."""
        splits = {"train": source.train, "validation": source.validation}
        return cls(
            spec=spec,
            source=source.name,
            images={name: len(split) for name, split in splits.items()},
            fingerprint={name: split.fingerprint() for name, split in splits.items()},
            legacy_fingerprint={name: split.legacy_fingerprint() for name, split in splits.items()},
            contents=contents,
            views=views,
            degradation=degradation,
            label_names=source.label_names,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as stored in the manifest, with the number of the format."""
        return {
            "format": CODE_CACHE.format,
            "spec": self.spec.to_dict(),
            "source": self.source,
            "images": self.images,
            "fingerprint": self.fingerprint,
            "contents": self.contents,
            "views": list(self.views),
            "degradation": None if self.degradation == "none" else self.degradation,
            "label_names": list(self.label_names) if self.label_names else None,
        }

    def differences(self, manifest: Mapping[str, Any]) -> list[str]:
        """Return the names of the fields in which a stored manifest differs; the source's name is not compared."""
        expected = self.to_dict()
        del expected["format"], expected["source"]
        if manifest.get("format") == 1:
            expected["fingerprint"] = self.legacy_fingerprint
        stored = CODE_CACHE.migrate(manifest)
        with suppress(ConfigError):  # an unknown spec stays as it is, and differs
            stored["spec"] = fill_defaults(type(self.spec), stored["spec"])
        return [name for name, value in expected.items() if stored.get(name) != value]


def find_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of the code cache in a folder; empty if there is none."""
    path = folder / MANIFEST_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of the code cache in a folder.

    Raises:
        UserError: there is no manifest, or a broken one.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        LatentSpec.from_dict(manifest["spec"])
        for name in ("train", "validation"):
            manifest["splits"][name]["shards"]
        manifest["label_names"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"no code cache in {folder} ({type(error).__name__}: {error}); expected a folder with a {MANIFEST_FILE}; run: "
            "latentloom tokenize --tokenizer … --data … --output …"
        ) from None
    return manifest


def codes_fingerprint(manifest: Mapping[str, Any]) -> str:
    """Hash the parts of a manifest that decide what a prior is trained on: 16 hexadecimal digits."""
    hashed = {
        name: manifest.get(name) for name in ("spec", "images", "fingerprint", "views", "degradation", "label_names")
    }
    if isinstance(spec := hashed["spec"], dict):
        # Fields with default values are left out, so that a field that is added later does not change the hash.
        defaults = {field.name: field.default for field in fields(LatentSpec)}
        hashed["spec"] = {name: value for name, value in spec.items() if value != defaults.get(name, MISSING)}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(folder: Path, request: CodeRequest, splits: dict[str, Any]) -> None:
    """Write the manifest of a request; `splits` has the rows and shards of each split."""
    write_json(folder / MANIFEST_FILE, request.to_dict() | {"splits": splits})
