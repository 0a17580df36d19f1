"""docs/results.md and its figures, from what the parts of the study found.

python -m benchmarks.study_results

Reads benchmarks/results/study/*.json, which `python -m benchmarks.study` writes, and trains nothing. It writes between
the marks of each part; the words around them are written by hand. What was found on another base and has no
marks gets a page of its own beside its file.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _study_choice, _study_cost
from benchmarks._gain_picture import gain_picture
from benchmarks._interval_picture import interval_picture
from benchmarks._methods_grid import ROOT
from benchmarks._methods_rates import gain_table
from benchmarks._result import markdown
from benchmarks._study_prediction import Run, block, picture, runs_of
from benchmarks.study import FOUND, PARTS, REFERENCES
from cfsd.report.compared import Compared
from cfsd.report.summary import Fig, Summary
from cfsd.report.table import POINTS, by_variant, shown
from cfsd.report.verdict import joined_figure, over_seeds
from cfsd.statistics import seeds
from cfsd.statistics.figures import FRACTION, MEAN, Figure
from cfsd.statistics.matched_gain import MatchedGain

PAGE, PICTURES = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
BEGIN, END = "<!-- made by python -m benchmarks.study_results: {} -->", "<!-- end of {} -->"
MEASURES = {  # of summary.json -> column
    "target_gain": "target gain", "probe_kl": "probe_kl", "chat_kl": "chat_kl",
}  # fmt: skip
DIVERGENCES = ("probe_kl", "chat_kl")  # of many variants, over orders of magnitude: on logarithmic axes
PREDICTION = "prediction"  # over all parts
CHOICE, COST = "choice", "cost"
ENDS = ("value", "low", "high")
MANY = 20  # variants; more are compared with the first alone, on the measures in BRIEF
BRIEF = ("target_gain", "probe_kl", MEAN)


class Made(NamedTuple):
    """What a part found."""

    name: str
    content: dict[str, Any]

    def summaries(self) -> list[Summary]:
        """Return the figures of every training."""
        run: dict[str, Any] = {"seconds": {}, "executed": [], "cached": []}
        variants = self.content["variants"].items()
        return [Summary.model_validate({"name": name, **run, **figures}) for name, figures in variants]

    def comparisons(self) -> list[Compared]:
        """Return every pair of variants on every measure."""
        return [Compared.model_validate(entry) for entry in self.content["comparisons"]]


def main() -> None:
    """Write tables and figures of all parts that were made into the page."""
    page, parts = PAGE.read_text(), found_parts()
    for name, content in (parts | found_elsewhere()).items():
        if name in parts or BEGIN.format(name) in page:
            page = _with(page, name, "\n".join(block_of(Made(name, content))))
        else:
            write_page_of(Made(name, content))
    if set(_study_choice.PARTS) <= set(parts):
        page = _with(page, CHOICE, "\n".join(_study_choice.block(parts)))
    page = _with(page, COST, "\n".join(_study_cost.block(parts)))
    if runs := runs_of(parts):
        page = _with(page, PREDICTION, "\n".join(prediction_block(runs)))
    PAGE.write_text(page)


def found_parts() -> dict[str, dict[str, Any]]:
    """Return what every part found that was made."""
    files = {name: FOUND / f"{name}.json" for name in PARTS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def write_page_of(made: Made) -> None:
    """Write a page for what was found on another base."""
    page, question = FOUND / f"{made.name}.md", made.content["question"]
    page.write_text(f"# {made.name}: {question}\n\n" + "\n".join(block_of(made, FOUND / "pictures")))
    print(page)


def found_elsewhere() -> dict[str, dict[str, Any]]:
    """Return what was found on another base, by part@model."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(FOUND.glob("*@*.json"))}


def prediction_block(runs: Sequence[Run]) -> Iterator[str]:
    """Yield how well divergences predict what benchmarks lose, and the picture of it."""
    own = [run for run in runs if not PARTS[run.part].taught_by]
    if len(own) < len(runs):
        yield "On the model itself:\n"
        yield from block(own)
        yield "With the trainings on the model that was taught before, another base:\n"
    yield from block(runs)
    PICTURES.mkdir(exist_ok=True)
    picture(runs).savefig(PICTURES / f"{PREDICTION}.png", dpi=120)
    yield f"![What benchmarks lost against divergences and the distance of weights]({PICTURES.name}/{PREDICTION}.png)\n"


def _with(page: str, name: str, block: str) -> str:
    before, begin, rest = page.partition(BEGIN.format(name))
    _, end, after = rest.partition(END.format(name))
    if not (begin and end):
        raise SystemExit(f"{PAGE} has no place for {name}: write {BEGIN.format(name)} and {END.format(name)} into it")
    return f"{before}{begin}\n\n{block}\n{end}{after}"


def block_of(made: Made, folder: Path | None = None) -> Iterator[str]:
    """Yield the table of a part, its figure, and the pairs that differ from the first variant.

    Figures are drawn into `folder`, by default the one of docs/results.md, and linked from the folder above it.
    """
    pictures = folder or PICTURES
    summaries, comparisons = made.summaries(), made.comparisons()
    repeats = by_variant((summary.name, summary) for summary in summaries)
    count = max(map(len, repeats.values()))
    yield (
        f"`{made.content['command']}` (`deployments/recipes/{made.content['recipes']}`); figures of every training, "
        f"with digest and artifact keys: `benchmarks/results/study/{made.name}.json`. {count} seeds, "
        f"{_covered(count)}\n"
    )
    benchmarks = list(summaries[0].benchmarks)
    losses = [f"{name} lost, {'points' if _is_share(summaries[0], name) else 'nats'}" for name in benchmarks]
    figures = {name: list(_figures(of_seeds, benchmarks)) for name, of_seeds in repeats.items()}
    heads, figures = _measured([*MEASURES.values(), *losses], figures)
    yield markdown([["variant", *heads], *([name, *map(_shown, row)] for name, row in figures.items())])
    pictures.mkdir(exist_ok=True)
    logarithmic = DIVERGENCES if _are_many(figures) else ()
    interval_picture(figures, heads, logarithmic).savefig(pictures / f"{made.name}.png", dpi=120)
    yield f"![What each variant learned and lost, with intervals]({pictures.name}/{made.name}.png)\n"
    if made.content.get("matched"):
        gain_picture(figures, heads, DIVERGENCES).savefig(pictures / f"{made.name}-gain.png", dpi=120)
        yield f"![Learned against lost, each method along its sweep]({pictures.name}/{made.name}-gain.png)\n"
        yield from _at_equal_gain(made)
        return
    yield "\n".join(_pairs(comparisons, *repeats)) + "\n"


def _at_equal_gain(made: Made) -> Iterator[str]:
    """Yield a table per cost of what every method loses at the gains that all have."""
    for entry in map(MatchedGain.model_validate, made.content["matched"]):
        unit, factor = ("points", POINTS) if entry.measure == MEAN else ("nats per token", 1)
        what = f"{entry.measure}, {unit}, at equal gain, over {entry.covers}"
        yield f"{what}, beside the difference from the first method:\n"
        yield gain_table(entry.gains, factor) + "\n"


def _are_many(variants: Collection[str]) -> bool:
    return len(variants) > MANY


def _covered(count: int) -> str:
    if count >= seeds.FEWEST:
        return "95 % intervals over rows and seeds."
    return "means, in brackets the ends of the seeds' own intervals." if count > 1 else "95 % intervals over rows."


def _is_share(summary: Summary, benchmark: str) -> bool:
    return bool(summary.benchmarks[benchmark]["forgetting"]["unit"] == "fraction")


def _lost(of_seeds: list[Summary], benchmark: str) -> Fig:
    return joined_figure([Figure.model_validate(summary.benchmarks[benchmark]["forgetting"]) for summary in of_seeds])


def _figures(of_seeds: list[Summary], benchmarks: list[str]) -> Iterator[Fig | None]:
    """Yield a variant's figures over the seeds, those of benchmarks in points where they are shares."""
    for name in MEASURES:
        yield over_seeds(of_seeds, name)
    for name in benchmarks:
        lost, unit = _lost(of_seeds, name), POINTS if _is_share(of_seeds[0], name) else 1
        yield lost | {end: lost[end] * unit for end in ENDS if lost[end] is not None}


def _measured(heads: list[str], figures: dict[str, list[Fig | None]]) -> tuple[list[str], dict[str, list[Fig | None]]]:
    """Return the columns in which any variant has a figure."""
    kept = [place for place in range(len(heads)) if any(row[place] for row in figures.values())]
    return [heads[place] for place in kept], {name: [row[i] for i in kept] for name, row in figures.items()}


def _shown(figure: Fig | None) -> str:
    return shown(figure) if figure else "-"


def _pairs(comparisons: list[Compared], first: str, *others: str) -> Iterator[str]:
    """Yield the difference of each variant from those that come first, measure by measure, where one is found."""
    many = _are_many([first, *others])
    listed = [entry for entry in comparisons if not many or entry.measure in BRIEF]
    for place, reference in enumerate([first, *others][: 1 if many else REFERENCES]):
        of = f" on {', '.join(BRIEF)}" if many else ""
        yield f"Paired differences from `{reference}`{of} (what is not listed is not significant):\n"
        for name in others[place:]:
            found = [entry for entry in (_between(e, name, reference) for e in listed) if entry and entry.sign()]
            if found:
                yield f"* {name}: " + "; ".join(map(_difference, found))
        yield ""


def _difference(entry: Compared) -> str:
    if entry.unit == FRACTION:
        return f"{entry.measure} {shown(entry.figure(), POINTS)} points"
    return f"{entry.measure} {shown(entry.figure())}"


def _between(entry: Compared, one: str, other: str) -> Compared | None:
    if (entry.one, entry.other) == (one, other):
        return entry
    return entry.turned() if (entry.other, entry.one) == (one, other) else None


if __name__ == "__main__":
    main()
