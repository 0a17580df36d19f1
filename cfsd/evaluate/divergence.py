"""How far the tuned model's law is from the base's where the target asks: on responses, given their prompts.

Source: Shenfeld, Pari, Agrawal 2025, arXiv:2509.04259: the forward KL on the new task predicts forgetting. Differs:
along held-out responses of the target, not along the model's own. B rows, T tokens, N supervised tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.model.batching import arrange, pad


@torch.inference_mode()
def target_divergence(
    base: PreTrainedModel, tuned: PreTrainedModel, rows: list[dict[str, Any]], max_tokens: int,
    on_progress: Callable[[int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return per row KL(base || tuned) summed over its supervised tokens, the whole vocabulary at each, in nats."""
    found: dict[int, dict[str, Any]] = {}
    for group in arrange([len(row["token_ids"]) for row in rows], max_tokens):
        token_ids_BT = pad([rows[i]["token_ids"] for i in group]).to(base.device)
        wanted_BT = pad([rows[i]["supervised"] for i in group], torch.bool)[:, 1:].to(base.device)
        columns = wanted_BT.any(0).nonzero()[:, 0]
        models: list[Any] = [base, tuned]
        logits = [model(input_ids=token_ids_BT, use_cache=False, logits_to_keep=columns).logits for model in models]
        for place, i in enumerate(group):
            here = wanted_BT[place, columns]
            base_NV, tuned_NV = (part[place][here].float().log_softmax(-1) for part in logits)
            kl_N = (base_NV.exp() * (base_NV - tuned_NV)).sum(-1)
            found[i] = {"row_id": rows[i]["row_id"], "kl": kl_N.double().sum().item(), "count": len(kl_N)}
        on_progress(len(found))
    return [found[i] for i in range(len(rows))]


CHUNK = 256  # positions whose full distributions exist at once


class Divergence(NamedTuple):
    """Sums over a row's predicted tokens, in nats."""

    kl: float
    sampled: float
    base_nll: float
    tuned_nll: float
    num_tokens: int


@torch.inference_mode()
def divergence(base: PreTrainedModel, tuned: PreTrainedModel, rows: list[list[int]]) -> list[Divergence]:
    """Return KL(base || tuned) along each row of `rows`, given the tokens before; start tokens predict only.

    `kl` sums over the whole vocabulary at each position, `sampled` takes the token that is there; on rows
    that the base sampled their expectations are equal.
    """
    token_ids_BT = pad(rows).to(base.device)
    states = [_logits(model, token_ids_BT) for model in (base, tuned)]
    lengths_B = torch.tensor([len(row) for row in rows], device=base.device)
    real_BT = torch.arange(1, token_ids_BT.shape[1], device=base.device) < lengths_B[:, None]
    next_N = token_ids_BT[:, 1:][real_BT]
    base_NV, tuned_NV = (state[:, :-1][real_BT] for state in states)
    parts = [
        _chunk(base_NV[i : i + CHUNK], tuned_NV[i : i + CHUNK], next_N[i : i + CHUNK])
        for i in range(0, len(next_N), CHUNK)
    ]
    per_token_N3 = torch.cat(parts).double().cpu()
    sums = [part.sum(0).tolist() for part in per_token_N3.split((lengths_B - 1).tolist())]
    return [
        Divergence(kl, base_nats - tuned_nats, -base_nats, -tuned_nats, len(row) - 1)
        for (kl, base_nats, tuned_nats), row in zip(sums, rows, strict=True)
    ]


def divergences(
    base: PreTrainedModel, tuned: PreTrainedModel, rows: list[list[int]], max_tokens: int,
    on_progress: Callable[[int], None],
) -> list[Divergence]:  # fmt: skip
    """Return `divergence` of each row, measured in batches of at most `max_tokens`, padding counted."""
    found: dict[int, Divergence] = {}
    for group in arrange([len(row) for row in rows], max_tokens):
        found |= zip(group, divergence(base, tuned, [rows[i] for i in group]), strict=True)
        on_progress(len(found))
    return [found[i] for i in range(len(rows))]


def _logits(model: PreTrainedModel, token_ids_BT: Tensor) -> Tensor:
    output: Any = model(input_ids=token_ids_BT, use_cache=False)
    logits: Tensor = output.logits
    return logits


def _chunk(base_NV: Tensor, tuned_NV: Tensor, next_N: Tensor) -> Tensor:
    """Return (N, 3): KL, base log p of the token, tuned log p of the token."""
    base_NV, tuned_NV = base_NV.float().log_softmax(-1), tuned_NV.float().log_softmax(-1)
    kl_N = (base_NV.exp() * (base_NV - tuned_NV)).sum(-1)
    chosen = [logprobs.gather(1, next_N[:, None])[:, 0] for logprobs in (base_NV, tuned_NV)]
    return torch.stack([kl_N, *chosen], dim=-1)
