"""The Inception Score: confidence of a classifier in each image, and variety of its predictions. It needs no real images.

    IS = exp( mean_x Σ_y p(y|x) log p(y|x) − Σ_y p(y) log p(y) ),     p(y) = mean_x p(y|x)

The images are split at random into ten parts. The score is the mean over the parts, with their standard deviation.
Salimans et al. 2016, arXiv 1606.03498.
"""

import torch

from pipelines.evaluation.feature_files import Rows, iterate_slices, select_rows

PARTS = 10


def inception_score(logits: Rows, seed: int = 0) -> dict[str, float]:
    """Compute `inception_score` and `inception_score_std` from (N, 1008) logits of the Inception network."""
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for positions in order.tensor_split(min(PARTS, len(logits))):
        negative_entropy = torch.zeros((), dtype=torch.float64)  # Σ_x Σ_y p(y|x) log p(y|x)
        marginal = torch.zeros(logits.shape[1], dtype=torch.float64)  # p(y)
        for rows in iterate_slices(select_rows(logits, positions.sort().values)):
            log_p = rows.log_softmax(1)
            negative_entropy += (log_p.exp() * log_p).sum()
            marginal += log_p.exp().sum(0)
        marginal /= len(positions)
        scores.append((negative_entropy / len(positions) - torch.xlogy(marginal, marginal).sum()).exp())
    all_scores = torch.stack(scores)
    return {"inception_score": all_scores.mean().item(), "inception_score_std": all_scores.std(correction=0).item()}
