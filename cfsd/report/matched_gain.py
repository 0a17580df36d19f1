"""What swept variants lost at equal gain, from the figures of a comparison, row by row."""

from collections.abc import Mapping, Sequence

from cfsd.report.table import sweep_of, variant_of
from cfsd.statistics.matched_gain import MatchedGain, Trained, matched, seeds_of
from cfsd.statistics.seeds import FEWEST
from cfsd.statistics.units import Units

GAIN = "target_gain"
Figures = Mapping[str, list[Units]]  # measure -> its parts
# measure -> whether it is interpolated in its logarithm
COSTS = {"probe_kl": True, "chat_kl": True, "mean_forgetting": False}


def matched_gains(measured: Mapping[str, Figures], questions: Mapping[str, object]) -> list[MatchedGain]:
    """Return what the swept variants of a comparison lost at equal gain, an entry per cost; nothing without a sweep.

    `measured`: each variant's figures, repeats apart. `questions`: what a variant was trained from and on. Those count
    that share it, and the benchmarks, with the first swept one, and of which gain and cost were measured.
    """
    found = []
    for cost, log in COSTS.items():
        asked = {
            name: (questions[variant_of(name)], [part.names for part in own[cost] if part.reach is not None])
            for name, own in measured.items()
            if {GAIN, cost} <= set(own)
        }
        first = next((question for name, question in asked.items() if sweep_of(name)), None)
        methods = methods_of([name for name, question in asked.items() if question == first])
        models = [
            Trained(*method, name.removeprefix(variant_of(name)), measured[name][GAIN], measured[name][cost])
            for name, method in methods.items()
        ]
        if gains := matched(models, log=log):
            seeds = seeds_of(models)
            covers = "documents and seeds" if seeds >= FEWEST else "documents"
            entry = MatchedGain(
                measure=cost,
                logarithmic=log,
                seeds=seeds,
                covers=covers,
                variants=_variants(methods),
                gains=tuple(gains),
            )
            found.append(entry)
    return found


def _variants(methods: Mapping[str, tuple[str, float | None]]) -> dict[str, tuple[str, ...]]:
    variants: dict[str, dict[str, None]] = {}
    for name, (method, _) in methods.items():
        variants.setdefault(method, {})[variant_of(name)] = None
    return {method: tuple(own) for method, own in variants.items()}


def methods_of(names: Sequence[str]) -> dict[str, tuple[str, float | None]]:
    """Return the method and the strength of each variant: "wise alpha=0.5" is "wise (alpha)" at 0.5.

    A variant that is no sweep, or the only one of its sweep, is a method of its own without a strength.
    """
    swept = {name: (_swept(name), sweep.value) for name in names if (sweep := sweep_of(name))}
    several = {
        name: method for name, method in swept.items() if len({s for m, s in swept.values() if m == method[0]}) > 1
    }
    taken = {method for method, _ in several.values()}
    single = {name: variant_of(name) for name in names if name not in several}
    alone = {name: f"{variant} (single)" if variant in taken else variant for name, variant in single.items()}
    return {name: several.get(name) or (alone[name], None) for name in names}


def _swept(name: str) -> str:
    family, _, field = variant_of(name).rpartition("=")[0].rpartition(" ")
    return f"{family} ({field})"
