"""Metrics of sets of images: features → feature files → distances between two sets → one report."""

from training_harness.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FeatureExtractor": "pipelines.evaluation.features",
        "ImageFeatures": "pipelines.evaluation.features",
        "feature_extractor": "pipelines.evaluation.features",
        "frechet_distance": "pipelines.evaluation.frechet",
        "kernel_distance": "pipelines.evaluation.kernel_distance",
        "precision_recall": "pipelines.evaluation.manifolds",
        "density_coverage": "pipelines.evaluation.manifolds",
        "Evaluator": "pipelines.evaluation.evaluator",
    },
)
