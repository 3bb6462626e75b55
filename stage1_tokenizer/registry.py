"""The table of tokenizers by name. A new tokenizer is one file and one line here."""

import json
from pathlib import Path

from stage1_tokenizer.autoencoder_kl import AutoencoderKL
from stage1_tokenizer.identity import IdentityTokenizer
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig
from stage1_tokenizer.vqgan import VQGAN
from training_harness.errors import UserError

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "vqgan": VQGAN,
    "kl": AutoencoderKL,
    "identity": IdentityTokenizer,
}


def new_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Create an untrained tokenizer of the type that the configuration describes."""
    return _tokenizer_class(config.model_type)(config)


def saved_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of any type from a model folder.

    Raises:   UserError when the folder holds no tokenizer.
    """
    folder = folder.expanduser()
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"no tokenizer could be loaded from {folder} ({type(error).__name__}: {error}); expected config.json and an intact "
            "model.safetensors. Copy or save the folder again"
        ) from None
    return _tokenizer_class(model_type, f" in {folder}").from_pretrained(folder)


def _tokenizer_class(model_type: str, location: str = "") -> type[Tokenizer]:
    classes = {tokenizer.config_class.model_type: tokenizer for tokenizer in TOKENIZERS.values()}
    if model_type not in classes:
        raise UserError(
            f"the model type{location} is {model_type!r}; expected a tokenizer, one of {', '.join(classes)}. Pass the run folder "
            "of latentloom train-tokenizer"
        )
    return classes[model_type]
