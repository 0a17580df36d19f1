"""Draw sequences from a causal language model, exactly by its own law. B rows, V vocabulary."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cfsd.errors import NotFinite
from cfsd.generate import GenerateSpec

COMPACT_BELOW = 0.75  # rows that ended are carried along until this share is left: compacting copies the cache


class Sample(NamedTuple):
    """One sequence: the start token and what followed, and log p* of each token that followed, in nats."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


def uniforms(seed: int, stream: str, row: int, length: int) -> np.ndarray[Any, Any]:
    """Return `length` numbers in [0, 1) that depend on nothing but the arguments.

    Number t of row r is the same whatever else is sampled beside it; `stream` keeps probe and corpus apart.
    """
    key = np.frombuffer(hashlib.sha256(f"{stream} {seed}".encode()).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, row])).random(length)


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    start: int,
    ends: Sequence[int],
    law: GenerateSpec,
    rows: Sequence[int],
    *,
    stream: str,
    where: str = "",
    on_step: Callable[[int], None] = lambda step: None,
) -> list[Sample]:
    """Return one sequence per entry of `rows`, each from `start` alone, until an end token or `law.length`.

    Raises NotFinite naming `where` when the model gives NaN.
    """
    device = model.device
    drawn = np.stack([uniforms(law.seed or 0, stream, row, law.length) for row in rows])
    uniform_BT = torch.from_numpy(drawn).to(device)
    samples = [Sample([start], [], "length") for _ in rows]
    alive = torch.arange(len(rows), device=device)  # which sample each row of the batch still writes
    last_B = torch.full((len(rows),), start, device=device)
    ended_B = torch.zeros(len(rows), dtype=torch.bool, device=device)
    end_E = torch.tensor(list(ends) or [-1], device=device)
    cache = DynamicCache(config=model.config)
    for step in range(law.length):
        output = model(input_ids=last_B[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        logprobs_BV = output.logits[:, -1].float().log_softmax(-1)
        if not bool(torch.isfinite(logprobs_BV.amax(-1)).all()):
            raise NotFinite(f"the base model's logits are not finite at token {step} of {where or 'the batch'}")
        last_B = draw(logprobs_BV, uniform_BT[alive, step], law)
        chosen_B = logprobs_BV.gather(1, last_B[:, None])[:, 0]
        _append(samples, alive, ended_B, last_B, chosen_B)
        ended_B = ended_B | torch.isin(last_B, end_E)
        on_step(step + 1)
        if bool(ended_B.all()):
            break
        left = (~ended_B).nonzero()[:, 0]
        if len(left) < COMPACT_BELOW * len(alive):
            cache.batch_select_indices(left)
            alive, last_B, ended_B = alive[left], last_B[left], ended_B[left]
    stops = set(ends)
    return [s._replace(finish_reason="eos") if s.logprobs and s.token_ids[-1] in stops else s for s in samples]


def _append(samples: list[Sample], alive: Tensor, ended_B: Tensor, tokens_B: Tensor, logprobs_B: Tensor) -> None:
    state = zip(alive.tolist(), ended_B.tolist(), tokens_B.tolist(), logprobs_B.tolist(), strict=True)
    for index, ended, token, logprob in state:
        if not ended:
            samples[index].token_ids.append(token)
            samples[index].logprobs.append(logprob)


def draw(logprobs_BV: Tensor, uniform_B: Tensor, law: GenerateSpec) -> Tensor:
    """Return one token per row by inverting the cumulative sum at `uniform_B`.

    The sum is in float64: in float32 its error, about 1e-6 over 50,000 tokens, would swallow rare tokens.
    """
    cumulative_BV = truncated(logprobs_BV, law).double().cumsum(-1)
    point_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    token_B = torch.searchsorted(cumulative_BV, point_B1, right=True)[:, 0]
    return token_B.clamp(max=logprobs_BV.shape[1] - 1)


def truncated(logprobs_BV: Tensor, law: GenerateSpec) -> Tensor:
    """Return the probabilities, not normalised, that are sampled: the model's own unless `law` is biased."""
    if not law.biases():
        return logprobs_BV.exp()
    probs_BV = (logprobs_BV / law.temperature).softmax(-1)
    if law.top_k:
        kept_BK, index_BK = probs_BV.topk(min(law.top_k, probs_BV.shape[1]))
        probs_BV = torch.zeros_like(probs_BV).scatter_(1, index_BK, kept_BK)
    if law.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        outside_BV = before_BV >= law.top_p * sorted_BV.sum(-1, keepdim=True)
        probs_BV = probs_BV.masked_fill(outside_BV.gather(1, order_BV.argsort(-1)), 0.0)
    return probs_BV
