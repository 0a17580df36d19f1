"""How far the tuned model's distribution is from the base's, along the probe and along held-out responses.

Source: Shenfeld, Pari, Agrawal 2025, arXiv:2509.04259: the forward KL on the new task predicts forgetting. Differs:
along held-out responses of the target, not along the model's own. B rows, T tokens, N supervised tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.evaluate.stage import load_models, per_token, size_of, write_result
from cfsd.machine import Machine
from cfsd.model.batching import arrange, pad
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import DIVERGENCE, read_rows, table_of

Masks = list[list[bool]] | None  # which tokens of each row count; None: all but the first
CHUNK = 256  # positions whose full distributions are in memory at once


class Divergence(NamedTuple):
    """Sums over a row's counted tokens, in nats."""

    kl: float
    sampled: float
    base_nll: float
    tuned_nll: float
    num_tokens: int


def score_probe(base: Artifact, tuned: Artifact, probe: Artifact, draft: Draft, machine: Machine) -> None:
    """Write the divergence along each probe row as the `divergence` table, and its mean per token as metadata."""
    rows = read_rows(draft.store.path(probe), "corpus", ["row_id", "token_ids"])
    parts = _along(base, tuned, rows, None, draft, machine)
    records: list[dict[str, Any]] = [
        {"row_id": row["row_id"], "count": part.num_tokens, **part._asdict()}
        for row, part in zip(rows, parts, strict=True)
    ]
    records.sort(key=lambda record: record["row_id"])
    kl, sampled = per_token(records, "kl", "sampled")
    metadata = size_of(records) | {"probe_kl": kl, "probe_kl_sampled": sampled}
    figures = {"forgetting/probe_kl": kl, "forgetting/probe_kl_sampled": sampled}
    write_result(draft, "divergence", table_of(DIVERGENCE, records), metadata, figures)


def score_target_divergence(
    base: Artifact, tuned: Artifact, target: Artifact, max_rows: int | None, draft: Draft, machine: Machine
) -> None:
    """Write KL(base || tuned) on each held-out response as the `divergence` table, and its mean as metadata."""
    rows = read_rows(draft.store.path(target), "held_out")[:max_rows]
    parts = _along(base, tuned, rows, [row["supervised"] for row in rows], draft, machine)
    records: list[dict[str, Any]] = [
        {"row_id": row["row_id"], "kl": part.kl, "count": part.num_tokens}
        for row, part in zip(rows, parts, strict=True)
    ]
    (mean,) = per_token(records, "kl")
    metadata = size_of(records) | {"target_divergence": mean}
    figures = {"forgetting/target_divergence": mean}
    write_result(draft, "divergence", pa.Table.from_pylist(records), metadata, figures)


def _along(
    base: Artifact, tuned: Artifact, rows: list[dict[str, Any]], masks: Masks, draft: Draft, machine: Machine
) -> list[Divergence]:
    def progress(done: int) -> None:
        draft.journal.progress(done, len(rows), "rows")

    base_model, tuned_model = load_models([base, tuned], draft, machine)
    token_rows = [row["token_ids"] for row in rows]
    return divergences(base_model, tuned_model, token_rows, machine.micro_batch_tokens, progress, masks)


def divergences(
    base: PreTrainedModel, tuned: PreTrainedModel, rows: list[list[int]], max_tokens: int,
    on_progress: Callable[[int], None], masks: Masks = None,
) -> list[Divergence]:  # fmt: skip
    """Return `divergence` of each row, measured in batches of at most `max_tokens`, padding included."""
    measured: dict[int, Divergence] = {}
    for group in arrange([len(row) for row in rows], max_tokens):
        of_group = [masks[i] for i in group] if masks else None
        measured |= zip(group, divergence(base, tuned, [rows[i] for i in group], of_group), strict=True)
        on_progress(len(measured))
    return [measured[i] for i in range(len(rows))]


@torch.inference_mode()
def divergence(
    base: PreTrainedModel, tuned: PreTrainedModel, rows: list[list[int]], masks: Masks = None
) -> list[Divergence]:
    """Return KL(base || tuned) along each row of `rows`, at every token but the first, or at those of its mask.

    `kl` sums over the whole vocabulary at each position, `sampled` takes the token of the row; on rows
    that the base sampled their expectations are equal.
    """
    token_ids_BT = pad(rows).to(base.device)
    counted_BT = pad(masks or [[True] * len(row) for row in rows], torch.bool)[:, 1:].to(base.device)
    columns = counted_BT.any(0).nonzero()[:, 0]
    models: list[Any] = [base, tuned]
    logits = [model(input_ids=token_ids_BT, use_cache=False, logits_to_keep=columns).logits for model in models]
    base_NV, tuned_NV = (part[counted_BT[:, columns]] for part in logits)
    next_N = token_ids_BT[:, 1:][counted_BT]
    parts = map(_chunk, *(part.split(CHUNK) for part in (base_NV, tuned_NV, next_N)))
    counts = counted_BT.sum(1).tolist()
    sums = [part.sum(0).tolist() for part in torch.cat(list(parts)).double().cpu().split(counts)]
    return [
        Divergence(kl, base_nats - tuned_nats, -base_nats, -tuned_nats, count)
        for (kl, base_nats, tuned_nats), count in zip(sums, counts, strict=True)
    ]


def _chunk(base_NV: Tensor, tuned_NV: Tensor, next_N: Tensor) -> Tensor:
    """Return (N, 3): KL, base log p of the token, tuned log p of the token."""
    base_NV, tuned_NV = base_NV.float().log_softmax(-1), tuned_NV.float().log_softmax(-1)
    kl_N = (base_NV.exp() * (base_NV - tuned_NV)).sum(-1)
    of_next = [logprobs.gather(1, next_N[:, None])[:, 0] for logprobs in (base_NV, tuned_NV)]
    return torch.stack([kl_N, *of_next], dim=-1)
