"""Priors by class name. A new prior needs one line here."""

import json
from pathlib import Path

from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.prior import Prior
from stage2_prior.standard_normal import StandardNormalPrior

PRIORS: dict[str, type[Prior]] = {
    kind.__name__: kind for kind in (AutoregressivePrior, DiffusionPrior, StandardNormalPrior)
}


def load_saved_prior(folder: Path) -> Prior:
    """Load a prior of any kind from a model folder, by the `model_type` in its config.json."""
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    prior_class = {kind.config_class.model_type: kind for kind in PRIORS.values()}[model_type]
    return prior_class.from_pretrained(folder)
