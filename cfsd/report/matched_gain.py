"""What swept variants lost at equal gain, from the score tables of a comparison."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from cfsd.report.measures import MEASURES, Measure, ScoreTables
from cfsd.report.run_record import RunRecord
from cfsd.report.table import sweep_of, variant_of
from cfsd.statistics.matched_gain import Match, Trained, matched, seeds_of
from cfsd.statistics.seeds import FEWEST
from cfsd.store.artifact import Store

GAIN = "target_gain"
COSTS = {"probe_kl": True, "mean_forgetting": False}  # measure -> whether it is interpolated in its logarithm


class MatchedGain(BaseModel):
    """One cost at the gains that methods have in common: an entry of `matched_gain` in summary.json.

    `covers`: what the intervals are over, documents alone below FEWEST seeds.
    """

    model_config = ConfigDict(frozen=True)

    measure: str
    logarithmic: bool
    seeds: int
    covers: str
    gains: tuple[Match, ...]

    def methods(self) -> list[str]:
        """Return every method that is at one of the gains."""
        return list(dict.fromkeys(entry.method for match in self.gains for entry in match.methods))


def matched_gains(store: Store, run_records: Sequence[RunRecord]) -> list[MatchedGain]:
    """Return what the swept variants of a comparison lost at equal gain, an entry per cost; nothing without a sweep.

    Variants count that share base and target with the first swept one, and of which gain and cost were measured.
    """
    swept = [run_record for run_record in run_records if sweep_of(run_record.name)]
    if not swept:
        return []
    tables = {r.name: ScoreTables(store, r) for r in run_records if _question(r) == _question(swept[0])}
    gain = _measure(GAIN)
    found = []
    for name, log in COSTS.items():
        models = [model for label, own in tables.items() if (model := _trained(label, own, gain, _measure(name)))]
        if gains := matched(_as_single(models), log=log):
            covers, seeds = ("documents", seeds_of(models))
            covers += " and seeds" if seeds >= FEWEST else ""
            found.append(MatchedGain(measure=name, logarithmic=log, seeds=seeds, covers=covers, gains=tuple(gains)))
    return found


def _question(run_record: RunRecord) -> list[str | None]:
    artifacts = run_record.artifacts
    return [artifacts[role].content if role in artifacts else None for role in ("base", "target")]


def _measure(name: str) -> Measure:
    return next(measure for measure in MEASURES if measure.name == name)


def _trained(name: str, tables: ScoreTables, gain: Measure, cost: Measure) -> Trained | None:
    """Return the model as a point of its method; None where its gain or its cost was not measured."""
    assert gain.units and cost.units
    gains, costs, sweep = gain.units(tables), cost.units(tables), sweep_of(name)
    if not gains or not costs:
        return None
    seed = name.removeprefix(variant_of(name))
    method, strength = (sweep.family, sweep.value) if sweep else (variant_of(name), None)
    return Trained(method, strength, seed, gains, costs)


def _as_single(models: Sequence[Trained]) -> list[Trained]:
    """Return the models with those of a sweep of one value as variants of their own."""
    strengths = {model.method: {other.strength for other in models if other.method == model.method} for model in models}
    return [model._replace(strength=None) if len(strengths[model.method]) == 1 else model for model in models]
