"""Quantizers by name: a new one is one file and one line here."""

from stage1_tokenizer.quantizers.ema_quantizer import EMAVectorQuantizer
from stage1_tokenizer.quantizers.vector_quantizer import QuantizerOutput, VectorQuantizer, nearest_code

QUANTIZERS: dict[str, type[VectorQuantizer]] = {"vq": VectorQuantizer, "ema": EMAVectorQuantizer}

__all__ = ["QUANTIZERS", "EMAVectorQuantizer", "QuantizerOutput", "VectorQuantizer", "nearest_code"]
