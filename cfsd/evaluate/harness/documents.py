"""Texts that are held back for measuring, which no rehearsal row may overlap: benchmark documents, held-out rows."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.harness.checked_task import named, naming
from cfsd.evaluate.harness.load import loaded
from cfsd.store.tables import batches


def held_back_texts(target: Path, benchmarks: Iterable[Benchmark]) -> Mapping[str, Iterable[str]]:
    """Return the texts of the target's held-out rows and of every document of each benchmark, read when iterated."""
    texts: dict[str, Iterable[str]] = {"held-out target rows": _held_out_rows(target)}
    return texts | {f"benchmark {benchmark.name}": documents(benchmark) for benchmark in benchmarks}


def _held_out_rows(target: Path) -> Iterator[str]:
    for batch in batches(target, "held_out", ["prompt", "response"]):
        for row in batch.to_pylist():
            yield f"{row['prompt']} {row['response']}"


def documents(benchmark: Benchmark) -> Iterator[str]:
    """Yield the prompt and the right answer of every document, also of those beyond `limit`; no examples.

    Raises: BadInput if the benchmark cannot be loaded, or a document has no text.
    """
    with loaded(benchmark, torch.device("cpu")) as (task, _):
        texts = []
        for number, document in enumerate(task.eval_docs):
            with naming(benchmark, f"{named(number, document)}, compared with rehearsal rows"):
                texts.append(_prompt_and_answer(task, document))
    yield from texts


def _prompt_and_answer(task: Any, document: Any) -> str:
    prompt, answer = task.doc_to_text(document), task.doc_to_target(document)
    answer = answer[0] if isinstance(answer, list) else answer  # the first of several right ones
    choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else []
    parts = [choices[part] if choices and isinstance(part, int) else str(part) for part in (prompt, answer)]
    return " ".join(parts)
