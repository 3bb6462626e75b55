"""Migrations of stage two's files: fields that were renamed or moved.

Format 1 had one section for all denoisers, `class_dropout` in the section `model`, and the options of a mean flow in two sections.
Its config.json had no sections. Format 2 has a dataclass for each denoiser and one for the mean flow.
"""

from training_harness.migration import MODEL_FORMAT_KEY, Migration, MigrationStep, Values, nest_in_model

TRANSFORMER_FIELDS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "qk_norm",
    "positions",
    "rope_theta",
)
AUTOREGRESSIVE_FIELDS = (
    *(*TRANSFORMER_FIELDS, "depth_layers", "num_key_value_heads", "dropout", "tie_embeddings", "learned_positions"),
    "rms_norm_eps",
)
DIT_FIELDS = (
    "patch_size",
    "num_heads",
    "intermediate_size",
    "feed_forward",
    "norm",
    "qk_norm",
    "positions",
    "rope_theta",
)
UNET_FIELDS = ("channel_multipliers", "attention")
PROCESS_FIELDS = ("schedule", "prediction", "zero_terminal_snr", "mean_flow", "max_guidance")
DIFFUSION_FIELDS = ("denoiser", "hidden_size", "num_layers", *DIT_FIELDS, *UNET_FIELDS, *PROCESS_FIELDS)
SPAN_FIELDS = ("instant_share", "spans_from")
MEAN_FLOW_RENAMES = {"model.max_guidance": "model.mean_flow.max_guidance"}


def split_denoiser_variants(values: Values) -> Values:
    """Convert the section `model` of format 1, which had the options of both denoisers and of the mean flow."""
    model, times = values.get("model"), values.get("times")
    if not isinstance(model, dict):
        return values
    denoiser, mean_flow = model.get("denoiser"), model.get("mean_flow")
    if denoiser == "unet":  # a U-Net ignored the options of a DiT
        model = {key: value for key, value in model.items() if key not in DIT_FIELDS}
    elif denoiser == "dit":
        model = {key: value for key, value in model.items() if key not in UNET_FIELDS or value not in ((), [])}
    if mean_flow is True:
        model["mean_flow"] = {}
    elif mean_flow is False:
        model.pop("max_guidance", None)
        model["mean_flow"] = None
        if isinstance(times, dict):
            values = values | {"times": {key: value for key, value in times.items() if key not in SPAN_FIELDS}}
        if denoiser == "unet":
            del model["mean_flow"]
    return values | {"model": model}


def nest_autoregressive_options(values: Values) -> Values:
    """Move the network's options of a format 1 config.json to the section `model`."""
    return nest_in_model(values, AUTOREGRESSIVE_FIELDS)


def nest_diffusion_options(values: Values) -> Values:
    """Move the denoiser's options of a format 1 config.json to the section `model`."""
    values = nest_in_model(values, DIFFUSION_FIELDS)
    if isinstance(model := values.get("model"), dict) and "name" not in model:
        defaults = {"denoiser": "dit", "mean_flow": False}
        values = split_denoiser_variants(values | {"model": defaults | model})
    return values


TRAINING = Migration(
    "prior configuration",
    (
        MigrationStep(
            convert=split_denoiser_variants,
            renamed_fields={
                "model.class_dropout": "class_dropout",
                "model.denoiser": "model.name",
                **MEAN_FLOW_RENAMES,
                **{f"times.{name}": f"model.mean_flow.{name}" for name in SPAN_FIELDS},
            },
        ),
    ),
)
AUTOREGRESSIVE_MODEL = Migration(
    "prior's config.json", (MigrationStep(convert=nest_autoregressive_options),), MODEL_FORMAT_KEY
)
DIFFUSION_MODEL = Migration(
    "prior's config.json",
    (
        MigrationStep(
            convert=nest_diffusion_options, renamed_fields={"model.denoiser": "model.name", **MEAN_FLOW_RENAMES}
        ),
    ),
    MODEL_FORMAT_KEY,
)
SAMPLING = Migration("sampling options")
"""Sampling options of all priors."""
