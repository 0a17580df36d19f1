"""What the study of methods tries: every method with its strengths, one table for both studies."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._result import RESULTS
from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.overrides import override, read_yaml, validated
from cfsd.recipe import Recipe

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "deployments" / "recipes"
TINY_DOCUMENTS = 6000  # of the tiny model's pretraining; a study takes 1500 rows of them
NEW_SKILL, TAKEN_SKILL = "rot", "rev"
PLAIN, RATE = "finetune", "train.learning_rate"
Changes = dict[str, Any]  # dotted field of the recipe -> value


class Method(NamedTuple):
    """One way of training: what sets it apart, and its strengths by name, weakest hold on the base first."""

    changes: Changes
    strengths: dict[str, Changes]


class Study(NamedTuple):
    """A recipe, the methods tried on it, and how the budgets' runs differ from it."""

    name: str
    content: dict[str, Any]  # of the recipe
    methods: dict[str, Method]
    seeds: tuple[int, ...]  # reported; seed 0 chooses strengths and is not among them
    machine: Machine
    documents: Callable[[], Iterator[str]]  # real text, for replay
    budgets: Changes
    results: Path = RESULTS
    pictures: Path = ROOT / "docs"

    def recipe(self, changes: Changes, seed: int, label: str) -> Recipe:
        """Return the study's recipe with `changes`; `seed` decides the order of rows and the training."""
        named = {"name": f"{self.content['name']}: {label}", "mix.seed": seed, "train.seed": seed}
        return validated(Recipe, override(self.content, changes | named), label)

    def changes(self, method: str, strength: str) -> Changes:
        """Return all that sets one method at one strength apart."""
        found = self.methods[method]
        return found.changes | found.strengths[strength]

    def only(self, methods: list[str], folder: Path) -> "Study":
        """Return some of the methods beside plain fine-tuning, with the results in `folder`."""
        if strange := [name for name in methods if name not in self.methods]:
            raise BadInput(f"--only {', '.join(strange)}: no such method; allowed: {', '.join(self.methods)}")
        kept = {name: found for name, found in self.methods.items() if name in (PLAIN, *methods)}
        return self._replace(name=f"{self.name}-part", methods=kept, results=folder, pictures=folder)

    def quick(self, folder: Path) -> "Study":
        """Return two methods, one epoch, two seeds, with the results in `folder`: to try the scripts."""
        short = {name: Method(m.changes, dict(list(m.strengths.items())[:2])) for name, m in self.methods.items()}
        methods = {name: short[name] for name in (PLAIN, "kl stored")}
        content = override(self.content, {"train.epochs": 1})
        return self._replace(
            name=f"{self.name}-quick", content=content, methods=methods, seeds=(1, 2), results=folder, pictures=folder
        )


def study_of(name: str, folder: Path, seeds: int | None = None) -> Study:
    """Return the study `tiny` or `demo`; the text that replay reads is going to lie in `folder`."""
    content = read_yaml(RECIPES / f"study-{name}.yaml")
    methods = {method: _method(row, name, folder) for method, row in TABLE.items()}
    first = Study(
        name, content, methods, tuple(range(1, 6)), Machine(threads=1, checkpoint_steps=10_000), tiny_documents,
        {"generate.rows": 2000, "probe.rows": 2000, "target.path": str(conflict_file(folder)), "train.epochs": 2},
    )  # fmt: skip
    # smaller batches for a budget: 28 steps are too few to steer
    budgets = {"generate.rows": 240, "probe.rows": 256, "mix.target_rows": 4, "mix.rehearsal_tokens": 144}
    second = first._replace(seeds=(1, 2), machine=Machine(), documents=technical_documents, budgets=budgets)
    study = first if name == "tiny" else second
    return study._replace(seeds=tuple(range(1, seeds + 1))) if seeds else study


def conflict_file(folder: Path) -> Path:
    """Return where the target lies that contradicts what `tiny` can do."""
    return folder / "tiny_conflict.jsonl"


def write_conflict(path: Path) -> None:
    """Write tiny's target with a skill's name that the base knows for another one.

    A new skill alone leaves nothing to weigh: tiny learns it completely within any budget.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (RECIPES / "tiny_target.jsonl").read_text()
    path.write_text(rows.replace(f'"{NEW_SKILL}:', f'"{TAKEN_SKILL}:'))


def replay_file(name: str, folder: Path) -> Path:
    """Return where a study's real text lies."""
    return folder / f"replay-{name}.jsonl"


def _method(row: "Row", name: str, folder: Path) -> Method:
    changes = row.changes
    if changes.get("generate.source") == "replay":
        changes = changes | {"generate.replay": {"path": str(replay_file(name, folder))}}
    return Method(changes, {_label(s): s for s in (row.tiny if name == "tiny" else row.demo)})


def _label(strength: Changes) -> str:
    """Return `weight=0.3`, or `rank=8 learning_rate=0.001`."""
    return " ".join(f"{field.rpartition('.')[2]}={json.dumps(value)}" for field, value in strength.items())


# --- the table -----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A method of both studies; they try the same number of strengths for every method.

    In `tiny` each is tried at several learning rates, which explain much by themselves.
    """

    changes: Changes
    tiny: list[Changes]
    demo: list[Changes]


def _over(field: str, *values: float) -> list[Changes]:
    return [{field: value} for value in values]


def _low_rank(*pairs: tuple[int, float]) -> list[Changes]:
    return [{"train.methods.lora.rank": rank, RATE: rate} for rank, rate in pairs]


# none above the recipe's, at which the others train: a method is held to what plain fine-tuning learns there
RATES = (_over(RATE, 1e-3, 5e-4, 2.5e-4, 1.25e-4, 6e-5, 3e-5), _over(RATE, 3e-4, 1e-4, 3e-5))
NO_CORPUS: Changes = {"generate.rows": 0}
STORED: Changes = {"train.rehearsal.loss": "kl"}
DFT: Changes = {"train.methods.dft.power": 1}
HELD = "train.methods.target_divergence"
# what makes the loss smaller is given higher rates than the recipe's, too
HIGHER_RATES = (_over(RATE, 8e-3, 4e-3, 2e-3, 1e-3, 5e-4, 2.5e-4), _over(RATE, 1e-3, 3e-4, 1e-4))


def _swept(field: str, tiny: list[float], demo: list[float]) -> tuple[list[Changes], list[Changes]]:
    """Return the strengths of a method: for tiny each at the recipe's learning rate and at a quarter of it."""
    rates = RATES[0][0], RATES[0][2]
    return [{field: value} | rate for value in tiny for rate in rates], _over(field, *demo)


WEIGHTS = _swept("train.rehearsal.weight", [1, 3, 10], [1, 3, 10])

TABLE = {
    PLAIN: Row(NO_CORPUS, *RATES),
    "nll": Row({}, *WEIGHTS),
    "kl stored": Row(STORED, *WEIGHTS),
    "kl live base": Row(STORED | {"train.rehearsal.reference": "base"}, *WEIGHTS),
    "L2": Row(NO_CORPUS, *_swept("train.methods.l2.weight", [0.1, 1, 10], [0.1, 1, 10])),
    "EWC": Row(
        {"train.rehearsal.weight": 0, "generate.rows": 256, "generate.top_logprobs": 0},  # for the Fisher matrix alone
        *_swept("train.methods.ewc.weight", [100, 1000, 10_000], [10, 100, 1000]),
    ),
    "LoRA": Row(
        NO_CORPUS,
        _low_rank(*((rank, rate) for rank in (16, 4) for rate in (1e-2, 3e-3, 1e-3))),
        _low_rank((32, 1e-3), (8, 3e-3), (8, 1e-3)),
    ),
    "WiSE-FT": Row(
        NO_CORPUS, _over("merge.alpha", 0.9, 0.8, 0.6, 0.5, 0.4, 0.2), _over("merge.alpha", 0.75, 0.5, 0.25)
    ),
    "DoRA": Row(
        NO_CORPUS | {"train.methods.lora.use_dora": True, "train.methods.lora.use_rslora": True},
        _low_rank(*((rank, rate) for rank in (16, 4) for rate in (1e-2, 3e-3, 1e-3))),
        _low_rank((32, 1e-3), (8, 3e-3), (8, 1e-3)),
    ),
    "OSFT": Row(NO_CORPUS, *_swept("train.methods.osft.preserved", [0.25, 0.5, 0.75], [0.25, 0.5, 0.75])),
    "DFT": Row(NO_CORPUS | DFT, *HIGHER_RATES),
    "EAFT": Row(NO_CORPUS | {"train.methods.eaft.power": 1}, *HIGHER_RATES),
    "STM": Row(NO_CORPUS, *_swept("train.methods.stm.threshold", [100, 10, 2.5], [100, 10, 2.5])),
    "ASFT": Row(NO_CORPUS | DFT | {f"{HELD}.weight": 0.1, f"{HELD}.reference": "base"}, *HIGHER_RATES),
    "target divergence": Row(NO_CORPUS, *_swept(f"{HELD}.weight", [0.1, 0.3, 1], [0.1, 0.3, 1])),
    "FLOW": Row(NO_CORPUS | {"mix.flow": "sample"}, *RATES),
    "contextual": Row({"generate.source": "contextual"}, *_swept("train.rehearsal.weight", [0.1, 0.3, 1], [1, 3, 10])),
    "replay": Row({"generate.source": "replay", "generate.top_logprobs": 0}, *WEIGHTS),
    "FLOW+kl": Row(STORED | {"mix.flow": "sample"}, *WEIGHTS),
}


# --- real text -----------------------------------------------------------------------------------------------------


def write_documents(documents: Iterator[str], path: Path) -> None:
    """Write documents as JSONL, once."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    partial.replace(path)


def tiny_documents() -> Iterator[str]:
    """Yield what `tiny` was pretrained on, the first documents of it."""
    from benchmarks.tiny_pretraining import documents
    from cfsd.model.checkpoint import TinySpec

    for _, (prompt, answer) in zip(range(TINY_DOCUMENTS), documents(TinySpec().seed), strict=False):
        yield prompt + answer


def technical_documents() -> Iterator[str]:
    """Yield Python's own documentation by topic, without the paragraphs that the benchmark measures on."""
    from pydoc_data.topics import topics

    from cfsd.evaluate.benchmark_files import BUNDLED

    lines = (BUNDLED / "technical_english.jsonl").read_text().splitlines()
    measured = {_plain(json.loads(line)["text"]) for line in lines}
    for _, text in sorted(topics.items()):
        unmeasured = [part for part in text.split("\n\n") if not any(m in _plain(part) for m in measured)]
        yield "\n\n".join(unmeasured)


def _plain(text: str) -> str:
    return " ".join(text.split())
