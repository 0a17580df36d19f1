"""What is changed in lm-eval's modules while a benchmark of the user's own is loaded and scored; all is put back."""

import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.api.metrics
import lm_eval.api.task
import lm_eval.utils
from datasets.exceptions import DatasetsError
from jinja2 import BaseLoader, Environment
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.registry import aggregation_registry, metric_registry

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark_code import places_of
from cfsd.evaluate.benchmark_files import Definition, is_hub
from cfsd.evaluate.harness.document_rules import printed, whole_choices
from cfsd.evaluate.harness.reads import watched

MAX_WORDS = 300  # characters of a foreign message


@contextmanager
def own_rules(definition: Definition) -> Iterator[None]:
    """Read its modules anew, fetch no metric; templates run no code and print no missing value as `None`.

    Differs: lm-eval keeps a module whose own file is unchanged, though one that it imports or reads has changed.
    """
    if is_hub(definition):
        yield
        return
    task, utils, path = lm_eval.api.task, lm_eval.utils, list(sys.path)
    before = task.get_metric, task.get_aggregation, utils.env
    places = _places(definition)
    choices = task.ConfigurableTask.doc_to_choice
    task.get_metric, task.get_aggregation = _metric, _aggregation
    utils.env = _sandbox(utils.env)
    task.ConfigurableTask.doc_to_choice = whole_choices(choices)
    _forget(places)
    try:
        with watched(places, definition.data):
            yield
    finally:
        task.get_metric, task.get_aggregation, utils.env = before
        task.ConfigurableTask.doc_to_choice = choices
        sys.path[:] = path
        _forget(places)


def _sandbox(env: Environment) -> Environment:
    """Return lm-eval's `env` for templates that may come from anywhere: they reach the document and nothing else."""
    sandbox = SandboxedEnvironment(
        loader=BaseLoader(), undefined=env.undefined, keep_trailing_newline=env.keep_trailing_newline, finalize=printed
    )
    sandbox.filters |= env.filters
    return sandbox


def _forget(places: set[str]) -> None:
    for name, module in list(sys.modules.items()):
        if places and _is_own(getattr(module, "__file__", None), places):
            del sys.modules[name]


def _is_own(file: str | None, places: set[str]) -> bool:
    return isinstance(file, str) and (file in places or any(file.startswith(f"{place}/") for place in places))


def _places(definition: Definition) -> set[str]:
    return {place for code in definition.code for place in places_of(code)}


def _metric(name: str, hf_evaluate_metric: bool = False) -> Callable[..., Any] | None:
    if name not in metric_registry or hf_evaluate_metric:
        raise BadInput(
            f"metric {name!r} is not lm-eval's own, and none is fetched from the hub; take one of "
            f"{', '.join(metric_registry.keys())}, or write a `!function` of yours"
        )
    found: Callable[..., Any] = metric_registry.get(name)
    return found


def _aggregation(name: str) -> Callable[..., Any]:
    if name not in aggregation_registry:
        raise BadInput(f"aggregation {name!r} is unknown; take one of {', '.join(aggregation_registry.keys())}")
    found: Callable[..., Any] = aggregation_registry.get(name)
    return found


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    if error:
        yield from _chain(error.__cause__)
        yield error


def in_words(error: BaseException, definition: Definition) -> str:
    """Return what `error` says, in one line, and where in the benchmark's own Python it was raised."""
    if isinstance(error, DatasetsError) and error.__cause__:
        error = error.__cause__  # the outer one says only that something went wrong
    words = re.sub(r"\s+", " ", str(error)).strip()[:MAX_WORDS]
    said = f"{type(error).__name__}: {words}" if words else repr(error)
    places = _places(definition)
    frames = [frame for part in _chain(error) for frame in traceback.extract_tb(part.__traceback__)]
    for frame in reversed(frames):
        if _is_own(frame.filename, places):
            return f"{Path(frame.filename).name}, line {frame.lineno}: {said}"
    return said
