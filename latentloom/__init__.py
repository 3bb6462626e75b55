"""latentloom: train an image tokenizer and a prior over its codes on your own images, then generate samples."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _put_own_packages_first() -> None:
    """Search this project's folder before the current folder, for `python -m latentloom`.

    Python searches the current folder first, and a package there may have the name of one of ours.
    """
    if sys.argv[:1] == ["-m"] and Path(sys.path[0] or ".").resolve() == Path.cwd():
        sys.path[:] = [str(ROOT), *(entry for entry in sys.path[1:] if entry != str(ROOT)), sys.path[0]]


def _check_packages() -> None:
    """Raise ImportError if Python finds another package with the name of one of ours."""
    for name in ("training_harness", "stage1_tokenizer", "stage2_prior", "pipelines"):
        loaded = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
        folders = list(spec.submodule_search_locations or ()) if spec else []
        if not any(Path(folder).resolve().parent == ROOT for folder in folders):
            first = folders[0] if folders else (spec and spec.origin) or "no package"
            raise ImportError(
                f"latentloom needs its own package {name} from {ROOT}, but Python finds {first} first; run from another folder, "
                "or rename that package"
            )


_put_own_packages_first()
_check_packages()

from training_harness.lazy import lazy_names  # noqa: E402

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "LatentGenerationPipeline": "pipelines.latent_generation",
        "VQGAN": "stage1_tokenizer.vqgan",
        "VQGANConfig": "stage1_tokenizer.vqgan",
        "AutoencoderKL": "stage1_tokenizer.autoencoder_kl",
        "AutoencoderKLConfig": "stage1_tokenizer.autoencoder_kl",
        "IdentityTokenizer": "stage1_tokenizer.identity",
        "StandardNormalPrior": "stage2_prior.standard_normal",
        "AutoregressivePrior": "stage2_prior.autoregressive.model",
        "AutoregressivePriorConfig": "stage2_prior.autoregressive.config",
        "DiffusionPrior": "stage2_prior.diffusion.model",
        "DiffusionPriorConfig": "stage2_prior.diffusion.config",
        "CodeCache": "stage1_tokenizer.codes.reader",
        "open_source": "stage1_tokenizer.data.sources",
    },
)
