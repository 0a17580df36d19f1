"""Shards: however a corpus is divided among processes, interrupted or short of memory, the rows are the same."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cfsd.data.replay import Replay
from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.errors import BadInput, NotFinite, OutOfMemory
from cfsd.generate.sampling import Rows, sample
from cfsd.generate.server.client import ServerGone
from cfsd.generate.spec import TAIL_SAMPLES, GenerateSpec, ProbeSpec, check_context
from cfsd.generate.stage import generate, probe
from cfsd.generate.workers import _device_of
from cfsd.machine import CUDA, Machine
from cfsd.mix.spec import MixSpec
from cfsd.mix.stage import mix
from cfsd.model.loading import load_for_measuring, load_model, load_tokenizer, read_eos_ids, read_start_token
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from cfsd.store.tables import read_rows, shards
from tests.conftest import fetched, fetched_with_nan, see_gpus, write_rows
from tests.loopback_server import Manners, serving

pytestmark = pytest.mark.processes

MACHINE = Machine(device="cpu", threads=1, sampling_rows=32)


def made(
    store: Store, base: Artifact, spec: GenerateSpec, machine: Machine = MACHINE, target: Artifact | None = None
) -> Artifact:
    key = key_of("generate", base, spec, machine.model_dump_json())
    return store.make("corpus", key, lambda draft: generate(base, target, spec, draft, machine))[0]


def test_the_corpus_is_what_was_sampled_and_the_probe_is_another(store: Store, model_folder: Path) -> None:
    base = fetched(store, model_folder)
    spec, look = GenerateSpec(rows=70, length=12, seed=0), ProbeSpec(rows=70, length=12, seed=0)
    corpus = store.make(
        "corpus", key_of("generate", base, spec), lambda draft: generate(base, None, spec, draft, MACHINE)
    )[0]
    held = store.make("corpus", key_of("probe", base, look), lambda draft: probe(base, look, draft, MACHINE))[0]
    rows, probed = (read_rows(store.path(artifact), "corpus") for artifact in (corpus, held))
    assert [row["row_id"] for row in rows] == list(range(70))
    assert [row["shard"] for row in rows] == [i // 32 for i in range(70)]
    folder = store.path(base)
    model = load_model(folder, "cpu").eval()
    start = [read_start_token(folder)]
    again = sample(model, Rows(range(70), [start] * 70, read_eos_ids(folder), "context-free"), spec)
    assert [row["token_ids"] for row in rows] == [s.token_ids for s in again]
    assert all(row["logprobs"][0] is None and len(row["logprobs"]) == len(row["token_ids"]) for row in rows)
    assert [row["token_ids"] for row in probed] != [row["token_ids"] for row in rows]
    tokens = sum(len(s.logprobs) - 1 for s in again)
    assert corpus.metadata["tokens"] == tokens
    assert corpus.metadata["mean_logprob"] == pytest.approx(
        sum(v or 0 for s in again for v in s.logprobs) / tokens, abs=1e-6
    )
    assert (corpus.metadata["biased"], held.metadata["rows"]) == ("", 70)


def test_finished_shards_of_a_draft_are_kept(store: Store, model_folder: Path) -> None:
    base, spec = fetched(store, model_folder), GenerateSpec(rows=70, length=12, seed=0)

    def interrupted(draft: Any) -> None:
        generate(base, None, spec.model_copy(update={"rows": 64}), draft, MACHINE)
        stamps.extend(path.stat().st_mtime_ns for path in sorted(draft.folder.glob("corpus-*")))
        raise OSError("interrupted")

    stamps: list[int] = []
    with pytest.raises(OSError, match="interrupted"):
        store.make("corpus", "a" * 16, interrupted)
    made = store.make("corpus", "a" * 16, lambda draft: generate(base, None, spec, draft, MACHINE))[0]
    shards = sorted(store.path(made).glob("corpus-*"))
    assert [path.stat().st_mtime_ns for path in shards[:2]] == stamps
    whole = store.make("corpus", "b" * 16, lambda draft: generate(base, None, spec, draft, MACHINE))[0]
    assert made.content == whole.content


def test_a_length_beyond_the_models_context_is_refused(base: Artifact) -> None:
    check_context(base, GenerateSpec(length=127), "generate")
    with pytest.raises(BadInput, match=r"generate\.length to at most 127"):
        check_context(base, GenerateSpec(length=128), "generate")


def test_two_processes_write_the_same_bytes_and_a_killed_one_is_replaced(store: Store, base: Artifact) -> None:
    """Equal threads per process; the first worker that has begun a shard is killed."""
    spec = GenerateSpec(rows=800, length=100, seed=0, top_logprobs=4)
    one = made(store, base, spec)
    machine = MACHINE.model_copy(update={"processes": 2})
    killed: list[int] = []
    folder = store.root / "corpus" / f"{'c' * 16}.draft"

    def kill() -> None:
        while not shards(folder, "corpus"):
            time.sleep(0.02)
        lock = folder / ".workers" / "0" / ".writer.lock"
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            if str(lock.parent).encode() in process.read_bytes():
                killed.append(int(process.parent.name))
                os.kill(killed[0], signal.SIGKILL)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    two, _ = store.make("corpus", "c" * 16, lambda draft: generate(base, None, spec, draft, machine))
    killer.join()
    assert killed
    assert two.content == one.content
    assert [path.name for path in shards(store.path(two), "corpus")] == [f"corpus-{i:05}.parquet" for i in range(25)]


def test_an_error_in_a_worker_comes_out_as_what_it_is(store: Store, tmp_path: Path) -> None:
    base = fetched_with_nan(store, tmp_path / "model", 18)
    with pytest.raises(NotFinite, match=r"shard [01]"):
        made(store, base, GenerateSpec(rows=64, length=20), MACHINE.model_copy(update={"processes": 2}))


@pytest.mark.parametrize("fits", [9, 0])
def test_a_batch_that_does_not_fit_is_halved_and_the_shard_says_so(
    store: Store, base: Artifact, fits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = GenerateSpec(rows=40, length=12, seed=0)
    plain = made(store, base, spec)
    model = load_for_measuring(store, base, "cpu")

    def allocate(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > fits:
            raise torch.OutOfMemoryError("planted")

    hook = model.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        if not fits:
            with pytest.raises(OutOfMemory, match=r"one row of shard 0.*lower machine\.sampling_rows"):
                store.make("corpus", "d" * 16, lambda draft: generate(base, None, spec, draft, MACHINE))
            return
        halved = store.make("corpus", "d" * 16, lambda draft: generate(base, None, spec, draft, MACHINE))[0]
    finally:
        hook.remove()
    assert halved.metadata["halved_shards"] == {"00000": 4}
    assert "shard 0 goes on with 16 rows" in capsys.readouterr().out
    ids = [[row["token_ids"] for row in read_rows(store.path(a), "corpus")] for a in (plain, halved)]
    assert ids[0] == ids[1]


def world_of(store: Store, base: Artifact, tmp_path: Path) -> tuple[Artifact, Replay]:
    """Return a target and documents of the user's own."""
    wanted = Target(path=str(write_rows(tmp_path / "rows.jsonl")), held_out=8, seed=0)
    target = store.make("target", key_of("target", base, wanted), lambda draft: prepare(base, wanted, draft))[0]
    texts = [f"document {'abcde'[i % 5] * (3 + i)}. " * 5 for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return target, Replay(kind="file", path=str(tmp_path / "texts.jsonl"))


def test_contextual_rows_go_on_from_prompts_of_training_rows_only(store: Store, base: Artifact, tmp_path: Path) -> None:
    target, _ = world_of(store, base, tmp_path)
    spec = GenerateSpec(rows=70, length=12, source="contextual", seed=0)
    rows = read_rows(store.path(made(store, base, spec, target=target)), "corpus")
    prompts = {
        tuple(t for t, s in zip(row["token_ids"], row["supervised"], strict=True) if not s)
        for row in read_rows(store.path(target), "train")
    }
    assert len(rows) == 70
    for row in rows:
        prompt = [i for i, value in enumerate(row["logprobs"]) if value is None]
        assert tuple(row["token_ids"][: len(prompt)]) in prompts
        assert prompt == list(range(len(prompt)))
        assert row["source"] == "contextual"
    with pytest.raises(BadInput, match="needs a target"):
        made(store, base, spec.model_copy(update={"seed": 1}))


def test_replay_rows_are_scored_and_hold_the_same_columns(store: Store, base: Artifact, tmp_path: Path) -> None:
    _, replay = world_of(store, base, tmp_path)
    spec = GenerateSpec(rows=40, length=16, source="replay", replay=replay, top_logprobs=3, seed=0)
    corpus = made(store, base, spec)
    table = pq.read_table(shards(store.path(corpus), "corpus")[0])
    assert {"topk_ids", "topk_logprobs", "rest_logprob"} < set(table.column_names)
    assert str(table.schema.field("topk_ids").type.value_type) == "uint16"
    model = load_model(store.path(base), "cpu").eval()
    for row in table.slice(0, 10).to_pylist():
        with torch.inference_mode():
            logprobs = model(torch.tensor([row["token_ids"]])).logits[0].log_softmax(-1)
        fresh = [logprobs[t, token].item() for t, token in enumerate(row["token_ids"][1:])]
        assert row["logprobs"][0] is None
        assert row["logprobs"][1:] == pytest.approx(fresh, abs=1e-4)
        assert len(row["topk_ids"]) == 3 * len(row["token_ids"])
        assert row["topk_ids"][3:6] == logprobs[0].topk(3).indices.tolist()
        assert row["topk_logprobs"][:3] == [None] * 3
        sampled = [logprobs[t // TAIL_SAMPLES, token].item() for t, token in enumerate(row["tail_ids"][TAIL_SAMPLES:])]
        assert row["tail_logprobs"][TAIL_SAMPLES:] == pytest.approx(sampled, rel=1e-3)
    assert table.schema.field("tail_ids").type == table.schema.field("topk_ids").type


def test_what_was_read_in_one_of_several_ways_is_kept_with_the_corpus(
    store: Store, base: Artifact, tmp_path: Path
) -> None:
    documents = tmp_path / "documents.json"
    documents.write_text(json.dumps({"data": [{"text": f"abc def {a}\ud83d"} for a in "abcdefgh"]}))
    spec = GenerateSpec(rows=8, length=8, source="replay", replay=Replay(path=str(documents)), seed=0)
    said = made(store, base, spec).metadata["said"]
    assert said == [
        f"'{documents}': the records are those of 'data'",
        f"'{documents}' row 1 and 7 more: half of a character (an emoji that was cut), read as U+FFFD",
    ]


def test_several_sources_fill_their_fractions_of_the_tokens(store: Store, base: Artifact, tmp_path: Path) -> None:
    target, replay = world_of(store, base, tmp_path)
    fractions = {"context-free": 0.5, "contextual": 0.2, "replay": 0.3}
    spec = GenerateSpec(rows=60, length=12, source="mixed", fractions=fractions, replay=replay, seed=0)
    corpus = made(store, base, spec, MACHINE.model_copy(update={"sampling_rows": 16}), target)
    metadata: Any = corpus.metadata
    assert metadata["token_fractions"] == pytest.approx(fractions, abs=12 / 720)
    assert 720 <= metadata["tokens"] <= 720 + 3 * 12
    rows = read_rows(store.path(corpus), "corpus")
    assert {row["source"] for row in rows} == set(fractions)
    for source in fractions:
        assert [row["row_id"] for row in rows if row["source"] == source] == list(
            range(sum(row["source"] == source for row in rows))
        )
    spec = MixSpec(target_rows=4, rehearsal_tokens=64, seed=0)
    mixed = store.make("mixture", "e" * 16, lambda d: mix(store.path(target), store.path(corpus), spec, d))[0]
    assert mixed.metadata["rehearsal_tokens"] == metadata["tokens"]


@pytest.mark.parametrize("second", ["template", "replay"])
def test_what_one_source_cannot_give_is_said_before_another_is_sampled(
    store: Store, base: Artifact, tmp_path: Path, second: str
) -> None:
    _, replay = world_of(store, base, tmp_path)
    settings: dict[str, Any] = {"source": "mixed", "fractions": {"context-free": 0.5, second: 0.5}}
    settings |= {"replay": replay, "rows": 100_000} if second == "replay" else {"rows": 16}
    with pytest.raises(BadInput, match="no chat template" if second == "template" else "are wanted"):
        made(store, base, GenerateSpec(length=12, **settings))
    assert not list(store.root.rglob("corpus-*.parquet"))


def test_a_worker_sees_a_gpu_of_those_that_its_parent_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 2)
    monkeypatch.setenv(CUDA, "4,6")
    assert [_device_of(number, Machine()) for number in range(3)] == [{CUDA: "4"}, {CUDA: "6"}, {CUDA: "4"}]
    monkeypatch.delenv(CUDA)
    assert _device_of(1, Machine()) == {CUDA: "1"}
    assert _device_of(1, Machine(device="cpu")) == {}


def test_fractions_are_kept_when_texts_are_short(store: Store, base: Artifact, tmp_path: Path) -> None:
    """Rows that end early leave tokens to make up for: more rows are sampled, and the surplus is cut."""
    target, _ = world_of(store, base, tmp_path)
    spec = GenerateSpec(
        rows=20, length=60, source="mixed", fractions={"context-free": 0.25, "contextual": 0.75}, seed=3
    )
    small = MACHINE.model_copy(update={"sampling_rows": 4})
    corpus = made(store, base, spec, small, target)
    metadata: Any = corpus.metadata
    assert metadata["rows"] > 20
    assert metadata["token_fractions"]["contextual"] == pytest.approx(0.75, abs=60 / 1200)
    assert metadata["tokens"] == pytest.approx(1200, abs=120)


def test_biased_settings_are_facts_of_the_corpus(store: Store, base: Artifact) -> None:
    corpus = made(store, base, GenerateSpec(rows=8, length=6, temperature=0.7, min_length=2))
    assert corpus.metadata["biased"] == "temperature=0.7, min_length=2"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "mixed"}, "belong to source mixed"),
        ({"fractions": {"replay": 1.0}}, "belong to source mixed"),
        ({"source": "mixed", "fractions": {"context-free": 0.5, "template": 0.6}}, "add up to 1"),
        ({"source": "replay"}, "needs it"),
        ({"min_length": 200}, "above length 128"),
        ({"source": "template", "fill": True}, "source template has none"),
    ],
)
def test_settings_that_disagree_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenerateSpec(**settings)


def test_a_field_at_its_neutral_value_leaves_the_digest_alone() -> None:
    assert GenerateSpec().digest() == GenerateSpec(min_length=0, top_logprobs=0).digest()
    assert (
        len({GenerateSpec(**s).digest() for s in ({}, {"fill": True}, {"top_logprobs": 8}, {"source": "template"})})
        == 4
    )


def test_a_server_fills_the_same_table_and_one_that_dies_costs_unfinished_shards_only(
    store: Store, base: Artifact
) -> None:
    model, tokenizer = load_model(store.path(base), "cpu").eval(), load_tokenizer(store.path(base))
    spec = GenerateSpec(rows=96, length=10, seed=0, top_logprobs=3, tail_samples=2)

    def work(url: str) -> Callable[[Draft], None]:
        machine = Machine(device="cpu", engine="server", base_url=url, in_flight=4, sampling_rows=16)
        return lambda draft: generate(base, None, spec, draft, machine)

    with serving(model, tokenizer, Manners(die_after=600)) as dying, pytest.raises(ServerGone, match="same command"):
        store.make("corpus", "f" * 16, work(dying.url))
    finished = shards(store.root / "corpus" / f"{'f' * 16}.draft", "corpus")
    assert 0 < len(finished) < 6
    stamps = [path.stat().st_mtime_ns for path in finished]
    with serving(model, tokenizer, Manners()) as successor:
        corpus = store.make("corpus", "f" * 16, work(successor.url))[0]
    assert [path.stat().st_mtime_ns for path in shards(store.path(corpus), "corpus")[: len(stamps)]] == stamps
    metadata: Any = corpus.metadata
    assert metadata["rows"] == 96
    assert metadata["first_token_p_value"] > 1e-4
    for row in read_rows(store.path(corpus), "corpus")[::8]:
        with torch.inference_mode():
            logprobs = model(torch.tensor([row["token_ids"]])).logits[0].log_softmax(-1)
        fresh = [logprobs[t, token].item() for t, token in enumerate(row["token_ids"][1:])]
        assert row["logprobs"][1:] == pytest.approx(fresh, abs=1e-4)
        assert row["topk_ids"][3:6] == logprobs[0].topk(3).indices.tolist()
        assert len(row["tail_ids"]) == 2 * len(row["token_ids"]) and row["tail_logprobs"][:2] == [None, None]
        sampled = [logprobs[t // 2, token].item() for t, token in enumerate(row["tail_ids"][2:])]
        assert row["tail_logprobs"][2:] == pytest.approx(sampled, rel=1e-3)
    assert "pass once through the base here" in metadata["said"][0]


def test_a_corpus_of_which_a_server_did_not_give_all_rows_whole_says_so(store: Store, base: Artifact) -> None:
    model, tokenizer = load_model(store.path(base), "cpu").eval(), load_tokenizer(store.path(base))
    with torch.inference_mode():
        first = model(torch.tensor([[0]])).logits[0, -1].softmax(-1)
    hidden = int((first - 0.01).abs().argmin())  # rare enough for the start check
    with serving(model, tokenizer, Manners(owned_by="llamacpp", hidden=(hidden,))) as server:
        machine = Machine(device="cpu", engine="server", base_url=server.url, in_flight=4)
        spec = GenerateSpec(rows=64, length=10, seed=0)
        corpus = store.make("corpus", "f" * 16, lambda draft: generate(base, None, spec, draft, machine))[0]
    metadata: Any = corpus.metadata
    dropped = metadata["dropped_rows"]["the server did not list all tokens"]
    assert 0 < dropped == 64 - metadata["rows"]
    assert metadata["approximate"] == f"{dropped} rows were dropped, which the server did not give whole"
    assert not any(hidden in row["token_ids"] for row in read_rows(store.path(corpus), "corpus"))


def test_a_chat_template_that_leaves_no_room_is_refused(store: Store, tmp_path: Path, model_folder: Path) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(model_folder, chat)
    opening = "a " * 50
    (chat / "chat_template.jinja").write_text(
        "{{ bos_token }}" + opening + "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}b:{% endif %}"
    )
    base = fetched(store, chat)
    rows = read_rows(store.path(made(store, base, GenerateSpec(rows=400, length=27, source="template"))), "corpus")
    for row in rows:
        known = [value is not None for value in row["logprobs"]]
        assert known[:101] == [False] * 101
        assert row["source"] == "template"
    two_turns = [row for row in rows if row["token_ids"].count(1) == 2]
    assert two_turns
    for row in two_turns:
        first = row["token_ids"].index(1)
        assert row["logprobs"][first + 1 : first + 3] == [None, None]
        assert row["finish_reason"] == "eos"
    with pytest.raises(BadInput, match=r"generate\.length to at most 27"):
        made(store, base, GenerateSpec(rows=4, length=28, source="template"))
