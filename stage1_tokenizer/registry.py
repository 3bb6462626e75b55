"""Tokenizers by name: a new one is one file and one line here."""

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
    """An untrained tokenizer of the configuration's kind."""
    return _class_of(config.model_type)(config)


def saved_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, whatever its kind; raises UserError when the folder holds none."""
    folder = folder.expanduser()
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"no tokenizer could be loaded from {folder} ({type(error).__name__}: {error}); expected config.json and an intact "
            "model.safetensors; copy or save the folder again"
        ) from None
    return _class_of(model_type, f" in {folder}").from_pretrained(folder)


def _class_of(model_type: str, where: str = "") -> type[Tokenizer]:
    by_type = {kind.config_class.model_type: kind for kind in TOKENIZERS.values()}
    if model_type not in by_type:
        raise UserError(
            f"the kind of model{where} is {model_type!r}; expected that of a tokenizer: {', '.join(by_type)}; give the run of "
            "latentloom train-tokenizer"
        )
    return by_type[model_type]
