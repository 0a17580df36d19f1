"""Variants against each other: every measure of every pair, paired, and counted as different under Holm's control."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

from pydantic import BaseModel, ConfigDict, FiniteFloat

from cfsd.report.measures import MEASURES, ScoreTables
from cfsd.report.run_record import RunRecord
from cfsd.report.summary import Fig
from cfsd.report.table import variant_of
from cfsd.statistics.differences import LEVEL, Difference, difference_over_seeds
from cfsd.statistics.discoveries import false_discovery
from cfsd.statistics.multiplicity import holm
from cfsd.statistics.units import Units
from cfsd.store.artifact import Store

BENCHMARK = "benchmarks/"  # before the name of one: its forgetting
TEXT = "texts/"
PROMPTS = "prompts/"  # before the name of a set: the divergence along the base's answers


class OfSeed(BaseModel):
    """The difference in one of two to four seeds, with its interval over units."""

    model_config = ConfigDict(frozen=True)

    seed: str
    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    p_value: float | None


class Compared(BaseModel):
    """One measure of two variants, `value` = one - other: an entry of `comparisons` in summary.json."""

    model_config = ConfigDict(frozen=True)

    one: str
    other: str
    measure: str
    unit: str
    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    p_value: float | None
    adjusted_p: float | None
    seeds: int
    paired: bool
    each: tuple[OfSeed, ...] = ()

    def sign(self) -> int | None:
        """Return 1 or -1 where `one` is found above or below `other`, 0 where neither is, None if none can be."""
        if self.adjusted_p is None:
            return None
        return 0 if self.adjusted_p > LEVEL else (self.value > 0) - (self.value < 0)

    def figure(self) -> Fig:
        """Return the difference for reading: of two to four seeds, the brackets hold the intervals of all."""
        ends = [(seed.low, seed.high) for seed in self.each if seed.low is not None and seed.high is not None]
        low, high = self.low, self.high
        if ends and len(ends) == len(self.each):
            low, high = min(low for low, _ in ends), max(high for _, high in ends)
        return {"value": self.value, "low": low, "high": high, "unit": self.unit}

    def turned(self) -> "Compared":
        """Return the same with `one` and `other` in each other's place."""
        return self.model_copy(
            update={"one": self.other, "other": self.one, **_negative(self)}
            | {"each": tuple(seed.model_copy(update=_negative(seed)) for seed in self.each)}
        )


def _negative(found: Compared | OfSeed) -> dict[str, float | None]:
    ends = [None if end is None else -end + 0.0 for end in (found.high, found.low)]
    return {"value": -found.value + 0.0, "low": ends[0], "high": ends[1]}


class Comparisons:
    """All that was compared, found by pair and measure in either order."""

    def __init__(self, entries: Iterable[Compared] = ()) -> None:
        """Keep the entries, each pair of which comes once per measure."""
        self.entries = tuple(entries)
        self._found = {(c.one, c.other, c.measure): c for entry in self.entries for c in (entry, entry.turned())}

    def of(self, one: str, other: str, measure: str) -> Compared | None:
        """Return `one` less `other`; None where they were not compared."""
        return self._found.get((one, other, measure))

    def sign(self, one: str, other: str, measure: str) -> int | None:
        """Return the sign of `one` less `other` as `Compared.sign`; None, too, where they were not compared."""
        found = self.of(one, other, measure)
        return None if found is None else found.sign()


Repeats = Mapping[str, Mapping[str, list[Units]]]  # seed -> measure -> parts


def comparisons_of(store: Store, run_records: Sequence[RunRecord]) -> Comparisons:
    """Return every measure of every pair of variants that share base and target, from their score tables.

    A measure is compared where every repeat has it and its entry in MEASURES has `units` and a label.
    """
    questions: dict[str, list[str | None]] = {}
    variants: dict[str, dict[str, dict[str, list[Units]]]] = {}
    for run_record in run_records if len({variant_of(r.name) for r in run_records}) > 1 else ():
        name, artifacts = variant_of(run_record.name), run_record.artifacts
        question = [artifacts[role].content if role in artifacts else None for role in ("base", "target")]
        questions.setdefault(name, question)
        seed = run_record.name.removeprefix(name).strip()
        variants.setdefault(name, {})[seed] = _measured(ScoreTables(store, run_record))
    pairs = [(one, other) for one, other in combinations(variants, 2) if questions[one] == questions[other]]
    return compared(variants, pairs)


def _measured(tables: ScoreTables) -> dict[str, list[Units]]:
    units = {measure.name: measure.units(tables) for measure in MEASURES if measure.units and measure.label}
    units |= {f"{BENCHMARK}{name}": [part] for name, part in tables.on_benchmarks().items()}
    units |= {f"{TEXT}{name}": [part] for name, part in tables.on_texts().items()}
    units |= {f"{PROMPTS}{name}": [part] for name, part in tables.on_prompts().items()}
    return {name: parts for name, parts in units.items() if parts}


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
            found = difference_over_seeds([(ones[seed][measure], others[seed][measure]) for seed in seeds])
            yield _entry(one, other, measure, seeds, found)


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
