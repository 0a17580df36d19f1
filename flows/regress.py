"""Did forgetting get worse? A recipe, trained anew with fresh seeds, against its baseline.

python -m flows.regress deployments/recipes/tiny.yaml           exit code 0 pass, 1 worse, 3 cannot tell
python -m flows.regress deployments/recipes/tiny.yaml --update-baseline
python -m flows.regress deployments/recipes/tiny.yaml --baseline champion
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field

from cfsd.baseline.file import (
    Baseline,
    UnreadableBaseline,
    baseline_of,
    check_place,
    guarded,
    read_baseline,
    with_margins,
    write_baseline,
)
from cfsd.errors import BadInput, CfsdError
from cfsd.generate.spec import AUTO
from cfsd.machine import Machine, home
from cfsd.overrides import override, validated
from cfsd.recipe import Recipe
from cfsd.report.markdown import plain
from cfsd.report.place import card_name, report_folder, slug
from cfsd.report.run_record import RunRecord
from cfsd.stages import CHAT
from cfsd.statistics.gate import LEAST_SEEDS, USUAL_SEEDS, Judgement, judge
from cfsd.store.artifact import Store
from flows._cli import NO_VERDICT, Home, On, Set, machine_of, start
from flows._conclude import Result, conclude
from flows._named import name_flow_run
from flows._parallel import run_variants
from flows._plan import checked
from flows._temporary_server import prefect_server
from flows._verdict import RESEEDED, found_trained, listed, origin, sentence_of, table, warnings
from flows.approve import approve, check_asked
from flows.mitigate import pipeline
from tasks import record, registry

BASELINES = Path("deployments") / "baselines"
CHAMPION = "champion"  # in place of a file: the figures of the model version with this alias
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
    numbers = fresh_seeds(known, baseline, seeds, update=update_baseline)
    title = f"{recipe.name} gate"
    recipes = reseeded_by_name(recipe, numbers)
    with checked(recipes.values(), machine, pipeline), record.comparison(title) as run_id:
        run_records = run_variants(recipes, machine, run_id)
        result = conclude(title, run_records, [run_id])
        runs = [registry.guarded_figures(run_record) for run_record in run_records]
        seconds = [trained_seconds(run_record) for run_record in run_records]
        found = found_trained(Store(home()), run_records)
        replaces = origin(known) if known else ""
        if update_baseline or known is None:
            made = baseline_of(recipe, numbers, runs, seconds, replaces)
            edited = known.edited_margins() & set(made.figures) if known else set()
            made = with_margins(made, known, edited) if known else made
            sentence = _replace(made, baseline, recipe, result, run_id, approval=approval)
            sentence += f"; margins that were edited are kept: {', '.join(sorted(edited))}" if edited else ""
            sentence += "".join(f"; {note}" for note in found)
            return _publish(title, run_records, run_id, sentence, listed(made))
        judgement = judge(guarded(known, runs))
        notes = warnings(known, recipe, seconds, runs[0]) + found
        if baseline == CHAMPION and judgement.outcome == "pass":
            enough = len(numbers) >= LEAST_SEEDS
            successor = with_margins(baseline_of(recipe, numbers, runs, seconds, replaces), known) if enough else None
            said = sentence_of(judgement, known)
            version = _register(successor, recipe, result, run_id, said) if successor else None
            notes.append(_succeed(recipe, version, enough=enough, approval=approval))
        body = table(judgement, known, recipe, notes)
        return _publish(title, run_records, run_id, sentence_of(judgement, known), body, judgement)


def known_baseline(recipe: Recipe, given: str | None, *, needed: bool = True) -> Baseline | None:
    """Return the baseline to judge by or, where it is not `needed`, the one to replace, if there is one to be read.

    Raises:
        BadInput: There is none but it is needed, or it guards a figure that the recipe does not measure; the file
            with the recipe's name is another recipe's; or a new one cannot be written where it is to be.
    """
    if not needed and given != CHAMPION:
        check_place(baseline_file(recipe, given))
    try:
        known = _read(recipe, given, needed=needed)
    except UnreadableBaseline:
        if needed:
            raise
        return None
    if known and given in (None, CHAMPION) and known.name != recipe.name:
        place = f"the champion {registry.model_name(recipe.name)!r}" if given else str(baseline_file(recipe, given))
        raise BadInput(
            f"{place} is the baseline of {known.name!r}, not of {recipe.name!r}; name a file of this recipe's own "
            "(--baseline FILE), or rename the recipe"
        )
    if known and needed:
        benchmarks = {f"forgetting/{benchmark.name}": benchmark.metric for benchmark in recipe.evaluate.benchmarks}
        chats = {"chat_kl"} if {AUTO, CHAT} & {mode.name for mode in recipe.probe.modes} else set()
        known.check_measured({"target_gain", "probe_kl"} | chats | benchmarks.keys())
        known.check_metrics(benchmarks)
    return known


def _read(recipe: Recipe, given: str | None, *, needed: bool) -> Baseline | None:
    if given == CHAMPION:
        known = registry.champion(recipe.name)
        if known is None and needed:
            raise BadInput(
                f"MLflow has no champion of {recipe.name!r} yet; make the first one: "
                "--baseline champion --update-baseline"
            )
        return known
    file = baseline_file(recipe, given)
    return read_baseline(file) if needed or file.is_file() else None


def baseline_file(recipe: Recipe, given: str | None) -> Path:
    """Return the file of the recipe's baseline: the given one, else the one with the recipe's name."""
    return Path(given) if given else BASELINES / f"{slug(recipe.name, 'recipe')}.json"


def fresh_seeds(known: Baseline | None, given: str | None, seeds: int | None, *, update: bool) -> range:
    """Return the seeds to train with; a successor of the champion needs as many as a baseline.

    Raises:
        BadInput: Too few for a new baseline.
    """
    if update and seeds is not None and seeds < LEAST_SEEDS:
        raise BadInput(f"--seeds {seeds} is too few for a baseline; give {LEAST_SEEDS} or more")
    first = 0 if update or known is None else max(known.seeds) + 1
    usual = LEAST_SEEDS if update or given == CHAMPION else USUAL_SEEDS
    return range(first, first + (seeds or usual))


def reseeded(recipe: Recipe, number: int) -> Recipe:
    """Return the recipe with the seed `number` for corpus, order and training.

    Target split and probe stay, so that all seeds are measured on the same documents. Every seed has a corpus of
    its own, because another machine samples another one, too.
    """
    seeds = {f"{part}.seed": number for part in RESEEDED}
    changed = override(recipe.model_dump(mode="json"), {**seeds, "name": f"{recipe.name}: seed={number}"})
    return validated(Recipe, changed, f"seed {number}")


def reseeded_by_name(recipe: Recipe, numbers: Iterable[int]) -> dict[str, Recipe]:
    """Return the recipe once for each seed, by the name of its run."""
    return {f"{recipe.name} seed={number}": reseeded(recipe, number) for number in numbers}


def trained_seconds(run_record: RunRecord) -> float:
    """Return the seconds that training took when it ran."""
    return float(Store(home()).manifest(run_record.artifacts["tuned"])["seconds"])


def _replace(
    made: Baseline, given: str | None, recipe: Recipe, result: Result, run_id: str | None, *, approval: bool
) -> str:
    """Put a new baseline into its file, or make its model the champion; return a sentence that says so."""
    seeds = f"baseline of {len(made.seeds)} seeds"
    if given != CHAMPION:
        file = baseline_file(recipe, given)
        instead = ", in place of one that could not be read" if file.is_file() and not made.provenance.replaces else ""
        write_baseline(file, made)
        return f"{seeds} written to {file}{instead}"
    version = _register(made, recipe, result, run_id, f"first of its kind, {seeds}: nothing was judged")
    return f"{seeds}: {_succeed(recipe, version, enough=True, approval=approval)}"


def _register(made: Baseline, recipe: Recipe, result: Result, run_id: str | None, verdict: str) -> int | None:
    """Register the model of the first fresh seed, not of the best one, as the candidate; return its version."""
    first = result.run_records[0]
    card = (result.folder / card_name(first.name)).read_text()
    return registry.register(recipe.name, first.artifacts["final"], made, run_id, card=card, verdict=verdict)


def _succeed(recipe: Recipe, version: int | None, *, enough: bool, approval: bool) -> str:
    """Make a candidate the champion, with `approval` if a person says so; return a sentence on what came of it."""
    if not enough:
        return f"the champion stays: its successor's figures must be of {LEAST_SEEDS} seeds; leave --seeds out"
    if version is not None and approval:
        return approve(recipe.name, version)
    if version is None or registry.promote(recipe.name, version) is None:
        return "the champion stays, because MLflow cannot be reached; the same command, all cached, moves it later"
    return f"champion of {registry.model_name(recipe.name)!r} is version {version}"


def _publish(
    title: str,
    run_records: list[RunRecord],
    run_id: str | None,
    sentence: str,
    body: str,
    judgement: Judgement | None = None,
) -> State[Any]:
    """Show the verdict on the terminal, in Prefect and in MLflow, and return the flow's state."""
    folder = report_folder(home(), title, run_records)
    files = [folder / "verdict.md", *([folder / "verdict.json"] if judgement else [])]
    files[0].write_text(f"# {plain(title)}\n\n{plain(sentence)}\n\n{body}\n")
    if judgement:
        files[1].write_text(judgement.model_dump_json(indent=1))
    record.conclusion(run_id, {}, files, verdict=sentence)
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
