"""One vector per row, whatever the batches; a killed run continues; garbage rows of a target are left out."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prefect import flow

from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.model.loading import load_for_measuring
from cfsd.select.embed import BLOCK, EMBEDDING, MARK, embed, open_embedding
from cfsd.select.spec import SelectSpec
from cfsd.store.artifact import Artifact, Store, key_of
from cfsd.store.tables import CORPUS, read_rows, shards, table_of, write_shard
from tasks._planned import Planned, planning
from tasks.select import select_corpus, select_target
from tests.conftest import LETTERS, ROOT, fetched, save_model

ON = Machine(device="cpu", threads=1, micro_batch_tokens=128)


def sequences(count: int, seed: int = 0) -> list[list[int]]:
    """Rows of 1 to 40 tokens; 1 is both the end and the padding token of the tiny model."""
    rng = random.Random(seed)
    return [rng.choices(range(31), k=rng.randint(1, 40)) for _ in range(count)]


def corpus(store: Store, rows: list[list[int]]) -> Artifact:
    records: list[dict[str, Any]] = [
        {"row_id": i, "token_ids": row, "logprobs": [None] + [-1.0] * (len(row) - 1)} for i, row in enumerate(rows)
    ]

    def write(draft: Any) -> None:
        half = len(rows) // 3
        write_shard(draft.folder, "corpus", 0, table_of(CORPUS, records[:half]))
        write_shard(draft.folder, "corpus", 1, table_of(CORPUS, records[half:]))
        draft.metadata |= {"rows": len(rows)}

    return store.make("corpus", key_of("made up", len(rows)), write)[0]


def embedded(store: Store, base: Artifact, rows: Artifact, machine: Machine = ON) -> Artifact:
    def work(draft: Any) -> None:
        embed(base, rows, "corpus", draft, machine)

    return store.make("embedding", key_of("embed", base, rows), work, environment=machine.environment("embed"))[0]


@pytest.mark.parametrize("family", ["llama", "olmo"])
def test_a_vector_is_the_mean_of_what_the_head_reads(store: Store, tmp_path: Path, family: str) -> None:
    base = fetched(store, save_model(tmp_path / family, family=family))
    rows = sequences(BLOCK + 30)
    made = embedded(store, base, corpus(store, rows))
    vectors, model = open_embedding(store.path(made)), load_for_measuring(store, base, "cpu")
    head: Any = model.get_output_embeddings()
    assert made.metadata == {"rows": len(rows), "width": 32}
    assert vectors.dtype == np.float32 and vectors.shape == (len(rows), 32)
    for row, vector in zip(rows[:5] + rows[-25:], np.concatenate([vectors[:5], vectors[-25:]]), strict=True):
        with torch.inference_mode():
            output: Any = model(input_ids=torch.tensor([row]), output_hidden_states=True)
        states = output.hidden_states[-1][0]
        assert torch.allclose(head(states), output.logits[0], atol=1e-5)
        assert np.allclose(vector, states.mean(0).numpy(), atol=1e-5)


def test_how_rows_are_batched_changes_nothing_but_rounding(store: Store, base: Artifact) -> None:
    rows = corpus(store, sequences(200))
    one = open_embedding(store.path(embedded(store, base, rows)))
    work = store.make("embedding", "other", lambda d: embed(base, rows, "corpus", d, Machine(device="cpu", threads=1)))
    assert np.allclose(one, open_embedding(store.path(work[0])), atol=1e-5)


def test_kill_9_costs_no_finished_block(store: Store, base: Artifact) -> None:
    rows = corpus(store, sequences(30 * BLOCK))
    whole = store.make("embedding", "whole", lambda draft: embed(base, rows, "corpus", draft, ON))[0]
    key = key_of("embed", base, rows)
    code = (
        "from cfsd.store.artifact import Artifact, Store; from cfsd.select.embed import embed;"
        "from cfsd.machine import Machine; from pathlib import Path; import sys;"
        "base, rows = map(Artifact.model_validate_json, sys.argv[2:4]); on = Machine.model_validate_json(sys.argv[4]);"
        "Store(Path(sys.argv[1])).make('embedding', sys.argv[5], lambda d: embed(base, rows, 'corpus', d, on),"
        " environment=on.environment('embed'))"
    )
    words = [str(store.home), base.model_dump_json(), rows.model_dump_json(), ON.model_dump_json(), key]
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT)
    draft = store.root / "embedding" / f"{key}.draft"
    end = time.monotonic() + 60
    while not (draft / MARK).exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = json.loads((draft / MARK).read_text())["rows"]
    assert 0 < done < 30 * BLOCK
    with (draft / EMBEDDING).open("r+b") as file:
        file.seek(128)  # the header's length: what is here now is not computed again
        file.write(np.full(32, 7, dtype="<f4").tobytes())
    continued = open_embedding(store.path(embedded(store, base, rows)))
    assert np.all(continued[0] == 7)
    assert np.array_equal(continued[1:], open_embedding(store.path(whole))[1:])
    assert not (store.path(whole) / MARK).exists()


def polluted(store: Store, base: Artifact, folder: Path) -> Artifact:
    """A target of words and their reverse, a quarter of its rows written in other letters."""
    rng = random.Random(0)
    records = []
    for i in range(90):
        word = "".join(rng.choices(LETTERS[8:] if i % 4 == 0 else LETTERS[:8], k=rng.randint(40, 50)))
        records.append({"prompt": f"{word}=", "response": word[::-1]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    target = Target(path=str(path), held_out=8, seed=0)
    return store.make("target", key_of("target", base, target), lambda draft: prepare(base, target, draft))[0]


def garbage(store: Store, target: Artifact) -> float:
    """Return the share of replaced rows."""
    words = [row["response"] for row in read_rows(store.path(target), "train")]
    return sum(not set(word) <= set(LETTERS[:8]) for word in words) / len(words)


def test_garbage_in_a_target_is_left_out(store: Store, base: Artifact, tmp_path: Path, server: str) -> None:
    target = polluted(store, base, tmp_path)
    specs = [SelectSpec(target_rows=24, method=method, seed=0) for method in ("geometric-median", "random")]
    choose = flow(select_target)
    matched, drawn = (choose(base, target, spec, ON) for spec in specs)
    shares = [garbage(store, made) for made in (matched, drawn, target)]
    assert shares[0] < 0.6 * min(shares[1:]), shares
    for made in (matched, drawn):
        rows = read_rows(store.path(made), "train")
        assert made.metadata["train_rows"] == len(rows) == 24
        assert made.metadata["train_tokens"] == sum(len(row["token_ids"]) for row in rows)
        assert made.metadata["supervised_tokens"] == sum(sum(row["supervised"]) for row in rows)
        unchanged = ("held_out_rows", "held_out_tokens", "dropped")
        assert [made.metadata[name] for name in unchanged] == [target.metadata[name] for name in unchanged]
        held_out = [[path.read_bytes() for path in shards(store.path(a), "held_out")] for a in (target, made)]
        assert held_out[0] == held_out[1]
    assert matched.metadata["selected"] == 24 and matched.metadata["of"] == target.metadata["train_rows"]
    made_at = store.manifest(matched)["created"]
    assert choose(base, target, specs[0], ON) == matched
    assert store.manifest(matched)["created"] == made_at  # found, not made again


def planned(base: Artifact, rows: Artifact, **settings: Any) -> tuple[Artifact, list[Planned]]:
    steps: list[Planned] = []
    token = planning.set(steps)
    try:
        call = select_target if rows.kind == "target" else select_corpus
        return call(base, rows, SelectSpec(**settings), ON), steps
    finally:
        planning.reset(token)


def test_only_what_is_needed_is_planned(store: Store, base: Artifact) -> None:
    rows = corpus(store, sequences(12))
    for settings in ({}, {"target_rows": 3}, {"corpus_rows": 12}):
        assert planned(base, rows, **settings) == (rows, [])
    matched, steps = planned(base, rows, corpus_rows=5)
    assert [step.stage for step in steps] == ["embed", "select"] and matched.kind == "corpus"
    drawn, steps = planned(base, rows, corpus_rows=5, method="random")
    assert [step.stage for step in steps] == ["select"] and drawn.key != matched.key


def test_a_larger_choice_needs_no_new_vectors(store: Store, base: Artifact) -> None:
    rows = corpus(store, sequences(12))
    first, second = (planned(base, rows, corpus_rows=k, target_rows=k, seed=k)[1] for k in (5, 6))
    assert first[0].key == second[0].key


def test_too_many_rows_are_refused_before_anything_is_computed(store: Store, base: Artifact) -> None:
    with pytest.raises(BadInput, match="corpus_rows is 13"):
        planned(base, corpus(store, sequences(12)), corpus_rows=13)
