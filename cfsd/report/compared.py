"""The differences between variants as they are kept and found: the entries of `comparisons` in summary.json."""

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, FiniteFloat

from cfsd.report.summary import Fig
from cfsd.statistics.differences import LEVEL

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


NOTHING = Comparisons()
