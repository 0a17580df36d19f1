"""Where a model moved from its base: by position, by the base's entropy, and on which tokens, from stored tables."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cfsd.report.run_record import RunRecord
from cfsd.report.scores import table
from cfsd.report.summary import Summary
from cfsd.stages import CHAT, PROBE
from cfsd.statistics.bins import Bin, bins_of, doubling_edges
from cfsd.store.artifact import Artifact, Store

POSITIONS, TOKENS = "moved_positions", "moved_tokens"


class Moved(NamedTuple):
    """What one section of the page shows: along what was measured, and per variant its bins and what moved most."""

    name: str  # the probe, chat, or the name of prompts
    bins: dict[str, dict[str, list[dict[str, Any]]]]  # variant -> by_position, by_entropy
    positions: dict[str, list[dict[str, Any]]]
    tokens: dict[str, list[dict[str, Any]]]

    def is_on_one(self) -> bool:
        """Say whether all variants were measured on the same positions, so that they have the same deciles."""
        return len({tuple((b["low"], b["tokens"]) for b in own["by_entropy"]) for own in self.bins.values()}) == 1


def bins_along(store: Store, scores: Artifact | None) -> dict[str, list[dict[str, Any]]] | None:
    """Return the divergence by position in the row and by decile of the base's entropy; None where not measured.

    Positions count from the first token that was measured. Each bin: `low`, `high` (positions, or nats), `tokens`, its
    `share` of the whole divergence, and `kl`, a figure per token.
    """
    if scores is None or "entropy_edges" not in scores.metadata:
        return None
    rows = table(store, scores, "divergence")
    kl, entropy = (rows[name].tolist() for name in ("token_kl", "token_entropy"))
    places = [np.arange(1, len(own) + 1) for own in kl]
    edges: Any = scores.metadata["entropy_edges"]
    longest = max(map(len, kl))
    by_position = bins_of(kl, places, doubling_edges(longest))
    by_position = [part._replace(high=min(part.high - 1, longest)) for part in by_position]  # its own last position
    return {"by_position": _as_json(by_position), "by_entropy": _as_json(bins_of(kl, entropy, edges))}


def _as_json(bins: Iterable[Bin]) -> list[dict[str, Any]]:
    return [
        {"low": b.low, "high": b.high, "tokens": b.tokens, "share": b.share, "kl": kl.model_dump()}
        for b, kl in ((b, b.figure.within(0, math.inf)) for b in bins)
    ]


def sections_of(store: Store, run_records: Sequence[RunRecord], summaries: Sequence[Summary]) -> list[Moved]:
    """Return what the page shows of each mode of the probe; nothing where nothing was measured."""
    found: dict[str, Moved] = {}
    for run_record, summary in zip(run_records, summaries, strict=True):
        measured = {PROBE: run_record.after.probe, CHAT: run_record.after.chat} | run_record.after.prompts
        along = {CHAT: summary.chats or {}} | summary.prompts
        binned = {PROBE: summary.moved} | {name: own.get("moved") for name, own in along.items()}
        for name, scores in measured.items():
            if scores is not None and (bins := binned.get(name)):
                section = found.setdefault(name, Moved(name, {}, {}, {}))
                section.bins[summary.name] = bins
                section.positions[summary.name] = _rows(store, scores, POSITIONS)
                section.tokens[summary.name] = _rows(store, scores, TOKENS)
    return list(found.values())


def _rows(store: Store, scores: Artifact, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table(store, scores, name).to_dict("records")
    return [row | {"risen": row["tuned_p"] > row["base_p"]} for row in rows] if name == TOKENS else rows
