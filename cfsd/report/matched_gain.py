"""What swept variants lost at equal gain, from the figures of a comparison, row by row."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from cfsd.report.table import sweep_of, variant_of
from cfsd.statistics.matched_gain import Match, Trained, matched, seeds_of
from cfsd.statistics.seeds import FEWEST
from cfsd.statistics.units import Units

GAIN = "target_gain"
Figures = Mapping[str, list[Units]]  # measure -> its parts
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


def matched_gains(measured: Mapping[str, Figures], questions: Mapping[str, object]) -> list[MatchedGain]:
    """Return what the swept variants of a comparison lost at equal gain, an entry per cost; nothing without a sweep.

    `measured`: each variant's figures, repeats apart. `questions`: what a variant was trained from and on; those count
    that share it with the first swept one, and of which gain and cost were measured.
    """
    swept = [variant_of(name) for name in measured if sweep_of(name)]
    alike = {n: own for n, own in measured.items() if swept and questions[variant_of(n)] == questions[swept[0]]}
    found = []
    for cost, log in COSTS.items():
        models = _as_single([_trained(n, own[GAIN], own[cost]) for n, own in alike.items() if {GAIN, cost} <= set(own)])
        if gains := matched(models, log=log):
            seeds = seeds_of(models)
            covers = "documents and seeds" if seeds >= FEWEST else "documents"
            found.append(MatchedGain(measure=cost, logarithmic=log, seeds=seeds, covers=covers, gains=tuple(gains)))
    return found


def _trained(name: str, gain: list[Units], cost: list[Units]) -> Trained:
    """Return a model as a point of its method."""
    sweep, variant = sweep_of(name), variant_of(name)
    method, strength = (sweep.family, sweep.value) if sweep else (variant, None)
    return Trained(method, strength, name.removeprefix(variant), gain, cost)


def _as_single(models: Sequence[Trained]) -> list[Trained]:
    """Return the models with those of a sweep of one value as variants of their own."""
    strengths = {model.method: {other.strength for other in models if other.method == model.method} for model in models}
    return [model._replace(strength=None) if len(strengths[model.method]) == 1 else model for model in models]
