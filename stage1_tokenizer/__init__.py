"""Stage one: encode pixels as codes and decode them again."""

from training_harness.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "VQGAN": "stage1_tokenizer.vqgan",
        "VQGANConfig": "stage1_tokenizer.vqgan",
        "AutoencoderKL": "stage1_tokenizer.autoencoder_kl",
        "AutoencoderKLConfig": "stage1_tokenizer.autoencoder_kl",
        "IdentityTokenizer": "stage1_tokenizer.identity",
        "IdentityConfig": "stage1_tokenizer.identity",
        "saved_tokenizer": "stage1_tokenizer.registry",
        "LatentSpec": "stage1_tokenizer.latent_spec",
        "ImageProcessor": "stage1_tokenizer.data.image_processor",
        "open_source": "stage1_tokenizer.data.sources",
        "train_tokenizer": "stage1_tokenizer.train",
        "TokenizerTraining": "stage1_tokenizer.training_config",
        "write_code_cache": "stage1_tokenizer.codes.writer",
    },
)
