"""The table of quantizers by name. A new quantizer is one file with its configuration and one line in each table here."""

from stage1_tokenizer.quantizers.binary import BSQ, LFQ, BSQConfig, LFQConfig
from stage1_tokenizer.quantizers.ema_quantizer import EMAVectorQuantizer, EMAVectorQuantizerConfig
from stage1_tokenizer.quantizers.fsq import FSQ, FSQConfig
from stage1_tokenizer.quantizers.ibq import IBQ, IBQConfig
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerConfig, QuantizerOutput
from stage1_tokenizer.quantizers.residual import ResidualQuantizer, ResidualQuantizerConfig
from stage1_tokenizer.quantizers.simvq import SimVQ, SimVQConfig
from stage1_tokenizer.quantizers.vector_quantizer import VectorQuantizer, VectorQuantizerConfig, nearest_code

QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "ema": EMAVectorQuantizer,
    "simvq": SimVQ,
    "ibq": IBQ,
    "fsq": FSQ,
    "lfq": LFQ,
    "bsq": BSQ,
    "residual": ResidualQuantizer,
}
AnyQuantizerConfig = (
    EMAVectorQuantizerConfig
    | VectorQuantizerConfig
    | SimVQConfig
    | IBQConfig
    | FSQConfig
    | LFQConfig
    | BSQConfig
    | ResidualQuantizerConfig
)
"""The section `model.quantizer`. A section without a name means the first."""

__all__ = [
    "QUANTIZERS",
    "AnyQuantizerConfig",
    "BSQConfig",
    "EMAVectorQuantizer",
    "EMAVectorQuantizerConfig",
    "FSQConfig",
    "IBQConfig",
    "LFQConfig",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "ResidualQuantizerConfig",
    "SimVQConfig",
    "VectorQuantizer",
    "VectorQuantizerConfig",
    "nearest_code",
]
