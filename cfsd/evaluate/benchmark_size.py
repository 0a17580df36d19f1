"""How much a benchmark makes a model read and write, from its documents and settings, without importing lm-eval."""

import ast
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment

from cfsd.data.files import ROWS, Files
from cfsd.data.records import Said
from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import WRITTEN, Benchmark
from cfsd.evaluate.benchmark_files import Definition, Function, is_hub
from cfsd.evaluate.benchmark_settings import length_limit

LOOKED_AT = 200  # documents whose texts are counted
ANSWERED = 0.5  # of its limit, an answer on average: SmolLM2 wrote 0.52 of `instructions`, 0.39 of `questions`
GENERATING = 16  # times as many tokens in a batch where the model writes: only a row's last position has logits then
UNSEEN = 200.0  # tokens of a document that is on the hub, its choices included: a guess
_templates = SandboxedEnvironment()  # a recipe may come from anywhere, and is planned before anybody reads it

Document = dict[str, Any]


class BenchmarkSize(NamedTuple):
    """Documents, tokens that the model reads for one, and tokens that it writes then, at most; 0: it only reads."""

    documents: float
    read: float
    written: int = 0

    def tokens(self) -> float:
        """Return how many tokens pass through the model for all documents, about."""
        return self.documents * (self.read + ANSWERED * self.written)


def size_of_benchmark(benchmark: Benchmark, count: Callable[[str], float]) -> BenchmarkSize | None:
    """Return the size of `benchmark`, None if its documents are unknown: on the hub, and no `limit` says how many.

    `count` says how many tokens a text comes to. Examples in the prompt are as long as the documents on average.
    """
    definition = benchmark.find()
    config = definition.config
    examples = benchmark.num_fewshot if benchmark.num_fewshot is not None else config.get("num_fewshot") or 0
    documents = [] if is_hub(definition) or "class" in config else list(_documents(definition, benchmark.limit))
    if documents:
        sizes = [_size(config, document, count) for document in documents[:LOOKED_AT]]
        asked, example = (fmean(part) for part in zip(*sizes, strict=True))
    elif benchmark.limit:
        asked = example = UNSEEN
    else:
        return None
    number = (len(documents) or benchmark.limit or 0) * config.get("repeats", 1)
    writes = config.get("output_type", WRITTEN) == WRITTEN
    limit = benchmark.max_gen_toks or length_limit(config.get("generation_kwargs") or {})
    return BenchmarkSize(number, asked + examples * example, limit if writes else 0)


def _documents(definition: Definition, limit: int | None) -> Iterator[Document]:
    """Yield the documents that are scored, if they are in files of their own."""
    config = definition.config
    split = config.get("test_split") or config.get("validation_split")
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    paths = files.get(split) if isinstance(files, dict) else files
    with suppress(BadInput):
        found = (
            located.record
            for path in ([paths] if isinstance(paths, str) else paths or [])
            for located in Files(str(path), "benchmark", "its data_files", ROWS).records(Said())
        )
        yield from islice(found, limit)


def _size(config: dict[str, Any], document: Document, count: Callable[[str], float]) -> tuple[float, float]:
    """Return the tokens of `document` with all its answers, which share one reading of the prompt, and with one answer.

    The second is what it takes as an example in the prompt of another.
    """
    kind = config.get("output_type", WRITTEN)
    try:
        prompt = _text(config.get("doc_to_text"), document) + _text(config.get("gen_prefix") or "", document)
        answers = [_text(config.get("doc_to_target"), document)]
        if kind == "multiple_choice":
            answers = _choices(_value(config.get("doc_to_choice"), document))
    except (
        TemplateError,
        TypeError,
        ValueError,
        SyntaxError,
    ):  # Python of its own, or templates with lm-eval's own filters
        return (count(" ".join(value for value in document.values() if isinstance(value, str))),) * 2
    read, sizes = count(prompt), list(map(count, answers))
    return read + (0 if kind == WRITTEN else sum(sizes)), read + fmean(sizes)


def _choices(value: Any) -> list[str]:
    listed = ast.literal_eval(value) if isinstance(value, str) else value
    return list(map(str, listed.values() if isinstance(listed, dict) else listed))


def _text(template: Any, document: Document) -> str:
    return str(_value(template, document))


def _value(template: Any, document: Document) -> Any:
    """Return what a `doc_to_…` setting makes of `document`: a field of it, or a filled template."""
    if isinstance(template, Function):
        raise TypeError("it is made by Python")
    if not isinstance(template, str):
        return template
    return document[template] if template in document else _templates.from_string(template).render(**document)
