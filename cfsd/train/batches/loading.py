"""What a training reads: the micro-batches of each global batch, one rank's share at a time."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from cfsd.errors import BadInput
from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import BATCHES
from cfsd.train.batches.global_batches import GlobalBatch, plan_batches
from cfsd.train.batches.micro_batches import MicroBatch, micro_batches_of
from cfsd.train.batches.mixture import Mask, MixtureRows
from cfsd.train.batches.stored_distributions import StoredDistributions
from cfsd.train.spec import TrainSpec


class Counts(NamedTuple):
    """Tokens of one global batch: those in each loss, those of rehearsal rows seen for the first time, and all."""

    target: int
    rehearsal: int
    fresh: int
    tokens: int


class Share(NamedTuple):
    """One rank's share of one global batch; counts and views are of the whole batch."""

    micro_batches: list[MicroBatch]
    counts: Counts
    views: Sequence[int]


class Batches(Dataset[Share]):
    """One item is one rank's share of one global batch."""

    def __init__(
        self, rows: MixtureRows, plan: list[GlobalBatch], max_tokens: int,
        distributions: StoredDistributions | None = None, rank: int = 0, world: int = 1,
        of_target: StoredDistributions | None = None,
    ) -> None:  # fmt: skip
        """Cut every global batch of `plan` into micro-batches of at most `max_tokens`."""
        self.rows, self.plan, self.distributions, self.of_target = rows, plan, distributions, of_target
        self.max_tokens, self.rank, self.world = max_tokens, rank, world
        self.counts = _counts(rows, plan)
        self.said: list[str] = []  # what of the rehearsal is other than asked for

    def __len__(self) -> int:
        """Return the number of optimizer steps."""
        return len(self.plan)

    def __getitem__(self, step: int) -> Share:
        """Return this rank's micro-batches of step `step`, as many as every other rank has."""
        batch = self.plan[step]
        rows = [self.rows[i]._replace(corpus_row=i) for i in batch.target]  # they come first in the mixture
        rows += [self.rows[i] for i in batch.rehearsal]
        fresh = [False] * len(batch.target) + [views == 0 for views in batch.views]
        share = micro_batches_of(
            rows, self.max_tokens, fresh=fresh, distributions=self.distributions, of_target=self.of_target,
            rank=self.rank, world=self.world,
        )  # fmt: skip
        return Share(share, self.counts[step], batch.views)

    def metadata(self, steps: int) -> dict[str, Any]:
        """Return what the first `steps` steps read."""
        counts = self.counts[:steps]
        return {
            "steps": steps,
            "target_tokens": sum(count.target for count in counts),
            "rehearsal_tokens": sum(count.rehearsal for count in counts),
            "tokens": sum(count.tokens for count in counts),
            "most_row_views": max((seen + 1 for batch in self.plan[:steps] for seen in batch.views), default=0),
        }


def _shortage(rows: MixtureRows, wanted: int) -> str | None:
    """Return what is to be said where the whole corpus is less than what each step was to rehearse."""
    counts = zip(rows.sources(), rows.supervised_tokens(), strict=True)
    held = [count for source, count in counts if source != "target"]
    if not held or sum(held) + min(held) > wanted:
        return None
    return (
        f"each step rehearses the whole corpus once, {sum(held)} tokens in {len(held)} rows, where "
        f"mix.rehearsal_tokens asks for {wanted}: no step takes a row twice; raise generate.rows for more"
    )


def _counts(rows: MixtureRows, plan: list[GlobalBatch]) -> list[Counts]:
    lengths, supervised = rows.lengths(), rows.supervised_tokens()
    counts = []
    for batch in plan:
        target, rehearsal = ([supervised[i] for i in part] for part in (batch.target, batch.rehearsal))
        fresh = sum(count for count, seen in zip(rehearsal, batch.views, strict=True) if not seen)
        tokens = sum(lengths[i] for i in (*batch.target, *batch.rehearsal))
        counts.append(Counts(sum(target), sum(rehearsal), fresh, tokens))
    return counts


def batches_of(
    store: Store, mixture: Artifact, spec: TrainSpec, max_tokens: int, distributions: StoredDistributions | None = None,
    rank: int = 0, world: int = 1, *, mask: Mask | None = None, of_target: StoredDistributions | None = None,
) -> Batches:  # fmt: skip
    """Return the global batches of the whole training.

    `mask` says which of the target's tokens are learned, `of_target` holds the base's distribution along them.
    Raises BadInput where rows that must be fresh run out, or where a step has none to read the divergence from.
    """
    metadata: dict[str, Any] = mixture.metadata
    asked = json.loads((store.path(mixture) / BATCHES).read_text())
    rows = MixtureRows(store.path(mixture), distributions.corpus if distributions else None, mask)
    wanted = asked["batch_rehearsal_tokens"] if spec.rehearsal.weight else 0
    plan = plan_batches(
        rows.sources(),
        rows.supervised_tokens(),
        target_rows=asked["batch_target_rows"],
        rehearsal_tokens=wanted,
        epochs=spec.epochs,
        seed=asked["seed"],
        refresh=spec.rehearsal.refresh,
    )
    blind = sum(0 not in batch.views for batch in plan)
    if spec.rehearsal.budget and blind:
        raise BadInput(
            f"train.rehearsal.budget reads the divergence on rehearsal rows that were not seen before, but {blind} of "
            f"{len(plan)} steps have none; raise generate.rows about {len(plan) / max(1, len(plan) - blind):.1f}-fold, "
            "or lower mix.rehearsal_tokens or train.epochs"
        )
    made = Batches(rows, plan, max_tokens, distributions, rank, world, of_target)
    if short := _shortage(rows, wanted):
        made.said.append(short)
    if mask:
        learned = sum(rows.supervised_tokens()[: metadata["target_rows"]])
        made.said.append(f"{learned / metadata['target_tokens']:.0%} of the target's tokens are learned")
    return made
