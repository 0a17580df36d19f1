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

from cfsd.evaluate.stage import Result, measure, per_token, size_of
from cfsd.machine import Machine
from cfsd.model.batching import arrange, pad
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import DIVERGENCE, read_rows, table_of

CHUNK = 256  # positions whose full distributions are in memory at once


def score_probe(base: Artifact, tuned: Artifact, probe: Artifact, draft: Draft, machine: Machine) -> None:
    """Write the divergence along each probe row as the `divergence` table, and its mean per token as metadata."""
    rows = read_rows(draft.store.path(probe), "corpus", ["row_id", "token_ids"])

    def along_probe(base_model: PreTrainedModel, tuned_model: PreTrainedModel) -> Result:
        token_rows = [row["token_ids"] for row in rows]
        parts = divergences(base_model, tuned_model, token_rows, machine.micro_batch_tokens, _progress(draft, rows))
        records: list[dict[str, Any]] = [
            {"row_id": row["row_id"], "count": part.num_tokens, **part._asdict()}
            for row, part in zip(rows, parts, strict=True)
        ]
        records.sort(key=lambda record: record["row_id"])
        kl, sampled = per_token(records, "kl", "sampled")
        metadata = size_of(records) | {"probe_kl": kl, "probe_kl_sampled": sampled}
        figures = {"forgetting/probe_kl": kl, "forgetting/probe_kl_sampled": sampled}
        return Result("divergence", table_of(DIVERGENCE, records), metadata, figures)

    measure(along_probe, [base, tuned], draft, machine)


def score_target_divergence(
    base: Artifact, tuned: Artifact, target: Artifact, max_rows: int | None, draft: Draft, machine: Machine
) -> None:
    """Write KL(base || tuned) on each held-out response as the `divergence` table, and its mean as metadata."""
    rows = read_rows(draft.store.path(target), "held_out")[:max_rows]

    def along_responses(base_model: PreTrainedModel, tuned_model: PreTrainedModel) -> Result:
        budget = machine.micro_batch_tokens
        records = target_divergence(base_model, tuned_model, rows, budget, _progress(draft, rows))
        (mean,) = per_token(records, "kl")
        metadata = size_of(records) | {"target_divergence": mean}
        return Result("divergence", pa.Table.from_pylist(records), metadata, {"forgetting/target_divergence": mean})

    measure(along_responses, [base, tuned], draft, machine)


def _progress(draft: Draft, rows: list[dict[str, Any]]) -> Callable[[int], None]:
    return lambda done: draft.journal.progress(done, len(rows), "rows")


@torch.inference_mode()
def target_divergence(
    base: PreTrainedModel, tuned: PreTrainedModel, rows: list[dict[str, Any]], max_tokens: int,
    on_progress: Callable[[int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return per row KL(base || tuned) summed over its supervised tokens, the whole vocabulary at each, in nats."""
    records: dict[int, dict[str, Any]] = {}
    for group in arrange([len(row["token_ids"]) for row in rows], max_tokens):
        token_ids_BT = pad([rows[i]["token_ids"] for i in group]).to(base.device)
        supervised_BT = pad([rows[i]["supervised"] for i in group], torch.bool)[:, 1:].to(base.device)
        columns = supervised_BT.any(0).nonzero()[:, 0]
        models: list[Any] = [base, tuned]
        logits = [model(input_ids=token_ids_BT, use_cache=False, logits_to_keep=columns).logits for model in models]
        for place, i in enumerate(group):
            mask_N = supervised_BT[place, columns]
            kl_N = _kl(*(part[place][mask_N].float().log_softmax(-1) for part in logits))
            records[i] = {"row_id": rows[i]["row_id"], "kl": kl_N.double().sum().item(), "count": len(kl_N)}
        on_progress(len(records))
    return [records[i] for i in range(len(rows))]


def _kl(base_NV: Tensor, tuned_NV: Tensor) -> Tensor:
    """Return KL(base || tuned) at each position, from log-probabilities."""
    return (base_NV.exp() * (base_NV - tuned_NV)).sum(-1)


class Divergence(NamedTuple):
    """Sums over a row's predicted tokens, in nats."""

    kl: float
    sampled: float
    base_nll: float
    tuned_nll: float
    num_tokens: int


@torch.inference_mode()
def divergence(base: PreTrainedModel, tuned: PreTrainedModel, rows: list[list[int]]) -> list[Divergence]:
    """Return KL(base || tuned) along each row of `rows`, at every token but the first.

    `kl` sums over the whole vocabulary at each position, `sampled` takes the token of the row; on rows
    that the base sampled their expectations are equal.
    """
    token_ids_BT = pad(rows).to(base.device)
    models: list[Any] = [base, tuned]
    logits = [model(input_ids=token_ids_BT, use_cache=False).logits for model in models]
    lengths_B = torch.tensor([len(row) for row in rows], device=base.device)
    real_BT = torch.arange(1, token_ids_BT.shape[1], device=base.device) < lengths_B[:, None]
    next_N = token_ids_BT[:, 1:][real_BT]
    base_NV, tuned_NV = (part[:, :-1][real_BT] for part in logits)
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
    """Return `divergence` of each row, measured in batches of at most `max_tokens`, padding included."""
    measured: dict[int, Divergence] = {}
    for group in arrange([len(row) for row in rows], max_tokens):
        measured |= zip(group, divergence(base, tuned, [rows[i] for i in group]), strict=True)
        on_progress(len(measured))
    return [measured[i] for i in range(len(rows))]


def _chunk(base_NV: Tensor, tuned_NV: Tensor, next_N: Tensor) -> Tensor:
    """Return (N, 3): KL, base log p of the token, tuned log p of the token."""
    base_NV, tuned_NV = base_NV.float().log_softmax(-1), tuned_NV.float().log_softmax(-1)
    of_next = [logprobs.gather(1, next_N[:, None])[:, 0] for logprobs in (base_NV, tuned_NV)]
    return torch.stack([_kl(base_NV, tuned_NV), *of_next], dim=-1)
