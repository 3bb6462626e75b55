"""What a stage-one run starts from: the configuration completed from the images, the model's, and the images themselves."""

from dataclasses import dataclass

from stage1_tokenizer.data.image_loader import LoadedSource
from stage1_tokenizer.data.sources import ImageSource
from stage1_tokenizer.data.statistics import DatasetStatistics, dataset_statistics
from stage1_tokenizer.tokenizer import TokenizerConfig
from stage1_tokenizer.training_config import TokenizerTraining, build_model_config, complete_config


@dataclass(frozen=True)
class TokenizerInputs:
    """Worked out once for a command, and handed to whatever it does with them."""

    config: TokenizerTraining
    """With the resolution and the channels of the images, where the user gave none."""
    model: TokenizerConfig
    images: LoadedSource

    @property
    def source(self) -> ImageSource:
        return self.images.source


def tokenizer_inputs(
    config: TokenizerTraining, source: ImageSource, statistics: DatasetStatistics | None = None
) -> TokenizerInputs:
    """Completes `config` from the images of `source`, whose statistics are computed where they are not given."""
    statistics = statistics or dataset_statistics(source.train)
    config = complete_config(config, statistics)
    model = build_model_config(config, statistics)
    return TokenizerInputs(config, model, LoadedSource(source, model.image_processor))
