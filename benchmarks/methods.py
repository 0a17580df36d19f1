"""The study of methods: what each learns and forgets at the strength chosen for it, with intervals, time and memory.

python -m benchmarks.methods tiny|demo [--home FOLDER] [--seeds N] [--strengths chosen.json] [--quick]
    [--only DFT --only STM] [--rates] [--machine devices=4]
make bench PART=methods

Interrupted, the same command goes on: every run is cached in the data folder. Strengths are chosen by
`_methods_table.RULE` on even documents with seed 0; the other documents and other seeds are reported.
"""

import json
import os
import platform
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks._methods_grid import PLAIN, Study, replay_file, study_of, write_documents
from benchmarks._methods_rates import FACTORS, sweep_rates
from benchmarks._methods_run import Runner, changed_machine, in_one_flow
from benchmarks._methods_table import (
    ENOUGH,
    EVEN,
    MAIN,
    ODD,
    RULE,
    Result,
    Tables,
    against,
    choose,
    compared_results,
    figures_of,
    half,
    markdown,
    over_seeds,
    picture,
    tables_of,
    units_of,
)  # fmt: skip
from cfsd.errors import BadInput
from cfsd.machine import home
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from cfsd.statistics.differences import DEFINITION, OF_SEEDS
from cfsd.statistics.figures import Figure
from flows._cli import Home, On, start

Tried = dict[str, dict[str, dict[str, Figure]]]  # method -> strength -> figure


class Name(StrEnum):
    """The studies."""

    tiny = "tiny"
    demo = "demo"


class Chosen(NamedTuple):
    """A strength, and whether it learned enough; None where it was given."""

    strength: str
    reached: bool | None


def methods_command(
    name: Annotated[Name, typer.Argument(help="tiny: five string skills, 5 seeds; demo: SmolLM2-135M, 2 seeds")] = (
        Name.tiny
    ),
    seeds: Annotated[int | None, typer.Option(min=1, help="Reported seeds, from 1 on")] = None,
    strengths: Annotated[
        Path | None, typer.Option(help="JSON of method -> strength, or a result: nothing is chosen, only reported")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two methods, one epoch, two seeds: to try the script")
    ] = False,
    only: Annotated[list[str], typer.Option(help="These methods beside plain fine-tuning; without it all")] = [],  # noqa: B006
    rates: Annotated[
        bool, typer.Option("--rates", help="Then sweep the learning rate of each, and compare them at equal gain")
    ] = False,
    machine: On = [],  # noqa: B006
    home: Home = None,
) -> None:
    """Choose a strength for every method, report the chosen ones on other documents and seeds."""
    study = study_of(name, _folder(), seeds)
    study = study.quick(_folder()) if quick else study
    study = study.only(only, _folder()) if only else study
    study = study._replace(machine=changed_machine(study.machine, machine))
    given = _given(study, strengths) if strengths else None
    write_documents(study.documents(), replay_file(name, _folder()))
    for method, found in study.methods.items():
        for strength in found.strengths:
            _recipe(study, method, strength, 0).check()  # before anything runs
    tries = 0 if given else sum(len(method.strengths) for method in study.methods.values())
    swept = len(FACTORS) if rates else 0
    runner = Runner(tries + (1 + swept) * len(study.methods) * len(study.seeds), study.machine)
    in_one_flow(f"methods-{study.name}", lambda: _study(study, runner, given, rates=rates))


def _folder() -> Path:
    return home() / "studies"


def _given(study: Study, path: Path) -> dict[str, Chosen]:
    content: dict[str, Any] = json.loads(path.read_text())
    content = content.get("chosen", content)
    for method, found in study.methods.items():
        if content.get(method) not in found.strengths:
            raise BadInput(
                f"--strengths {path}: {method} has {content.get(method)!r}; allowed: {', '.join(found.strengths)}"
            )
    return {method: Chosen(content[method], None) for method in study.methods}


def _study(study: Study, runner: Runner, given: dict[str, Chosen] | None, *, rates: bool) -> None:
    with runner:
        tried = {} if given else _try_all(study, runner)
        chosen = given or _choose_all(tried)
        for method, choice in chosen.items():
            print(f"{method}: {choice.strength}" + (" (less than 95 %)" if choice.reached is False else ""), flush=True)
        results = _report_all(study, runner, chosen)
        if rates:
            sweep_rates(study, runner, {method: choice.strength for method, choice in chosen.items()})
    _tell(study, results, {m: {s: figures_of(t) for s, t in strengths.items()} for m, strengths in tried.items()})


def _recipe(study: Study, method: str, strength: str, seed: int) -> Recipe:
    return study.recipe(study.changes(method, strength), seed, f"{method} {strength} seed={seed}")


def _try_all(study: Study, runner: Runner) -> dict[str, dict[str, Tables]]:
    """Return what was measured of every strength on even documents with seed 0."""
    strengths = [(method, strength) for method, found in study.methods.items() for strength in found.strengths]
    tried: dict[str, dict[str, Tables]] = {method: {} for method in study.methods}
    made = runner.run_all([_recipe(study, method, strength, 0) for method, strength in strengths])
    for (method, strength), run_record in zip(strengths, made, strict=True):
        if run_record:
            tables = tried[method][strength] = half(tables_of(runner.store, run_record), EVEN)
            print(f"{method} {strength}: {_brief(figures_of(tables))}", flush=True)
    return tried


def _choose_all(tried: dict[str, dict[str, Tables]]) -> dict[str, Chosen]:
    plain = max(_gain(tables) for tables in tried[PLAIN].values())
    chosen = {}
    for method, strengths in tried.items():
        if strengths:  # of a method that never gave finite numbers there is nothing to report
            strength = choose(strengths, plain)
            chosen[method] = Chosen(strength, _gain(strengths[strength]) >= ENOUGH * plain)
    return chosen


def _gain(tables: Tables) -> float:
    return figures_of(tables)["target_gain"].value


def _report_all(study: Study, runner: Runner, chosen: dict[str, Chosen]) -> list[Result]:
    """Return the figures of the chosen strengths on odd documents with the other seeds."""
    repeats = [(method, seed) for method in chosen for seed in study.seeds]
    made = runner.run_all([_recipe(study, method, chosen[method].strength, seed) for method, seed in repeats])
    found: dict[str, dict[int, RunRecord]] = {method: {} for method in chosen}
    for (method, seed), run_record in zip(repeats, made, strict=True):
        if run_record:
            found[method][seed] = run_record
    return [_report(runner, method, chosen[method], of_seeds) for method, of_seeds in found.items() if of_seeds]


def _report(runner: Runner, method: str, choice: Chosen, of_seeds: dict[int, RunRecord]) -> Result:
    repeats = {seed: half(tables_of(runner.store, run_record), ODD) for seed, run_record in of_seeds.items()}
    costs = [runner.cost(run_record) for run_record in of_seeds.values()]
    figures = over_seeds(list(repeats.values()))
    print(f"{method} {choice.strength}: {_brief(figures)}", flush=True)
    seeds = {seed: figures_of(tables) for seed, tables in repeats.items()}
    units = {seed: units_of(tables) for seed, tables in repeats.items()}
    seconds, memory = median(cost.seconds for cost in costs), max(cost.peak_memory for cost in costs)
    return Result(method, choice.strength, choice.reached, figures, seeds, units, seconds, memory)


def _brief(figures: dict[str, Figure]) -> str:
    return ", ".join(f"{name} {figures[name].value:.4f}" for name in MAIN if name in figures)


def _tell(study: Study, results: list[Result], tried: Tried) -> None:
    losses = [name for name in results[0].figures if name not in MAIN]
    comparisons = compared_results(results)
    text = f"{markdown(results, losses)}\n{against(PLAIN, results, comparisons)}"
    notes = _notes(study, results, tried)
    print("\n" + text + "\n" + "\n".join(notes), flush=True)
    found = {
        "part": f"methods-{study.name}",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": study.machine.threads},
        "seeds": list(study.seeds),
        "chosen": {result.method: result.strength for result in results},
        "rows": [_row(result) for result in results],
        "comparisons": [entry.model_dump(mode="json") for entry in comparisons.entries],
        "tried": _plain(tried),
        "notes": notes,
    }
    study.results.mkdir(parents=True, exist_ok=True)
    file = study.results / f"methods-{study.name}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".md").write_text(text + "\n" + "\n".join(f"* {note}" for note in notes) + "\n")
    picture(results).savefig(study.pictures / f"methods-{study.name}.png", dpi=150)
    print(file, flush=True)


def _row(result: Result) -> dict[str, Any]:
    content = {name: value for name, value in result._asdict().items() if name != "units"}
    return content | {name: _plain(content[name]) for name in ("figures", "seeds")}


def _notes(study: Study, results: list[Result], tried: Tried) -> list[str]:
    many = len(results[0].seeds) >= 5
    over = "documents and seeds (t over seeds)" if many else "documents; the seeds' own values are in the JSON"
    notes = [
        RULE,
        f"Reported: odd documents, seeds {', '.join(map(str, study.seeds))}; 95 % intervals over {over}.",
        f"Second table: {DEFINITION} {OF_SEEDS}",
        "Training: the whole stage with the start of its process, median over seeds; memory: the most of any seed.",
    ]
    if few := [result.method for result in results if result.reached is False]:
        notes.append(f"Less than 95 % of plain fine-tuning's gain at every strength (*): {', '.join(few)}.")
    edges = [r.method for r in results if r.method in tried and r.strength in _ends(list(tried[r.method]))]
    if edges:
        notes.append(f"The chosen strength is the first or last tried: {', '.join(edges)}.")
    return notes


def _ends(strengths: list[str]) -> set[str]:
    return {strengths[0], strengths[-1]} if len(strengths) > 2 else set()


def _plain(content: Any) -> Any:
    """Return figures as JSON."""
    if isinstance(content, Figure):
        return content.model_dump(mode="json")
    return {str(name): _plain(value) for name, value in content.items()}


if __name__ == "__main__":
    start(methods_command)
