"""One contender of the training benchmark, in a process of its own so that its peak memory is its own.

python -m benchmarks._training_run prepare DATA PLAN            makes model, corpus and mixtures; prints their sizes
python -m benchmarks._training_run ours|peer DATA SETTINGS      jobs in, answers out: one JSON a line
python -m benchmarks._training_run bound DATA                   likewise
python -m benchmarks._training_run tuned|tail DATA              see benchmarks/_training_tail.py
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer

from benchmarks import _training_tail
from benchmarks._bound import limit, skeleton, training_flops
from benchmarks._training_bench import LEARNING_RATE, NEVER, Answer, Bench, request_of
from cfsd.comparison import Comparison
from cfsd.data.stage import prepare
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.stage import generate
from cfsd.machine import Machine, peak_memory
from cfsd.mix.spec import MixSpec
from cfsd.mix.stage import mix
from cfsd.model.checkpoint import Checkpoint
from cfsd.model.fetching import fetch
from cfsd.model.loading import load_model, load_tokenizer
from cfsd.store.artifact import Artifact, Draft, Store
from cfsd.train.batches.loading import batches_of
from cfsd.train.spec import TrainSpec
from cfsd.train.trainer import fit

DEMO = Path(__file__).parents[1] / "deployments" / "recipes" / "demo.yaml"
TOP, MAX_TOP = 64, 256


def main() -> None:
    """Do what the command line says; only answers go to standard output."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    role, data, rest = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    say = _say_alone()
    if role == "prepare":
        say(_prepare(data, json.loads(rest[0])))
    elif role == "bound":
        for line in sys.stdin:
            say(_bound(data, **json.loads(line)))
    elif role in ("tuned", "tail"):
        say(getattr(_training_tail, role)(data))
    else:
        _contend(role, data, json.loads(rest[0]), say)


def _contend(role: str, data: Path, settings: Answer, say: Any) -> None:
    gate = Gate(say)
    callbacks: list[Any] = transformers_trainer.DEFAULT_CALLBACKS
    callbacks.append(gate)  # the same clock for both, wherever they make a Trainer
    try:
        _ours(data, settings) if role == "ours" else _peer(data, settings)
    except Exception as error:
        if not gate.left:  # no job is under way: the answer is to the next one
            sys.stdin.readline()
        say({"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})


def _say_alone() -> Any:
    """Return what writes an answer; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda answer: print(json.dumps(answer), file=answers, flush=True)


class Gate(TrainerCallback):
    """Lets a Trainer take as many steps as a job asks for, and answers with the seconds of each.

    A step lasts from the moment its batch is there to the moment that the next one is. `losses` are the trainer's own.
    """

    def __init__(self, say: Any) -> None:
        """Answer with `say`."""
        self.say, self.left = say, 0
        self.started = 0.0
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let the parent's SIGTERM end this process, whatever the trainer made of it."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End a step and the job, if it has its steps; then wait for the next one."""
        self._note()
        if not self.left:
            self.left = json.loads(sys.stdin.readline())["steps"]
        self.started = time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Keep the step's loss."""
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the last step."""
        self._note()

    def _note(self) -> None:
        if not self.started or not self.left:
            return
        self.seconds.append(time.perf_counter() - self.started)
        self.left -= 1
        if not self.left:
            peak = peak_memory() / 2**20
            self.say({"seconds": self.seconds, "losses": self.losses, "peak_mb": peak})
            self.seconds, self.losses = [], []


def _prepare(data: Path, plan: Answer) -> Answer:
    """Make everything by the stages of the project, as the demo's recipe says."""
    store, recipe = Store(data), Comparison.load(DEMO).recipe
    checkpoint = Checkpoint(kind="folder", path=plan["model"]) if plan["model"] else Checkpoint(kind="smollm2")
    base, _ = store.make("model", "base", lambda draft: fetch(checkpoint, draft))
    target, _ = store.make("target", "target", lambda draft: prepare(base, recipe.target, draft))

    def sampled(name: str, rows: int, top: int, seed: int) -> Artifact:
        distribution = GenerateSpec(rows=rows, length=plan["length"], top_logprobs=top, seed=seed)
        return store.make("corpus", name, lambda draft: generate(base, None, distribution, draft, Machine()))[0]

    def mixed(name: str, spec: MixSpec) -> Artifact:
        def work(draft: Draft) -> None:
            mix(store.path(target), store.path(corpus), spec, draft)

        return store.make("mixture", name, work)[0]

    corpus = sampled("corpus", plan["rows"], TOP, 0)
    probe = sampled("probe", plan["probe_rows"], MAX_TOP, 1)
    made = {"base": base, "corpus": corpus, "probe": probe, "mixture": mixed("mixture", recipe.mix)}
    made["single"] = mixed("single", recipe.mix.model_copy(update={"target_rows": 1, "rehearsal_tokens": 1}))
    (data / "bench.json").write_text(json.dumps({name: found.model_dump(mode="json") for name, found in made.items()}))
    return {name: _counts(Bench.at(data), name) for name in ("mixture", "single")}


def _counts(bench: Bench, mixture: str) -> list[dict[str, int]]:
    """Return the tokens of each step: in the target's loss, in the rehearsal's, and all."""
    counts = []
    for rows in _rows_by_batch(bench, mixture):
        parts = {"target": 0, "rehearsal": 0, "tokens": sum(len(row.token_ids) for row in rows)}
        for row in rows:
            parts["target" if row.source == "target" else "rehearsal"] += sum(row.supervised)
        counts.append(parts)
    return counts


def _rows_by_batch(bench: Bench, mixture: str) -> list[list[Any]]:
    batches = batches_of(bench.store, getattr(bench, mixture), _spec({}), NEVER)
    return [[batches.rows[i] for i in (*batch.target, *batch.rehearsal)] for batch in batches.plan]


def _spec(settings: Answer) -> TrainSpec:
    given = {"learning_rate": LEARNING_RATE, "precision": "float32", "seed": 0, **settings}
    return TrainSpec.model_validate(given)


def _ours(data: Path, settings: Answer) -> None:
    folder = data / "runs" / settings["name"]
    folder.mkdir(parents=True)
    mixture, machine = settings.get("mixture", "mixture"), settings.get("machine", {})
    fit(folder, request_of(Bench.at(data), _spec(settings["train"]), mixture, **machine))


def _peer(data: Path, settings: Answer) -> None:
    """Train by TRL's SFTTrainer on the same batches; its defaults stay, but for precision and `settings`."""
    from datasets import Dataset

    trl: Any = import_module("trl")
    bench = Bench.at(data)
    folder = bench.store.path(bench.base)
    layout: str = settings["layout"]
    batches = _rows_by_batch(bench, settings.get("mixture", "mixture"))
    parts = [_as_dataset(batch, packed=layout == "packed") for batch in batches]
    config = trl.SFTConfig(
        output_dir=str(data / "runs" / settings["name"]),
        max_steps=len(batches),
        per_device_train_batch_size=max(map(len, parts)),
        learning_rate=settings.get("learning_rate", LEARNING_RATE),
        gradient_checkpointing=settings["checkpointing"],
        packing=layout == "packed",
        padding_free=layout == "padding-free",
        max_length=None if layout == "padding-free" else 1024,
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=False, use_cpu=True, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=0,
    )  # fmt: skip

    class InOrder(trl.SFTTrainer):  # type: ignore[misc]
        """Takes the rows in our order, in batches of our sizes."""

        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                self.train_dataset, batch_sampler=list(_spans(map(len, parts))), collate_fn=self.data_collator
            )

    trainer = InOrder(
        model=load_model(folder, "cpu", "float32"), args=config, processing_class=load_tokenizer(folder),
        train_dataset=Dataset.from_list([row for part in parts for row in part]),
    )  # fmt: skip
    trainer.train()


def _as_dataset(rows: list[Any], *, packed: bool) -> Any:
    from datasets import Dataset

    labels = [[t if s else -100 for t, s in zip(row.token_ids, row.supervised, strict=True)] for row in rows]
    found = Dataset.from_dict({"input_ids": [row.token_ids for row in rows], "labels": labels})
    return import_module("trl").pack_dataset(found, 1024, "bfd") if packed else found


def _spans(lengths: Any) -> Iterator[list[int]]:
    first = 0
    for length in lengths:
        yield list(range(first, first + length))
        first += length


def _bound(data: Path, tokens: int, do: str = "rate") -> Answer:
    """Return the best measured rate of matrix products, and what training takes of them."""
    bench = Bench.at(data)
    model = skeleton(bench.store.path(bench.base))
    body, head = training_flops(model)
    return {"gflops": limit(model, tokens).gflops, "body": body, "head": head}


if __name__ == "__main__":
    main()
