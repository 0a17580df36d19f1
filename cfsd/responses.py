"""How well a model predicts given responses. B rows, T tokens, V vocabulary."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from cfsd.microbatch import arrange, pad


@torch.inference_mode()
def score_responses(
    model: PreTrainedModel, rows: list[dict[str, Any]], most_tokens: int, on_progress: Callable[[int], None],
    *, per_token: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return per row the summed -log p of its supervised tokens and how many are the model's first choice.

    All of them first choice is the same as: greedy decoding of the prompt writes exactly this response.
    `per_token` adds `token_nll`, the -log p of each supervised token.
    """
    found: dict[int, dict[str, Any]] = {}
    for group in arrange([len(row["token_ids"]) for row in rows], most_tokens):
        token_ids_BT = pad([rows[i]["token_ids"] for i in group]).to(model.device)
        wanted_BT = pad([rows[i]["supervised"] for i in group], torch.bool)[:, 1:].to(model.device)
        columns = wanted_BT.any(0).nonzero()[:, 0]
        output: Any = model(input_ids=token_ids_BT, use_cache=False, logits_to_keep=columns)
        for place, i in enumerate(group):
            logits_NV = output.logits[place][wanted_BT[place, columns]].float()
            next_N = token_ids_BT[place, 1:][wanted_BT[place]]
            nll_N = torch.nn.functional.cross_entropy(logits_NV, next_N, reduction="none")
            found[i] = {
                **{k: rows[i][k] for k in ("row_id", "prompt", "response") if k in rows[i]},
                "nll": nll_N.double().sum().item(),
                "correct": int((logits_NV.argmax(-1) == next_N).sum()),
                "count": len(next_N),
                **({"token_nll": nll_N.tolist()} if per_token else {}),
            }
        on_progress(len(found))
    return [found[i] for i in range(len(rows))]
