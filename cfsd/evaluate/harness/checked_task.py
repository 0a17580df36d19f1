"""A task of lm-eval that checks each document before it is asked about, and names the one at which anything fails."""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.api.task import ConfigurableTask

from cfsd.errors import BadInput, CfsdError
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.harness.document_rules import (
    Absent,
    Unusable,
    check_document,
    repeated_choice,
    taken_as_number,
    unknown_field,
)
from cfsd.evaluate.harness.own_code import in_words
from cfsd.evaluate.harness.reads import read_elsewhere
from cfsd.evaluate.harness.rows import check_number, names_of_means

SHOWN = 100  # characters of a document in a message


@contextmanager
def naming(benchmark: Benchmark, where: str) -> Iterator[None]:
    """Turn whatever is raised inside, by lm-eval or by the benchmark's own Python, into a BadInput that says where."""
    try:
        yield
    except (CfsdError, MemoryError):
        raise
    except Unusable as error:
        cause = None if isinstance(error.__cause__, Absent) else error.__cause__
        said = f"{error}: {in_words(cause, benchmark.find())}" if cause else str(error)
        raise BadInput(f"benchmark {benchmark.name}, {where}: {said}") from error
    except (Exception, SystemExit) as error:
        definition = benchmark.find()
        raise BadInput(
            f"benchmark {benchmark.name}, {where}: {in_words(error, definition)}; correct {definition.place()}, its "
            "Python or its data"
        ) from error


def named(number: int, document: Any) -> str:
    """Return how a message names a document, whose numbers start from 0."""
    text = str(document)
    return f"document {number} ({text if len(text) <= SHOWN else text[:SHOWN] + '…'})"


class CheckedTask:
    """Stands between lm-eval and a task object, whose methods it replaces.

    Raises: BadInput with benchmark and document for whatever a method of the task raises. Of lm-eval's own
        benchmarks documents are taken as they are, so that scores equal published ones.
    """

    def __init__(self, benchmark: Benchmark, task: Any) -> None:
        """Replace the methods of `task`, and check what holds for all its documents, few-shot examples included."""
        self.benchmark, self.task = benchmark, task
        self.checks = isinstance(task, ConfigurableTask) and not benchmark.is_hub()
        self.asked = self.processed = 0
        self.repeated: list[int] = []  # numbers of documents with two equal choices
        self.as_numbers: list[int] = []  # of those whose right answer is also the text of another choice
        if self.checks:
            self._check_settings()
            self._check_examples()
        for method in ("doc_to_prefix", "fewshot_context", "construct_requests", "process_results", "apply_filters"):
            if hasattr(task, method):
                setattr(task, method, functools.partial(getattr(self, f"_{method}"), getattr(task, method)))
        for metric, aggregate in task.aggregation().items() if self.checks else ():
            task.aggregation()[metric] = self._named_aggregation(metric, aggregate)

    def said(self) -> list[str]:
        """Return what was taken one of several ways, a line each."""
        lines = []
        if self.repeated:
            lines.append(
                f"{len(self.repeated)} documents have one choice twice (the first is document {self.repeated[0]}): "
                "the first of the two counts as the model's answer"
            )
        if self.as_numbers:
            lines.append(
                f"{len(self.as_numbers)} documents have a right answer that is the number of one choice, counted from "
                f"0, and the text of another (the first is document {self.as_numbers[0]}): the number counts; where "
                'the text is meant, write doc_to_target as "{{choices.index(answer)}}"'
            )
        if self.checks and self.task.get_config("num_fewshot") and _draws_from_what_is_scored(self.task):
            lines.append(
                "examples are drawn from the documents that are scored, without leaving out the one in question: its "
                "own answer may be among them; set fewshot_split"
            )
        if files := read_elsewhere():
            lines.append(
                f"its Python reads {', '.join(files[:3])}, outside the folder of its YAML: a change there is not in "
                "its key, and does not score it again; put it beside the YAML"
            )
        return lines

    def _check_settings(self) -> None:
        if reason := unknown_field(self.task):
            raise BadInput(f"benchmark {self.benchmark.name}, {self.benchmark.find().place()}: {reason}")

    def _check_examples(self) -> None:
        if not self.task.get_config("num_fewshot") or not hasattr(self.task, "sampler"):
            return
        for number, document in enumerate(self.task.sampler.fewshot_docs()):
            with naming(self.benchmark, f"few-shot example, {named(number, document)}"):
                check_document(self.task, document, example=True)

    def _doc_to_prefix(self, method: Callable[..., Any], document: Any) -> Any:
        with naming(self.benchmark, named(self.asked, document)):
            return method(document)

    def _fewshot_context(self, method: Callable[..., Any], document: Any, *args: Any, **kwargs: Any) -> Any:
        with naming(self.benchmark, named(self.asked, document)):
            if self.checks:
                check_document(self.task, document)
                if repeated_choice(self.task, document):
                    self.repeated.append(self.asked)
                if taken_as_number(self.task, document):
                    self.as_numbers.append(self.asked)
            context = method(document, *args, **kwargs)
            if self.checks and self.task.OUTPUT_TYPE == "generate_until" and context == "":
                raise Unusable("its prompt is empty; the model needs a text to continue")
        self.asked += 1
        return context

    def _construct_requests(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        document = kwargs.get("doc", args[0] if args else None)
        with naming(self.benchmark, named(self.asked - 1, document)):
            return method(*args, **kwargs)

    def _process_results(self, method: Callable[..., Any], document: Any, results: Any) -> Any:
        number = self.processed % max(1, self.asked)  # lm-eval goes through all documents once per filter
        self.processed += 1
        with naming(self.benchmark, f"{named(number, document)}, its result"):
            values = method(document, results)
            if not isinstance(values, dict):
                raise Unusable(f"process_results gives {values!r}; it must give numbers by the name of a metric")
        for metric in names_of_means(self.task):
            if metric in values:
                check_number(f"benchmark {self.benchmark.name}, document {number}", metric, values[metric])
        return values

    def _apply_filters(self, method: Callable[..., Any]) -> Any:
        try:
            return method()
        except Exception:
            for filters, instance in itertools.product(getattr(self.task, "_filters", ()), self.task.instances):
                with naming(self.benchmark, f"{named(instance.doc_id, instance.doc)}, filter {filters.name}"):
                    filters.apply([instance])
            with naming(self.benchmark, "its filters"):  # none fails on one document alone
                raise

    def _named_aggregation(self, metric: str, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(aggregate)
        def checked(items: Any) -> Any:
            with naming(self.benchmark, f"aggregation of {metric}"):
                return aggregate(items)

        return checked


def _draws_from_what_is_scored(task: Any) -> bool:
    config = task.config
    has_other = config.training_split or (config.test_split and config.validation_split)
    return not (task.fewshot_cfg.split or task.fewshot_cfg.samples or has_other or not config.test_split)
