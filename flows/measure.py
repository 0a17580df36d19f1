"""What was lost between two models that already exist? The same measurement, without training.

python -m flows.measure BASE TUNED --benchmarks facts --target rows.jsonl
"""

from prefect import flow

from cfsd.data.target import Target
from cfsd.evaluate.spec import EvaluateSpec, check_comparable
from cfsd.generate.spec import ProbeSpec
from cfsd.machine import Machine
from cfsd.model.checkpoint import Checkpoint
from cfsd.report.run_record import RunRecord
from flows._conclude import conclude
from tasks import record
from tasks.evaluate import evaluate_base, evaluate_tuned
from tasks.fetch import fetch_model
from tasks.generate import sample_probe
from tasks.target import prepare_target


@flow(name="measure")
def measure(
    base: Checkpoint,
    tuned: Checkpoint,
    target: Target | None = None,
    probe: ProbeSpec = ProbeSpec(seed=0),  # noqa: B008
    evaluate: EvaluateSpec = EvaluateSpec(),  # noqa: B008
    machine: Machine = Machine(),  # noqa: B008
) -> RunRecord:
    """Sample a probe from the base, score both models, and report what the second one lost."""
    name = f"measure {tuned.label()} against {base.label()}"
    with record.variant(name) as variant:
        models = fetch_model(base, machine), fetch_model(tuned, machine)
        check_comparable(*models)
        evaluate.check_base(models[0])
        sampled = sample_probe(models[0], probe, machine)
        rows = prepare_target(models[0], target, machine) if target else None
        before = evaluate_base(models[0], rows, evaluate, machine)
        after = evaluate_tuned(*models, rows, sampled, evaluate, machine)
        roles = {"base": models[0], "final": models[1], "probe": sampled} | ({"target": rows} if rows else {})
        run_record = RunRecord(
            name=tuned.label(), artifacts=roles, before=before, after=after, steps=tuple(variant.steps)
        )
        conclude(name, [run_record], [variant.run_id])
    return run_record


if __name__ == "__main__":
    from flows._cli import measure_command, start

    start(measure_command)
