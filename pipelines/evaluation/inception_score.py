"""The Inception Score: how sure a classifier is of each image, and how varied its verdicts are. It looks at no real image.

    IS = exp( mean_x Σ_y p(y|x) log p(y|x) − Σ_y p(y) log p(y) ),     p(y) = mean_x p(y|x)

in ten parts drawn at random, whose mean and standard deviation are given. Salimans et al. 2016, arXiv 1606.03498.
"""

import torch

from pipelines.evaluation.feature_files import Rows, chosen, iterate_slices

PARTS = 10


def inception_score(logits: Rows, seed: int = 0) -> dict[str, float]:
    """`inception_score` and `inception_score_std` of (N, 1008) logits of the Inception network."""
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for positions in order.tensor_split(min(PARTS, len(logits))):
        sharpness, marginal = torch.zeros((), dtype=torch.float64), torch.zeros(logits.shape[1], dtype=torch.float64)
        for part in iterate_slices(chosen(logits, positions.sort().values)):
            log_p = part.log_softmax(1)
            sharpness += (log_p.exp() * log_p).sum()
            marginal += log_p.exp().sum(0)
        marginal /= len(positions)
        scores.append((sharpness / len(positions) - torch.xlogy(marginal, marginal).sum()).exp())
    found = torch.stack(scores)
    return {"inception_score": found.mean().item(), "inception_score_std": found.std(correction=0).item()}
