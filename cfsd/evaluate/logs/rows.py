"""From the samples that lm-eval logged to our rows and metadata, as `cfsd.evaluate.harness` has them of its own runs.

Nothing of lm-eval is needed. Which metrics are averages over documents is not believed but computed again: a metric
counts if its values come to the score that lm-eval reported.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa

from cfsd.errors import BadInput, NotFinite
from cfsd.evaluate.harness.rows import (
    CHOICE_ACCURACIES,
    COLUMNS,
    ZERO_OR_ONE,
    best_choice,
    check_no_chance,
    chosen_first,
    said_of_filters,
)
from cfsd.evaluate.logs.folder import Log
from cfsd.store.artifact import Draft
from cfsd.store.tables import write_shard

FIELDS = {
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash",
    "target_hash",
}  # fmt: skip
PREFERRED = ("acc", "exact_match")
CHOICES = re.compile(r"\d{1,4}|\[\d{1,4}(, \d{1,4})*\]")  # the numbers of the right ones, as lm-eval writes them
TOLERANCE = 1e-6  # relative, of a score that is computed again


class Asked(NamedTuple):
    """Digests of what a model was asked."""

    document: str
    prompt: str
    target: str


class Logged(NamedTuple):
    """Rows with the columns COLUMNS, metadata as of `cfsd.evaluate.harness.score.Scores`, and what was asked.

    Of a perplexity the tokens are not known: `per` in the metadata says whether `count` is of words, bytes or
    documents. `asked` is by (filter, doc_id), with the documents to which the metric does not apply.
    """

    rows: list[dict[str, Any]]
    metadata: dict[str, Any]
    asked: dict[tuple[str, Any], Asked]


class _Metric(NamedTuple):
    """How a metric's score follows from documents: mean, nanmean, or a perplexity per word, byte or document."""

    name: str
    kind: str
    per: str = ""


def write_scores(log: Log, draft: Draft) -> None:
    """Write one row per document as the `scores` table. Raises BadInput and NotFinite as `read`."""
    logged = read(log)
    table = pa.Table.from_pandas(pd.DataFrame(logged.rows, columns=COLUMNS), preserve_index=False)
    write_shard(draft.folder, "scores", 0, table)
    draft.metadata |= {"benchmark": log.name, **logged.metadata}
    draft.journal.metrics(0, {f"eval/{log.name}/{logged.metadata['metric']}": float(logged.metadata["score"])})


def read(log: Log) -> Logged:
    """Return what a log says, document by document.

    Raises: BadInput for a line that is no sample of lm-eval's, documents that are missing or come twice, and a log of
        which no metric can be computed again; NotFinite for a value that is NaN or infinite.
    """
    samples = list(_samples(log))
    _check_documents(log, samples)
    found = [(name, _kind(name, log, samples)) for name in _metrics(log, samples)]
    _check_count(log, samples, [name for name, kind in found if kind])
    metric = _primary(log, found)
    applies = [s for s in samples if metric.kind != "nanmean" or not math.isnan(_number(s[metric.name]) or 0)]
    rows = [_row(log, metric, sample) for sample in applies]
    asked = {(s["filter"], s["doc_id"]): _asked(s) for s in samples}
    unusable = [name for name, kind in found if kind is None]
    left_out = len({s["doc_id"] for s in samples}) - len({row["doc_id"] for row in rows})
    return Logged(rows, _metadata(log, metric, applies, rows, left_out, unusable), asked)


def _samples(log: Log) -> Iterator[dict[str, Any]]:
    """Yield the lines with the name of their filter, which lm-eval 0.4.5 leaves out, in the order of filters."""
    filters, seen = log.conditions.filters(), Counter[Any]()
    with Path(log.path).open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{log.path}, line {number}"
            sample = _sample(where, line)
            place, seen[sample["doc_id"]] = seen[sample["doc_id"]], seen[sample["doc_id"]] + 1
            yield {"filter": filters[min(place, len(filters) - 1)], **sample, "where": where}


def _sample(where: str, line: bytes) -> dict[str, Any]:
    try:
        sample = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where} is no JSON ({error}); it was cut short or changed: copy it again") from error
    needed = {"doc_id": int, "doc": object, "target": object, "arguments": dict, "filtered_resps": list}
    given = sample if isinstance(sample, dict) else {}
    wrong = [n for n, kind in needed.items() if n not in given or not isinstance(given[n], kind)]
    if wrong or not all(isinstance(request, dict) and request for request in sample["arguments"].values() or [None]):
        raise BadInput(
            f"{where} is no sample of lm-eval 0.4.3 or later ({', '.join(wrong) or 'arguments'} missing or of another "
            "kind); measure again with --log_samples"
        )
    sample.pop("resps", None)  # may be huge, as the document
    document = json.dumps(sample.pop("doc"), indent=2, ensure_ascii=False)  # as lm-eval digests it
    return {"doc_hash": _sha(document), **sample}


def _check_documents(log: Log, samples: list[dict[str, Any]]) -> None:
    times = Counter((sample["filter"], sample["doc_id"]) for sample in samples)
    if twice := next((key for key, count in times.items() if count > 1), None):
        raise BadInput(
            f"{log.path}: document {twice[1]} comes more than once (filter {twice[0]}); give a log of one run"
        )
    if not samples:
        raise _cut_short(log, 0)


def _check_count(log: Log, samples: list[dict[str, Any]], usable: list[str]) -> None:
    """Raise BadInput where documents are missing.

    With --samples lm-eval before 0.4.13 counts all documents of the task, although it scored some. Then the scores
    speak for a whole log, unless every document has the same one.
    """
    found = len({sample["doc_id"] for sample in samples})
    if log.documents in (None, found):
        return
    speak = any(len({str(sample[name]) for sample in samples}) > 1 for name in usable)
    if found > log.documents or not _counts_all(log) or not speak:
        raise _cut_short(log, found)


def _counts_all(log: Log) -> bool:
    return [int(part) for part in log.lm_eval.split(".") if part.isdigit()] < [0, 4, 13]


def _cut_short(log: Log, found: int) -> BadInput:
    return BadInput(
        f"{log.path} holds {found} documents, the results beside it are of {log.documents or 'some'}; it was cut "
        "short: copy it again, or run lm-eval again"
    )


def _metrics(log: Log, samples: list[dict[str, Any]]) -> list[str]:
    own = [name for name in samples[0] if name not in FIELDS | {"where"}]
    return [*(name for name in log.higher_is_better if name in own), *(n for n in own if n not in log.higher_is_better)]


def _kind(name: str, log: Log, samples: list[dict[str, Any]]) -> _Metric | None:
    """Return how the reported scores follow from the samples, the same way for all filters; None if in no known way."""
    found: _Metric | None = None
    for own in dict.fromkeys(sample["filter"] for sample in samples):
        values = [sample.get(name) for sample in samples if sample["filter"] == own]
        reported = _number(log.reported.get(f"{name},{own}"))
        kind = None if reported is None else _kind_of(name, values, reported)
        if kind is None or found not in (None, kind):
            return None
        found = kind
    return found


def _kind_of(name: str, values: list[Any], reported: float) -> _Metric | None:
    numbers = [number for value in values if (number := _number(value)) is not None]
    if len(numbers) == len(values):
        there = [number for number in numbers if not math.isnan(number)]
        if _is_close(fmean(numbers), reported):
            return _Metric(name, "mean")
        if there and _is_close(fmean(there), reported):
            return _Metric(name, "nanmean")
        return _Metric(name, "perplexity", "document") if _is_close(_exp(-fmean(numbers)), reported) else None
    pairs = [tuple(map(_number, value)) for value in values if isinstance(value, list) and len(value) == 2]
    if numbers or len(pairs) < len(values) or any(None in pair for pair in pairs):
        return None
    nats = -sum(pair[0] or 0 for pair in pairs) / (sum(pair[1] or 0 for pair in pairs) or math.nan)
    if _is_close(_exp(nats), reported) or _is_close(nats / math.log(2), reported):
        return _Metric(name, "perplexity", "word" if name.startswith("word") else "byte")
    return None


def _primary(log: Log, found: list[tuple[str, _Metric | None]]) -> _Metric:
    usable = {name: kind for name, kind in found if kind}
    if log.metric:
        chosen = usable.get(log.metric)
    else:
        chosen = next((usable[name] for name in (*PREFERRED, *usable) if name in usable), None)
    if chosen is None:
        others = ", ".join(usable) or "none"
        what = f"{log.metric} of {log.path} is no" if log.metric else f"no metric of {log.path} is an"
        raise BadInput(
            f"benchmark {log.name}: {what} average over documents that comes to the score in the results beside it; "
            f"usable are {others}: choose one (--set evaluate.benchmarks=[{{name: {log.name}, metric: …}}]), leave the "
            "benchmark out, or copy both files again"
        )
    if _is_better_higher(log, chosen.name) is None:
        raise BadInput(
            f"benchmark {log.name}: its results do not say whether more of {chosen.name} is better; add "
            "higher_is_better to the metric_list of its YAML and measure again, or choose another metric"
        )
    return chosen


def _is_better_higher(log: Log, metric: str) -> bool | None:
    """Return whether more of a metric is better; None where the log does not say.

    HumanEval names a function that computes pass@1: it has the direction of all metrics that are listed.
    """
    listed = set(log.higher_is_better.values())
    return log.higher_is_better.get(metric) if metric in log.higher_is_better or len(listed) != 1 else listed.pop()


def _row(log: Log, metric: _Metric, sample: dict[str, Any]) -> dict[str, Any]:
    requests = [list(sample["arguments"][name].values()) for name in sample["arguments"]]
    value, count = sample[metric.name], 1.0
    if isinstance(value, list):
        value, count = value
    number = _number(value)
    for likelihood in _likelihoods(sample["filtered_resps"]) if log.conditions.output_type != "generate_until" else ():
        if likelihood is not None and not math.isfinite(likelihood):  # accuracy would hide a NaN
            raise NotFinite(f"{sample['where']}: the model's log-likelihood is {likelihood}; look at its weights")
    if number is None or not math.isfinite(number):
        raise NotFinite(f"{sample['where']}: its {metric.name} is {value}")
    if metric.kind == "perplexity":
        number = -number
        answer = f"{number:.2f} nats" + (f", {count:.0f} {metric.per}s" if metric.per != "document" else "")
    else:
        answer = _answer(log, metric.name, requests, sample)
    return {
        "benchmark": log.name,
        "filter": sample["filter"],
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "metric": metric.name,
        "value": number,
        "count": int(count),
        "prompt": str(requests[0][0]),
        "answer": answer,
    }


def _likelihoods(answers: list[Any]) -> list[float | None]:
    return [_number(answer[0] if isinstance(answer, list) and answer else answer) for answer in answers]


def _answer(log: Log, metric: str, requests: list[list[Any]], sample: dict[str, Any]) -> str:
    """Return the model's answer and the right one, for people to read."""
    answer, right = sample["filtered_resps"], str(sample["target"])
    if log.conditions.output_type == "multiple_choice":
        choices, numbers = _choices(requests), [n for n in _likelihoods(answer) if n is not None]
        if len(numbers) >= len(choices):
            answer = choices[best_choice(metric, choices, [(number, False) for number in numbers])]
        right = " or ".join(choices[i] if isinstance(i, int) else str(i) for i in _right(right, len(choices)))
    elif len(answer) == 1:
        answer = answer[0]
    return f"{answer} [right: {right}]"


def _choices(requests: list[list[Any]]) -> list[str]:
    """Return the texts of the choices: the continuations or, where those are all the same, what stands before them."""
    continuations = [str(request[-1]).strip() for request in requests]
    texts = continuations if len(set(continuations)) > 1 else [str(request[0]) for request in requests]
    half = len(texts) // 2  # acc_mutual_info asks for every choice once more, without the question
    is_twice = len(texts) % 2 == 0 and texts[:half] == texts[half:] and bool(half)
    return texts[:half] if is_twice and all(request[0] == "" for request in requests[half:]) else texts


def _right(target: str, choices: int) -> list[Any]:
    """Return the numbers of the right choices, or the right text as it is."""
    if not CHOICES.fullmatch(target):
        return [target]
    values = [int(number) for number in re.findall(r"\d+", target)]
    return values if all(value < choices for value in values) else [target]


def _metadata(
    log: Log, metric: _Metric, samples: list[dict[str, Any]], rows: list[dict[str, Any]], left_out: int,
    unusable: list[str],
) -> dict[str, Any]:  # fmt: skip
    filters = chosen_first(log.name, log.filter, list(dict.fromkeys(row["filter"] for row in rows)))
    scores = {name: _number(log.reported[f"{metric.name},{name}"]) for name in filters}
    is_binary = metric.name in ZERO_OR_ONE and all(row["value"] in (0.0, 1.0) for row in rows)
    remark = f"{metric.name} is compared; {', '.join(unusable)} cannot be, being no average of a number per document"
    remarks = [*([remark] if unusable else []), *said_of_filters(filters)]
    scored = len({sample["doc_id"] for sample in samples}) + left_out
    if log.documents not in (None, scored):
        remarks.append(f"{scored} of {log.documents} documents are in the log, whose scores are of these (--samples)")
    return {
        "metric": metric.name,
        "higher_is_better": bool(_is_better_higher(log, metric.name)),
        "chance": _chance(log, metric, samples),
        "kind": metric.kind if metric.kind == "perplexity" else "binary" if is_binary else "mean",
        "num_documents": len({row["doc_id"] for row in rows}),
        "num_fewshot": log.conditions.num_fewshot or 0,
        "filters": filters,
        "score": scores[filters[0]],
        "scores": scores,
        "lm_eval": log.lm_eval,
        **({"per": metric.per} if metric.kind == "perplexity" else {}),
        **({"left_out": left_out} if left_out or metric.kind == "nanmean" else {}),
        **({"chat_template": True} if log.conditions.chat_template else {}),
        **({"remarks": remarks} if remarks else {}),
    }  # fmt: skip


def _chance(log: Log, metric: _Metric, samples: list[dict[str, Any]]) -> float | None:
    """Return the expected score of guessing: the user's, that of the task's metadata, or from the choices.

    Raises: BadInput if the user gives one to a perplexity, which has none.
    """
    if metric.kind == "perplexity":  # the metadata's is of another of its metrics
        check_no_chance(log.name, metric.name, log.chance)
        return None
    stated = log.chance if log.chance is not None else log.known_chance
    if stated is not None:
        return float(stated)
    if metric.name not in CHOICE_ACCURACIES or log.conditions.output_type != "multiple_choice":
        return None
    if not all(_number(sample.get(metric.name)) in (0, 1) for sample in samples):  # a probability, as of truthfulqa_mc2
        return None
    chances = []
    for sample in samples:
        count = len(_choices([list(request.values()) for request in sample["arguments"].values()]))
        chances.append(len(_right(str(sample["target"]), count)) / count)
    chance = fmean(chances)
    return chance if chance < 1 else None


def _number(value: Any) -> float | None:
    """Return a number, also one that lm-eval wrote as a text since it was numpy's; None for anything else."""
    if isinstance(value, str):
        value = {"True": 1.0, "False": 0.0}.get(value, value)
    try:
        return float(value) if isinstance(value, bool | int | float | str) else None
    except ValueError:
        return None


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-9) or (math.isnan(one) and math.isnan(other))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _asked(sample: dict[str, Any]) -> Asked:
    prompt = sample.get("prompt_hash") or _sha(next(iter(next(iter(sample["arguments"].values())).values())))
    return Asked(sample["doc_hash"], prompt, sample.get("target_hash") or _sha(sample["target"]))


def _sha(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()
