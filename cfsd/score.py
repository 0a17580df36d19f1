"""Scores of a loaded model on one benchmark, document by document. The only module that imports lm-eval."""

import copy
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
import jinja2
import lm_eval.api.task
import numpy as np
import pandas as pd
import torch
from datasets.exceptions import DatasetsError
from lm_eval.api.model import CacheHook
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsd.benchmark import Benchmark
from cfsd.benchmark_files import Definition, is_hub
from cfsd.errors import BadInput
from cfsd.score_rows import facts, primary_metric, table

Progress = Callable[[int, int], None]

MOST_WARNINGS = 10
# Raised while a task with wrong YAML or data is loaded. A failing network is a ConnectionError.
MISTAKES = (AttributeError, DatasetsError, ImportError, LookupError, SyntaxError, TypeError, ValueError,
            jinja2.TemplateError)  # fmt: skip


class Scores(NamedTuple):
    """Rows: one per (filter, doc_id), columns as in `cfsd.score_rows.COLUMNS`. Facts: what holds for all.

    `value` is the document's metric, or, where facts' `kind` is "perplexity", its summed negative
    log-likelihood in nats; `count` is 1, or the number of tokens of that sum.
    Facts: metric, higher_is_better, chance (None: unknown), kind ("binary": values are 0 or 1; "mean";
    "perplexity"), num_documents, num_fewshot, filters, score (lm-eval's own figure for the first filter),
    scores (per filter), lm_eval (version), warnings (what lm-eval had to say, such as cut documents).
    """

    rows: pd.DataFrame
    facts: dict[str, Any]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    *,
    batch_size: int,
    on_progress: Progress | None = None,
) -> Scores:
    """Return what `lm_eval.simple_evaluate` finds for `model`, without chat template.

    `on_progress(done, total)` counts requests (one per choice) and is called a hundred times at most.
    The model's mode and all random states are left as they were, because training may go on afterwards.
    Differs: `num_fewshot` also counts where the YAML says 0.

    Raises: BadInput if the benchmark cannot be loaded or has no such metric; NotFinite if a log-likelihood
        or a document's value is NaN or infinite.
    """
    benchmark.check()
    with ExitStack() as stack:
        warnings = stack.enter_context(_quiet())
        stack.enter_context(_seeded(model.device))
        stack.enter_context(_mode_kept(model))
        # datasets leaves its Arrow files in the cache: in the user's own unless told otherwise.
        task = _load(benchmark, stack.enter_context(TemporaryDirectory(prefix="cfsd-score-")))
        lm = _lm(model, tokenizer, batch_size, on_progress)
        results = evaluate(lm, {"tasks": {benchmark.name: task}}, limit=benchmark.limit, bootstrap_iters=0)
        metric = primary_metric(benchmark, task, results["results"][benchmark.name])
        rows = table(benchmark, lm, task, metric, results["samples"][benchmark.name])
        found = facts(benchmark, task, metric, rows, results)
        return Scores(rows, found | {"warnings": warnings[:MOST_WARNINGS]})


def documents(benchmark: Benchmark) -> list[str]:
    """Return the prompt and the right answer of every document that is scored without `limit`, examples left out.

    Raises: BadInput if the benchmark cannot be loaded.
    """
    benchmark.check()
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(_seeded(torch.device("cpu")))
        task = _load(benchmark, stack.enter_context(TemporaryDirectory(prefix="cfsd-score-")))
        return [_prompt_and_answer(task, document) for document in task.eval_docs]


def _prompt_and_answer(task: Any, document: Any) -> str:
    prompt, answer = task.doc_to_text(document), task.doc_to_target(document)
    answer = answer[0] if isinstance(answer, list) else answer  # of several right ones
    choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else []
    parts = [choices[part] if choices and isinstance(part, int) else str(part) for part in (prompt, answer)]
    return " ".join(parts)


def _load(benchmark: Benchmark, cache: str) -> Any:
    """Return lm-eval's task object; local data is read into `cache` and needs no network."""
    definition = benchmark.find()
    # An inline group is lm-eval's public way to load a YAML file with changed settings.
    group = {"group": "cfsd", "task": [{"task": benchmark.name} | _changes(benchmark, definition, cache)]}
    try:
        # Reading one folder takes milliseconds, lm-eval's own 14,000 files 6-23 s.
        manager = TaskManager(include_path=str(definition.path.parent), include_defaults=False)
        task = manager.load([group])["tasks"][benchmark.name]
    except MISTAKES as error:
        raise BadInput(
            f"benchmark {benchmark.name}: lm-eval cannot load {definition.path} "
            f"({type(error).__name__}: {error.__cause__ or error}); correct that file or its data"
        ) from error
    task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    _check_fewshot(benchmark, task)
    return task


def _changes(benchmark: Benchmark, definition: Definition, cache: str) -> dict[str, Any]:
    config = definition.config
    changes = {key: copy.deepcopy(config[key]) for key in ("dataset_path", "dataset_kwargs") if config.get(key)}
    if not is_hub(definition) and "custom_dataset" not in config:
        changes["dataset_kwargs"] = {**changes.get("dataset_kwargs", {}), "cache_dir": cache}
    if benchmark.num_fewshot is not None:
        changes["num_fewshot"] = benchmark.num_fewshot
    return changes


def _check_fewshot(benchmark: Benchmark, task: Any) -> None:
    wanted, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if not wanted or sampler is None:
        return
    needed = wanted + int(task.fewshot_cfg.split == task.config.test_split)  # not the document itself
    if len(sampler.fewshot_docs()) < needed:
        raise BadInput(
            f"benchmark {benchmark.name}: num_fewshot {wanted} needs {needed} documents to choose from, "
            f"and there are {len(sampler.fewshot_docs())}; lower num_fewshot"
        )


class _Counter(CacheHook):  # type: ignore[misc]
    """Reports each new percent: lm-eval tells its cache hook of every answered request."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        super().__init__(None)
        self.done, self.total, self.on_progress = 0, total, on_progress

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        if attr != "loglikelihood_rolling":  # told at the very end only; counted per batch below instead
            self.advance(1)

    def advance(self, number: int) -> None:
        before, self.done = self.done, min(self.done + number, self.total)
        if self.on_progress and 100 * before // self.total < 100 * self.done // self.total:
            self.on_progress(self.done, self.total)


class _LM(HFLM):  # type: ignore[misc]
    """lm-eval's own model class, without bars and with `on_progress`."""

    on_progress: Progress | None = None

    def _counted(self, method: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
        self.cache_hook = _Counter(len(requests), self.on_progress)
        return method(requests, disable_tqdm=True)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._counted(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._counted(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._counted(super().generate_until, requests)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Any]:
        answers: list[Any] = super()._loglikelihood_tokens(requests, True, override_bs)
        if requests and requests[0][0] is None:  # windows of rolling requests are not told to the hook
            self.cache_hook.advance(len(requests))
        return answers


def _lm(model: PreTrainedModel, tokenizer: Any, batch_size: int, on_progress: Progress | None) -> _LM:
    # HFLM gives a tokenizer that has no padding token one, in place.
    own = tokenizer if tokenizer.pad_token_id is not None else copy.deepcopy(tokenizer)
    lm = _LM(pretrained=model, tokenizer=own, batch_size=batch_size)
    lm.on_progress = on_progress
    return lm


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep lm-eval and datasets from writing; yield the growing list of lm-eval's distinct warnings."""
    logger, collector = logging.getLogger("lm_eval"), _Collector()
    propagate, bars = logger.propagate, not datasets.are_progress_bars_disabled()
    logger.propagate = False
    logger.addHandler(collector)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # the one bar that has no switch
    try:
        yield collector.messages
    finally:
        lm_eval.api.task.tqdm = tqdm
        logger.removeHandler(collector)
        logger.propagate = propagate
        if bars:
            datasets.enable_progress_bars()


class _Collector(logging.Handler):
    """Keeps distinct warnings, but for those on being given a loaded model, which HFLM always gives."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        is_expected = record.module == "huggingface" and record.funcName == "__init__"
        if not is_expected and message not in self.messages:
            self.messages.append(message)


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Seed as `simple_evaluate` does; put all random states back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _mode_kept(model: PreTrainedModel) -> Iterator[None]:
    """Switch back from evaluation mode, which HFLM sets."""
    was_training = model.training
    try:
        yield
    finally:
        model.train(was_training)
