"""What was lost between two models that already exist? The same measurement, without training.

python -m flows.measure BASE TUNED --benchmark facts --target rows.jsonl

python -m flows.measure --samples BASE_LOGS TUNED_LOGS

python -m flows.measure BASE@http://host:8000/v1 TUNED@http://host:8000/v1 --benchmark facts --tokenizer FOLDER

TUNED may be the folder of an adapter, which is merged into BASE first. With --samples both are folders of lm-eval's
logs, and no model is needed; NAME@URL is a model behind an OpenAI-compatible server, and no weights are needed.
Exit codes with --margin: 0 nothing lost more, 1 something did, 2 bad input, 3 cannot tell, 4 failed.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from prefect import flow

from cfsd.data.target import Target
from cfsd.errors import BadInput
from cfsd.evaluate.benchmark_files import files_in, names_in, read
from cfsd.evaluate.spec import EvaluateSpec, check_comparable, check_windows
from cfsd.generate.spec import ProbeSpec, check_context
from cfsd.machine import Machine, served_at
from cfsd.model.adapter import Adapter
from cfsd.model.checkpoint import Checkpoint
from cfsd.overrides import override, parse_overrides, validated
from cfsd.report.run_record import RunRecord, roles_of
from cfsd.store.artifact import Artifact
from flows._cli import NO_VERDICT, Home, On, machine_of, start
from flows._conclude import Result, conclude, show
from flows._logs import measure_logs, models_of, print_plan
from flows._named import call_flow_run
from flows._plan import planned, usable
from flows._served import measure_served
from flows._temporary_server import prefect_server
from tasks import record
from tasks.adapter import merge_adapter
from tasks.evaluate import check_benchmarks, evaluate_base, evaluate_tuned
from tasks.fetch import check_model, fetch_model, tokenizer_differences
from tasks.generate import check_modes, sample_along
from tasks.logs import check_logs
from tasks.report import judge_margin
from tasks.target import prepare_target

MOST_POINTS = 100
NO_WEIGHTS = "of a model behind a server the weights are not here"
EXITS = {"pass": 0, "fail": 1, "cannot tell": 3}


@flow(name="measure")
def measure(
    base: Checkpoint,
    tuned: Checkpoint,
    target: Target | None = None,
    probe: ProbeSpec = ProbeSpec(seed=0),  # noqa: B008
    evaluate: EvaluateSpec = EvaluateSpec(),  # noqa: B008
    machine: Machine = Machine(),  # noqa: B008
) -> Result:
    """Sample a probe from the base, score both models, and report what the second one lost."""
    adapter = Adapter.at(tuned.path)
    label = f"adapter {adapter.label()} merged into {base.label()}" if adapter else tuned.label()
    name = f"measure {adapter.label() if adapter else tuned.label()} against {base.label()}"
    call_flow_run(name, [f"model:{tuned.label()}", f"base:{base.label()}"])
    with usable(machine), record.variant(name) as variant:
        fetched = fetch_model(base, machine)
        models = fetched, _merged(base, fetched, adapter, machine) if adapter else fetch_model(tuned, machine)
        check_comparable(*models)
        notes = tokenizer_differences(*models)
        for model in models:  # TUNED may attend to fewer tokens than BASE
            check_context(model, probe, "probe")
        probe.check_base(models[0])
        check_modes(models[0], probe)
        evaluate.check_base(models[0])
        check_windows(*models, evaluate)
        check_benchmarks(models[0], evaluate, machine)
        sampled = sample_along(models[0], probe, machine)
        rows = prepare_target(models[0], _fitting(target, models[1]), machine) if target else None
        before = evaluate_base(models[0], rows, evaluate, machine)
        after = evaluate_tuned(*models, rows, sampled, evaluate, machine)
        roles = {"base": models[0], "final": models[1], **roles_of(sampled)} | ({"target": rows} if rows else {})
        run_record = RunRecord(name=label, artifacts=roles, before=before, after=after, steps=tuple(variant.steps))
        return conclude(name, [run_record], [variant.run_id], notes)


def _fitting(target: Target, tuned: Artifact) -> Target:
    """Return the target without rows that are longer than TUNED attends to; the stage drops, counts and says them."""
    context = tuned.metadata["context"]
    most = min(target.max_length, context) if isinstance(context, int) else target.max_length
    return target.model_copy(update={"max_length": most})


def _merged(base: Checkpoint, fetched: Artifact, adapter: Adapter, machine: Machine) -> Artifact:
    """Return the base with the adapter merged into it; say so where the adapter names another base."""
    named = adapter.named_base()
    if named and Path(named).name != Path(base.label()).name:
        record.say(f"adapter {adapter.label()} was trained on {named}; it is merged into {base.label()}")
    return merge_adapter(fetched, adapter, machine)


def measure_command(
    base: Annotated[
        str,
        typer.Argument(
            help="Model before: folder, org/name@commit, smollm2, tiny, or NAME@http://host:8000/v1 behind a server; "
            "with --samples its logs"
        ),
    ],
    tuned: Annotated[
        str,
        typer.Argument(help="Model after; or the folder of an adapter, which is merged into BASE; with --samples logs"),
    ],
    samples: Annotated[
        bool,
        typer.Option(
            "--samples",
            help="BASE and TUNED are folders that lm-eval 0.4.3 or later wrote, with --log_samples, of any trainer's "
            "models: they are compared without the models",
        ),
    ] = False,
    benchmark: Annotated[
        list[str],
        typer.Option("--benchmark", help="A bundled or lm-eval task; with --samples this one alone; repeat for more"),
    ] = [],  # noqa: B006
    benchmarks: Annotated[Path | None, typer.Option(help="A folder of lm-eval YAML files: all of them")] = None,
    target: Annotated[
        Path | None, typer.Option(help="Rows of the target that TUNED was not trained on; columns prompt and response")
    ] = None,
    prompts: Annotated[
        list[str], typer.Option(help="Your own prompts, which BASE answers in probe.length tokens: FILE or NAME=FILE")
    ] = [],  # noqa: B006
    set_: Annotated[
        list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Change a setting, as probe.rows=64")
    ] = [],  # noqa: B006
    tokenizer: Annotated[
        Path | None, typer.Option(help="Of models behind a server: the folder of the tokenizer that both have")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="With --samples: say what would be compared, and stop")] = False,
    margin: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="Gate: exit code 1 if a benchmark, or the mean of several, lost more points than this, 3 if it cannot "
            "tell, 4 if it failed, else 0",
        ),
    ] = None,
    machine: On = [],  # noqa: B006
    home: Home = None,
) -> None:  # fmt: skip
    """Say what TUNED lost against BASE: divergence on the base's own text, benchmarks, loss on target rows."""
    if margin is not None and not 0 <= margin < MOST_POINTS:
        raise BadInput(f"--margin {margin:g} is not possible; give the points that may be lost, from 0 to below 100")
    of_weights = {"--target": target, "--prompts": prompts}
    if samples:
        refused = {"--benchmarks": benchmarks, "--machine": machine, "--tokenizer": tokenizer} | of_weights
        _check_used(refused, "with --samples there are logs and no models")
        _show(_measured_logs((base, tuned), benchmark, set_, plan=plan), margin)
        return
    if plan:
        raise BadInput("--plan is for --samples; without it `--set` and the models are checked before anything runs")
    named = [*benchmark, *(_benchmarks_in(benchmarks) if benchmarks else ())]
    on = machine_of(machine)
    if served_at(base) or served_at(tuned):
        _check_used(of_weights, NO_WEIGHTS)
        _show(measure_served((base, tuned), _evaluated(named, set_, NO_WEIGHTS), on, tokenizer), margin)
        return
    _check_used({"--tokenizer": tokenizer}, "the tokenizer of a model that is not behind a server is its own")
    asked = asked_of((base, tuned), named, str(target) if target else None, prompts, set_)
    if margin is not None and not asked.evaluate.benchmarks:
        raise BadInput("--margin is of benchmarks, and none is measured; name one or more: --benchmark instructions")
    with usable(on):
        asked.check(on)
        with prefect_server():
            result = measure(*asked, on)
    _show(result, margin)


def _show(result: Result | None, margin: float | None) -> None:
    """Print figures and files; with a margin, write and print the verdict, and end with its exit code."""
    if result is None:
        return
    show(result)
    if margin is not None:
        (summary,) = result.summaries
        outcome, sentence = judge_margin(result.folder, summary, margin)
        record.say(sentence)
        print(result.folder / "verdict.md", flush=True)
        sys.exit(EXITS[outcome])


def _measured_logs(folders: tuple[str, str], benchmarks: list[str], changes: list[str], *, plan: bool) -> Result | None:
    """Compare two folders of logs, or say what would be compared and return None."""
    evaluate = _evaluated(benchmarks, changes, "with --samples there are logs and no models")
    if plan:
        print_plan(*folders, evaluate)
        return None
    check_logs(*models_of(*folders, evaluate))
    with prefect_server():
        return measure_logs(*folders, evaluate)


def _evaluated(benchmarks: Sequence[Any], changes: list[str], why: str) -> EvaluateSpec:
    """Return which benchmarks are compared. Raises BadInput, with `why`, for settings of anything else."""
    evaluate = asked_of(("tiny", "tiny"), benchmarks, None, (), changes).evaluate  # models that are not looked at
    others = {change.partition(".")[0] for change in changes} - {"evaluate"}
    others |= set(evaluate.model_fields_set) - {"benchmarks"}
    _check_used({f"--set {name}": True for name in sorted(others)}, why)
    return evaluate


def _check_used(given: Mapping[str, Any], why: str) -> None:
    """Raise BadInput for options that would do nothing."""
    if unused := [name for name, value in given.items() if value]:
        raise BadInput(
            f"{', '.join(unused)}: {why}, so it has no effect; leave it out "
            "(--benchmark, or --set evaluate.benchmarks=[{name: …, metric: …, chance: …}], works)"
        )


class Asked(NamedTuple):
    """What a measurement takes, as its flow does."""

    base: Checkpoint
    tuned: Checkpoint
    target: Target | None
    probe: ProbeSpec
    evaluate: EvaluateSpec

    def check(self, machine: Machine) -> None:
        """Raise BadInput for errors detectable before anything is sampled."""
        after = Adapter.at(self.tuned.path) or self.tuned
        given: list[Checkpoint | Adapter | ProbeSpec | EvaluateSpec | Target | None] = [
            self.base, after, self.probe, self.evaluate, self.target
        ]  # fmt: skip
        for part in given:
            if part:
                part.check()
            if isinstance(part, Checkpoint):
                check_model(part)
        with planned():
            check_benchmarks(fetch_model(self.base, machine), self.evaluate, machine)


def asked_of(
    models: tuple[str, str], benchmarks: Sequence[Any], target: str | None, prompts: Sequence[str], changes: list[str]
) -> Asked:
    """Return what is measured, from texts of the command line or of a form. Raises BadInput."""
    own = {"target": {"path": target, "seed": 0, "measure_only": True}} if target else {}
    settings = {"probe": {"seed": 0}, "evaluate": {"benchmarks": list(benchmarks)}} | own
    parts = override(settings, parse_overrides(changes))
    if unknown := set(parts) - {"probe", "evaluate", "target"}:
        raise BadInput(f"--set {', '.join(sorted(unknown))}: unknown; allowed: fields of probe, evaluate, target")
    probe = validated(ProbeSpec, parts["probe"], "--set")
    modes = [*probe.modes, *map(_named_prompts, prompts)]
    probe = validated(ProbeSpec, probe.model_dump() | {"modes": modes}, "--prompts")
    evaluate = validated(EvaluateSpec, parts["evaluate"], "--benchmark")
    base, tuned = (validated(Checkpoint, model, "measure") for model in models)
    rows = validated(Target, parts["target"], "--target") if "target" in parts else None
    return Asked(base, tuned, rows, probe, evaluate)


def _named_prompts(given: str) -> dict[str, Any]:
    """Return the settings of NAME=FILE, or of FILE, whose name without endings is then the prompts' too."""
    name, _, path = given.partition("=") if "=" in given else ("", "", given)
    return {"name": name or Path(path).name.partition(".")[0], "prompts": path}


def _benchmarks_in(folder: Path) -> list[dict[str, str]]:
    if not folder.is_dir():
        raise BadInput(f"--benchmarks {folder} is not a folder; give one that holds lm-eval YAML files")
    for path in files_in(folder):
        read(path)  # a file with a mistake is named, not left out
    if not (names := names_in(folder)):
        raise BadInput(f"--benchmarks {folder} holds no benchmark; give a folder of lm-eval YAML files with `task:`")
    return [{"name": name, "folder": str(folder)} for name in names]


if __name__ == "__main__":
    start(measure_command, failed=NO_VERDICT)
