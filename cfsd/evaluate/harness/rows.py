"""From lm-eval's results to our rows and metadata. Its objects come as arguments, so nothing of it is imported."""

import math
from importlib.metadata import version
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from cfsd.errors import BadInput, NotFinite
from cfsd.evaluate.benchmark import Benchmark

COLUMNS = ["benchmark", "filter", "doc_id", "doc_hash", "metric", "value", "count", "prompt", "answer"]
# lm-eval's aggregations by name: averages over documents, and averages over log-likelihoods.
MEANS = ("mean", "nanmean")
PERPLEXITIES = ("perplexity", "weighted_perplexity", "bits_per_byte")
CHOICE_ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
ZERO_OR_ONE = (*CHOICE_ACCURACIES, "exact_match", "prompt_level_strict_acc", "prompt_level_loose_acc")


def primary_metric(benchmark: Benchmark, task: Any, results: dict[str, Any]) -> str:
    """Return the metric that the benchmark names, or acc, else exact_match, else the first usable of `results`.

    Raises: BadInput if it is missing, or is no average over documents (f1, bleu).
    """
    names = {key.partition(",")[0] for key in results if "," in key and "_stderr," not in key}
    listed = [name for name in task.aggregation() if name in names]  # in the order of the YAML
    usable = [name for name in listed if _aggregation(task, name) in MEANS + PERPLEXITIES]
    for name in [benchmark.metric] if benchmark.metric else ["acc", "exact_match", *usable]:
        if name in usable:
            return name
    problem = "is no average over documents" if benchmark.metric in listed else "is not among its metrics"
    asked = f"metric {benchmark.metric} {problem}" if benchmark.metric else "no metric is an average over documents"
    raise BadInput(
        f"benchmark {benchmark.name}: {asked}; usable are {', '.join(usable) or 'none'}; "
        "name one of these, or add to metric_list one with `aggregation: mean`"
    )


def names_of_means(task: Any) -> list[str]:
    """Return the metrics whose score is an average over documents."""
    return [name for name in task.aggregation() if _aggregation(task, name) in MEANS]


def direction(benchmark: Benchmark, task: Any, metric: str) -> bool:
    """Return whether more is better. Raises BadInput if the benchmark does not say."""
    higher_is_better = task.higher_is_better().get(metric)
    if higher_is_better is None:
        raise BadInput(f"benchmark {benchmark.name}: its YAML must say higher_is_better for {metric}")
    return bool(higher_is_better)


def table(benchmark: Benchmark, lm: Any, task: Any, metric: str, samples: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one row per (filter, doc_id).

    Documents that are NaN under a nanmean are left out: the metric does not apply to them.

    Raises: NotFinite if a log-likelihood or a value is NaN or infinite; BadInput if a document has no value, or none
        is left.
    """
    if _aggregation(task, metric) == "nanmean":
        samples = [s for s in samples if not (isinstance(s.get(metric), Real) and math.isnan(s[metric]))]
    if not samples:
        raise BadInput(f"benchmark {benchmark.name}: its {metric} is NaN for every document; choose another metric")
    return pd.DataFrame([_row(benchmark, lm, task, metric, sample) for sample in samples], columns=COLUMNS)


def metadata(
    benchmark: Benchmark, task: Any, metric: str, rows: pd.DataFrame, results: dict[str, Any]
) -> dict[str, Any]:
    """Return the metadata of `cfsd.evaluate.harness.score.Scores` that hold for all documents."""
    filters = chosen_first(benchmark.name, benchmark.filter, list(dict.fromkeys(rows["filter"])))
    samples = results["samples"][benchmark.name]
    left_out = len({sample["doc_id"] for sample in samples}) - int(rows["doc_id"].nunique())
    scores = {name: float(results["results"][benchmark.name][f"{metric},{name}"]) for name in filters}
    return {
        "metric": metric,
        "higher_is_better": direction(benchmark, task, metric),
        "chance": _chance(benchmark, task, metric, samples),
        "kind": _kind(task, metric, rows),
        "num_documents": int(rows["doc_id"].nunique()),
        "num_fewshot": int(task.get_config("num_fewshot")),
        "filters": filters,
        "score": scores[filters[0]],
        "scores": scores,
        "lm_eval": version("lm_eval"),
    } | ({"left_out": left_out} if _aggregation(task, metric) == "nanmean" else {})


def chosen_first(benchmark: str, chosen: str | None, filters: list[str]) -> list[str]:
    """Return `filters` with the chosen one first: of the others nothing but the score is kept. Raises BadInput."""
    if chosen is None:
        return filters
    if chosen not in filters:
        raise BadInput(f"benchmark {benchmark}: filter {chosen!r} is none of its own; allowed: {', '.join(filters)}")
    return [chosen, *(name for name in filters if name != chosen)]


def said_of_filters(filters: list[str]) -> list[str]:
    """Return a line where several filters read the answers, of which one counts."""
    first, *others = filters
    return [f"answers are as filter {first} reads them, not as {', '.join(others)} (`filter`)"] if others else []


def _aggregation(task: Any, metric: str) -> str:
    return getattr(task.aggregation()[metric], "__name__", "custom")


def is_perplexity(task: Any, metric: str) -> bool:
    """Return whether a metric's score is an average over log-likelihoods."""
    return _aggregation(task, metric) in PERPLEXITIES


def _kind(task: Any, metric: str, rows: pd.DataFrame) -> str:
    if is_perplexity(task, metric):
        return "perplexity"
    # The name counts too: a mean metric that is 0 or 1 everywhere by chance must not change kind between models.
    return "binary" if metric in ZERO_OR_ONE and rows["value"].isin([0.0, 1.0]).all() else "mean"


def _row(benchmark: Benchmark, lm: Any, task: Any, metric: str, sample: dict[str, Any]) -> dict[str, Any]:
    where = f"benchmark {benchmark.name}, document {sample['doc_id']}"
    responses = (part[0] if isinstance(part, tuple) else part for repeats in sample["resps"] for part in repeats)
    for number in responses:  # accuracy would hide a NaN, whose argmax is the first choice
        if isinstance(number, float) and not math.isfinite(number):
            raise NotFinite(f"{where}: the model's log-likelihood is {number}; look at its weights and its training")
    value, count, answer = sample.get(metric), 1, ""
    if isinstance(value, tuple):  # rolling: the log-likelihood, and a number of words or bytes
        value = value[0]
    value = check_number(where, metric, value)
    if not math.isfinite(value):
        raise NotFinite(f"{where}: its {metric} is {value}")
    if is_perplexity(task, metric):
        value, count = -value, sum(_num_tokens(lm, *arguments) for arguments in sample["arguments"])
        answer = f"{value:.2f} nats, {count} tokens"
    return {
        "benchmark": benchmark.name,
        "filter": sample["filter"],
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "metric": metric,
        "value": value,
        "count": count,
        "prompt": str(sample["arguments"][0][0]),
        "answer": answer or _answer(task, metric, sample),
    }


def check_number(where: str, metric: str, value: Any) -> float:
    """Return `value` as a number. Raises BadInput if it is none."""
    if not isinstance(value, Real | np.bool_):
        raise BadInput(f"{where}: its {metric} is {value!r}, not a number; choose another metric")
    return float(value)


def _num_tokens(lm: Any, context: str, continuation: str | None = None) -> int:
    """Return how many tokens lm-eval scored; a rolling request is one text, scored whole."""
    if continuation is None:
        return len(lm.tok_encode(context))
    if context:
        return len(lm._encode_pair(context, continuation)[1])
    tokens = lm.tok_encode(continuation, add_special_tokens=False)
    return len(tokens) - int(tokens[0] == lm.prefix_token_id)


def _answer(task: Any, metric: str, sample: dict[str, Any]) -> str:
    """Return the model's answer and the right one, for people to read."""
    answer, right = sample["filtered_resps"], sample["target"]
    if task.OUTPUT_TYPE == "multiple_choice":
        choices, right = _choices_and_right(task, sample)
        named = [choices[i] if isinstance(i, int) else str(i) for i in _as_list(right)]
        answer, right = choices[best_choice(metric, choices, answer)], " or ".join(named)
    elif len(answer) == 1:
        answer = answer[0]
    return f"{answer} [right: {right}]"


def _choices_and_right(task: Any, sample: dict[str, Any]) -> tuple[list[str], Any]:
    # With several inputs per document (winogrande) doc_to_text gives the right one's index.
    source = task.doc_to_text if task.multiple_input else task.doc_to_target
    return task.doc_to_choice(sample["doc"]), source(sample["doc"])


def best_choice(metric: str, choices: list[str], answers: list[tuple[float, bool]]) -> int:
    """Return the number of the choice that `metric` takes: the likeliest, by its length or what the prompt adds.

    For acc_mutual_info the likelihoods without a prompt follow those with it.
    """
    lengths = [1] * len(choices)
    if metric in ("acc_norm", "acc_bytes"):
        lengths = [len(choice if metric == "acc_norm" else choice.encode()) for choice in choices]
    likelihoods = np.array([likelihood for likelihood, _ in answers])
    alone = likelihoods[len(choices) :] if metric == "acc_mutual_info" else 0
    return int(np.argmax((likelihoods[: len(choices)] - alone) / lengths))


def _chance(benchmark: Benchmark, task: Any, metric: str, samples: list[dict[str, Any]]) -> float | None:
    """Return the expected score of guessing: the benchmark's, that of the YAML's metadata, or from the choices.

    Raises: BadInput if the benchmark gives one to a perplexity, which has none.
    """
    if is_perplexity(task, metric):  # the YAML's is of another of its metrics
        check_no_chance(benchmark.name, metric, benchmark.chance)
        return None
    stated = benchmark.chance if benchmark.chance is not None else (task.get_config("metadata") or {}).get("chance")
    if stated is not None:
        return float(stated)
    if metric not in CHOICE_ACCURACIES or task.OUTPUT_TYPE != "multiple_choice":
        return None
    if not all(sample.get(metric) in (0, 1) for sample in samples):  # a probability, as of truthfulqa_mc2
        return None
    pairs = [_choices_and_right(task, sample) for sample in samples]
    chance = float(np.mean([len(_as_list(right)) / len(choices) for choices, right in pairs]))
    return chance if chance < 1 else None


def check_no_chance(name: str, metric: str, chance: float | None) -> None:
    """Raise BadInput where the user gives a chance level to a perplexity."""
    if chance is not None:
        raise BadInput(
            f"benchmark {name}: chance is {chance}, but its {metric} is a perplexity, which guessing has no score of; "
            "take chance out, or choose another metric"
        )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
