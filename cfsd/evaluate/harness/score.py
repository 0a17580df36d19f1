"""Scores of a loaded model on one benchmark, document by document, as `lm_eval.simple_evaluate` finds them."""

import copy
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
from lm_eval.evaluator import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsd.data.chat import dated_template
from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import WRITTEN, Benchmark
from cfsd.evaluate.harness.batch_sizes import Batches
from cfsd.evaluate.harness.checked_task import CheckedTask
from cfsd.evaluate.harness.greedy import own_settings
from cfsd.evaluate.harness.language_model import BatchedModel, Progress
from cfsd.evaluate.harness.load import loaded
from cfsd.evaluate.harness.rows import metadata, primary_metric, said_of_filters, table
from cfsd.evaluate.stage import load_models, write_result
from cfsd.machine import Machine
from cfsd.model.batching import tokens_that_fit
from cfsd.model.loading import load_tokenizer
from cfsd.model.undisturbed import mode_kept
from cfsd.store.artifact import Artifact, Draft

MAX_WARNINGS = 10


class Scores(NamedTuple):
    """Rows: one per (filter, doc_id), columns as in `cfsd.evaluate.harness.rows.COLUMNS`. Metadata: what holds for all.

    `value` is the document's metric, or, where the metadata's `kind` is "perplexity", its summed negative
    log-likelihood in nats; `count` is 1, or the number of tokens of that sum.
    Metadata: metric, higher_is_better, chance (None: unknown), kind ("binary": values are 0 or 1; "mean";
    "perplexity"), num_documents, num_fewshot, filters, score (lm-eval's own figure for the first filter),
    scores (per filter), lm_eval (version), warnings (lm-eval's own, such as cut documents). Where they apply:
    remarks (what was cut, or taken one of several ways, a line each), left_out (documents to which a nanmean does not
    apply), chat_template (true), and of written answers max_gen_toks (their limit, tokens), at_limit (the share that
    reached it), limit_is_meant (true), decoding (settings of the checkpoint's own that change answers) and, with
    `thinking_end`, unfinished (the share whose reasoning did not end).
    """

    rows: pd.DataFrame
    metadata: dict[str, Any]


def score_benchmark(model: Artifact, benchmark: Benchmark, draft: Draft, machine: Machine) -> None:
    """Write one row per document as the `scores` table; the metadata say what the values mean.

    Raises: BadInput as `score`, and if files of the benchmark changed meanwhile, so that its key is another now.
    """
    before = benchmark.digest()
    (loaded_model,) = load_models([model], draft, machine)
    scores = score(
        loaded_model,
        load_tokenizer(draft.store.path(model)),
        benchmark,
        max_tokens=tokens_that_fit(loaded_model, machine),
        on_progress=lambda done, total: draft.journal.progress(done, total, "requests"),
    )
    if benchmark.digest() != before:
        raise BadInput(
            f"benchmark {benchmark.name}: its files changed while it was scored; run again, and if its own Python "
            "writes files into the folder of the YAML, let it write elsewhere"
        )
    rows = pa.Table.from_pandas(scores.rows, preserve_index=False)
    figures = {f"eval/{benchmark.name}/{scores.metadata['metric']}": float(scores.metadata["score"])}
    write_result(draft, "scores", rows, {"benchmark": benchmark.name, **scores.metadata}, figures)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    *,
    max_tokens: int = 1024,
    on_progress: Progress | None = None,
) -> Scores:
    """Return the scores of `model`, those of `lm_eval.simple_evaluate`.

    A batch holds `max_tokens`, padding included, at least one row; after an out-of-memory half as many.
    `on_progress(done, total)` counts requests (one per choice) and is called a hundred times at most. The model's mode
    and all random states are the same afterwards, because a training may be under way.
    Differs: `num_fewshot` also applies where the YAML says 0; chat templates write a fixed date; `thinking_end`
    as in `cfsd.evaluate.harness.written_answers.Answers`.

    Raises: BadInput if the benchmark cannot be loaded, has no such metric, or the model has no chat template;
        NotFinite if a log-likelihood or a document's value is NaN or infinite; OutOfMemory.
    """
    with loaded(benchmark, model.device) as (task, warnings), mode_kept(model):
        lm = BatchedModel(pretrained=model, tokenizer=own_tokenizer(tokenizer, benchmark), batch_size="auto")
        lm.prepare(benchmark, task, Batches(max_tokens), on_progress)
        checked = CheckedTask(benchmark, task)
        results = evaluate(
            lm, {"tasks": {benchmark.name: task}}, limit=benchmark.limit, bootstrap_iters=0,
            apply_chat_template=benchmark.is_chat(), fewshot_as_multiturn=benchmark.is_chat(),
        )  # fmt: skip
        metric = primary_metric(benchmark, task, results["results"][benchmark.name])
        rows = table(benchmark, lm, task, metric, results["samples"][benchmark.name])
        known = metadata(benchmark, task, metric, rows, results) | lm.answers.metadata()
        known |= {"chat_template": True} if benchmark.is_chat() else {}
        known |= {"limit_is_meant": True} if benchmark.limit_is_meant() else {}
        written_by = own_settings(model) if task.OUTPUT_TYPE == WRITTEN else {}
        known |= {"decoding": {name: str(value) for name, value in written_by.items()}} if written_by else {}
        remarks = [*lm.window.said(), *checked.said(), *said_of_filters(known["filters"])]
        known |= {"remarks": remarks} if remarks else {}
        return Scores(rows, known | {"warnings": warnings[:MAX_WARNINGS]})


def own_tokenizer(tokenizer: Any, benchmark: Benchmark) -> Any:
    """Return a tokenizer that may be changed in place: HFLM adds a padding token where there is none."""
    if tokenizer.pad_token_id is not None and not benchmark.is_chat():
        return tokenizer
    own = copy.deepcopy(tokenizer)
    if benchmark.is_chat():
        try:
            own.chat_template = dated_template(tokenizer)
        except ValueError as error:
            raise benchmark.lacks_template() from error
    return own
