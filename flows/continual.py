"""Several targets in turn, each trained on the model before: what is left of the earlier ones, and of the base?

python -m flows.continual deployments/recipes/tiny-sequence.yaml
"""

from collections.abc import Sequence
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from cfsd.machine import Machine, home
from cfsd.recipe import Recipe
from cfsd.report.run_record import Measured, RunRecord
from cfsd.store.artifact import Artifact, Store
from cfsd.target_sequence import TargetSequence, trained_on
from flows._conclude import report_folder
from flows.mitigate import mitigate
from tasks import record
from tasks.evaluate import Role, evaluate_probe, evaluate_target

ROLES: tuple[Role, Role] = ("base", "tuned")


@flow(name="continual", flow_run_name="{sequence.recipe.name}")
def continual(sequence: TargetSequence, machine: Machine = Machine()) -> list[RunRecord]:  # noqa: B008
    """Train on one target after another; every stage is a `mitigate` run, and every model is scored on every target."""
    title = sequence.recipe.name
    with record.comparison(title) as run_id:
        run_records = stages(sequence, machine)
        conclude_sequence(title, run_records, measured(run_records, sequence.recipe, machine), run_id)
    return run_records


def stages(sequence: TargetSequence, machine: Machine) -> list[RunRecord]:
    """Train on each target, on what the one before gave."""
    run_records: list[RunRecord] = []
    for name, recipe in sequence.recipes().items():
        on = trained_on(recipe, Store(home()).path(run_records[-1].artifacts["final"])) if run_records else recipe
        run_records.append(mitigate(on, machine).model_copy(update={"name": name}))
    return run_records


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


def conclude_sequence(title: str, run_records: list[RunRecord], found: Measured, run_id: str | None) -> Path:
    """Write the page of the sequence and its figures, and show them where people look; return the page."""
    from cfsd.report.files import Kept
    from cfsd.report.sequence.files import described_sequence, write_sequence_files

    folder = report_folder(title, run_records)
    remains, files = write_sequence_files(
        folder, Store(home()), Kept(title=title, run_records=tuple(run_records)), found
    )
    record.conclusion(run_id, None, files)
    text = described_sequence(title, remains)
    create_markdown_artifact(text, key=f"{folder.name}-continual")
    record.say(text)
    return files[0]


if __name__ == "__main__":
    from flows._cli import continual_command, start

    start(continual_command)
