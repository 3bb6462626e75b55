"""latentloom: train an image tokenizer and a prior over its codes on your own images, then sample."""

from training_harness.lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "LatentGenerationPipeline": "pipelines.latent_generation",
        "VQGAN": "stage1_tokenizer.vqgan",
        "VQGANConfig": "stage1_tokenizer.vqgan",
        "AutoregressivePrior": "stage2_prior.autoregressive.model",
        "AutoregressivePriorConfig": "stage2_prior.autoregressive.model",
        "CodeCache": "stage2_prior.codes",
        "open_source": "stage1_tokenizer.sources",
    },
)
