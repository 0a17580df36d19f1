"""Scores of a loaded model on one benchmark, document by document. The only module that imports lm-eval."""

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
import jinja2
import lm_eval.api.task
import pandas as pd
import torch
from datasets.exceptions import DatasetsError
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsd.data.chat import dated_template
from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.benchmark_files import Definition, is_hub
from cfsd.evaluate.harness.batches import Batches, Collector
from cfsd.evaluate.harness.model import Model, Progress
from cfsd.evaluate.harness.rows import metadata, primary_metric, refuse_what_has_no_mean, table
from cfsd.model.undisturbed import mode_kept, seeded

MAX_WARNINGS = 10
# Raised while a task with wrong YAML or data is loaded. A failing network is a ConnectionError.
MISTAKES = (AttributeError, DatasetsError, ImportError, LookupError, SyntaxError, TypeError, ValueError,
            jinja2.TemplateError)  # fmt: skip


class Unreachable(BadInput, ConnectionError):
    """The hub did not answer; trying again may help."""


class Scores(NamedTuple):
    """Rows: one per (filter, doc_id), columns as in `cfsd.evaluate.harness.rows.COLUMNS`. Facts: what holds for all.

    `value` is the document's metric, or, where facts' `kind` is "perplexity", its summed negative
    log-likelihood in nats; `count` is 1, or the number of tokens of that sum.
    Facts: metric, higher_is_better, chance (None: unknown), kind ("binary": values are 0 or 1; "mean";
    "perplexity"), num_documents, num_fewshot, filters, score (lm-eval's own figure for the first filter),
    scores (per filter), lm_eval (version), warnings (what lm-eval had to say, such as cut documents);
    left_out (documents to which a nanmean does not apply), chat_template (true), and of written answers
    max_gen_toks (their limit, tokens), at_limit (the share that reached it) and, with `thinking_end`,
    unfinished (the share whose reasoning did not end), where there is such a thing.
    """

    rows: pd.DataFrame
    metadata: dict[str, Any]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    *,
    max_tokens: int = 1024,
    on_progress: Progress | None = None,
) -> Scores:
    """Return what `lm_eval.simple_evaluate` finds for `model`.

    A batch holds `max_tokens`, padding included, at least one row; after an out-of-memory half as many.
    `on_progress(done, total)` counts requests (one per choice) and is called a
    hundred times at most. The model's mode and all random states stay as they were, because training may go on.
    Differs: `num_fewshot` also counts where the YAML says 0; chat templates write a fixed date; `thinking_end`
    as in `cfsd.evaluate.harness.answers.Answers`.

    Raises: BadInput if the benchmark cannot be loaded, has no such metric, or the model has no chat template;
        NotFinite if a log-likelihood or a document's value is NaN or infinite; OutOfMemory.
    """
    benchmark.check()
    with ExitStack() as stack:
        warnings = stack.enter_context(_quiet())
        stack.enter_context(seeded(model.device, DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED))
        stack.enter_context(mode_kept(model))
        # datasets leaves its Arrow files in the cache: in the user's own unless told otherwise.
        task = _load(benchmark, stack.enter_context(TemporaryDirectory(prefix="cfsd-score-")))
        lm = _LM(pretrained=model, tokenizer=_tokenizer(tokenizer, benchmark), batch_size="auto")
        lm.prepare(benchmark, task, Batches(max_tokens), on_progress)
        refuse_what_has_no_mean(benchmark, task)
        results = evaluate(
            lm, {"tasks": {benchmark.name: task}}, limit=benchmark.limit, bootstrap_iters=0,
            apply_chat_template=benchmark.chat_template, fewshot_as_multiturn=benchmark.chat_template,
        )  # fmt: skip
        metric = primary_metric(benchmark, task, results["results"][benchmark.name])
        rows = table(benchmark, lm, task, metric, results["samples"][benchmark.name])
        found = metadata(benchmark, task, metric, rows, results) | lm.answers.metadata()
        found |= {"chat_template": True} if benchmark.chat_template else {}
        return Scores(rows, found | {"warnings": warnings[:MAX_WARNINGS]})


def documents(benchmark: Benchmark) -> list[str]:
    """Return the prompt and the right answer of every document that is scored without `limit`, examples left out.

    Raises: BadInput if the benchmark cannot be loaded.
    """
    benchmark.check()
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(seeded(torch.device("cpu"), DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED))
        task = _load(benchmark, stack.enter_context(TemporaryDirectory(prefix="cfsd-score-")))
        return [_prompt_and_answer(task, document) for document in task.eval_docs]


def _prompt_and_answer(task: Any, document: Any) -> str:
    prompt, answer = task.doc_to_text(document), task.doc_to_target(document)
    answer = answer[0] if isinstance(answer, list) else answer  # of several right ones
    choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else []
    parts = [choices[part] if choices and isinstance(part, int) else str(part) for part in (prompt, answer)]
    return " ".join(parts)


def _tokenizer(given: Any, benchmark: Benchmark) -> Any:
    """Return a tokenizer that may be changed in place: HFLM gives one without a padding token another token."""
    if given.pad_token_id is not None and not benchmark.chat_template:
        return given
    own = copy.deepcopy(given)
    if benchmark.chat_template:
        try:
            own.chat_template = dated_template(given)
        except ValueError as error:
            raise BadInput(
                f"benchmark {benchmark.name}: chat_template is on, but the model's tokenizer has no chat template; "
                "turn it off, or measure a model that has one"
            ) from error
    return own


def _load(benchmark: Benchmark, cache: str) -> Any:
    """Return lm-eval's task object; local data is read into `cache` and needs no network."""
    definition = benchmark.find()
    folder = None if definition.is_inline() else str(definition.path.parent)
    changed = _changes(benchmark, definition, cache)
    # An inline group is lm-eval's public way to load a YAML file with changed settings.
    wanted = changed if definition.is_inline() else {"group": "cfsd", "task": [{"task": benchmark.name} | changed]}
    try:
        # Reading one folder takes milliseconds, lm-eval's own 14,000 files 6-23 s.
        task = TaskManager(include_path=folder, include_defaults=False).load([wanted])["tasks"][benchmark.name]
    except MISTAKES as error:
        raise BadInput(
            f"benchmark {benchmark.name}: lm-eval cannot load {definition.place(full=True)} "
            f"({type(error).__name__}: {error.__cause__ or error}); correct that file or its data"
        ) from error
    except ConnectionError as error:
        raise Unreachable(
            f"benchmark {benchmark.name}: its data is on the hub, which could not be reached ({error}); connect to "
            "the network, or give a benchmark with local data: `folder` with your YAML, or a bundled one"
        ) from error
    task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    benchmark.check_answers(task.OUTPUT_TYPE)
    if benchmark.max_gen_toks is not None:
        task.set_config("generation_kwargs", {"max_gen_toks": benchmark.max_gen_toks}, update=True)
    _check_fewshot(benchmark, task)
    return task


def _changes(benchmark: Benchmark, definition: Definition, cache: str) -> dict[str, Any]:
    config = definition.config
    places = [key for key in ("dataset_path", "dataset_kwargs") if config.get(key)]
    changes = copy.deepcopy(config if definition.is_inline() else {key: config[key] for key in places})
    if not is_hub(definition) and definition.data and "custom_dataset" not in config:
        changes["dataset_kwargs"] = {**(changes.get("dataset_kwargs") or {}), "cache_dir": cache}
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


class _LM(Model, HFLM):  # type: ignore[misc]
    """lm-eval's own model class, asked in our batches."""


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep lm-eval and datasets from writing; yield the growing list of lm-eval's distinct warnings."""
    logger, collector = logging.getLogger("lm_eval"), Collector()
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
