"""latentloom: train an image tokenizer and a prior over its codes on your own images, then sample."""

from training_harness.lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "LatentGenerationPipeline": "pipelines.latent_generation",
        "VQGAN": "stage1_tokenizer.vqgan",
        "VQGANConfig": "stage1_tokenizer.vqgan",
        "AutoencoderKL": "stage1_tokenizer.autoencoder_kl",
        "AutoencoderKLConfig": "stage1_tokenizer.autoencoder_kl",
        "IdentityTokenizer": "stage1_tokenizer.identity",
        "StandardNormalPrior": "stage2_prior.standard_normal",
        "AutoregressivePrior": "stage2_prior.autoregressive.model",
        "AutoregressivePriorConfig": "stage2_prior.autoregressive.config",
        "DiffusionPrior": "stage2_prior.diffusion.model",
        "DiffusionPriorConfig": "stage2_prior.diffusion.config",
        "CodeCache": "stage1_tokenizer.codes.reader",
        "open_source": "stage1_tokenizer.data.sources",
    },
)
