"""Quantizers by name: a new one is one file and one line here."""

from stage1_tokenizer.quantizers.binary import BSQ, LFQ
from stage1_tokenizer.quantizers.ema_quantizer import EMAVectorQuantizer
from stage1_tokenizer.quantizers.fsq import FSQ
from stage1_tokenizer.quantizers.ibq import IBQ
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerConfig, QuantizerName, QuantizerOutput
from stage1_tokenizer.quantizers.residual import ResidualQuantizer
from stage1_tokenizer.quantizers.simvq import SimVQ
from stage1_tokenizer.quantizers.vector_quantizer import VectorQuantizer, nearest_code

QUANTIZERS: dict[QuantizerName, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "ema": EMAVectorQuantizer,
    "simvq": SimVQ,
    "ibq": IBQ,
    "fsq": FSQ,
    "lfq": LFQ,
    "bsq": BSQ,
    "residual": ResidualQuantizer,
}

__all__ = [
    "QUANTIZERS",
    "EMAVectorQuantizer",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "VectorQuantizer",
    "nearest_code",
]
