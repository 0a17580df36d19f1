"""How far the tuned model's distribution is from the base's, along the probe and along held-out responses.

Source: Shenfeld, Pari, Agrawal 2025, arXiv:2509.04259: the forward KL on the new task predicts forgetting. Differs:
along held-out responses of the target, not along the model's own. B rows, T tokens, N supervised tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pydantic import JsonValue
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.errors import BadInput
from cfsd.evaluate.movement import Chunk, Movement
from cfsd.evaluate.spec import BLOCK, CHUNK
from cfsd.evaluate.stage import load_models, per_token, size_of, write_result
from cfsd.machine import Machine
from cfsd.model.batching import arrange
from cfsd.model.context import context_tokens
from cfsd.model.head import head_of
from cfsd.model.hidden_states import Batch, States, states
from cfsd.model.loading import load_tokenizer
from cfsd.statistics.bins import quantile_edges
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import DIVERGENCE, MOVED_POSITIONS, MOVED_TOKENS, read_rows, table_of, write_shard

Masks = list[list[bool]] | None  # which tokens of each row count; None: all but the first
Counted = tuple[list[int], list[bool]]  # a row and which of its tokens count
DECILES = 10
Look = Callable[[Sequence[int], Sequence[int], Chunk], None]  # gets rows and places of a chunk's positions


class Divergence(NamedTuple):
    """Sums over a row's counted tokens, in nats."""

    kl: float
    sampled: float
    base_nll: float
    tuned_nll: float
    num_tokens: int


def score_probe(base: Artifact, tuned: Artifact, probe: Artifact, draft: Draft, machine: Machine) -> None:
    """Write the divergence along each probe row and where it came from; its mean per token as metadata."""
    kl, sampled, reverse = score_along(base, tuned, probe, draft, machine)
    draft.metadata |= {"probe_kl": kl, "probe_kl_sampled": sampled, "reverse_kl": reverse}
    draft.journal.metrics(0, {f"forgetting/{name}": value for name, value in
                              (("probe_kl", kl), ("probe_kl_sampled", sampled), ("reverse_kl", reverse))})  # fmt: skip


def score_prompts(
    base: Artifact, tuned: Artifact, answers: Artifact, name: str, draft: Draft, machine: Machine
) -> None:
    """Write the divergence along the base's answers to the user's prompts, as `score_probe` does along the probe.

    `name` is that of the prompts, which another set of the same rows does not share.
    """
    kl, _, reverse = score_along(base, tuned, answers, draft, machine)
    draft.metadata |= {"prompts": name, "kl": kl, "reverse_kl": reverse, **_thoughts(answers)}
    draft.journal.metrics(0, {f"forgetting/{name}/prompts_kl": kl, f"forgetting/{name}/prompts_reverse_kl": reverse})


def score_chats(base: Artifact, tuned: Artifact, chats: Artifact, draft: Draft, machine: Machine) -> None:
    """Write the divergence along the answers of chats, as `score_probe` does along the probe.

    That along the users' turns is the table `user_turns`, a row per chat; a chat without an answer is in that alone.
    """
    answers = {row["row_id"]: row["answer"] for row in read_rows(draft.store.path(chats), "turns")}
    kl, _, reverse = score_along(base, tuned, chats, draft, machine, answers)
    (of_users,) = per_token(read_rows(draft.folder, "user_turns"), "kl")
    figures = {"chat_kl": kl, "chat_reverse_kl": reverse, "chat_user_kl": of_users}
    known = {name: value for name, value in figures.items() if not math.isnan(value)}
    draft.metadata |= known | {"unanswered": chats.metadata["unanswered"], **_thoughts(chats)}
    draft.journal.metrics(0, {f"forgetting/{name}": value for name, value in known.items()})


def _thoughts(sampled: Artifact) -> dict[str, JsonValue]:
    """Return in how many rows of a model that thinks it does so, and in how many without an end; else nothing."""
    return {name: sampled.metadata[name] for name in ("reasoning", "unfinished") if name in sampled.metadata}


def counted_rows(sampled: Path) -> list[Counted]:
    """Return the rows in which there is something to measure, with the mask of these tokens: of chats, the answers'."""
    answers = {row["row_id"]: row["answer"] for row in read_rows(sampled, "turns")}
    counted = []
    for row in read_rows(sampled, "corpus", ["row_id", "token_ids", "logprobs"]):
        begin = answers.get(row["row_id"], 0)
        mask = [logprob is not None and place >= begin for place, logprob in enumerate(row["logprobs"])]
        if any(mask):
            counted.append((row["token_ids"], mask))
    return counted


def score_along(
    base: Artifact, tuned: Artifact, sampled: Artifact, draft: Draft, machine: Machine,
    answers: Mapping[int, int] | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """Return KL(base || tuned), its sampled form and KL(tuned || base) along tokens that the base sampled, per token.

    Writes `divergence`, a row per sequence, and `moved_positions` and `moved_tokens`, what moved most. The deciles of
    the base's entropy at these tokens are metadata, as edges in nats. With `answers`, where the answer of each row
    begins, all of this is of answers, and the divergence along the users' turns is `user_turns`; nan without answers.
    """
    rows = read_rows(draft.store.path(sampled), "corpus", ["row_id", "token_ids", "logprobs"])
    rows.sort(key=lambda row: row["row_id"])
    masks = [[logprob is not None for logprob in row["logprobs"]] for row in rows]
    begin = [answers[row["row_id"]] if answers else 0 for row in rows]
    movement = Movement([row["token_ids"] for row in rows], begin)
    nats = _along(base, tuned, rows, masks, draft, machine, movement)
    firsts = [sum(mask[:place]) for mask, place in zip(masks, begin, strict=True)]  # of each row's counted tokens
    if answers:
        turns = [_of_user(row, part_N3[:first]) for row, part_N3, first in zip(rows, nats, firsts, strict=True)]
        write_shard(draft.folder, "user_turns", 0, pa.Table.from_pylist(turns))
    records = [
        _record(row, _sums(part_N3[first:]), values)
        for row, part_N3, first, values in zip(rows, nats, firsts, movement.by_row(), strict=True)
        if first < len(part_N3)
    ]
    return _write_along(records, movement, [row["row_id"] for row in rows], base, draft)


def _write_along(
    records: list[dict[str, Any]], movement: Movement, ids: list[int], base: Artifact, draft: Draft
) -> tuple[float, float, float]:
    metadata: dict[str, Any] = size_of(records)
    if records:
        tokenizer = load_tokenizer(draft.store.path(base))
        write_shard(draft.folder, "moved_positions", 0, table_of(MOVED_POSITIONS, movement.positions(tokenizer, ids)))
        write_shard(draft.folder, "moved_tokens", 0, table_of(MOVED_TOKENS, movement.tokens(tokenizer)))
        entropies = np.concatenate([record["token_entropy"] for record in records])
        metadata["entropy_edges"] = quantile_edges(entropies, DECILES).tolist()
    write_result(draft, "divergence", table_of(DIVERGENCE, records), metadata, {})
    kl, drawn, reverse = per_token(records, "kl", "sampled", "reverse_kl") if records else (math.nan,) * 3
    return kl, drawn, reverse


def _of_user(row: dict[str, Any], part_N3: Tensor) -> dict[str, Any]:
    return {"row_id": row["row_id"], "kl": _sums(part_N3).kl, "count": len(part_N3)}


def _record(row: dict[str, Any], part: "Divergence", values_T3: np.ndarray[Any, Any]) -> dict[str, Any]:
    kl_T, reverse_T, entropy_T = values_T3.T
    of_tokens = {"reverse_kl": float(reverse_T.sum(dtype=np.float64)), "token_kl": kl_T, "token_entropy": entropy_T}
    return {"row_id": row["row_id"], "count": part.num_tokens} | part._asdict() | of_tokens


def score_target_divergence(
    base: Artifact, tuned: Artifact, target: Artifact, max_rows: int | None, draft: Draft, machine: Machine
) -> None:
    """Write KL(base || tuned) on each held-out response as the `divergence` table, and its mean as metadata."""
    rows = read_rows(draft.store.path(target), "held_out")[:max_rows]
    parts = map(_sums, _along(base, tuned, rows, [row["supervised"] for row in rows], draft, machine))
    records: list[dict[str, Any]] = [
        {"row_id": row["row_id"], "kl": part.kl, "count": part.num_tokens}
        for row, part in zip(rows, parts, strict=True)
    ]
    (mean,) = per_token(records, "kl")
    metadata = size_of(records) | {"target_divergence": mean}
    figures = {"forgetting/target_divergence": mean}
    write_result(draft, "divergence", pa.Table.from_pylist(records), metadata, figures)


def _along(
    base: Artifact, tuned: Artifact, rows: list[dict[str, Any]], masks: Masks, draft: Draft, machine: Machine,
    movement: Movement | None = None,
) -> list[Tensor]:  # fmt: skip
    """Return `token_nats` of each row; one model after the other is loaded, where memory is too small for both."""
    token_rows = [row["token_ids"] for row in rows]
    check_fit(token_rows, {"the base": base, "the tuned model": tuned})

    def progress(done: int) -> None:
        draft.journal.progress(done, 2 * len(rows), "rows of base and tuned model")

    (base_model,) = load_models([base], draft, machine)
    predicted = BasePredictions(base_model, token_rows, machine.micro_batch_tokens, masks)
    del base_model  # it is let go where memory is small
    predicted.keep(progress)
    (tuned_model,) = load_models([tuned], draft, machine)
    return predicted.token_nats(tuned_model, lambda done: progress(len(rows) + done), movement)


def check_fit(rows: Sequence[Sequence[int]], models: dict[str, Artifact]) -> None:
    """Raise BadInput when a row has more tokens than one of the models, by what they are called, attends to."""
    longest = max(map(len, rows))
    for name, model in models.items():
        context = context_tokens(model)
        if longest > context:
            raise BadInput(
                f"a row of {longest} tokens does not fit {name}, which attends to {context} tokens; give "
                "shorter prompts, or a smaller `length` in probe.modes"
            )


def divergence(
    base: PreTrainedModel, tuned: PreTrainedModel, rows: list[list[int]], masks: Masks = None
) -> list[Divergence]:
    """Return KL(base || tuned) along each row of `rows`, at every token but the first, or at those of its mask.

    `kl` sums over the whole vocabulary at each position, `sampled` takes the token of the row; on rows
    that the base sampled their expectations are equal.
    """
    return BasePredictions(base, rows, sum(map(len, rows)) * len(rows), masks).divergences(tuned)


class BasePredictions:
    """What the base predicts along rows: models are measured against it one after another.

    Batches are of at most `max_tokens`, padding included. Both models read the same batches by the same path, so that
    equal weights are at 0 to the last bit.
    """

    def __init__(self, base: PreTrainedModel, rows: Sequence[list[int]], max_tokens: int, masks: Masks = None) -> None:
        """Take the tokens of `rows` that count: all but the first, or those of `masks`."""
        self.groups = [*arrange([len(row) for row in rows], max_tokens)]
        self.batches = [Batch.of([rows[i] for i in of], masks and [masks[i] for i in of]) for of in self.groups]
        self.head_of, self.base = head_of(base), base
        self.kept: list[States] = []

    def keep(self, on_progress: Callable[[int], None] = lambda done: None) -> None:
        """Read the rows now and let go of the base, which then need not stay in memory beside a tuned model.

        Only its head stays, and a hidden state per token that counts. Nothing changes where the output is no linear
        layer: whole distributions would have to be kept.
        """
        head, done = self.head_of(self.base), 0
        if head is None:
            return
        for batch in self.batches:
            self.kept.append(states(self.base, batch, self.head_of).to("cpu"))
            on_progress(done := done + len(batch.token_ids_BT))
        del self.base

    def divergences(
        self, tuned: PreTrainedModel, on_progress: Callable[[int], None] = lambda done: None
    ) -> list[Divergence]:
        """Return the divergence of `tuned` along each row."""
        return [*map(_sums, self.token_nats(tuned, on_progress))]

    @torch.inference_mode()
    def token_nats(
        self, tuned: PreTrainedModel, on_progress: Callable[[int], None] = lambda done: None,
        movement: Movement | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Return of each row, at its counted tokens, N x 3: the divergence, and log p of the token by base and tuned.

        `movement` takes in every position.
        """
        measured: dict[int, Tensor] = {}
        head = head_of(tuned)
        for place, (group, batch) in enumerate(zip(self.groups, self.batches, strict=True)):
            base = self.kept[place] if self.kept else states(self.base, batch, self.head_of)
            look = partial(_place, group, movement) if movement else None
            nats_N3 = _compared(base, states(tuned, batch, head), batch, look)
            measured |= zip(group, nats_N3.split(batch.counts()), strict=True)
            on_progress(len(measured))
        return [measured[i] for i in range(len(measured))]


def _compared(base: States, tuned: States, batch: Batch, look: Look | None) -> Tensor:
    """Return N x 3 of a batch; `look` sees the positions, chunk by chunk in order.

    Logits are made of BLOCK tokens at a time: a product of fewer would read the head's weights more often.
    """
    device = tuned.hidden_ND.device
    places_N2, next_N = batch.places_N2(), batch.next_N().to(device)
    parts = [torch.zeros(0, 3, device=device)]
    for first in range(0, len(next_N), BLOCK):
        block = slice(first, first + BLOCK)
        parts += _of_block(base.logits(block, device), tuned.logits(block, device), next_N[block],
                           places_N2[block], look)  # fmt: skip
    return torch.cat(parts).double().cpu()


def _of_block(
    base_NV: Tensor, tuned_NV: Tensor, next_N: Tensor, places_N2: Tensor, look: Look | None
) -> Iterator[Tensor]:  # fmt: skip
    for base_CV, tuned_CV, next_C, places_C2 in zip(
        *(part.split(CHUNK) for part in (base_NV, tuned_NV, next_N, places_N2)), strict=True
    ):
        chunk = _chunk(base_CV, tuned_CV)
        of_next = [logprobs.gather(1, next_C[:, None])[:, 0] for logprobs in (chunk.base_NV, chunk.tuned_NV)]
        if look:
            look(places_C2[:, 0].tolist(), (places_C2[:, 1] + 1).tolist(), chunk)
        yield torch.stack([chunk.kl_N, *of_next], dim=-1)


def _place(group: list[int], movement: Movement, row_N: Sequence[int], place_N: Sequence[int], chunk: Chunk) -> None:
    movement.add([group[row] for row in row_N], place_N, chunk)


def _sums(nats_N3: Tensor) -> Divergence:
    kl, base_nats, tuned_nats = nats_N3.sum(0).tolist()
    return Divergence(kl, base_nats - tuned_nats, -base_nats, -tuned_nats, len(nats_N3))


def _chunk(base_NV: Tensor, tuned_NV: Tensor) -> Chunk:
    """Return the distributions of two rows of logits, and their divergence."""
    base_NV, tuned_NV = base_NV.float().log_softmax(-1), tuned_NV.float().log_softmax(-1)
    gap_NV, probs_NV = base_NV - tuned_NV, base_NV.exp()
    terms_NV = probs_NV * gap_NV
    return Chunk(base_NV, tuned_NV, gap_NV, probs_NV, terms_NV, terms_NV.sum(-1))
