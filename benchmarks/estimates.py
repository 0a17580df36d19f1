"""Which estimate of the divergence protects best, and what each costs.

python -m flows.compare deployments/recipes/study-estimates.yaml --seeds 3     # makes what is compared
python -m benchmarks.estimates [RECIPES] [--seeds N] [--home FOLDER]           # reads the table off, trains nothing
python -m benchmarks.estimates --timed                                         # step and sampling times, measured here

Final divergence and held-out loss are of the model as trained; a variant that has not been made yet is left out.
"""

from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks._estimates_timing import sampling_seconds, step_seconds
from benchmarks._result import markdown
from cfsd.comparison import Comparison
from cfsd.machine import Machine, home
from cfsd.report.run_record import RunRecord
from cfsd.report.summarise import summarise
from cfsd.report.table import number, shown
from cfsd.store.artifact import Artifact, Store
from flows._cli import Home, start
from flows._plan import planned
from flows.mitigate import pipeline

RECIPES = Path("deployments/recipes/study-estimates.yaml")
HEAD = ["variant", "final divergence", "held-out loss", "bytes per token"]


def estimates_command(
    recipes: Annotated[Path, typer.Argument(help="The comparison that was made")] = RECIPES,
    seeds: Annotated[int | None, typer.Option(min=1, help="As given to `compare`")] = None,
    timed: Annotated[bool, typer.Option("--timed", help="Measure times on this machine instead")] = False,
    home: Home = None,
) -> None:
    """Print the table of what is there, or measure what a step and a sampled token take."""
    if timed:
        _print_times()
        return
    loaded = Comparison.load(recipes, [], seeds)
    found = {name: made for name, recipe in loaded.recipes().items() if (made := _made(recipe))}
    print(markdown([HEAD, *(_row(name, run_record, list(found.values())) for name, run_record in found.items())]))
    print(f"{len(found)} of {len(loaded.recipes())} are made")


def _made(recipe: Any) -> RunRecord | None:
    """Return the run record of a recipe, None where a stage of it is missing."""
    with planned() as steps:
        run_record = pipeline(recipe, Machine())
    return run_record if all(step.cached for step in steps) else None


def _row(name: str, run_record: RunRecord, run_records: list[RunRecord]) -> list[str]:
    store = Store(home())
    summary = summarise(store, run_record, run_records)
    assert summary.probe_kl
    corpus = run_record.artifacts["corpus"]
    size = number(_bytes_per_token(store, corpus)) if corpus.metadata["rows"] else "-"
    return [name, shown(summary.probe_kl), number(summary.target["tuned_loss"]), size]


def _bytes_per_token(store: Store, corpus: Artifact) -> float:
    tokens: Any = corpus.metadata["tokens"]
    return sum(path.stat().st_size for path in store.path(corpus).glob("*.parquet")) / float(tokens)


def _print_times() -> None:
    """Print medians, and the ratio to the first line of each part."""
    for what, measure in (("training step", step_seconds), ("sampled token", sampling_seconds)):
        seconds = measure()
        first = median(next(iter(seconds.values())))
        rows = [[name, number(1000 * median(s)), f"{median(s) / first:.3f}"] for name, s in seconds.items()]
        print(markdown([[what, "ms", "ratio"], *rows]), flush=True)


if __name__ == "__main__":
    start(estimates_command)
