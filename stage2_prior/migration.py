"""Formats of stage two's files: what has another name or place since.

Format 1 had one section for all denoisers, `class_dropout` among the options of the network, and what belongs to a mean flow
in two sections; a config.json had no sections. Format 2 has a dataclass for each denoiser and one for the mean flow.
"""

from training_harness.migration import MODEL_FORMAT_KEY, Migration, MigrationStep, Values

TRANSFORMER = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "qk_norm", "positions", "rope_theta")
AUTOREGRESSIVE = (
    *(*TRANSFORMER, "depth_layers", "num_key_value_heads", "dropout", "tie_embeddings", "learned_positions"),
    "rms_norm_eps",
)
DIT = ("patch_size", "num_heads", "intermediate_size", "feed_forward", "norm", "qk_norm", "positions", "rope_theta")
UNET = ("channel_multipliers", "attention")
PROCESS = ("schedule", "prediction", "zero_terminal_snr", "mean_flow", "max_guidance")
DIFFUSION = ("denoiser", "hidden_size", "num_layers", *DIT, *UNET, *PROCESS)
SPANS = ("instant_share", "spans_from")
MEAN_FLOW = {"model.max_guidance": "model.mean_flow.max_guidance"}


def one_variant_each(values: Values) -> Values:
    """A configuration of format 1, whose section `model` had the options of both denoisers and of the mean flow."""
    model, times = values.get("model"), values.get("times")
    if not isinstance(model, dict):
        return values
    denoiser, mean_flow = model.get("denoiser"), model.get("mean_flow")
    if denoiser == "unet":  # which ignored what it had no use for
        model = {key: value for key, value in model.items() if key not in DIT}
    elif denoiser == "dit":
        model = {key: value for key, value in model.items() if key not in UNET or value not in ((), [])}
    if mean_flow is True:
        model["mean_flow"] = {}
    elif mean_flow is False:
        model.pop("max_guidance", None)
        model["mean_flow"] = None
        if isinstance(times, dict):
            values = values | {"times": {key: value for key, value in times.items() if key not in SPANS}}
        if denoiser == "unet":
            del model["mean_flow"]
    return values | {"model": model}


def autoregressive_section(values: Values) -> Values:
    """A config.json of format 1, which held the options of the network beside the others."""
    return _in_a_section(values, AUTOREGRESSIVE)


def diffusion_section(values: Values) -> Values:
    values = _in_a_section(values, DIFFUSION)
    if isinstance(model := values.get("model"), dict) and "name" not in model:
        defaults = {"denoiser": "dit", "mean_flow": False}
        values = one_variant_each(values | {"model": defaults | model})
    return values


def _in_a_section(values: Values, options: tuple[str, ...]) -> Values:
    if "model" in values:
        return values
    model = {name: values.pop(name) for name in options if name in values}
    return values | {"model": model} if model else values


TRAINING = Migration(
    "prior configuration",
    (
        MigrationStep(
            convert=one_variant_each,
            renamed_fields={
                "model.class_dropout": "class_dropout",
                "model.denoiser": "model.name",
                **MEAN_FLOW,
                **{f"times.{name}": f"model.mean_flow.{name}" for name in SPANS},
            },
        ),
    ),
)
AUTOREGRESSIVE_MODEL = Migration(
    "prior's config.json", (MigrationStep(convert=autoregressive_section),), MODEL_FORMAT_KEY
)
DIFFUSION_MODEL = Migration(
    "prior's config.json",
    (MigrationStep(convert=diffusion_section, renamed_fields={"model.denoiser": "model.name", **MEAN_FLOW}),),
    MODEL_FORMAT_KEY,
)
SAMPLING = Migration("sampling options")
"""Of every kind of prior."""
