"""Faults planted into the tiny recipe, and honest runs, before the gate and its baseline: a table of verdicts.

    CFSD_MUTATIONS=/tmp/mutations python -m pytest -m slow -s tests/flows/test_mutations.py

The folder keeps what is made, so that a second run, or one that was stopped, goes on; without it all is made anew.
Corpus faults that stop a run before it trains are in test_corpus_check.py; here that check is off.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.tiny_pretraining import pretrain
from cfsd.baseline.file import guarded, read_baseline
from cfsd.baseline.measured import measured
from cfsd.generate.stage import generate
from cfsd.machine import Machine
from cfsd.mix.stage import mix
from cfsd.model.checkpoint import TinySpec
from cfsd.recipe import Recipe
from cfsd.statistics.gate import Judgement, judge
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from cfsd.store.tables import batches, write_shard
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CPU = Machine(device="cpu", threads=1)
BASELINE = read_baseline(ROOT / "deployments" / "baselines" / "tiny.json")
FIRST = max(BASELINE.seeds) + 1
HONEST_RUNS, FAULTY_RUNS, CAUGHT = 20, 5, 4
ANOTHER = TinySpec(seed=1, steps=200)  # of the same shape, tokenizer and documents, but far from finished


class Fault(NamedTuple):
    """How a fault is planted: by the recipe, or by a function that stands in for a stage's."""

    changes: tuple[str, ...] = ()
    module: str = ""
    name: str = ""
    planted: Callable[..., Any] | None = None


def mix_masked(target: Path, corpus: Path, spec: Any, draft: Draft, losses: Path | None = None) -> None:
    """Mix, and let only the last token of every rehearsal row count."""
    mix(target, corpus, spec, draft, losses)
    masked = []
    for batch in batches(draft.folder, "mixture"):
        rows = batch.to_pylist()
        for row in rows:
            if row["source"] != "target":
                row["supervised"] = [False] * (len(row["supervised"]) - 1) + [True]
        masked.append(pa.Table.from_pylist(rows, schema=batch.schema))
    write_shard(draft.folder, "mixture", 0, pa.concat_tables(masked))


def generate_from_another(base: Artifact, target: Any, spec: Any, draft: Draft, *rest: Any) -> None:
    """Sample from another model than the base."""
    from cfsd.model.fetching import describe
    from cfsd.model.loading import load_tokenization, load_tokenizer
    from cfsd.model.special_tokens import settle_start_token
    from cfsd.model.usable import load_config

    def work(made: Draft) -> None:
        pretrain(ANOTHER, made.folder)
        settle_start_token(made.folder, load_tokenizer(made.folder), None)
        config = load_config(made.folder, "another")
        made.metadata |= describe(made.folder, config, load_tokenization(made.folder))

    other, _ = draft.store.make("model", key_of("another", ANOTHER), work)
    generate(other, target, spec, draft, *rest)


FAULTS = {
    "rehearsal weight 0": Fault(("train.rehearsal.weight=0",)),
    "learning rate x 10": Fault(("train.learning_rate=0.01",)),
    "rehearsal rows masked": Fault((), "cfsd.mix.stage", "mix", mix_masked),
    "rehearsal rows from another model": Fault((), "cfsd.generate.stage", "generate", generate_from_another),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of honest runs and of faults that are in the recipe, and so in the keys."""
    return Path(os.environ.get("CFSD_MUTATIONS") or tmp_path_factory.mktemp("mutations")) / "honest"


def own_home(shared: Path, fault: str) -> Path:
    """Return a folder for a planted fault: its artifacts bear honest keys and must not lie among honest ones.

    It shares, by hard links, what comes before rows are sampled.
    """
    home = shared.with_name(fault.replace(" ", "-"))
    if not home.exists():
        shutil.copytree(shared / "store", home / "store", copy_function=os.link)
        shutil.copy(shared / "digests.json", home / "digests.json")
        for kind in ("corpus", "mixture"):
            shutil.rmtree(home / "store" / kind, ignore_errors=True)
    return home


Judged = Callable[..., Judgement]


@pytest.fixture
def judged(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Judged]:
    """Return the judgement of a fresh seed and the next, as many as the gate usually has, made in a data folder."""
    import flows.mitigate

    monkeypatch.setattr(flows.mitigate, "check_corpus", lambda *_: None, raising=False)

    def one(home: Path, seed: int, changes: tuple[str, ...] = ()) -> Judgement:
        from flows._gate_runs import reseeded

        monkeypatch.setenv("CFSD_HOME", str(home))
        recipe = Recipe.load(ROOT / "deployments" / "recipes" / "tiny.yaml", list(changes))
        run_records = [flows.mitigate.pipeline(reseeded(recipe, number), CPU) for number in (seed, seed + 1)]
        return judge(guarded(BASELINE, [measured(Store(home), run_record) for run_record in run_records]))

    yield one


def table(name: str, one: Callable[[int], Judgement], seeds: range) -> list[str]:
    """Judge every seed, print a row for each, and return the outcomes."""
    outcomes = []
    for seed in seeds:
        started = time.monotonic()
        found = one(seed)
        worst = sorted(found.findings, key=lambda f: -f.worsening / f.margin)[:3]
        said = ", ".join(f"{f.name} {f.worsening:+.3g} of {f.margin:.2g}" for f in worst)
        print(f"| {name} | {seed} | {found.outcome} | {said} | {time.monotonic() - started:.0f} s |", flush=True)
        outcomes.append(found.outcome)
    return outcomes


def test_of_twenty_honest_runs_none_fails(shared: Path, judged: Judged) -> None:
    outcomes = table("honest", partial(judged, shared), range(FIRST, FIRST + HONEST_RUNS))
    print({outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))})
    assert "fail" not in outcomes
    assert outcomes.count("pass") >= HONEST_RUNS / 2  # or the gate would say nothing at all


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, shared: Path, judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, home = FAULTS[name], shared
    if fault.planted:
        judged(shared, FIRST)  # what comes before, for all planted faults to share
        home = own_home(shared, name)
        monkeypatch.setattr(f"{fault.module}.{fault.name}", fault.planted)
    outcomes = table(name, lambda seed: judged(home, seed, fault.changes), range(FIRST, FIRST + FAULTY_RUNS))
    assert np.sum([outcome == "fail" for outcome in outcomes]) >= CAUGHT
