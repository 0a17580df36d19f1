"""Variants against each other: every measure of every pair, paired, and counted as different under Holm's control."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

from cfsd.report.compared import BENCHMARK, PROMPTS, TEXT, Compared, Comparisons, OfSeed
from cfsd.report.matched_gain import matched_gains
from cfsd.report.measures import MEASURES, ScoreTables
from cfsd.report.run_record import RunRecord
from cfsd.report.table import variant_of
from cfsd.statistics.differences import Difference, difference_over_seeds
from cfsd.statistics.discoveries import false_discovery
from cfsd.statistics.multiplicity import holm
from cfsd.statistics.units import Units
from cfsd.store.artifact import Store

Repeats = Mapping[str, Mapping[str, list[Units]]]  # seed -> measure -> parts


def comparisons_of(store: Store, run_records: Sequence[RunRecord]) -> Comparisons:
    """Return every measure of every pair of variants that share base and target, and swept ones at equal gain.

    A measure is compared where every repeat has it, over the same benchmarks where it is a mean of several, and its
    entry in MEASURES has `units` and a label.
    """
    questions: dict[str, list[str | None]] = {}
    variants: dict[str, dict[str, dict[str, list[Units]]]] = {}
    measured: dict[str, dict[str, list[Units]]] = {}
    for run_record in run_records if len({variant_of(r.name) for r in run_records}) > 1 else ():
        name, artifacts = variant_of(run_record.name), run_record.artifacts
        question = [artifacts[role].content if role in artifacts else None for role in ("base", "target")]
        questions.setdefault(name, question)
        seed = run_record.name.removeprefix(name).strip()
        measured[run_record.name] = _measured(ScoreTables(store, run_record))
        variants.setdefault(name, {})[seed] = measured[run_record.name]
    pairs = [(one, other) for one, other in combinations(variants, 2) if questions[one] == questions[other]]
    return Comparisons(compared(variants, pairs).entries, matched_gains(measured, questions))


def _measured(tables: ScoreTables) -> dict[str, list[Units]]:
    units = {measure.name: measure.units(tables) for measure in MEASURES if measure.units and measure.label}
    units |= {f"{BENCHMARK}{name}": [part] for name, part in tables.on_benchmarks().items()}
    units |= {f"{TEXT}{name}": [part] for name, part in tables.on_texts().items()}
    units |= {f"{PROMPTS}{name}": [part] for name, part in tables.on_prompts().items()}
    return {name: sorted(parts, key=lambda part: part.part_of) for name, parts in units.items() if parts}


def compared(variants: Mapping[str, Repeats], pairs: Iterable[tuple[str, str]]) -> Comparisons:
    """Return every measure of the `pairs` of `variants`, with p adjusted over all pairs."""
    found = [entry for pair in pairs for entry in _pair(*pair, variants[pair[0]], variants[pair[1]])]
    families: dict[str, list[Compared]] = {}
    for entry in found:
        families.setdefault(BENCHMARK if entry.measure.startswith(BENCHMARK) else entry.measure, []).append(entry)
    return Comparisons(entry for family in families.values() for entry in _adjusted(family))


def _pair(one: str, other: str, ones: Repeats, others: Repeats) -> Iterator[Compared]:
    seeds = [seed for seed in ones if seed in others]
    measures = dict.fromkeys(measure for seed in seeds for measure in ones[seed])
    for measure in measures:
        if all(measure in side[seed] for side in (ones, others) for seed in seeds):
            repeats = [(ones[seed][measure], others[seed][measure]) for seed in seeds]
            if len({_asked(parts) for repeat in repeats for parts in repeat}) == 1:
                yield _entry(one, other, measure, seeds, difference_over_seeds(repeats))


def _asked(parts: Sequence[Units]) -> tuple[tuple[str, str, str], ...]:
    """Return what parts a figure has, of which metric and unit: of others it is another figure."""
    return tuple((part.part_of, part.metric, part.unit) for part in parts)


def _entry(one: str, other: str, measure: str, seeds: Sequence[str], found: Difference) -> Compared:
    each = [
        OfSeed(seed=seed, **part.figure.model_dump(exclude={"unit"}), p_value=part.p_value)
        for seed, part in zip(seeds, found.each, strict=False)
    ]
    return Compared(
        one=one, other=other, measure=measure, **found.figure.model_dump(), p_value=found.p_value, adjusted_p=None,
        seeds=len(seeds), paired=found.paired, each=tuple(each),
    )  # fmt: skip


def _adjusted(family: list[Compared]) -> Iterator[Compared]:
    """Yield the entries with p adjusted: benchmarks together by Benjamini and Hochberg, others by Holm."""
    control = false_discovery if family[0].measure.startswith(BENCHMARK) else holm
    adjusted = iter(control([entry.p_value for entry in family if entry.p_value is not None]))
    for entry in family:
        yield entry if entry.p_value is None else entry.model_copy(update={"adjusted_p": next(adjusted)})
