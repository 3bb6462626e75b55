"""Stage two: a prior over the codes."""

from training_harness.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AutoregressivePrior": "stage2_prior.autoregressive.model",
        "AutoregressivePriorConfig": "stage2_prior.autoregressive.model",
        "SamplingOptions": "stage2_prior.autoregressive.sampling",
        "CodeCache": "stage2_prior.codes",
        "train_prior": "stage2_prior.train",
        "PriorTraining": "stage2_prior.training_config",
    },
)
