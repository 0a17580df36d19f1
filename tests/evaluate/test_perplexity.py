"""Perplexity of the user's own texts: every token once, whatever the windows; divergence on the target's responses."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from cfsd.errors import BadInput
from cfsd.evaluate.divergence import divergence, score_target_divergence
from cfsd.evaluate.perplexity import score_text, text_likelihoods, windows
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.evaluate.text import Text
from cfsd.machine import Machine
from cfsd.model.context import context_tokens
from cfsd.model.loading import load_for_measuring, load_tokenizer, read_start_token
from cfsd.report.run_record import RunRecord, Scores
from cfsd.report.summarise import summarise
from cfsd.statistics.texts import text_forgetting
from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import TARGET, table_of, write_shard
from tests.conftest import fetched, save_model

CPU = Machine(device="cpu", threads=1, micro_batch_tokens=100)
TEXTS = ["a dog and a cat.", "the end", "words = words. " * 20, "é", "zebra", "fast: slow"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A file with a document to a line; the third is longer than the model's context of 128."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in [*TEXTS, " "]))
    return file


def measured(store: Store, model: Artifact, text: Text, max_tokens: int = 100) -> list[Any]:
    folder = store.path(model)
    loaded, tokenizer = load_for_measuring(store, model, "cpu"), load_tokenizer(folder)
    start = read_start_token(folder)
    return text_likelihoods(loaded, tokenizer, text, start, max_tokens, context_tokens(model), lambda *_: None)


def test_every_token_is_scored_once(store: Store, base: Artifact, texts: Path) -> None:
    found = measured(store, base, Text(name="mine", path=str(texts)))
    assert [d["tokens"] for d in found] == [len(text) for text in TEXTS]  # one token per character
    assert [d["bytes"] for d in found] == [len(text.encode()) for text in TEXTS]
    model, tokenizer = load_for_measuring(store, base, "cpu"), load_tokenizer(store.path(base))
    start = read_start_token(store.path(base))
    for text, document in zip(TEXTS, found, strict=True):
        tokens = [start, *tokenizer.encode(text, add_special_tokens=False)]
        expected = 0.0
        for first in range(0, len(text), 127):  # the context of 128 holds the token before, and 127 to predict
            part_BT = torch.tensor([tokens[first : first + 128]])
            with torch.no_grad():
                expected += float(model(part_BT, labels=part_BT).loss) * (part_BT.shape[1] - 1)
        assert document["nll"] == pytest.approx(expected, rel=1e-5)
    alone = measured(store, base, Text(name="mine", path=str(texts)), max_tokens=1)
    assert [d["nll"] for d in alone] == pytest.approx([d["nll"] for d in found], rel=1e-6)


@pytest.mark.parametrize("longest", [2, 3, 7, 10, 11])
def test_windows_meet_in_one_token(longest: int) -> None:
    token_ids = list(range(10))
    parts = list(windows(token_ids, longest))
    assert all(2 <= len(part) <= longest for part in parts)
    assert [token for part in parts for token in part[1:]] == token_ids[1:]


def test_texts_come_from_files_and_folders(tmp_path: Path, texts: Path) -> None:
    folder = tmp_path / "many"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.md").write_text("# first\n")
    (folder / "deep" / "b.txt").write_text("second")
    (folder / "ignored.bin").write_bytes(b"\xff")
    assert list(Text(name="m", path=str(folder)).documents()) == ["# first\n", "second"]
    assert list(Text(name="m", path=str(folder / "a.md")).documents()) == ["# first\n"]
    assert list(Text(name="m", path=str(texts), limit=2).documents()) == TEXTS[:2]


def test_texts_count_by_content_and_settings(tmp_path: Path, texts: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(texts.read_bytes())
    first = Text(name="a", path=str(texts))
    assert first.digest() == Text(name="b", path=str(other)).digest()
    assert len({first.digest(), *(first.model_copy(update=u).digest() for u in ({"limit": 1}, {"window": 9}))}) == 3
    other.write_text('{"text": "else"}\n')
    assert first.digest() != Text(name="a", path=str(other)).digest()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"words": "x"}\n', r"a\.jsonl' line 1 has no column 'text'; its columns are 'words'"),
        ("a.jsonl", "{\n", r"could not be read as jsonl: line 1"),
        ("a.txt", " \n", r"holds no text; fix evaluate\.texts"),
        ("a.txt", "", r"is empty; fix evaluate\.texts"),
        ("a.pdf", "x", r"ends in '\.pdf'; allowed: \.txt, \.md, \.jsonl"),
    ],
)
def test_texts_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=message):
        EvaluateSpec.model_validate({"texts": [{"name": "t", "path": str(tmp_path / name)}]}).check()
    with pytest.raises(BadInput, match="does not exist"):
        Text(name="t", path=str(tmp_path / "nowhere.txt")).check()


def test_forgetting_of_texts_is_the_rise_of_their_likelihood_loss() -> None:
    before = pd.DataFrame(
        {"row_id": range(6), "nll": [10.0] * 6, "tokens": [5, 5, 5, 5, 5, 15], "bytes": [20] * 6, "text": "x"}
    )
    after = before.assign(nll=[12.0, 11, 10, 11, 12, 14])
    found = text_forgetting("t", before, after)
    assert (found["documents"], found["tokens"], found["bytes"]) == (6, 40, 120)
    token, byte = found["per_token"], found["per_byte"]
    assert (token["base"], token["tuned"]) == (60 / 40, 70 / 40)
    assert token["forgetting"]["value"] == pytest.approx(10 / 40) and token["forgetting"]["unit"] == "nats/token"
    assert byte["forgetting"]["value"] == pytest.approx(10 / 120) and byte["forgetting"]["unit"] == "nats/byte"
    assert 0 < token["forgetting"]["low"] < 0.25 < token["forgetting"]["high"]
    with pytest.raises(ValueError, match="text t: the documents before and after differ"):
        text_forgetting("t", before, after.assign(tokens=4))


def target_in(store: Store) -> Artifact:
    """Return a target of eight held-out rows; the response follows the equals sign."""
    rows = []
    for i in range(8):
        tokens = [0, *range(3, 8 + i), 29, *range(9, 12 + i % 3)]
        known = tokens.index(29) + 1
        rows.append({"row_id": i, "source": "target", "token_ids": tokens, "prompt": "", "response": "",
                     "supervised": [False] * known + [True] * (len(tokens) - known)})  # fmt: skip
    return store.make(
        "target", "ab" * 8, lambda draft: write_shard(draft.folder, "held_out", 0, table_of(TARGET, rows))
    )[0]


def test_texts_and_target_divergence_reach_the_summary(
    store: Store, base: Artifact, tmp_path: Path, texts: Path
) -> None:
    tuned, target = fetched(store, save_model(tmp_path / "other", seed=1)), target_in(store)
    text = Text(name="mine", path=str(texts))

    def made(key: str, work: Any, *inputs: Any) -> Artifact:
        return store.make("scores", key * 8, lambda draft: work(*inputs, draft, CPU))[0]

    before = Scores(texts={"mine": made("0a", score_text, base, text)})
    divergence = made("0c", score_target_divergence, base, tuned, target, None)
    after = Scores(texts={"mine": made("0b", score_text, tuned, text)}, target_divergence=divergence)
    found = summarise(store, RunRecord(name="x", artifacts={"base": base, "final": tuned}, before=before, after=after))
    sums = [sum(d["nll"] for d in measured(store, model, text)) for model in (base, tuned)]
    tokens = sum(map(len, TEXTS))
    assert found.texts["mine"]["per_token"]["forgetting"]["value"] == pytest.approx((sums[1] - sums[0]) / tokens)
    assert before.texts["mine"].metadata["nats_per_token"] == pytest.approx(sums[0] / tokens)
    assert found.target_divergence is not None and found.probe_kl is None and found.mean_forgetting is None
    assert found.target_divergence["value"] == pytest.approx(divergence.metadata["target_divergence"])
    assert 0 < found.target_divergence["low"] < found.target_divergence["value"]


def test_target_divergence_sums_the_kl_over_the_response_alone(store: Store, base: Artifact, tmp_path: Path) -> None:
    tuned = fetched(store, save_model(tmp_path / "other", seed=1))
    models = [load_for_measuring(store, model, "cpu") for model in (base, tuned)]
    rows = [{"row_id": 0, "token_ids": [0, 5, 6, 7, 8], "supervised": [False, False, False, True, True]},
            {"row_id": 1, "token_ids": [0, 9, 10], "supervised": [False, False, True]}]  # fmt: skip
    token_rows, masks = ([row[name] for row in rows] for name in ("token_ids", "supervised"))
    found = divergence(models[0], models[1], token_rows, masks)
    for row, part in zip(rows, found, strict=True):
        with torch.no_grad():
            base_TV, tuned_TV = (m(torch.tensor([row["token_ids"]])).logits[0].double().log_softmax(-1) for m in models)
        kl_T = (base_TV.exp() * (base_TV - tuned_TV)).sum(-1)
        places = [t - 1 for t, wanted in enumerate(row["supervised"]) if wanted]
        assert part.kl == pytest.approx(float(kl_T[places].sum()), rel=1e-4) and part.num_tokens == len(places)
    same = divergence(models[0], models[0], token_rows, masks)
    assert all(part.kl == 0 for part in same) and not math.isclose(found[0].kl, 0)
