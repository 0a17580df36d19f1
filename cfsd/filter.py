"""Stage filter: keep or reject each row, with a reason.

Off by default: rejecting rows bends the estimate of the divergence, and the facts say by how much.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from cfsd.artifact import Draft
from cfsd.spec import Spec


class FilterSpec(Spec):
    """Which rows of a corpus to reject. Every rule is off unless set."""

    duplicates: bool = Field(False, description="Reject rows whose tokens were seen before")
    min_tokens: PositiveInt | None = Field(None, description="Reject rows with fewer sampled tokens")
    max_tokens: PositiveInt | None = Field(None, description="Reject rows with more sampled tokens")


class Rules:
    """The rules of a spec, with what they remember."""

    def __init__(self, spec: FilterSpec) -> None:
        """Start with nothing seen."""
        self.spec = spec
        self.seen: set[int] = set()

    def reason(self, row: dict[str, Any]) -> str | None:
        """Return why `row` is rejected, or None."""
        sampled = len(row["token_ids"]) - 1
        if self.spec.min_tokens is not None and sampled < self.spec.min_tokens:
            return f"fewer than {self.spec.min_tokens} tokens"
        if self.spec.max_tokens is not None and sampled > self.spec.max_tokens:
            return f"more than {self.spec.max_tokens} tokens"
        return "duplicate" if self.spec.duplicates and self._seen_before(row["token_ids"]) else None

    def _seen_before(self, token_ids: list[int]) -> bool:
        mark = hash(tuple(token_ids))  # 64 bits: among a million rows a false match has odds of 3e-8
        if mark in self.seen:
            return True
        self.seen.add(mark)
        return False


def filter_rows(corpus: Path, spec: FilterSpec, draft: Draft) -> None:
    """Write the accepted rows of `corpus` as a `corpus` table and the others, with reasons, as `rejects`."""
    from cfsd.rows import CORPUS, REJECTS, batches, table_of, write_shard

    rules = Rules(spec)
    reasons: Counter[str] = Counter()
    nats: Counter[str] = Counter()
    for index, batch in enumerate(batches(corpus, "corpus")):
        kept, rejected = [], []
        for row in batch.to_pylist():
            sums = {"tokens": len(row["token_ids"]) - 1, "nats": sum(row["logprobs"][1:]), "rows": 1}
            nats.update({f"all {k}": v for k, v in sums.items()})
            if reason := rules.reason(row):
                reasons[reason] += 1
                rejected.append({**row, "reason": reason})
                continue
            kept.append(row)
            nats.update(sums)
        write_shard(draft.folder, "corpus", index, table_of(CORPUS, kept))
        if rejected:
            table = table_of(REJECTS, [{k: r[k] for k in REJECTS.names} for r in rejected])
            write_shard(draft.folder, "rejects", index, table)
        draft.journal.progress(int(nats["all rows"]), int(nats["all rows"]), "rows")
    draft.facts |= _facts(nats, reasons)


def _facts(nats: Counter[str], reasons: Counter[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {"rows": nats["rows"], "tokens": nats["tokens"], "rejected": dict(reasons)}
    if nats["tokens"]:
        before, after = nats["all nats"] / nats["all tokens"], nats["nats"] / nats["tokens"]
        facts |= {
            "accepted_fraction": nats["rows"] / nats["all rows"],
            "mean_logprob": after,
            "mean_logprob_shift": after - before,
        }
    return facts
