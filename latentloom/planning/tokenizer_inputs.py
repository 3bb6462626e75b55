"""Inputs of a stage-one run: the completed configuration, the model's configuration and the images."""

from dataclasses import dataclass

from stage1_tokenizer.data.image_loader import LoadedSource
from stage1_tokenizer.data.sources import ImageSource
from stage1_tokenizer.data.statistics import DatasetStatistics, dataset_statistics
from stage1_tokenizer.tokenizer import TokenizerConfig
from stage1_tokenizer.training_config import TokenizerTraining, build_model_config, complete_config


@dataclass(frozen=True)
class TokenizerInputs:
    """Inputs that a command computes once and passes to everything that it runs."""

    config: TokenizerTraining
    """Training configuration; resolution and channels come from the images unless the user set them."""
    model: TokenizerConfig
    images: LoadedSource

    @property
    def source(self) -> ImageSource:
        return self.images.source


def tokenizer_inputs(
    config: TokenizerTraining, source: ImageSource, statistics: DatasetStatistics | None = None
) -> TokenizerInputs:
    """Complete `config` from the images of `source`.

    Args:
        statistics: statistics of the training images; computed here when None.
    """
    statistics = statistics or dataset_statistics(source.train)
    config = complete_config(config, statistics)
    model = build_model_config(config, statistics)
    return TokenizerInputs(config, model, LoadedSource(source, model.image_processor))
