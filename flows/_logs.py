"""Two models of which there are logs of lm-eval, made by whoever, compared without either of them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import flow
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cfsd.errors import BadInput
from cfsd.evaluate.logs.folder import LoggedModel, logs_in
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.machine import Machine
from cfsd.report.run_record import RunRecord
from flows._cli import console
from flows._conclude import Result, conclude
from flows._named import call_flow_run
from flows._plan import usable
from tasks import record
from tasks.logs import check_logs, keep_logs, scores_of_logs

CPU = Machine(device="cpu")  # nothing is computed
NO_DIVERGENCE = "Divergences (probe_kl, chat_kl) need the weights of both models and were not measured."


@flow(name="measure-logs")
def measure_logs(
    base: str,
    tuned: str,
    evaluate: EvaluateSpec = EvaluateSpec(),  # noqa: B008
    said: tuple[str, ...] = (),
) -> Result:
    """Report what one model lost against another, from the folders of their logs; `said` is told with the figures."""
    before, after = models_of(base, tuned, evaluate)
    remarks = [line for known in check_logs(before, after) for line in _remarks(known)]
    name = f"measure {after.name} against {before.name}"
    call_flow_run(name, [f"model:{after.name}", f"base:{before.name}"])
    with usable(CPU), record.variant(name) as variant:
        notes = [NO_DIVERGENCE, *said, *before.said, *after.said, *_unlike(before, after), *remarks]
        for note in notes:
            record.say(note)
        roles = {"base": keep_logs(before, "base", CPU), "final": keep_logs(after, "tuned", CPU)}
        scores = scores_of_logs(before, "base", CPU), scores_of_logs(after, "tuned", CPU)
        run_record = RunRecord(
            name=after.name, artifacts=roles, before=scores[0], after=scores[1], steps=tuple(variant.steps)
        )
        return conclude(name, [run_record], [variant.run_id], notes)


def models_of(base: str, tuned: str, evaluate: EvaluateSpec) -> tuple[LoggedModel, LoggedModel]:
    """Return the two models, with the logs of the benchmarks that were chosen. Raises BadInput."""
    folders = Path(base), Path(tuned)
    if folders[0].exists() and folders[0].resolve() == folders[1].resolve():
        raise BadInput(f"{base} is given twice; give the logs of the model before, and of the model after")
    whole = [logs_in(folder) for folder in folders]
    models = [model.only(evaluate.benchmarks) for model in whole]
    there = {name for model in whole for name in model.names()}
    if absent := [benchmark.name for benchmark in evaluate.benchmarks if benchmark.name not in there]:
        raise BadInput(
            f"no benchmark {', '.join(absent)} in the logs; there are {', '.join(sorted(there)) or 'others'}"
        )
    if models[0].name == models[1].name:  # two folders `checkpoint`, or one model served twice
        both = os.path.commonpath([folder.absolute() for folder in folders])
        names = [str(folder.absolute().relative_to(both)) for folder in folders]
        models = [model.model_copy(update={"name": name}) for model, name in zip(models, names, strict=True)]
    return models[0], models[1]


def print_plan(base: str, tuned: str, evaluate: EvaluateSpec) -> None:
    """Print what would be compared; nothing has to be computed."""
    before, after = models_of(base, tuned, evaluate)
    table = Table("benchmark", "metric", "documents", "examples", title="plan", box=SIMPLE_HEAD)
    for known in check_logs(before, after):
        columns = (known[name] for name in ("benchmark", "metric", "num_documents", "num_fewshot"))
        table.add_row(*map(str, columns))
    console.print(table)
    console.print(f"{after.name} against {before.name}, from their logs: nothing is computed by a model")


def _remarks(known: dict[str, Any]) -> Iterator[str]:
    yield from (f"benchmark {known['benchmark']}: {remark}" for remark in known.get("remarks", ()))


def _unlike(base: LoggedModel, tuned: LoggedModel) -> Iterator[str]:
    """Yield in what the two models were measured differently that need not change their scores."""
    one, other = base.versions(), tuned.versions()
    if one != other:
        yield f"The logs are of lm-eval {_listed(one)} (base) and {_listed(other)} (tuned): they may score differently."
    if base.computed() != tuned.computed():
        yield (
            f"The base was computed by {base.computed() or 'an unknown engine'}, the tuned by "
            f"{tuned.computed() or 'an unknown engine'}: some answers may differ by rounding alone."
        )
    yield from _given_otherwise(base, tuned)


def _given_otherwise(base: LoggedModel, tuned: LoggedModel) -> Iterator[str]:
    """Yield the arguments of lm-eval's model that differ, a sentence for each pair of values."""
    names, apart = [name for name in base.names() if name in tuned.names()], dict[str, list[str]]()
    for name in names:
        one, other = base.log(name).arguments, tuned.log(name).arguments
        for key in {**one, **other}:
            before, after = (side.get(key, "its default") for side in (one, other))
            is_known = key != "max_length" or (key in one and key in other)  # not every model of lm-eval says it
            if before != after and is_known:
                apart.setdefault(f"{key} was {before} for the base and {after} for the tuned model", []).append(name)
    for what, of in apart.items():
        on = "" if of == names else f" on {', '.join(of)}"
        cut = ", to which prompts are cut" if what.startswith("max_length ") else ""
        yield f"In lm-eval, {what}{cut}; this alone may change scores{on}."


def _listed(versions: list[str]) -> str:
    return " and ".join(versions) or "an unknown version"
