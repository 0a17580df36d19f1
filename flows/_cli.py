"""The command lines: options, the table at the end, one clear message for what the user can mend."""

import atexit
import functools
import json
import shlex
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cfsd.comparison import Comparison
from cfsd.errors import BadInput, CfsdError, Stopped
from cfsd.machine import Machine
from cfsd.overrides import override, parse_overrides, validated
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from cfsd.report.summary import Summary

INTERRUPTED = 130
console = Console(highlight=False, soft_wrap=True)

Set = Annotated[
    list[str],
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe, as train.epochs=2"),
]
On = Annotated[
    list[str],
    typer.Option("--machine", metavar="FIELD=VALUE", help="Change a field of the machine, as threads=1"),
]
Home = Annotated[Path | None, typer.Option(help="Data folder; default: $CFSD_HOME, else ./data")]
Plan = Annotated[bool, typer.Option("--plan", help="Say what would run and what is cached, and stop")]


class Until(StrEnum):
    """Where to stop."""

    filter = "filter"


def start(command: Callable[..., None]) -> None:
    """Run a command line. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted or told to end."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (KeyboardInterrupt, Stopped):
            _stopped()
        except CfsdError as error:
            _fail(str(error), 2 if isinstance(error, BadInput) else 1)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a pre-emption ends it as Ctrl-C does
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(guarded)
    app()


_last_words: list[str] = []


def _stopped() -> None:
    _last_words.extend(["stopped; what is finished is kept. To continue:", _same_command()])
    sys.exit(INTERRUPTED)


@atexit.register
def _say_last_words() -> None:
    """Print after everything that ends at exit; this was registered before any of it, so it comes last."""
    for line in _last_words:
        print(line, flush=True)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _same_command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = ["-m", spec.name] if spec else [sys.argv[0]]
    return shlex.join(["python", *module, *sys.argv[1:]])


def _machine(changes: list[str]) -> Machine:
    return validated(Machine, override({}, parse_overrides(changes)), "--machine")


def mitigate_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML")],
    set_: Set = [],  # noqa: B006
    machine: On = [],  # noqa: B006
    home: Home = None,
    plan: Plan = False,
    until: Annotated[
        Until | None, typer.Option(help="filter: make the corpus, write a page that shows it, and stop")
    ] = None,
) -> None:
    """Fine-tune on the target, rehearsing the base model's own text, and report what was learned and forgotten."""
    from flows._plan import check, print_plan
    from flows._temporary_server import prefect_server
    from flows.corpus import corpus, corpus_pipeline
    from flows.mitigate import mitigate, pipeline

    loaded, on = Recipe.load(recipe, set_), _machine(machine)
    steps = corpus_pipeline if until else pipeline
    check(loaded, on, steps)
    if plan:
        print_plan({loaded.name: loaded}, on, steps, console)
        return

    with prefect_server():
        run_record = corpus(loaded, on) if until else mitigate(loaded, on)
    show_corpus(run_record) if until else show(loaded.name, [run_record])


def show_corpus(run_record: RunRecord) -> None:
    """Print what the corpus is and, last, the path of the page that shows it."""
    from cfsd.machine import home
    from cfsd.store.artifact import Store
    from flows._conclude import report_folder

    for role in ("corpus", "filtered", "selected_corpus"):
        artifact = run_record.artifacts[role]
        metadata = {
            k: f"{v:.4g}" if isinstance(v, float) else v for k, v in artifact.metadata.items() if v not in ("", {})
        }
        console.print(f"{role:8} {', '.join(f'{k} {v}' for k, v in metadata.items())}")
        console.print(f"         {Store(home()).path(artifact)}")
    print(report_folder(run_record.name, [run_record]) / "corpus.html", flush=True)


def compare_command(
    comparison: Annotated[Path, typer.Argument(help="A recipe and its variants in YAML")],
    set_: Set = [],  # noqa: B006
    machine: On = [],  # noqa: B006
    seeds: Annotated[int | None, typer.Option(min=1, help="Repeats per variant; mix and train vary")] = None,
    home: Home = None,
    plan: Plan = False,
) -> None:
    """Run every variant of a recipe and put them into one table, one figure and one report."""
    from flows._plan import check, print_plan
    from flows._temporary_server import prefect_server
    from flows.compare import compare
    from flows.mitigate import pipeline

    loaded, on = Comparison.load(comparison, set_, seeds), _machine(machine)
    recipes = loaded.recipes()
    for recipe in recipes.values():
        check(recipe, on, pipeline)
    if plan:
        print_plan(recipes, on, pipeline, console)
        return

    with prefect_server():
        run_records = compare(loaded, on)
    show(loaded.recipe.name, run_records)


def continual_command(
    sequence: Annotated[Path, typer.Argument(help="A recipe and its targets in YAML")],
    set_: Set = [],  # noqa: B006
    machine: On = [],  # noqa: B006
    home: Home = None,
) -> None:
    """Train on several targets in turn and say what is left of the earlier ones and of the base."""
    from cfsd.target_sequence import TargetSequence
    from flows._plan import check
    from flows._temporary_server import prefect_server
    from flows.continual import continual
    from flows.mitigate import pipeline

    loaded, on = TargetSequence.load(sequence, set_), _machine(machine)
    for recipe in loaded.recipes().values():
        check(recipe, on, pipeline)
    with prefect_server():
        run_records = continual(loaded, on)
    show_files(loaded.recipe.name, run_records)


def regress_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML")] = Path("deployments/recipes/tiny.yaml"),
    baseline: Annotated[
        str | None,
        typer.Option(
            help="A baseline's JSON, or champion: MLflow's model version with that alias, which what passes "
            "follows; default: deployments/baselines/<recipe's name>.json"
        ),
    ] = None,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Write what the recipe comes to now as the new baseline")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs with seeds of their own; default: 2, for a baseline or a champion 5")
    ] = None,
    set_: Set = [],  # noqa: B006
    machine: On = [],  # noqa: B006
    home: Home = None,
) -> None:
    """Say whether a recipe got worse than its baseline. Exit codes: 0 no, 1 yes, 3 cannot tell."""
    from cfsd.statistics.gate import LEAST_SEEDS
    from flows._plan import check
    from flows._temporary_server import prefect_server
    from flows.mitigate import pipeline
    from flows.regress import CANNOT_TELL, GotWorse, known_baseline, regress

    loaded, on = Recipe.load(recipe, set_), _machine(machine)
    known_baseline(loaded, baseline, needed=not update_baseline)
    if update_baseline and seeds is not None and seeds < LEAST_SEEDS:
        raise BadInput(f"--seeds {seeds} is too few for a baseline; give {LEAST_SEEDS} or more")
    check(loaded, on, pipeline)
    with prefect_server():
        state = regress(loaded, baseline, seeds, update_baseline, on, return_state=True)
        try:
            state.result()
        except GotWorse:
            sys.exit(1)
    if state.name == CANNOT_TELL:
        sys.exit(3)


def measure_command(
    base: Annotated[str, typer.Argument(help="Model before: folder, org/name@commit, smollm2 or tiny")],
    tuned: Annotated[str, typer.Argument(help="Model after")],
    benchmark: Annotated[
        list[str], typer.Option("--benchmark", help="A bundled or lm-eval task; repeat for more")
    ] = [],  # noqa: B006
    benchmarks: Annotated[Path | None, typer.Option(help="A folder of lm-eval YAML files: all of them")] = None,
    target: Annotated[
        Path | None, typer.Option(help="Rows of the target that TUNED was not trained on; columns prompt and response")
    ] = None,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="FIELD=VALUE", help="As probe.rows=64, target.prompt=question")
    ] = [],  # noqa: B006
    machine: On = [],  # noqa: B006
    home: Home = None,
) -> None:  # fmt: skip
    """Say what TUNED lost against BASE: divergence on the base's own text, benchmarks, loss on target rows."""
    from cfsd.data.target import Target
    from cfsd.evaluate.benchmark_files import files_in, names_in, read
    from cfsd.evaluate.spec import EvaluateSpec
    from cfsd.generate.spec import ProbeSpec
    from cfsd.model.checkpoint import Checkpoint

    named: list[Any] = list(benchmark)
    if benchmarks is not None:
        if not benchmarks.is_dir():
            _fail(f"--benchmarks {benchmarks} is not a folder; give one that holds lm-eval YAML files", 2)
        for path in files_in(benchmarks):
            read(path)  # a file with a mistake is named, not left out
        if not (names := names_in(benchmarks)):
            _fail(f"--benchmarks {benchmarks} holds no benchmark; give a folder of lm-eval YAML files with `task:`", 2)
        named += [{"name": name, "folder": str(benchmarks)} for name in names]
    parts = override(
        {"probe": {"seed": 0}, "evaluate": {"benchmarks": named}}
        | ({"target": {"path": str(target), "seed": 0, "measure_only": True}} if target else {}),
        parse_overrides(set_),
    )
    if unknown := set(parts) - {"probe", "evaluate", "target"}:
        _fail(
            f"--set {', '.join(sorted(unknown))}: unknown; allowed: fields of probe, evaluate, target",
            2,
        )
    on = _machine(machine)
    evaluate = validated(EvaluateSpec, parts["evaluate"], "--benchmark")
    models = [validated(Checkpoint, model, "measure") for model in (base, tuned)]
    rows = validated(Target, parts["target"], "--target") if "target" in parts else None
    parts_to_check: list[Checkpoint | EvaluateSpec | Target] = [*models, evaluate]
    for part in parts_to_check + ([rows] if rows else []):
        part.check()
    from flows._temporary_server import prefect_server
    from flows.measure import measure

    probe = validated(ProbeSpec, parts["probe"], "--set")
    with prefect_server():
        run_record = measure(models[0], models[1], rows, probe, evaluate, on)
    show(f"measure {models[1].label()} against {models[0].label()}", [run_record])


def show(title: str, run_records: list[RunRecord]) -> None:
    """Print the table and `show_files`."""
    from cfsd.report.verdict import print_summary
    from flows._conclude import report_folder

    folder = report_folder(title, run_records)
    found = json.loads((folder / "summary.json").read_text())["variants"]
    summaries = [Summary(name=name, **content) for name, content in found.items()]
    print_summary(summaries, console)
    show_files(title, run_records)


def show_files(title: str, run_records: list[RunRecord]) -> None:
    """Print the last model's and the report's path, how to open the pages and, last, the path of summary.json."""
    from cfsd.machine import home
    from cfsd.store.artifact import Store
    from flows._conclude import report_folder

    folder, final = report_folder(title, run_records), run_records[-1].artifacts["final"]
    console.print(f"model    {Store(home()).path(final)}")
    console.print(f"report   {folder / 'report.html'}")
    console.print("compare runs in the browser (Prefect and MLflow): make up")
    print(folder / "summary.json", flush=True)
