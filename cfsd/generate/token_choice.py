"""What a token is sampled with: the random numbers of a row, and the model's probabilities or a biased version of them.

B rows, V vocabulary, K likeliest.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfsd.generate.spec import GenerateSpec
from cfsd.model.distribution import Distribution


def uniforms(seed: int, stream: str, row: int, length: int) -> np.ndarray[Any, Any]:
    """Return `length` numbers in [0, 1) that depend on nothing but the arguments.

    Number t of row r does not depend on the rest of the batch; `stream` differs between probe and corpus.
    """
    key = np.frombuffer(hashlib.sha256(f"{stream} {seed}".encode()).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, row])).random(length)


def tail_points(seed: int, stream: str, row: int, length: int, count: int) -> np.ndarray[Any, Any]:
    """Return `count` points in [0, 1] for each of `length` positions, one in each of `count` equal parts.

    They invert the tail's cumulative probabilities: each part gives one sample, which is unbiased for any count and
    varies no more than independent samples do. The numbers are no row's own `uniforms`: texts do not depend on them.
    """
    numbers = uniforms(seed, f"{stream} tail", row, length * count).reshape(length, count)
    return np.asarray((numbers + np.arange(count)) / max(1, count))


def sampled_probs(
    distribution: Distribution, spec: GenerateSpec, barred: Sequence[int] = (), barred_B: Tensor | None = None
) -> Tensor:
    """Return the probabilities, not normalised, that are sampled: the model's own unless `spec` is biased.

    Tokens `barred` cannot be sampled in rows where `barred_B` is true.
    """
    probs_BV = distribution.probs_BV
    if spec.temperature != 1:
        probs_BV = (distribution.logits_BV / spec.temperature).softmax(-1)
    if barred and barred_B is not None and bool(barred_B.any()):
        probs_BV = probs_BV.clone()
        probs_BV[:, list(barred)] = probs_BV[:, list(barred)].masked_fill(barred_B[:, None], 0.0)
    if spec.top_k:
        largest_BK, index_BK = probs_BV.topk(min(spec.top_k, probs_BV.shape[1]))
        probs_BV = torch.zeros_like(probs_BV).scatter_(1, index_BK, largest_BK)
    if spec.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        outside_BV = before_BV >= spec.top_p * sorted_BV.sum(-1, keepdim=True)
        probs_BV = probs_BV.masked_fill(outside_BV.gather(1, order_BV.argsort(-1)), 0.0)
    return probs_BV
