"""Exact accuracy is what greedy decoding would write; the loss is the response's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.evaluate.stage import score_target
from cfsd.machine import Machine
from cfsd.model.likelihood import score_responses
from cfsd.model.loading import load_model
from cfsd.store.artifact import Artifact, Store, key_of
from cfsd.store.tables import read_rows
from tests.conftest import write_rows


@pytest.fixture(scope="module")
def model(model_folder: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = load_model(model_folder, "cpu").eval()
    return loaded


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """Return what transformers' own greedy decoding writes after `prompt`."""
    written: Any = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=length
    )
    return [int(token) for token in written[0, len(prompt) :]]


def row(index: int, prompt: list[int], response: list[int]) -> dict[str, Any]:
    return {
        "row_id": index, "token_ids": prompt + response, "prompt": str(prompt), "response": str(response),
        "supervised": [False] * len(prompt) + [True] * len(response),
    }  # fmt: skip


@pytest.fixture(scope="module")
def rows(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Prompts with the greedy response, and with one token of it changed at each place in turn."""
    found = []
    for i in range(24):
        prompt = [0, *((11 * i + j) % 30 + 2 for j in range(1 + i % 5))]
        response = greedy(model, prompt, 2 + i % 6)
        if i % 2:
            place = i % len(response)
            response[place] = (response[place] + 1) % 30 + 2
        found.append(row(i, prompt, response))
    return found


def split(item: dict[str, Any]) -> tuple[list[int], list[int]]:
    start = item["supervised"].index(True)
    return item["token_ids"][:start], item["token_ids"][start:]


def test_all_first_choices_is_what_greedy_decoding_writes(model: PreTrainedModel, rows: list[dict[str, Any]]) -> None:
    found = score_responses(model, rows, 60, lambda done: None)
    exact = [record["correct"] == record["count"] for record in found]
    written = [greedy(model, prompt, len(response)) == response for prompt, response in map(split, rows)]
    assert exact == written
    assert {True, False} == set(written)


def test_the_loss_is_the_responses_own_whatever_stands_beside_it(
    model: PreTrainedModel, rows: list[dict[str, Any]]
) -> None:
    seen: list[int] = []
    found = score_responses(model, rows, 60, seen.append)
    assert seen[-1] == len(rows) and seen == sorted(seen)
    for record, item in zip(found, rows, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([item["token_ids"]])).logits[0].double().log_softmax(-1)
        _, response = split(item)
        first = len(item["token_ids"]) - len(response)
        nll = -sum(float(logprobs[first + t - 1, token]) for t, token in enumerate(response))
        assert record["nll"] == pytest.approx(nll, rel=1e-5)
        assert (record["row_id"], record["count"]) == (item["row_id"], len(response))


def test_supervised_turns_with_gaps_between_them_are_found(model: PreTrainedModel) -> None:
    tokens = [0, 5, 6, 7, 8, 9, 1]
    gaps = {"row_id": 0, "token_ids": tokens, "prompt": "", "response": "",
            "supervised": [False, False, True, False, False, True, True]}  # fmt: skip
    beside = row(1, [0, 4], [5, 6, 7, 8, 9, 10, 11])
    found = score_responses(model, [gaps, beside], 1000, lambda done: None)[0]
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert found["nll"] == pytest.approx(-sum(float(logprobs[t - 1, tokens[t]]) for t in (2, 5, 6)), rel=1e-5)
    assert found["count"] == 3


def test_a_row_above_the_limit_has_its_logits_in_parts(model: PreTrainedModel) -> None:
    long = row(0, [0, 4, 5], [(7 * i) % 30 + 2 for i in range(61)])
    whole = score_responses(model, [long], 1000, lambda done: None, per_token=True)[0]
    most: list[int] = []
    head = model.get_output_embeddings().register_forward_hook(lambda *args: most.append(args[2].shape[1]))
    parts = score_responses(model, [long], 16, lambda done: None, per_token=True)[0]
    head.remove()
    assert most == [16, 16, 16, 13] and (parts["correct"], parts["count"]) == (whole["correct"], 61)
    assert parts["nll"] == pytest.approx(whole["nll"], rel=1e-6)
    assert parts["token_nll"] == pytest.approx(whole["token_nll"], rel=1e-5)


def test_the_target_score_is_over_held_out_rows(store: Store, base: Artifact, tmp_path: Path) -> None:
    target = Target(path=str(write_rows(tmp_path / "rows.jsonl")), held_out=10, seed=0)
    made = store.make("target", key_of("prepare", base, target), lambda draft: prepare(base, target, draft))[0]
    machine = Machine(device="cpu", threads=1, micro_batch_tokens=40)
    scored = store.make("scores", "a" * 16, lambda draft: score_target(base, made, None, draft, machine))[0]
    few = store.make("scores", "b" * 16, lambda draft: score_target(base, made, 3, draft, machine))[0]
    assert (scored.metadata["rows"], few.metadata["rows"]) == (10, 3)
    records = read_rows(store.path(scored), "responses")
    assert [r["prompt"] for r in read_rows(store.path(few), "responses")] == [r["prompt"] for r in records[:3]]
    tokens = sum(record["count"] for record in records)
    assert tokens == sum(sum(row["supervised"]) for row in read_rows(store.path(made), "held_out"))
    assert scored.metadata["loss"] == pytest.approx(sum(record["nll"] for record in records) / tokens)
    assert scored.metadata["accuracy"] == sum(r["correct"] == r["count"] for r in records) / 10
