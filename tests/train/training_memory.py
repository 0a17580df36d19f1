"""Measure what real trainings need: python -m tests.train.training_memory FOLDER CASES, one JSON line per case.

Every case is trained in a fork of one process that has everything imported, after a very small training there: the
peak of resident memory above that is what the training took. Linux only.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
from transformers import LlamaConfig, LlamaForCausalLM

from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.stage import generate
from cfsd.machine import Machine, peak_memory
from cfsd.mix.spec import MixSpec
from cfsd.mix.stage import mix
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from cfsd.train.memory import Shapes
from cfsd.train.spec import TrainRequest, TrainSpec
from cfsd.train.trainer import fit
from tests.conftest import fetched, save_model

SMALL = {"shapes": Shapes(32, 1, 64, heads=2, kv_heads=2, vocabulary=64, tied=True)._asdict(), "spec": {}}
LENGTH = 128  # tokens per row, or a few less


def trained(store: Store, shapes: Shapes, machine: Machine, spec: TrainSpec) -> None:
    """Train a random Llama of `shapes` for two steps of two full micro-batches."""
    folder = save_model(store.home / "plain")
    tokens = json.loads((folder / "config.json").read_text())
    config = LlamaConfig(
        hidden_size=shapes.width, num_hidden_layers=shapes.layers, intermediate_size=shapes.intermediate,
        num_attention_heads=shapes.heads, num_key_value_heads=shapes.kv_heads, vocab_size=shapes.vocabulary,
        tie_word_embeddings=shapes.tied, max_position_embeddings=512,
        **{name: tokens[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    base = fetched(store, folder)
    rows = store.home / "rows.jsonl"
    count = machine.micro_batch_tokens // LENGTH
    lines = (
        json.dumps({"prompt": "a" + "b" * (i % 4), "response": "c" * (LENGTH - 7 - i // 4)})
        for i in range(4 * count + 4)
    )
    rows.write_text("".join(f"{line}\n" for line in lines))
    target = Target(path=str(rows), held_out=4, seed=0)
    request = TrainRequest(
        home=store.home, base=base, mixture=mixture(store, base, target, 2 * count), spec=spec, machine=machine
    )

    def work(draft: Draft) -> None:
        draft.metadata |= fit(draft.folder, request)

    store.make("model", "trained", work)


def mixture(store: Store, base: Artifact, target: Target, rows: int) -> Artifact:
    """Return the target alone, in batches of `rows`."""
    prepared = store.make("target", key_of("prepare", base, target), lambda draft: prepare(base, target, draft))[0]
    none, machine = GenerateSpec(rows=0, seed=0), Machine(device="cpu")
    corpus = store.make("corpus", "0" * 16, lambda draft: generate(base, None, none, draft, machine))[0]
    folders = store.path(prepared), store.path(corpus)
    return store.make("mixture", "mixed", lambda draft: mix(*folders, MixSpec(target_rows=rows, seed=0), draft))[0]


def measured(store: Store, case: dict[str, Any]) -> int:
    """Return the bytes that a training took, in a process of its own."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        code = 1
        try:
            train_case(Store(store.home / "warm"), case | SMALL)  # a fork maps its libraries anew, page by page
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            before = psutil.Process().memory_info().rss
            train_case(store, case)
            os.write(writing, str(peak_memory() - before).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    assert os.waitpid(child, 0)[1] == 0
    return int(text)


def train_case(store: Store, case: dict[str, Any]) -> None:
    """Train as one case says."""
    machine = Machine(
        device="cpu", threads=1, checkpoint_steps=1000,
        micro_batch_tokens=case["tokens"], gradient_checkpointing=case["checkpointing"],
    )  # fmt: skip
    trained(store, Shapes(**case["shapes"]), machine, TrainSpec.model_validate({"seed": 0} | case["spec"]))


if __name__ == "__main__":
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for number, case in enumerate(cases):
        print(json.dumps({"case": number, "bytes": measured(Store(folder / str(number)), case)}), flush=True)
