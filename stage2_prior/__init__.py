"""Stage two: a prior over the codes."""

from training_harness.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AutoregressivePrior": "stage2_prior.autoregressive.model",
        "AutoregressivePriorConfig": "stage2_prior.autoregressive.config",
        "SamplingOptions": "stage2_prior.autoregressive.sampling",
        "CodeCache": "stage1_tokenizer.codes.reader",
        "train_prior": "stage2_prior.train",
        "AutoregressiveTraining": "stage2_prior.training_config",
        "DiffusionTraining": "stage2_prior.training_config",
        "DiffusionPrior": "stage2_prior.diffusion.model",
        "DiffusionPriorConfig": "stage2_prior.diffusion.config",
        "DiffusionOptions": "stage2_prior.diffusion.sampling",
    },
)
