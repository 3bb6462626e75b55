"""Both stages as one object: sampling, saving, loading, the Hub, and metrics of sets of images."""

from training_harness.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "LatentGenerationPipeline": "pipelines.latent_generation",
        "ImagePipelineOutput": "pipelines.latent_generation",
        "ReferenceClassifier": "pipelines.evaluation.reference_classifier",
        "Evaluator": "pipelines.evaluation.evaluator",
        "FeatureExtractor": "pipelines.evaluation.features",
        "frechet_distance": "pipelines.evaluation.frechet",
        "precision_recall": "pipelines.evaluation.manifolds",
    },
)
