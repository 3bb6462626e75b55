"""Formats of stage one's files: what has another name or place since, and what ids are made of.

Format 1 had one section for all quantizers and one for all tokenizers, in which each left the others' options unused, and a
config.json without sections. Format 2 has a dataclass for each of them.
"""

from collections.abc import Mapping
from typing import Any

from training_harness.migration import MODEL_FORMAT_KEY, Migration, MigrationStep, Values

SHAPE = ("channels", "blocks", "attention", "latent_channels")
LEARNT = ("usage_decay", "restart_threshold", "kmeans_iterations", "normalize", "gradient")
QUANTIZER_OPTIONS: dict[str, tuple[str, ...]] = {
    "vq": LEARNT,
    "ema": LEARNT,
    "residual": (*LEARNT, "depth"),
    "fsq": ("levels",),
    "lfq": ("entropy_temperature",),
    "bsq": ("entropy_temperature",),
    "ibq": ("entropy_temperature",),
}
"""What each quantizer used of the section, in format 1; simvq nothing."""

FIRST_QUANTIZER: dict[str, Any] = {
    "name": "ema",
    "usage_decay": 0.95,
    "restart_threshold": 0.3,
    "kmeans_iterations": 0,
    "normalize": False,
    "gradient": "straight-through",
    "levels": [],
    "depth": 4,
    "entropy_temperature": 1.0,
}
"""The section with its defaults in format 1, in which it enters a tokenizer's id. It never changes."""

REFUSED = ("normalize", "gradient", "levels")
"""Options that format 1 refused where they were not used; it ignored all the others."""


def without_unused(quantizer: Mapping[str, Any], name: str) -> Values:
    """A quantizer's section of format 1 without the options that its quantizer did not use."""
    used = QUANTIZER_OPTIONS.get(name, ())
    return {
        key: value
        for key, value in quantizer.items()
        if key == "name"
        or key in used
        or key not in FIRST_QUANTIZER
        or (key in REFUSED and _plain(value) != FIRST_QUANTIZER[key])
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def one_variant_each(values: Values) -> Values:
    """A training configuration of format 1, whose section `model` had the options of all tokenizers."""
    model = values.get("model")
    if not isinstance(model, dict):
        return values
    name, quantizer = model.get("name"), model.get("quantizer")
    if name in ("kl", "identity"):
        model = {key: value for key, value in model.items() if key not in ("codebook_size", "quantizer")}
    elif isinstance(quantizer, dict) and "name" in quantizer:
        model["quantizer"] = without_unused(quantizer, str(quantizer["name"]))
    if name == "identity":
        model = {key: value for key, value in model.items() if key not in SHAPE}
    if name in ("vqgan", "identity") and model.get("prior") == "none":
        del model["prior"]
    return values | {"model": model}


def in_a_section(values: Values) -> Values:
    """A config.json of format 1, which held the options of the network beside the others."""
    if "model" in values:
        return values
    options = (*SHAPE, "codebook_size", "quantizer")
    model = {name: values.pop(name) for name in options if name in values}
    if isinstance(quantizer := model.get("quantizer"), dict):
        values["id_quantizer"] = quantizer
        model["quantizer"] = without_unused(quantizer, str(quantizer.get("name", "ema")))
    return values | {"model": model} if model else values


TRAINING = Migration("tokenizer configuration", (MigrationStep(convert=one_variant_each),))
CODE_CACHE = Migration(
    "manifest of a code cache", (MigrationStep(),)
)  # by the same names; fingerprints of format 1 are of ids alone
MODEL = Migration("tokenizer's config.json", (MigrationStep(convert=in_a_section),), MODEL_FORMAT_KEY)
