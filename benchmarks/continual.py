"""What holds an earlier target: unprompted text alone, answers to its prompts, or its rows; over seeds.

python -m benchmarks.continual [SEQUENCE] [--seeds N] [--home FOLDER]
make bench PART=continual

Interrupted, the same command goes on: every stage is cached in the data folder.
"""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from benchmarks._methods_run import Runner, in_one_flow
from benchmarks._result import RESULTS
from cfsd.machine import Machine, home
from cfsd.recipe import Recipe
from cfsd.report.files import ReportSource
from cfsd.report.run_record import RunRecord
from cfsd.report.sequence.repeats import LINES, OverSeeds, described_repeats, write_repeats_files
from cfsd.report.table import shown
from cfsd.target_sequence import Earlier, TargetSequence
from flows._cli import Home, start
from flows.continual import in_turn

SEQUENCE = Path("deployments/recipes/tiny-sequence.yaml")


WAYS: tuple[Earlier, ...] = ("unprompted", "prompts", "rows")


def continual_command(
    sequence: Annotated[Path, typer.Argument(help="A recipe and its targets in YAML")] = SEQUENCE,
    seeds: Annotated[int, typer.Option(min=1, help="Repeats of each way; from 5 on there are intervals")] = 5,
    home: Home = None,
) -> None:
    """Train in turn in every way with every seed, and print the R matrices and what is read from them."""
    loaded = {way: TargetSequence.load(sequence, seeds=seeds, earlier=way) for way in WAYS}
    recipes = [recipe for way in loaded.values() for one in way.repeats() for recipe in one.recipes().values()]
    for recipe in recipes:
        recipe.check()  # before anything runs
    with Runner(len(recipes), Machine(threads=1, checkpoint_steps=10_000, devices=1)) as runner:
        in_one_flow("continual-ways", lambda: _study(loaded, runner))


def _study(ways: Mapping[Earlier, TargetSequence], runner: Runner) -> None:
    _tell(ways, {name: _over_seeds(name, way, runner) for name, way in ways.items()}, runner.machine)


def _tell(ways: Mapping[Earlier, TargetSequence], found: Mapping[Earlier, OverSeeds], machine: Machine) -> None:
    pages = [described_repeats(name, [ways[name].way()], over) for name, over in found.items()]
    text = "\n\n".join([_table(found), *pages])
    print(f"\n{text}", flush=True)
    file = RESULTS / "continual.json"
    where = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": machine.threads}
    content = {name: over.model_dump(mode="json") for name, over in found.items()}
    file.write_text(json.dumps({"part": "continual", "machine": where, "ways": content}, indent=1) + "\n")
    file.with_suffix(".md").write_text(text + "\n")
    print(file, flush=True)


def _over_seeds(name: str, way: TargetSequence, runner: Runner) -> OverSeeds:
    """Take every repeat of one way, and write its pages into the data folder."""

    def train(recipe: Recipe, machine: Machine) -> RunRecord:
        (run_record,) = runner.run_all([recipe])
        if run_record is None:
            raise SystemExit(f"{name}: {recipe.name} met numbers that are not finite")
        return run_record

    done = [in_turn(repeat, runner.machine, train) for repeat in way.repeats()]
    kept = [(ReportSource(title=one.title, run_records=tuple(one.run_records)), one.measured) for one in done]
    title, folder = f"{way.recipe.name}: {name}", home() / "studies" / "continual" / name
    return write_repeats_files(folder, runner.store, title, [way.way()], kept)[0]


def _table(found: Mapping[Earlier, OverSeeds]) -> str:
    """Return a row per figure, a column per way."""
    lines = [f"| | {' | '.join(found)} |", "|---" + "|--:" * len(found) + "|"]
    for name, line in LINES.items():
        cells = [shown(over.figures[name].model_dump(), line.factor) for over in found.values()]
        lines.append(f"| {line.text} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    start(continual_command)
