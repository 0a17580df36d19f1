"""Tiny outputs of each stage, tied to its spec's version: code that computes something else must raise it.

python -m tests.test_golden        # writes tests/golden/*.json anew
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.filter.spec import FilterSpec
from cfsd.filter.stage import filter_rows
from cfsd.generate.spec import GenerateSpec, ProbeSpec
from cfsd.generate.stage import generate, probe
from cfsd.machine import Machine
from cfsd.mix.spec import MixSpec
from cfsd.mix.stage import mix
from cfsd.model.checkpoint import Checkpoint
from cfsd.model.fetching import fetch
from cfsd.spec import Spec
from cfsd.store.artifact import Artifact, Draft, Store
from cfsd.store.tables import read_rows
from cfsd.train.batches.loading import batches_of
from cfsd.train.batches.micro_batches import micro_batches_of
from cfsd.train.spec import TrainSpec

GOLDEN = Path(__file__).parent / "golden"
SPECS: dict[str, type[Spec]] = {
    "target": Target, "probe": ProbeSpec, "generate": GenerateSpec, "filter": FilterSpec, "mix": MixSpec,
    "train": TrainSpec,
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrst=:"
MACHINE = Machine(device="cpu", threads=1, sampling_rows=4)


def write_model(folder: Path) -> None:
    """Write a model whose weights are sines: no random generator of any library has a part in them."""
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", *LETTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=":"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() > 1:
                values = [0.4 * math.sin(1.7 * i * i + number) for i in range(parameter.numel())]
                parameter.copy_(torch.tensor(values).view_as(parameter))
    assert model.generation_config
    model.generation_config.eos_token_id = [1, 3, 21]  # several, so that texts end early and repeat
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Stages:
    """One small run of every stage; `outputs` are texts and numbers that no rounding changes."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "data")
        write_model(folder / "model")
        rows = [{"prompt": f"{a}{b}=", "response": f"{b}{a}"} for a in "abc" for b in "defgh"]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
        checkpoint = Checkpoint(kind="folder", path=str(folder / "model"))
        self.base = base = self.make("base", lambda draft: fetch(checkpoint, draft))
        wanted = Target(path=str(folder / "rows.jsonl"), held_out=5, seed=0, max_length=12)
        self.target = target = self.make("target", lambda draft: prepare(base, wanted, draft))
        look = ProbeSpec(rows=6, length=10, seed=0)
        self.probe = held = self.make("probe", lambda draft: probe(base, look, draft, MACHINE))
        law = GenerateSpec(rows=24, length=10, seed=0)
        corpus = self.make("corpus", lambda draft: generate(base, None, law, draft, MACHINE))
        rules = FilterSpec(duplicates=True, max_tokens=9)
        kept = self.make("kept", lambda draft: filter_rows(self.store.path(corpus), rules, draft))
        self.mixing = spec = MixSpec(target_rows=4, rehearsal_tokens=20, seed=0)
        folders = self.store.path(target), self.store.path(corpus)
        mixture = self.make("mixture", lambda draft: mix(*folders, spec, draft))
        self.outputs: dict[str, Any] = {
            "target": {part: self.rows(target, part, "token_ids", "supervised") for part in ("train", "held_out")},
            "probe": self.rows(held, "corpus", "token_ids", "finish_reason"),
            "generate": self.rows(corpus, "corpus", "token_ids", "finish_reason"),
            "filter": [self.rows(kept, "corpus", "row_id"), self.rows(kept, "rejects", "row_id", "reason")],
            "mix": self.rows(mixture, "mixture", "source", "token_ids", "supervised", "weight"),
            "train": self.training(mixture),
        }

    def make(self, kind: str, work: Callable[[Draft], None]) -> Artifact:
        return self.store.make(kind, "0" * 16, work)[0]

    def rows(self, artifact: Artifact, table: str, *columns: str) -> list[list[Any]]:
        found = read_rows(self.store.path(artifact), table, list(columns))
        return [[row[column] for column in columns] for row in found]

    def training(self, mixture: Artifact) -> list[Any]:
        """Return the global batches, and the coefficients of the first one in millionths."""
        data = batches_of(self.store, mixture, TrainSpec(epochs=2, seed=0), 64)
        first = [data.rows[i] for i in (*data.plan[0].target, *data.plan[0].rehearsal)]
        micro_batches = micro_batches_of(first, 40)
        return [[batch.target, batch.rehearsal] for batch in data.plan] + [
            [round(value * 1e6) for value in micro_batch.coefficient_BT.flatten().tolist()]
            for micro_batch in micro_batches
        ]


def verdict(stored: dict[str, Any], version: int, output: Any) -> str | None:
    """Return what is wrong, or None."""
    if stored["version"] == version:
        return None if stored["output"] == output else "cached artifacts would be stale: raise version"
    return f"version is {version}, golden is of {stored['version']}: run python -m tests.test_golden"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return Stages(tmp_path_factory.mktemp("golden")).outputs


@pytest.mark.parametrize("name", sorted(SPECS))
def test_output_changes_only_with_the_version(outputs: dict[str, Any], name: str) -> None:
    stored = json.loads((GOLDEN / f"{name}.json").read_text())
    problem = verdict(stored, SPECS[name].version, outputs[name])
    assert problem is None, f"{SPECS[name].__name__}: {problem}"


def test_the_outputs_say_enough_to_notice_a_change(outputs: dict[str, Any]) -> None:
    ends = {reason for _, reason in outputs["generate"]}
    assert ends == {"eos", "length"}
    assert outputs["probe"] != outputs["generate"][:6]
    kept, rejected = outputs["filter"]
    assert kept and len({reason for _, reason in rejected}) == 2


def test_a_change_without_a_new_version_is_told_apart_from_one_with_it() -> None:
    stored = {"version": 1, "output": [1]}
    assert verdict(stored, 1, [1]) is None
    assert "raise version" in str(verdict(stored, 1, [2]))
    assert "python -m tests.test_golden" in str(verdict(stored, 2, [2]))


def write_golden() -> None:
    GOLDEN.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        found = json.loads(json.dumps(Stages(Path(folder)).outputs))
    for name, output in found.items():
        (GOLDEN / f"{name}.json").write_text(_by_line({"version": SPECS[name].version, "output": output}))


def _by_line(value: dict[str, Any]) -> str:
    """Return JSON with one row to a line, so that a change is read in a diff."""
    return json.dumps(value).replace("]], [", "]],\n[").replace('"], [', '"],\n[').replace("1.0], [", "1.0],\n[") + "\n"


if __name__ == "__main__":
    write_golden()
