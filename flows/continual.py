"""Several targets in turn, each trained on the model before it: what is left of the earlier ones, and of the base?

python -m flows.continual deployments/recipes/tiny-sequence.yaml
python -m flows.continual deployments/recipes/tiny-sequence.yaml --earlier prompts --seeds 5
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from prefect import flow
from prefect.artifacts import create_markdown_artifact

from cfsd.machine import Machine, home
from cfsd.recipe import Recipe
from cfsd.report.place import report_folder
from cfsd.report.run_record import Measured, RunRecord
from cfsd.store.artifact import Artifact, Store
from cfsd.target_sequence import Earlier, TargetSequence, trained_on
from flows._cli import Home, On, Set, console, machine_of, start
from flows._cli import Plan as PlanOption
from flows._conclude import Result, show_files
from flows._plan import Pipeline, Plan, checked, planned, print_lacking, print_plans
from flows._temporary_server import prefect_server
from flows.mitigate import mitigate, pipeline
from tasks import record
from tasks.evaluate import Role, evaluate_probe, evaluate_target
from tasks.fetch import planned_on
from tasks.report import InTurn, write_sequence

ROLES: tuple[Role, Role] = ("base", "tuned")


@flow(name="continual", flow_run_name="{sequence.recipe.name}")
def continual(sequence: TargetSequence, machine: Machine = Machine()) -> Result:  # noqa: B008
    """Train on one target after another; every stage is a `mitigate` run, and every model is scored on every target."""
    title, repeats = sequence.recipe.name, sequence.repeats()
    with checked(recipes_of(repeats), machine, pipeline), record.comparison(title) as run_id:
        done = [in_turn(repeat, machine) for repeat in repeats]
        run_records = [run_record for one in done for run_record in one.run_records]
        folder = report_folder(home(), title, run_records)
        report = write_sequence(folder, title, done, [sequence.way()])
        record.conclusion(run_id, report.figures, report.files)
        create_markdown_artifact(report.text, key=f"{folder.name}-continual")
        record.say(report.text)
    return Result(run_records, [], folder)


def recipes_of(repeats: Sequence[TargetSequence]) -> list[Recipe]:
    """Return the recipes of every stage of every repeat, all on the first base."""
    return [recipe for repeat in repeats for recipe in repeat.recipes().values()]


def mitigated(recipe: Recipe, machine: Machine) -> RunRecord:
    """Take one stage as a flow run of its own, with its own report."""
    return mitigate(recipe, machine).only()


def in_turn(sequence: TargetSequence, machine: Machine, train: Pipeline = mitigated) -> InTurn:
    """Train on the targets once, one after the other, and score every model on every target."""
    run_records = stages(sequence, machine, train)
    return InTurn(sequence.recipe.name, run_records, measured(run_records, sequence.recipe, machine))


def stages(sequence: TargetSequence, machine: Machine, train: Pipeline) -> list[RunRecord]:
    """Train on each target, starting from the model of the one before."""
    run_records: list[RunRecord] = []
    for name, recipe in sequence.recipes().items():
        before = run_records[-1].artifacts["final"] if run_records else None
        if before and not before.content:  # it is planned
            with planned_on(before):
                made = train(recipe, machine)
        else:
            made = train(trained_on(recipe, Store(home()).path(before)) if before else recipe, machine)
        run_records.append(made.model_copy(update={"name": name}))
    return run_records


def planned_in_turn(sequence: TargetSequence, machine: Machine) -> list[Plan]:
    """Return what a sequence would do: a plan for each stage, on the model before it, and one for what is scored."""
    plans: list[Plan] = []

    def walked(recipe: Recipe, machine: Machine) -> RunRecord:
        with planned() as steps:
            run_record = pipeline(recipe, machine)
        base = run_record.artifacts["base"]
        known = base if base.content or not plans else plans[0].base  # of a model that is not made: sizes, tokenizer
        plans.append(Plan(recipe, steps, known, run_record.artifacts["target"]))
        return run_record

    with planned() as scoring:
        in_turn(sequence, machine, walked)
    return [*plans, plans[0]._replace(steps=scoring)]


def measured(run_records: list[RunRecord], recipe: Recipe, machine: Machine) -> Measured:
    """Score every stage's model on every target's held-out rows and on the first base's probe; stage 0 is that base."""
    base, probe = (run_records[0].artifacts[role] for role in ("base", "probe"))
    models = [run_record.artifacts["final"] for run_record in run_records]
    rows = recipe.evaluate.held_out_rows
    return Measured(
        scored=tuple(
            scored(model, run_records, rows, ROLES[stage > 0], machine) for stage, model in enumerate([base, *models])
        ),
        probes=tuple(evaluate_probe(base, model, probe, machine) for model in models),
    )


def scored(
    model: Artifact, run_records: Sequence[RunRecord], rows: int | None, role: Role, machine: Machine
) -> tuple[Artifact, ...]:
    """Score one model on every target."""
    return tuple(
        evaluate_target(model, run_record.artifacts["target"], rows, role, machine) for run_record in run_records
    )


def continual_command(
    sequence: Annotated[Path, typer.Argument(help="A recipe and its targets in YAML")],
    set_: Set = [],  # noqa: B006
    machine: On = [],  # noqa: B006
    earlier: Annotated[
        Earlier | None, typer.Option(help="What holds the earlier targets; default: as the file says")
    ] = None,
    earlier_fraction: Annotated[
        float | None, typer.Option(help="With prompts or rows: their share of the rehearsal's tokens")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Repeats of the whole sequence, each with seeds of its own")
    ] = None,
    home: Home = None,
    plan: PlanOption = False,
) -> None:
    """Train on several targets in turn and say what is left of the earlier ones and of the base."""
    given = {"earlier": earlier, "earlier_fraction": earlier_fraction, "seeds": seeds}
    loaded, on = TargetSequence.load(sequence, set_, **given), machine_of(machine)
    repeats = loaded.repeats()
    with checked(recipes_of(repeats), on, pipeline, only_plan=plan) as on_first:
        if plan:
            print_plans([p for repeat in repeats for p in planned_in_turn(repeat, on)], on, console)
            print_lacking(on_first, console)
            return
        with prefect_server():
            result = continual(loaded, on)
    if loaded.seeds == 1:
        show_files(result)
    else:
        console.print(f"report   {result.folder / 'report.html'}")
        print(result.folder / "continual.json", flush=True)


if __name__ == "__main__":
    start(continual_command)
