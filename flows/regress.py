"""Did forgetting get worse? A recipe, trained anew with fresh seeds, against its baseline.

python -m flows.regress deployments/recipes/tiny.yaml           exit code 0 pass, 1 worse, 3 cannot tell
python -m flows.regress deployments/recipes/tiny.yaml --update-baseline
python -m flows.regress deployments/recipes/tiny.yaml --baseline champion
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field

from cfsd.baseline.file import Baseline, guarded, with_margins, write_baseline
from cfsd.errors import CfsdError
from cfsd.machine import Machine, home
from cfsd.recipe import Recipe
from cfsd.report.markdown import plain
from cfsd.report.place import card_name, report_folder, slug
from cfsd.statistics.gate import LEAST_SEEDS, Judgement, judge
from flows._cli import NO_VERDICT, Home, On, Set, machine_of, start
from flows._conclude import conclude
from flows._gate_runs import GateRuns, fresh_seeds, reseeded_by_name
from flows._known_baseline import CHAMPION, baseline_file, known_baseline
from flows._named import name_flow_run
from flows._parallel import run_variants
from flows._plan import checked
from flows._temporary_server import prefect_server
from flows._verdict import listed, sentence_of, table, warnings
from flows.approve import approve, check_asked
from flows.mitigate import pipeline
from tasks import record, registry

CANNOT_TELL = "Cannot tell"
Seeds = Annotated[int, Field(ge=1)]


class GotWorse(CfsdError):
    """The gate's FAIL; its text is the verdict."""


@flow(name="regress")
def regress(
    recipe: Recipe,
    baseline: str | None = None,
    seeds: Seeds | None = None,
    update_baseline: bool = False,
    machine: Machine = Machine(),  # noqa: B008
    approval: bool = False,
) -> State[Any]:
    """Train the recipe with seeds that the baseline does not have, and judge every guarded figure.

    The state has the verdict as its message: Failed where something got worse, else Completed, with the name
    `Cannot tell` where the verdict is open. `baseline` is a file or `champion`; what passes becomes the champion, with
    `approval` once a person says so in Prefect's pages (`flows.approve`).
    With `update_baseline` the recipe's own figures become the baseline, and nothing is judged.
    """
    name_flow_run(recipe, "gate")
    known = known_baseline(recipe, baseline, needed=not update_baseline)
    seeds_to_run = fresh_seeds(known, baseline, seeds, update=update_baseline)
    title = gate_title(recipe)
    recipes = reseeded_by_name(recipe, seeds_to_run)
    with checked(recipes.values(), machine, pipeline), record.comparison(title) as run_id:
        result = conclude(title, run_variants(recipes, machine, run_id), [run_id])
        runs = GateRuns(recipe, seeds_to_run, result, run_id)
        if update_baseline or known is None:
            return _new_baseline(runs, known, baseline, approval=approval)
        return _judged(runs, known, baseline, approval=approval)


def gate_title(recipe: Recipe) -> str:
    """Return the title of a gate's report, which is its run's name in MLflow."""
    return f"{recipe.name} gate"


def _new_baseline(runs: GateRuns, known: Baseline | None, given: str | None, *, approval: bool) -> State[Any]:
    """Put these runs in place of the `known` baseline; margins that were edited are kept."""
    made = runs.baseline(known)
    edited = known.edited_margins() & set(made.figures) if known else set()
    made = with_margins(made, known, edited) if known else made
    sentence = _replace(made, given, runs, approval=approval)
    kept = [f"margins that were edited are kept: {', '.join(sorted(edited))}"] if edited else []
    return _publish(runs, "; ".join([sentence, *kept, *runs.notes]), listed(made))


def _judged(runs: GateRuns, known: Baseline, given: str | None, *, approval: bool) -> State[Any]:
    """Judge these runs by the `known` baseline; what passes succeeds the champion, where the baseline is one."""
    figures = runs.figures
    judgement = judge(guarded(known, figures))
    found = runs.notes
    sentence = "; ".join([sentence_of(judgement, known), *found])  # all that a notification shows
    notes = warnings(known, runs.recipe, runs.seconds, figures[0]) + found
    if given == CHAMPION and judgement.outcome == "pass":
        notes.append(_successor(runs, known, sentence, approval=approval))
    return _publish(runs, sentence, table(judgement, known, runs.recipe, notes), judgement)


def _successor(runs: GateRuns, known: Baseline, sentence: str, *, approval: bool) -> str:
    """Make the runs that passed the champion, if there are enough of them; return a sentence on what came of it."""
    if len(runs.seeds) < LEAST_SEEDS:
        return f"the champion stays: its successor's figures must be of {LEAST_SEEDS} seeds; leave --seeds out"
    version = _register(with_margins(runs.baseline(known), known), runs, sentence)
    return _succeed(runs.recipe, version, approval=approval)


def _replace(made: Baseline, given: str | None, runs: GateRuns, *, approval: bool) -> str:
    """Put a new baseline into its file, or make its model the champion; return a sentence that says so."""
    seeds = f"baseline of {len(made.seeds)} seeds"
    if given != CHAMPION:
        file = baseline_file(runs.recipe, given)
        instead = ", in place of one that could not be read" if file.is_file() and not made.provenance.replaces else ""
        write_baseline(file, made)
        return f"{seeds} written to {file}{instead}"
    version = _register(made, runs, f"first of its kind, {seeds}: nothing was judged")
    return f"{seeds}: {_succeed(runs.recipe, version, approval=approval)}"


def _register(made: Baseline, runs: GateRuns, verdict: str) -> int | None:
    """Register the model of the first fresh seed, not of the best one, as the candidate; return its version."""
    first = runs.result.run_records[0]
    card = (runs.result.folder / card_name(first.name)).read_text()
    return registry.register(runs.recipe.name, first.artifacts["final"], made, runs.run_id, card=card, verdict=verdict)


def _succeed(recipe: Recipe, version: int | None, *, approval: bool) -> str:
    """Make a candidate the champion, with `approval` if a person says so; return a sentence on what came of it."""
    if version is not None and approval:
        return approve(recipe.name, version)
    if version is None or registry.promote(recipe.name, version) is None:
        return "the champion stays, because MLflow cannot be reached; the same command, all cached, moves it later"
    return f"champion of {registry.model_name(recipe.name)!r} is version {version}"


def _publish(runs: GateRuns, sentence: str, body: str, judgement: Judgement | None = None) -> State[Any]:
    """Show the verdict on the terminal, in Prefect and in MLflow, and return the flow's state."""
    title = gate_title(runs.recipe)
    folder = report_folder(home(), title, runs.result.run_records)
    files = [folder / "verdict.md", *([folder / "verdict.json"] if judgement else [])]
    files[0].write_text(f"# {plain(title)}\n\n{plain(sentence)}\n\n{body}\n")
    if judgement:
        files[1].write_text(judgement.model_dump_json(indent=1))
    record.conclusion(runs.run_id, {}, files, verdict=sentence)
    create_markdown_artifact(files[0].read_text(), key=f"{slug(title)}-verdict", description=sentence)
    record.say(f"{body}\n\n{sentence}")
    record.say(str(files[0]))
    if judgement and judgement.outcome == "fail":
        return Failed(message=sentence, data=GotWorse(sentence))
    return Completed(message=sentence, name=CANNOT_TELL if judgement and judgement.outcome != "pass" else None)


def regress_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML")] = Path("deployments/recipes/tiny.yaml"),
    baseline: Annotated[
        str | None,
        typer.Option(
            help="A baseline's JSON, or champion: MLflow's model version with that alias, which moves to what "
            "passes; default: deployments/baselines/<recipe's name>.json"
        ),
    ] = None,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Write the recipe's present figures as the new baseline")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs with seeds of their own; default: 2, for a baseline or a champion 5")
    ] = None,
    approval: Annotated[
        bool,
        typer.Option("--approve", help="With --baseline champion: a person is asked before it moves"),
    ] = False,
    set_: Set = [],  # noqa: B006
    machine: On = [],  # noqa: B006
    home: Home = None,
) -> None:
    """Say whether a recipe got worse than its baseline: exit code 0 no, 1 yes, 2 bad input, 3 cannot tell, 4 failed."""
    loaded, on = Recipe.load(recipe, set_), machine_of(machine)
    if approval:
        check_asked(is_champion=baseline == CHAMPION)
    known = known_baseline(loaded, baseline, needed=not update_baseline)
    numbers = fresh_seeds(known, baseline, seeds, update=update_baseline)
    with checked(reseeded_by_name(loaded, numbers).values(), on, pipeline), prefect_server():
        state = regress(loaded, baseline, seeds, update_baseline, on, approval, return_state=True)
        try:
            state.result()
        except GotWorse:
            sys.exit(1)
    if state.name == CANNOT_TELL:
        sys.exit(3)


if __name__ == "__main__":
    start(regress_command, failed=NO_VERDICT)
