"""Our adapter to lm-eval against lm-eval by hand: documents per second and memory, on the same model and documents.

make bench PART=evaluate                             SmolLM2-135M, about 8 minutes, alone on the machine
python -m benchmarks.evaluate --model FOLDER         the same for a transformers folder
python -m benchmarks.evaluate --quick                tries the benchmark itself; its numbers mean nothing

By hand: `lm_eval.simple_evaluate` with HFLM, at its default batch size of 1 and at the best of those that are tried.
Float32, two threads. Every score must be the same. The making of the task is in the seconds, the model's loading not.
"""

import argparse
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks._model import ROOT, environment, fetched
from benchmarks._result import RESULTS, Worker, row, tell
from cfsd.evaluate.benchmark_files import BUNDLED

RUN = [sys.executable, "-m", "benchmarks._evaluate_run"]
THREADS = 2
DEFAULT = "1"  # lm-eval's batch size
BATCHES = ("8", "32", "64")
TOLERANCE = 1e-4  # of a whole text's nats, relative
WRITE = {
    "task": "written",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "technical_english.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{text[:160]}}",
    "doc_to_target": "{{text[160:170]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
# in a file: an argument would not count where the file that is included says 0
EXAMPLES = {"include": "plausibility.yaml", "task": "after_examples", "num_fewshot": 5}
TASKS: dict[str, dict[str, Any]] = {
    "two sentences each": {"name": "agreement", "limit": 50},
    "one-word choices": {"name": "facts", "limit": 60},
    "choices after 5 examples": {"name": "after_examples", "limit": 24},
    "whole texts": {"name": "technical_english", "limit": 20},
    "24 written tokens": {"name": "written", "limit": 12},
    "64 written tokens in a chat": {"name": "instructions", "limit": 48},
}


class Score(NamedTuple):
    """One contender's scoring of one task."""

    task: str
    contender: str
    documents_per_second: float
    peak_mb: float


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a transformers folder; default: the packaged SmolLM2-135M")
    parser.add_argument("--quick", action="store_true", help="few documents, to try the benchmark itself")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cfsd-evaluate-") as folder:
        data = Path(folder)
        model = fetched(data, given.model, THREADS)
        benchmarks = _benchmarks(data / "benchmarks", few=given.quick)
        _bench(model, benchmarks, 1 if given.quick else 3, data if given.quick else RESULTS, started)


def _benchmarks(folder: Path, *, few: bool) -> dict[str, dict[str, Any]]:
    """Write the benchmarks' files into one folder, and return what is to be scored."""
    shutil.copytree(BUNDLED, folder)
    for task in (WRITE, EXAMPLES):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return {name: {**task, "folder": str(folder), "limit": 4 if few else task["limit"]} for name, task in TASKS.items()}


def _bench(model: Path, tasks: dict[str, dict[str, Any]], rounds: int, results: Path, started: float) -> None:
    found: list[Score] = []
    best: dict[str, str] = {}
    with ExitStack() as stack:
        workers = {role: _worker(stack, role, model) for role in ("ours", DEFAULT, *BATCHES)}
        for name, task in tasks.items():
            best[name], scores = _contest(workers, name, task, rounds)
            found += scores
            print(f"{time.monotonic() - started:6.0f} s  {name}", flush=True)
    notes = [
        "documents per second and peak resident MB; by hand at its default batch size of 1, and at its best of "
        + ", ".join(f"{best[name]} ({name})" for name in tasks),
        f"{THREADS} threads, {rounds} rounds in turn after one that does not count; every document has the same score; "
        f"{(time.monotonic() - started) / 60:.1f} minutes",
    ]
    table = [entry for name in tasks for entry in _rows(found, name, best[name])]
    tell("evaluate", table, notes, folder=results, best=best, measured=[score._asdict() for score in found])


def _worker(stack: ExitStack, role: str, model: Path) -> Worker:
    log = stack.enter_context((model.parent / f"{role}.log").open("w"))  # what lm-eval says of each batch
    command = [*RUN, role, str(model)]
    return stack.enter_context(Worker(role, command, cwd=ROOT, env=environment(model.parent, THREADS), stderr=log))


def _contest(workers: dict[str, Worker], name: str, task: dict[str, Any], rounds: int) -> tuple[str, list[Score]]:
    """Return the best batch size of lm-eval, and the scores of ours, its default and its best, in turn."""
    warm = {role: worker.ask("score", **task) for role, worker in workers.items()}
    _check_equal(name, {role: answer["values"] for role, answer in warm.items()})
    best = min(BATCHES, key=lambda role: warm[role]["seconds"])
    scores = []
    for _ in range(rounds):
        for role in ("ours", DEFAULT, best):
            answer = workers[role].ask("score", **task)
            scores.append(Score(name, role, answer["documents"] / answer["seconds"], answer["peak_mb"]))
    return best, scores


def _check_equal(name: str, values: dict[str, list[float]]) -> None:
    for role, theirs in values.items():
        apart = [abs(a - b) / max(1, abs(b)) for a, b in zip(values["ours"], theirs, strict=True)]
        if max(apart) > TOLERANCE:
            raise SystemExit(f"{name}: a document's score differs from that at batch size {role} by {max(apart):.1e}")


def _rows(found: list[Score], task: str, best: str) -> list[dict[str, Any]]:
    """Return rates against the default and against the best, then memory against the best."""
    of = {role: [s for s in found if (s.task, s.contender) == (task, role)] for role in ("ours", DEFAULT, best)}
    rates = {role: [score.documents_per_second for score in scores] for role, scores in of.items()}
    peaks = {role: [score.peak_mb for score in scores] for role, scores in of.items()}
    return [
        row(f"{task}: documents/s, batch size {DEFAULT}", rates["ours"], rates[DEFAULT], ">= 1.5"),
        row(f"{task}: documents/s, batch size {best}", rates["ours"], rates[best], ">= 1"),
        row(f"{task}: peak MB, batch size {best}", peaks["ours"], peaks[best], "<= 1"),
    ]


if __name__ == "__main__":
    main()
