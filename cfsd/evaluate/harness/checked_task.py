"""A task of lm-eval that checks each document before it is asked about, and names the one at which anything fails."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.api.task import ConfigurableTask

from cfsd.errors import BadInput, CfsdError
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.benchmark_files import is_hub
from cfsd.evaluate.harness.document_rules import Absent, Unusable, check_document, repeated_choice, unknown_field
from cfsd.evaluate.harness.own_code import in_words
from cfsd.evaluate.harness.rows import check_number, names_of_means

SHOWN = 100  # characters of a document in a message


class CheckedTask:
    """Stands between lm-eval and a task object, whose methods it replaces.

    Raises: BadInput with benchmark and document for whatever a method of the task raises. Of lm-eval's own
        benchmarks documents are taken as they are, so that scores equal published ones.
    """

    def __init__(self, benchmark: Benchmark, task: Any) -> None:
        """Replace the methods of `task`, and check what holds for all its documents, few-shot examples included."""
        self.name, self.task, self.definition = benchmark.name, task, benchmark.find()
        self.checks = isinstance(task, ConfigurableTask) and not is_hub(self.definition)
        self.asked = self.processed = 0
        self.repeated: list[int] = []  # numbers of documents with two equal choices
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
        if self.checks and self.task.get_config("num_fewshot") and _draws_from_what_is_scored(self.task):
            lines.append(
                "examples are drawn from the documents that are scored, without leaving out the one in question: its "
                "own answer may be among them; set fewshot_split"
            )
        return lines

    @contextmanager
    def _naming(self, where: str) -> Iterator[None]:
        """Turn whatever is raised inside into a BadInput that says where."""
        try:
            yield
        except (CfsdError, MemoryError):
            raise
        except Unusable as error:
            cause = None if isinstance(error.__cause__, Absent) else error.__cause__
            said = f"{error}: {in_words(cause, self.definition)}" if cause else str(error)
            raise BadInput(f"benchmark {self.name}, {where}: {said}") from error
        except (Exception, SystemExit) as error:
            raise BadInput(
                f"benchmark {self.name}, {where}: {in_words(error, self.definition)}; correct "
                f"{self.definition.place()}, its Python or its data"
            ) from error

    def _document(self, number: int, document: Any) -> str:
        text = str(document)
        return f"document {number} ({text if len(text) <= SHOWN else text[:SHOWN] + '…'})"

    def _check_settings(self) -> None:
        if reason := unknown_field(self.task):
            raise BadInput(f"benchmark {self.name}, {self.definition.place()}: {reason}")

    def _check_examples(self) -> None:
        if not self.task.get_config("num_fewshot") or not hasattr(self.task, "sampler"):
            return
        for number, document in enumerate(self.task.sampler.fewshot_docs()):
            with self._naming(f"few-shot example, {self._document(number, document)}"):
                check_document(self.task, document, example=True)

    def _doc_to_prefix(self, method: Callable[..., Any], document: Any) -> Any:
        with self._naming(self._document(self.asked, document)):
            return method(document)

    def _fewshot_context(self, method: Callable[..., Any], document: Any, *args: Any, **kwargs: Any) -> Any:
        with self._naming(self._document(self.asked, document)):
            if self.checks:
                check_document(self.task, document)
                if repeated_choice(self.task, document):
                    self.repeated.append(self.asked)
            context = method(document, *args, **kwargs)
            if self.checks and self.task.OUTPUT_TYPE == "generate_until" and context == "":
                raise Unusable("its prompt is empty; the model needs a text to continue")
        self.asked += 1
        return context

    def _construct_requests(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        document = kwargs.get("doc", args[0] if args else None)
        with self._naming(self._document(self.asked - 1, document)):
            return method(*args, **kwargs)

    def _process_results(self, method: Callable[..., Any], document: Any, results: Any) -> Any:
        number = self.processed % max(1, self.asked)  # lm-eval goes through all documents once per filter
        self.processed += 1
        with self._naming(f"{self._document(number, document)}, its result"):
            values = method(document, results)
            if not isinstance(values, dict):
                raise Unusable(f"process_results gives {values!r}; it must give numbers by the name of a metric")
        for metric in names_of_means(self.task):
            if metric in values:
                check_number(f"benchmark {self.name}, document {number}", metric, values[metric])
        return values

    def _apply_filters(self, method: Callable[..., Any]) -> Any:
        for filters in getattr(self.task, "_filters", ()):
            with self._naming(f"filter {filters.name}"):
                filters.apply(self.task.instances)
        return method() if not hasattr(self.task, "_filters") else None

    def _named_aggregation(self, metric: str, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(aggregate)
        def named(items: Any) -> Any:
            with self._naming(f"aggregation of {metric}"):
                return aggregate(items)

        return named


def _draws_from_what_is_scored(task: Any) -> bool:
    config = task.config
    has_other = config.training_split or (config.test_split and config.validation_split)
    return not (task.fewshot_cfg.split or task.fewshot_cfg.samples or has_other or not config.test_split)
