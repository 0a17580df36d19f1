"""Methods at equal gain: each at the strength chosen for it, along learning rates, over all reported seeds."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure as Picture

from benchmarks._interval_picture import interval_picture
from benchmarks._methods_grid import RATE, Study
from benchmarks._methods_run import Runner
from benchmarks._methods_table import ODD, half, tables_of, units_of
from cfsd.recipe import Recipe
from cfsd.report.summary import Fig
from cfsd.report.table import POINTS, shown
from cfsd.statistics.figures import Figure
from cfsd.statistics.matched_gain import DEFINITION, Match, Trained, matched

FACTORS = (0.25, 0.5, 1.0, 2.0)  # of the chosen strength's own learning rate


class Cost(NamedTuple):
    """Whether a cost is compared in its logarithm; what it is called in the picture, and multiplied by."""

    log: bool
    head: str
    factor: float = 1


COSTS = {"probe_kl": Cost(True, "probe_kl"), "mean_forgetting": Cost(False, "mean forgetting, points", POINTS)}


def sweep_rates(study: Study, runner: Runner, chosen: Mapping[str, str]) -> None:
    """Train every method at every rate with every seed, compare them at equal gain, and write the tables."""
    runs = [(method, rate, seed) for method in chosen for rate in _rates(study, method, chosen) for seed in study.seeds]
    made = runner.run_all([_recipe(study, method, chosen[method], rate, seed) for method, rate, seed in runs])
    units = {
        run: units_of(half(tables_of(runner.store, run_record), ODD))
        for run, run_record in zip(runs, made, strict=True) if run_record
    }  # fmt: skip
    matches: dict[str, list[Match]] = {}
    seeds = min(len(study.seeds), len({seed for _, _, seed in units}))
    for cost, kind in COSTS.items():
        models = [
            Trained(method, rate, str(seed), u["target_gain"], u[cost]) for (method, rate, seed), u in units.items()
        ]
        matches[cost] = matched(models, log=kind.log)
    text = "\n\n".join(f"{cost}, at equal gain over {seeds} seeds\n\n{gain_table(m)}" for cost, m in matches.items())
    print(f"\n{text}\n\n{DEFINITION}.", flush=True)
    study.results.mkdir(parents=True, exist_ok=True)
    file = study.results / f"methods-{study.name}-rates.json"
    found = {cost: [match.model_dump(mode="json") for match in of_cost] for cost, of_cost in matches.items()}
    file.write_text(json.dumps({"chosen": dict(chosen), "factors": FACTORS, "matches": found}, indent=1) + "\n")
    file.with_suffix(".md").write_text(f"{text}\n\n{DEFINITION}.\n")
    if all(matches.values()):  # there is a gain that methods have in common
        picture(matches).savefig(study.pictures / f"{file.stem}.png", dpi=120)
    print(file, flush=True)


def picture(matches: Mapping[str, Sequence[Match]]) -> Picture:
    """Return what each method costs at the largest gain that all sweeps reach, the one that forgot least first."""
    found = {cost: {entry.method: entry.cost for entry in of_cost[0].methods} for cost, of_cost in matches.items()}
    forgot = found["mean_forgetting"]
    order = sorted(forgot, key=lambda method: math.inf if (cost := forgot[method]) is None else cost.value)
    rows = {method: [_shown_as(kind, found[name][method]) for name, kind in COSTS.items()] for method in order}
    heads, logarithmic = [kind.head for kind in COSTS.values()], [kind.head for kind in COSTS.values() if kind.log]
    return interval_picture(rows, heads, logarithmic)


def _shown_as(kind: Cost, cost: Figure | None) -> Fig | None:
    return cost.scaled(kind.factor, cost.unit).model_dump() if cost else None


def _rates(study: Study, method: str, chosen: Mapping[str, str]) -> list[float]:
    own = study.changes(method, chosen[method]).get(RATE, study.content["train"]["learning_rate"])
    return [float(own) * factor for factor in FACTORS]


def _recipe(study: Study, method: str, strength: str, rate: float, seed: int) -> Recipe:
    changes: dict[str, Any] = study.changes(method, strength) | {RATE: rate}
    return study.recipe(changes, seed, f"{method} {strength} at {rate:g} seed={seed}")


def gain_table(matches: Sequence[Match], factor: float = 1) -> str:
    """Return a row per method: `factor` times what it lost at each gain, and how that differs from the first's."""
    if not matches:
        return "no gain that two methods have in common"
    first, *others = dict.fromkeys(entry.method for match in matches for entry in match.methods)
    heads = [f"{match.gain.value:.3f} nats ({match.at})" for match in matches]
    lines = [f"| method | {' | '.join(heads)} |", f"| --- |{' --: |' * len(matches)}"]
    for method in (first, *others):
        cells = [_cell(match, method, first, factor) for match in matches]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(match: Match, method: str, first: str, factor: float) -> str:
    cost = next((entry.cost for entry in match.methods if entry.method == method), None)
    if cost is None:
        return "not reached"
    sign, apart = next(
        ((1 if entry.one == method else -1, entry.difference) for entry in match.differences
         if {entry.one, entry.other} == {method, first}),
        (1, None),
    )  # fmt: skip
    told = f" ({sign * factor * apart.value:+.3g} of {first})" if apart else ""
    return f"{shown(cost.model_dump(), factor)}{told}"
