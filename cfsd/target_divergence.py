"""How far the tuned model's law is from the base's where the target asks: on responses, given their prompts.

Source: Shenfeld, Pari, Agrawal 2025, arXiv:2509.04259: the forward KL on the new task predicts forgetting. Differs:
along held-out responses of the target, not along the model's own. `cfsd.divergence` is another measure: on text that
the base wrote unprompted. B rows, T tokens, N supervised tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from cfsd.microbatch import arrange, pad


@torch.inference_mode()
def target_divergence(
    base: PreTrainedModel, tuned: PreTrainedModel, rows: list[dict[str, Any]], most_tokens: int,
    on_progress: Callable[[int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return per row KL(base || tuned) summed over its supervised tokens, the whole vocabulary at each, in nats."""
    found: dict[int, dict[str, Any]] = {}
    for group in arrange([len(row["token_ids"]) for row in rows], most_tokens):
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
