"""The format of a code cache: what its folder holds, and the request that it answers.

    codes/manifest.json            LatentSpec, source, label names, splits, views, shards with counts and sha256
    codes/tokenizer/               the tokenizer, so that stage two can leave a whole pipeline
    codes/train-00000.arrow        columns indices and/or latents, label, source_id; an Arrow stream of one record batch
    codes/skipped.jsonl            images that could not be read, and why

Codes are stored flat, image by image: indices as uint16 where K allows, else int32; latents as float16. A prior that restores
images also needs the latents of each degraded view, in the column `degraded` (`stage1_tokenizer.data.degradation`).
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
MANIFEST, SKIPPED, TOKENIZER = "manifest.json", "skipped.jsonl", "tokenizer"


@dataclass(frozen=True, kw_only=True)
class CodeRequest:
    """What a code cache is asked to hold. Two caches of equal requests hold the same codes."""

    spec: LatentSpec
    source: str
    images: dict[str, int]
    """Images of each split."""
    fingerprint: dict[str, str]
    """Hash of each split's images (`ImageSplit.fingerprint`)."""
    fingerprint_of_ids: dict[str, str]
    """The same as caches of format 1 hold it; compared with those, and not stored."""
    contents: Contents
    views: tuple[View, ...]
    degradation: Degradation
    label_names: tuple[str, ...] | None

    @classmethod
    def of(
        cls,
        source: ImageSource,
        spec: LatentSpec,
        contents: Contents,
        views: tuple[View, ...],
        degradation: Degradation,
    ) -> Self:
        splits = {"train": source.train, "validation": source.validation}
        return cls(
            spec=spec,
            source=source.name,
            images={name: len(split) for name, split in splits.items()},
            fingerprint={name: split.fingerprint() for name, split in splits.items()},
            fingerprint_of_ids={name: split.fingerprint_of_ids() for name, split in splits.items()},
            contents=contents,
            views=views,
            degradation=degradation,
            label_names=source.label_names,
        )

    def to_dict(self) -> dict[str, Any]:
        """As it is stored: the fields in JSON's types, beside the number of the format."""
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
        """Names of the fields in which a stored manifest answers another request. The name of the source does not matter."""
        wanted = self.to_dict()
        del wanted["format"], wanted["source"]
        if manifest.get("format") == 1:
            wanted["fingerprint"] = self.fingerprint_of_ids
        stored = CODE_CACHE.migrate(manifest)
        with suppress(ConfigError):  # another spec, which then differs
            stored["spec"] = fill_defaults(type(self.spec), stored["spec"])
        return [name for name, value in wanted.items() if stored.get(name) != value]


def stored_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the code cache in a folder; empty where there is none."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the code cache in a folder. Raises UserError when the folder holds none, or a broken one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        LatentSpec.from_dict(manifest["spec"])
        for name in ("train", "validation"):
            manifest["splits"][name]["shards"]
        manifest["label_names"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"no code cache in {folder} ({type(error).__name__}: {error}); expected a folder with a {MANIFEST}; run: latentloom "
            "tokenize --tokenizer … --data … --output …"
        ) from None
    return manifest


def codes_fingerprint(manifest: Mapping[str, Any]) -> str:
    """A hash of what a prior is trained on: 16 hexadecimal digits, wherever the cache lies and whatever else it holds."""
    known = {
        name: manifest.get(name) for name in ("spec", "images", "fingerprint", "views", "degradation", "label_names")
    }
    if isinstance(spec := known["spec"], dict):  # without fields that were added later, where they are their defaults
        defaults = {field.name: field.default for field in fields(LatentSpec)}
        known["spec"] = {name: value for name, value in spec.items() if value != defaults.get(name, MISSING)}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(folder: Path, request: CodeRequest, splits: dict[str, Any]) -> None:
    write_json(folder / MANIFEST, request.to_dict() | {"splits": splits})
