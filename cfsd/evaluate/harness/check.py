"""Everything that can be known of a benchmark without weights, found out before anything is sampled."""

from typing import Any

import torch
from transformers import GenerationConfig

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import ROLLING, WRITTEN, Benchmark
from cfsd.evaluate.benchmark_settings import LIMITS
from cfsd.evaluate.harness.checked_task import CheckedTask
from cfsd.evaluate.harness.load import loaded
from cfsd.evaluate.harness.rows import check_no_chance, chosen_first, direction, is_perplexity, primary_metric
from cfsd.evaluate.harness.trial import try_generation

_whole: set[str] = set()  # digests of what was checked in this process


def check_documents(benchmark: Benchmark) -> None:
    """Ask about every document that will be scored, without a model, and score made-up answers to the first.

    The made-up answers are the right one where the model writes, and one likelihood for all otherwise.

    Raises: BadInput for data, documents, few-shot examples, metrics, filters and generation settings that cannot work,
        and for Python of the benchmark that raises.
    """
    if (digest := benchmark.digest()) in _whole:
        return
    with loaded(benchmark, torch.device("cpu")) as (task, _):
        checked = CheckedTask(benchmark, task)
        chosen_first(benchmark.name, benchmark.filter, [f.name for f in getattr(task, "_filters", ())] or ["none"])
        if checked.checks:
            _check_generation(benchmark, task)
        first: list[Any] = []
        for number, document in task.doc_iterator(limit=benchmark.limit):
            requests = _requests(task, number, document) if checked.checks else []
            first = first or [document, requests]
        if checked.checks:
            _try(benchmark, task, *first)
    _whole.add(digest)


def _requests(task: Any, number: int, document: Any) -> list[Any]:
    shots, prefix = task.get_config("num_fewshot"), task.doc_to_prefix(document)
    context = task.fewshot_context(document, num_fewshot=shots, gen_prefix=prefix)
    repeats = task.get_config("repeats")
    made = task.construct_requests(doc=document, ctx=context, metadata=(task.get_config("task"), number, repeats))
    return made if isinstance(made, list) else [made]


def _try(benchmark: Benchmark, task: Any, document: Any, requests: list[Any]) -> None:
    for request in requests:
        request.resps = [_made_up(task, document)] * request.repeats
    task._instances = requests
    task.apply_filters()
    found: dict[str, Any] = {}
    for name in requests[0].filtered_resps:
        values = task.process_results(document, [request.filtered_resps[name] for request in requests])
        found |= {f"{metric},{name}": value for metric, value in values.items()}
    metric = primary_metric(benchmark, task, found)
    direction(benchmark, task, metric)
    if is_perplexity(task, metric):
        check_no_chance(benchmark.name, metric, benchmark.chance)


def _made_up(task: Any, document: Any) -> Any:
    if task.OUTPUT_TYPE != WRITTEN:
        return -1.0 if task.OUTPUT_TYPE == ROLLING else (-1.0, False)
    right = task.doc_to_target(document)
    if isinstance(right, int) and task.config.doc_to_choice is not None:
        right = task.doc_to_choice(document)[right]
    return str(right[0] if isinstance(right, list) and right else right)


def _check_generation(benchmark: Benchmark, task: Any) -> None:
    if task.OUTPUT_TYPE != WRITTEN:
        return
    settings = dict(task.get_config("generation_kwargs") or {})
    own = {name: value for name, value in settings.items() if name not in ("until", *LIMITS)}
    known = set(GenerationConfig().to_dict())
    where = f"benchmark {benchmark.name}: generation_kwargs"
    if unknown := sorted(set(own) - known):
        raise BadInput(
            f"{where}: {', '.join(unknown)} is unknown; allowed are until, {LIMITS[0]}, {', '.join(sorted(known))}"
        )
    try:
        GenerationConfig(**own).validate()
        try_generation(settings)
    except Exception as error:  # whatever lm-eval and transformers raise
        raise BadInput(f"{where}: {error}; correct or remove the setting") from error
