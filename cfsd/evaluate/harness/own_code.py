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
from lm_eval.api.registry import aggregation_registry, metric_registry

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark_code import python_of
from cfsd.evaluate.benchmark_files import Definition, is_hub

MAX_WORDS = 300  # characters of a foreign message


class Absent(ValueError):
    """A template prints a field that the document has not."""


@contextmanager
def own_rules(definition: Definition) -> Iterator[None]:
    """Read the benchmark's modules anew, fetch no metric, and let no template print a missing value as `None`.

    Differs: lm-eval keeps a module whose own file is unchanged, though one that it imports or reads has changed.
    """
    if is_hub(definition):
        yield
        return
    task, utils, path = lm_eval.api.task, lm_eval.utils, list(sys.path)
    before = task.get_metric, task.get_aggregation, utils.env
    task.get_metric, task.get_aggregation = _metric, _aggregation
    utils.env = utils.env.overlay(finalize=_printed)
    _forget(definition)
    try:
        yield
    finally:
        task.get_metric, task.get_aggregation, utils.env = before
        sys.path[:] = path
        _forget(definition)


def _forget(definition: Definition) -> None:
    places = tuple(place for code in definition.code for place in python_of(code))
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if places and isinstance(file, str) and any(_is_in(file, place) for place in places):
            del sys.modules[name]


def _is_in(file: str, place: str) -> bool:
    return Path(file).resolve().is_relative_to(place)


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


def _printed(value: Any) -> Any:
    if value is None:
        raise Absent("the template prints a field that is null or missing")
    return value


def in_words(error: BaseException, definition: Definition) -> str:
    """Return what `error` says, in one line, and where in the benchmark's own Python it was raised."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    words = re.sub(r"\s+", " ", str(cause)).strip()[:MAX_WORDS]
    said = str(cause) if isinstance(cause, Absent) else f"{type(cause).__name__}: {words}" if words else repr(cause)
    places = [place for code in definition.code for place in python_of(code)]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if any(_is_in(frame.filename, place) for place in places):
            return f"{Path(frame.filename).name}, line {frame.lineno}: {said}"
    return said
