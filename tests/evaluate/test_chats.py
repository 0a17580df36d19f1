"""The mode chat: which tokens are the user's and which the answer's, and the divergence along each, enumerated."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cfsd.errors import BadInput
from cfsd.evaluate.divergence import counted_rows, score_chats
from cfsd.generate.spec import ProbeSpec
from cfsd.generate.stage import chat, probe
from cfsd.machine import Machine
from cfsd.merge.budget import CLOSE, keep_budget
from cfsd.merge.spec import MergeSpec, budgets_of, check_budgeted
from cfsd.model.loading import load_model
from cfsd.report.budget import judge, severity
from cfsd.spec import digest_of
from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import read_rows
from cfsd.train.controller import Controller
from cfsd.train.spec import RehearsalSpec
from tasks.generate import modes_of
from tests.conftest import fetched

ON = Machine(device="cpu", threads=1, micro_batch_tokens=4000, sampling_rows=1000)
START, END, U, V = range(4)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}v{% endif %}"
)
LENGTH = 5


def write_model(folder: Path, *, seed: int, template: str | None = TEMPLATE) -> Path:
    """Write a model of four tokens, with a tokenizer and a chat template: a start, an end and two letters."""
    raw = Tokenizer(models.WordLevel({"<s>": START, "</s>": END, "u": U, "v": V}, unk_token="u"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = template
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=1.0, bos_token_id=START, eos_token_id=END, pad_token_id=END,
    ))  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class World(NamedTuple):
    store: Store
    base: Artifact
    tuned: Artifact
    chats: Artifact
    rows: list[dict[str, Any]]
    answers: dict[int, int]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    store = Store(folder / "data")
    base, tuned = (fetched(store, write_model(folder / str(seed), seed=seed)) for seed in (0, 1))
    spec = ProbeSpec(rows=4000, length=LENGTH, seed=0)
    chats = store.make("corpus", "c" * 16, lambda draft: chat(base, spec, draft, ON))[0]
    rows = read_rows(store.path(chats), "corpus")
    answers = {row["row_id"]: row["answer"] for row in read_rows(store.path(chats), "turns")}
    return World(store, base, tuned, chats, rows, answers)


def scored(world: World, base: Artifact, tuned: Artifact, key: str) -> Artifact:
    return world.store.make("scores", key * 16, lambda draft: score_chats(base, tuned, world.chats, draft, ON))[0]


def law(world: World, model: Artifact) -> Any:
    return load_model(world.store.path(model), "cpu", "float32").eval().double()


def chats_of_the_law(model: Any) -> Iterator[tuple[float, list[int], int]]:
    """Yield every row that the sampler can write, with its probability and where its answer begins."""
    known: dict[tuple[int, ...], list[float]] = {}

    def probs(row: list[int]) -> list[float]:
        if tuple(row) not in known:
            with torch.no_grad():
                known[tuple(row)] = model(torch.tensor([row])).logits[0, -1].softmax(-1).tolist()
        return known[tuple(row)]

    def grown(row: list[int], p: float, answer: int | None) -> Iterator[tuple[float, list[int], int]]:
        if len(row) == 1 + LENGTH:
            yield p, row, len(row) if answer is None else min(answer, len(row))
            return
        for token, own in enumerate(probs(row)):
            longer = [*row, token]
            if token == END and answer is not None:
                yield p * own, longer, answer
            elif token == END:
                opened = [*longer, V][: 1 + LENGTH]
                yield from grown(opened, p * own, len(longer) + 1)
            else:
                yield from grown(longer, p * own, answer)

    yield from grown([START], 1.0, None)


def expected(world: World) -> tuple[float, float]:
    """Return the divergence per token along answers and along users' turns, enumerated in float64."""
    base, tuned = law(world, world.base), law(world, world.tuned)
    sums = {"user": [0.0, 0.0], "answer": [0.0, 0.0]}
    mass = 0.0
    for p, row, answer in chats_of_the_law(base):
        mass += p
        with torch.no_grad():
            at_base, at_tuned = (model(torch.tensor([row])).logits[0].log_softmax(-1) for model in (base, tuned))
        kl = (at_base.exp() * (at_base - at_tuned)).sum(-1).tolist()
        opened = {answer - 1} if row[answer - 2 : answer - 1] == [END] else set()
        for place in set(range(1, len(row))) - opened:
            side = sums["answer" if place >= answer else "user"]
            side[0], side[1] = side[0] + p * kl[place - 1], side[1] + p
    assert mass == pytest.approx(1, abs=1e-9)
    return sums["answer"][0] / sums["answer"][1], sums["user"][0] / sums["user"][1]


def spread(records: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean per token of a divergence table and its standard error over rows."""
    kl, counts = (torch.tensor([record[name] for record in records]).double() for name in ("kl", "count"))
    mean = float(kl.sum() / counts.sum())
    rest = kl - mean * counts
    return mean, float(rest.square().sum().sqrt() / counts.sum())


def test_chat_kl_is_the_divergence_along_answers_of_the_enumerated_law(world: World) -> None:
    made = scored(world, world.base, world.tuned, "1")
    tables = {"chat_kl": "divergence", "chat_user_kl": "user_turns"}
    for (name, table), right in zip(tables.items(), expected(world), strict=True):
        mean, error = spread(read_rows(world.store.path(made), table))
        assert made.metadata[name] == pytest.approx(mean)
        assert abs(mean - right) < 4 * error and error < 0.03 * right
    assert made.metadata["chat_kl"] != pytest.approx(made.metadata["chat_user_kl"], rel=0.1)


def test_a_model_does_not_move_from_itself_in_chats(world: World) -> None:
    made = scored(world, world.base, world.base, "2")
    assert (made.metadata["chat_kl"], made.metadata["chat_user_kl"]) == (0.0, 0.0)
    assert all(record["kl"] == 0 for record in read_rows(world.store.path(made), "divergence"))


def test_every_sampled_token_is_the_users_or_the_answers_and_the_templates_are_neither(world: World) -> None:
    made = scored(world, world.base, world.tuned, "3")
    answers, users = (
        {record["row_id"]: record["count"] for record in read_rows(world.store.path(made), table)}
        for table in ("divergence", "user_turns")
    )
    for row in world.rows:
        tokens, begin = row["token_ids"], world.answers[row["row_id"]]
        is_sampled = [logprob is not None for logprob in row["logprobs"]]
        assert users[row["row_id"]] == sum(is_sampled[:begin])
        assert answers.get(row["row_id"], 0) == sum(is_sampled[begin:]) == len(tokens) - begin
        turn = tokens[1:begin]
        if begin < len(tokens):
            assert turn[-2:] == [END, V] and END not in turn[:-2] and not is_sampled[begin - 1]
    shares = {len(row["token_ids"]) - world.answers[row["row_id"]] for row in world.rows}
    assert shares >= {0, 1, 2, 3}


def test_chats_without_an_answer_are_counted_said_and_measured_in_the_users_turn(world: World) -> None:
    made = scored(world, world.base, world.tuned, "4")
    none = [row["row_id"] for row in world.rows if world.answers[row["row_id"]] == len(row["token_ids"])]
    assert world.chats.metadata["unanswered"] == made.metadata["unanswered"] == len(none) > 0
    assert made.metadata["rows"] == 4000 - len(none)
    said: Any = world.chats.metadata["said"]
    assert f"in {len(none)} of 4000 chats the user's turn did not end within 5 tokens" in said[0]
    folder = world.store.path(made)
    assert not set(none) & {record["row_id"] for record in read_rows(folder, "divergence")}
    assert set(none) < {record["row_id"] for record in read_rows(folder, "user_turns")}
    assert [sum(mask) for _, mask in counted_rows(world.store.path(world.chats))] == [
        record["count"] for record in read_rows(folder, "divergence")
    ]


def test_what_moved_in_chats_is_of_answers_alone(world: World) -> None:
    folder = world.store.path(scored(world, world.base, world.tuned, "5"))
    records = read_rows(folder, "divergence")
    assert all(len(r["token_kl"]) == len(r["token_entropy"]) == r["count"] for r in records)
    assert all(sum(r["token_kl"]) == pytest.approx(r["kl"], rel=1e-5, abs=1e-6) for r in records)
    positions = read_rows(folder, "moved_positions")
    assert positions and all(p["place"] >= world.answers[p["row_id"]] for p in positions)
    by_token = sum(row["kl"] for row in read_rows(folder, "moved_tokens"))
    tokens = sum(r["count"] for r in records)
    assert by_token == pytest.approx(sum(r["kl"] for r in records) / tokens, rel=1e-5)


def test_where_no_chat_has_an_answer_there_is_no_figure(world: World) -> None:
    short = ProbeSpec(rows=40, length=1, seed=0)
    chats = world.store.make("corpus", "d" * 16, lambda draft: chat(world.base, short, draft, ON))[0]
    assert chats.metadata["unanswered"] == 40
    made = world.store.make("scores", "6" * 16, lambda d: score_chats(world.base, world.tuned, chats, d, ON))[0]
    assert "chat_kl" not in made.metadata and made.metadata["rows"] == 0
    assert made.metadata["chat_user_kl"] > 0
    assert counted_rows(world.store.path(chats)) == []


def test_chats_share_no_random_number_with_the_probe(world: World) -> None:
    spec = ProbeSpec(rows=4000, length=LENGTH, seed=0)
    held = world.store.make("corpus", "e" * 16, lambda draft: probe(world.base, spec, draft, ON))[0]
    first = [row["token_ids"][1] for row in read_rows(world.store.path(held), "corpus")]
    own = [row["token_ids"][1] for row in world.rows]
    share = sum(a == b for a, b in zip(first, own, strict=True)) / len(own)
    chance = sum((own.count(token) / len(own)) ** 2 for token in range(4))
    assert share == pytest.approx(chance, abs=4 * math.sqrt(chance / len(own)))  # of one stream it would be 1


PLAIN_END = "<s>{% for m in messages %}{{ m.content }}v{% endfor %}"


def test_auto_takes_chats_where_they_can_be_had_and_says_so(world: World, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("CFSD_HOME", str(world.store.home))
    said: list[str] = []
    assert list(modes_of(world.base, ProbeSpec(length=5), said.append)) == ["unprompted", "chat"]
    assert said.pop() == "probe: text without a prompt and chats are measured, as the base has a chat template"
    bare = fetched(world.store, write_model(tmp_path / "bare", seed=2, template=None))
    assert list(modes_of(bare, ProbeSpec(length=5), said.append)) == ["unprompted"] and not said
    odd = fetched(world.store, write_model(tmp_path / "odd", seed=3, template=PLAIN_END))
    assert list(modes_of(odd, ProbeSpec(length=5), said.append)) == ["unprompted"]
    assert "chats are not: probe.modes: this model's chat template ends a user's turn with plain text" in said[0]


def test_a_named_mode_that_the_base_cannot_have_is_refused(world: World, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("CFSD_HOME", str(world.store.home))
    named = ProbeSpec.model_validate({"modes": ["unprompted", "chat"], "length": 5})
    bare = fetched(world.store, write_model(tmp_path / "bare", seed=2, template=None))
    with pytest.raises(BadInput, match=r"probe\.modes names chat, but the base has no chat template; leave chat out"):
        named.check_base(bare)
    named.check_base(world.base)
    odd = fetched(world.store, write_model(tmp_path / "odd", seed=3, template=PLAIN_END))
    with pytest.raises(BadInput, match=r"nothing tells where the answer begins; leave chat out of probe\.modes"):
        modes_of(odd, named)
    long = ProbeSpec.model_validate({"modes": ["unprompted", {"name": "chat", "length": 16}], "length": 5})
    with pytest.raises(BadInput, match=r"length 16 and the start token do not fit .* set probe\.modes\[chat\]\.length"):
        long.check_base(world.base)


@pytest.mark.parametrize(("modes", "message"), [
    (["chat"], "add unprompted"),
    ([], "modes are empty: add unprompted"),
    (["auto", "chat"], "auto stands for unprompted and chat"),
    (["auto", "auto"], "named twice: auto"),
    (["auto", "spoken"], "'spoken' is unknown; allowed: unprompted, chat, auto, or a name of yours with `prompts`"),
    (["auto", {"name": "chat", "prompts": "p.jsonl"}], "prompts cannot be called chat"),
    (["auto", {"name": "probe", "prompts": "p.jsonl"}], "prompts cannot be called probe"),
    ([{"name": "unprompted", "rows": 5}], "set probe.rows"),
    (["auto", {"name": "a/b", "prompts": "p.jsonl"}], "should match pattern"),
    (["unprompted", {"name": "chat", "column": "text"}], "belongs to `prompts`"),
])  # fmt: skip
def test_modes_that_contradict_themselves_are_refused(modes: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ProbeSpec.model_validate({"modes": modes})


def test_the_digest_is_of_modes_and_content_and_neutral_as_before(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\n")
    support = {"name": "support", "prompts": str(file)}
    specs = [["auto"], ["unprompted"], ["unprompted", "chat"], ["auto", support], ["unprompted", support]]
    digests = [ProbeSpec.model_validate({"seed": 0, "modes": modes}).digest() for modes in specs]
    assert len(set(digests)) == len(specs) and digests[0] == ProbeSpec(seed=0).digest()
    other = tmp_path / "q.jsonl"
    file.rename(other)
    moved = {"name": "other", "prompts": str(other)}
    assert ProbeSpec.model_validate({"seed": 0, "modes": ["auto", moved]}).digest() == digests[3]
    own = ProbeSpec.model_validate({"seed": 3, "rows": 7, "length": 9, "modes": ["auto", moved | {"rows": 2}]})
    (prompts,) = own.own_prompts()
    assert (prompts.rows, prompts.length, prompts.seed, prompts.name) == (2, 9, 3, "other")


# --- budgets of several modes --------------------------------------------------------------------------------------


def control_of(world: World, name: str, seed: int = 7) -> Artifact:
    make = {"unprompted": probe, "chat": chat}[name]
    spec = ProbeSpec(rows=300, length=LENGTH, seed=seed)
    return world.store.make("corpus", f"control {name}", lambda draft: make(world.base, spec, draft, ON))[0]


def fitted(world: World, budget: Any, *modes: str) -> Any:
    controls, spec = [control_of(world, mode) for mode in modes], MergeSpec(budget=budget)
    key = digest_of([budget, *modes])
    made = world.store.make(
        "scores", key, lambda draft: keep_budget(world.base, world.tuned, controls, spec, draft, ON)
    )
    return made[0].metadata


def test_merging_keeps_the_budget_of_every_mode(world: World) -> None:
    """Whichever mode uses most of its budget decides alpha; the others stay below theirs."""
    alone = {mode: fitted(world, {mode: 0.1}, mode) for mode in ("unprompted", "chat")}
    both = fitted(world, {"unprompted": 0.1, "chat": 0.1}, "unprompted", "chat")
    least = min(found["alpha"] for found in alone.values())
    assert both["alpha"] == pytest.approx(least, rel=CLOSE) and both["alpha"] < 1
    tight = max(both["control_kls"], key=both["control_kls"].get)
    assert 0.9 * 0.1 < both["control_kls"][tight] <= 0.1 and min(both["control_kls"].values()) < 0.09
    other = next(mode for mode in alone if mode != tight)
    wide = fitted(world, {"unprompted": 0.1, "chat": 0.1} | {tight: 10.0}, "unprompted", "chat")
    assert wide["alpha"] > both["alpha"]
    assert wide["control_kls"][other] <= 0.1 and wide["control_kls_at_most"] == both["control_kls_at_most"]


def test_a_number_and_the_same_of_unprompted_alone_are_one_search(world: World) -> None:
    number = fitted(world, 0.1, "unprompted")
    assert "control_kls" not in number
    assert number["alpha"] == fitted(world, {"unprompted": 0.1}, "unprompted")["alpha"]
    spec, modes = MergeSpec(), ("unprompted", "chat", "support")
    assert spec.keeping(budgets_of(0.1, modes[:1])).digest() == MergeSpec(budget=0.1).digest()
    assert spec.keeping(budgets_of({"unprompted": 0.1}, modes)).budget == 0.1
    assert budgets_of(0.1, modes) == {"unprompted": 0.1, "chat": 0.1}
    assert budgets_of({"support": 0.3, "unprompted": 0.1}, modes) == {"unprompted": 0.1, "support": 0.3}
    assert budgets_of(None, modes) == {} and spec.keeping({}) == spec


def test_training_is_steered_by_unprompted_text_and_its_key_knows_nothing_else() -> None:
    number, each, other = (
        RehearsalSpec.model_validate({"budget": budget})
        for budget in (0.02, {"unprompted": 0.02, "chat": 0.05}, {"unprompted": 0.03, "chat": 0.05})
    )
    assert each.steered_to() == 0.02 and each.digest() == number.digest() != other.digest()
    of_each, of_number = (Controller(spec, 10) for spec in (each, number))
    for controller in (of_each, of_number):
        controller.learn(3.0, 100)
    assert of_each.weight(1) == of_number.weight(1) > 1
    with pytest.raises(ValidationError, match=r"for chat alone cannot steer lambda.* give it as merge\.budget"):
        RehearsalSpec.model_validate({"budget": {"chat": 0.02}})


@pytest.mark.parametrize(("budget", "message"), [
    (0, "greater than 0"), ({"unprompted": -1}, "greater than 0"), ({}, "no mode has a budget"),
])  # fmt: skip
def test_a_budget_is_positive_in_every_mode(budget: Any, message: str) -> None:
    for spec in (MergeSpec, RehearsalSpec):
        with pytest.raises(ValidationError, match=message):
            spec.model_validate({"budget": budget})
    with pytest.raises(BadInput, match=r"a budget is given for chat, but with this base the probe has the modes unpro"):
        check_budgeted({"unprompted": 0.1, "chat": 0.1}, ["unprompted"])


def figure(value: float, half: float) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "unit": "nats/token"}


MODES = ["unprompted", "chat"]


@pytest.mark.parametrize(("unprompted", "in_chats", "outcome", "decides"), [
    (figure(0.09, 0.001), figure(0.05, 0.001), "kept", 0.09),
    (figure(0.05, 0.001), figure(0.2, 0.001), "exceeded", 0.2),
    (figure(0.2, 0.001), figure(0.11, 0.05), "exceeded", 0.2),
    (figure(0.09, 0.001), figure(0.11, 0.05), "cannot tell", 0.11),
    (figure(0.09, 0.001), None, "cannot tell", None),
])  # fmt: skip
def test_every_mode_is_judged_and_the_worstseverity(
    unprompted: Any, in_chats: Any, outcome: str, decides: float | None
) -> None:
    judged = {mode: judge(of, 0.1, None) for mode, of in zip(MODES, (unprompted, in_chats), strict=True)}
    worst = max(judged.values(), key=severity)
    assert worst["outcome"] == outcome
    assert (worst["ratio"] and worst["ratio"]["value"]) == (decides and pytest.approx(decides / 0.1))
