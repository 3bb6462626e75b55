"""Migrations of stage one's files from earlier formats, and the format 1 names that tokenizer ids depend on.

Format 1 has one section with the options of all quantizers, one section with the options of all tokenizers, and a config.json
without sections. Format 2 has one dataclass per quantizer and per tokenizer.
"""

from collections.abc import Mapping
from typing import Any

from training_harness.migration import MODEL_FORMAT_KEY, Migration, MigrationStep, Values, nest_in_model

SHAPE_OPTIONS = ("channels", "blocks", "attention", "latent_channels")
CODEBOOK_OPTIONS = ("usage_decay", "restart_threshold", "kmeans_iterations", "normalize", "gradient")
QUANTIZER_OPTIONS: dict[str, tuple[str, ...]] = {
    "vq": CODEBOOK_OPTIONS,
    "ema": CODEBOOK_OPTIONS,
    "residual": (*CODEBOOK_OPTIONS, "depth"),
    "fsq": ("levels",),
    "lfq": ("entropy_temperature",),
    "bsq": ("entropy_temperature",),
    "ibq": ("entropy_temperature",),
}
"""Options that each quantizer used in format 1. simvq used none."""

FORMAT_1_QUANTIZER: dict[str, Any] = {
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
"""The quantizer's section with the defaults of format 1. Tokenizer ids depend on it, so it never changes."""

REJECTED_OPTIONS = ("normalize", "gradient", "levels")
"""Options that format 1 rejected when the quantizer did not use them. It ignored all other unused options."""


def drop_unused_options(quantizer: Mapping[str, Any], name: str) -> Values:
    """Remove the options that quantizer `name` did not use from a format 1 section."""
    used = QUANTIZER_OPTIONS.get(name, ())
    return {
        key: value
        for key, value in quantizer.items()
        if key == "name"
        or key in used
        or key not in FORMAT_1_QUANTIZER
        or (key in REJECTED_OPTIONS and _as_list(value) != FORMAT_1_QUANTIZER[key])
    }


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def drop_other_variants(values: Values) -> Values:
    """Remove the options of other tokenizers from the section `model` of a format 1 training configuration."""
    model = values.get("model")
    if not isinstance(model, dict):
        return values
    name, quantizer = model.get("name"), model.get("quantizer")
    if name in ("kl", "identity"):
        model = {key: value for key, value in model.items() if key not in ("codebook_size", "quantizer")}
    elif isinstance(quantizer, dict) and "name" in quantizer:
        model["quantizer"] = drop_unused_options(quantizer, str(quantizer["name"]))
    if name == "identity":
        model = {key: value for key, value in model.items() if key not in SHAPE_OPTIONS}
    if name in ("vqgan", "identity") and model.get("prior") == "none":
        del model["prior"]
    return values | {"model": model}


def nest_model_options(values: Values) -> Values:
    """Move the model options of a format 1 config.json from the top level to the section `model`."""
    if "model" in values:
        return values
    values = nest_in_model(values, (*SHAPE_OPTIONS, "codebook_size", "quantizer"))
    model = values.get("model", {})
    if isinstance(quantizer := model.get("quantizer"), dict):
        values["id_quantizer"] = quantizer
        model["quantizer"] = drop_unused_options(quantizer, str(quantizer.get("name", "ema")))
    return values


TRAINING = Migration("tokenizer configuration", (MigrationStep(convert=drop_other_variants),))
# The names of the code cache did not change. Its fingerprints of format 1 cover the source ids only.
CODE_CACHE = Migration("manifest of a code cache", (MigrationStep(),))
MODEL = Migration("tokenizer's config.json", (MigrationStep(convert=nest_model_options),), MODEL_FORMAT_KEY)
