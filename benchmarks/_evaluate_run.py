"""One contender of the benchmark of `evaluate`, in a process of its own so that its peak memory is its own.

python -m benchmarks._evaluate_run ours|N MODEL_FOLDER      jobs in, answers out: one JSON a line; N: a batch size
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.harness.score import score
from cfsd.machine import peak_memory
from cfsd.model.loading import load_model, load_tokenizer

Answer = dict[str, Any]
PEAK = Path("/proc/self/clear_refs")  # of Linux


def main() -> None:
    """Do the jobs that come on standard input."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    role, folder = sys.argv[1], Path(sys.argv[2])
    contender = Contender(role, folder)
    for line in sys.stdin:
        job = json.loads(line)
        job.pop("do")
        PEAK.write_text("5")  # forget the peak of before
        answer = contender.scores(Benchmark.model_validate(job))
        answer["peak_mb"] = peak_memory() / 2**20
        print(json.dumps(answer), flush=True)


class Contender:
    """Our adapter, or lm-eval's own model class at one batch size."""

    def __init__(self, role: str, folder: Path) -> None:
        """Load the model in `folder`."""
        self.role, self.model = role, load_model(folder, "cpu", "float32").eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(folder)

    def scores(self, benchmark: Benchmark) -> Answer:
        """Score the benchmark: seconds, the making of the task included, and what each document got."""
        started = time.perf_counter()
        values = self._ours(benchmark) if self.role == "ours" else self._peer(benchmark, int(self.role))
        return {"seconds": time.perf_counter() - started, "documents": len(values), "values": values}

    def _ours(self, benchmark: Benchmark) -> list[float]:
        scores = score(self.model, self.tokenizer, benchmark)
        return [float(value) for value in scores.rows["value"]]

    def _peer(self, benchmark: Benchmark, batch_size: int) -> list[float]:
        """Score as people do by hand; lm-eval looks for data in the working directory."""
        assert benchmark.folder
        os.chdir(benchmark.find().path.parent)
        manager = TaskManager(include_path=benchmark.folder, include_defaults=False)
        lm = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=batch_size)
        found: Any = simple_evaluate(
            model=lm, tasks=[benchmark.name], task_manager=manager, limit=benchmark.limit,
            num_fewshot=benchmark.num_fewshot, bootstrap_iters=0, apply_chat_template=benchmark.is_chat(),
        )  # fmt: skip
        return [_value(sample) for sample in found["samples"][benchmark.name]]


def _value(sample: dict[str, Any]) -> float:
    """Return the first metric of a document, of a whole text its negative log-likelihood."""
    value = next(sample[name] for name in sample["metrics"])
    return -float(value[0]) if isinstance(value, tuple) else float(value)


if __name__ == "__main__":
    main()
