"""Weighted k-nearest-neighbour classification."""

from typing import Annotated

import torch
from annotated_types import Gt
from torch.nn.functional import normalize

from orchestrate.evaluation.probe import Features, Probe

_QUERIES_AT_ONCE = 1024


class Knn(Probe):
    """Vote of the k training samples nearest in cosine similarity s, each with weight exp(s / temperature).

    Source: Wu et al. 2018, arXiv:1805.01978, sec. 3.4 (temperature 0.07).
    """

    def __init__(self, *, k: Annotated[int, Gt(0)] = 20, temperature: Annotated[float, Gt(0)] = 0.07) -> None:
        self._k, self._temperature = k, temperature

    @property
    def key(self) -> str:
        """Name the protocol."""
        return f"knn_k{self._k}_cosine_t{self._temperature:g}"

    def score(self, train: Features, val: Features) -> dict[str, float]:
        """Return `top1`; with fewer than k training samples all of them vote."""
        num_classes = int(max(train.labels.max(), val.labels.max())) + 1
        bank, queries = normalize(train.values, dim=1).T.contiguous(), normalize(val.values, dim=1)
        k = min(self._k, len(train.labels))
        correct = 0
        chunks, answers = torch.split(queries, _QUERIES_AT_ONCE), torch.split(val.labels, _QUERIES_AT_ONCE)
        for chunk, labels in zip(chunks, answers, strict=True):
            similarity, neighbour = (chunk @ bank).topk(k, dim=1)
            votes = torch.zeros(len(chunk), num_classes)
            # Less the nearest one's similarity, which scales all votes alike: exp must not overflow.
            weights = ((similarity - similarity[:, :1]) / self._temperature).exp()
            votes.scatter_add_(1, train.labels[neighbour], weights)
            correct += int((votes.argmax(dim=1) == labels).sum())
        return {"top1": correct / len(val.labels)}
