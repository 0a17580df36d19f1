"""Scores of given rows are the model's own log-probabilities, however the rows are arranged."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OlmoConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from cfsd.errors import NotFinite
from cfsd.model.likelihood import token_logprobs

VOCABULARY = 60
END = 1
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": END, "pad_token_id": END,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "olmo": OlmoConfig(**SHAPE),
    "qwen": Qwen3Config(**SHAPE, head_dim=16),
    "gemma": Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=5.0, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3,
                       bos_token_id=0, eos_token_id=END),
}  # fmt: skip


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model_of(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return model_of("llama")


def rows_of_many_lengths(seed: int = 0) -> list[list[int]]:
    """Rows of 1 to 40 tokens; some hold the end token, which is also the padding, inside and at their end."""
    numbers = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, VOCABULARY, (length,), generator=numbers).tolist() for length in (1, 2, 40, 7, 7, 23, 40)]
    return [*rows, [0, 5, END, 9, END], [0, END]]


@torch.inference_mode()
def law(model: PreTrainedModel, row: list[int]) -> Tensor:
    """Return log p(. | tokens < t) for t = 1 ..., computed for this row alone."""
    found: Tensor = model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)
    return found


def test_every_token_after_the_first_has_the_models_own_log_probability(model: PreTrainedModel) -> None:
    rows = rows_of_many_lengths()
    for row, sample in zip(rows, token_logprobs(model, rows, (END,), max_tokens=60), strict=True):
        assert sample.token_ids == row
        assert sample.logprobs[0] is None and len(sample.logprobs) == len(row)
        wanted = law(model, row).gather(1, torch.tensor(row[1:], dtype=torch.long)[:, None])[:, 0]
        assert sample.logprobs[1:] == pytest.approx(wanted.tolist(), abs=2e-5)


@pytest.mark.parametrize("max_tokens", [1, 6, 39, 40, 80])
def test_logits_never_exceed_the_limit_and_the_limit_changes_nothing(llama: PreTrainedModel, max_tokens: int) -> None:
    rows = rows_of_many_lengths()
    positions: list[int] = []
    head = llama.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, output: positions.append(output.shape[:-1].numel()))
    found = token_logprobs(llama, rows, (END,), top_logprobs=3, max_tokens=max_tokens)
    hook.remove()
    assert max(positions) <= max_tokens
    for one, other in zip(found, token_logprobs(llama, rows, (END,), top_logprobs=3, max_tokens=10**6), strict=True):
        assert one.logprobs[1:] == pytest.approx(other.logprobs[1:], abs=2e-5)
        assert one.top and other.top
        assert (one.top.ids == other.top.ids).all()
        assert one.top.rest[1:] == pytest.approx(other.top.rest[1:], abs=2e-5)


def test_the_likeliest_and_the_rest_are_the_whole_law(model: PreTrainedModel) -> None:
    rows = rows_of_many_lengths(1)
    for row, sample in zip(rows, token_logprobs(model, rows, (END,), top_logprobs=5, max_tokens=100), strict=True):
        assert sample.top
        ids, logprobs, rest = (torch.from_numpy(part) for part in sample.top[:3])
        assert ids.shape == logprobs.shape == (len(row), 5) and rest.shape == (len(row),)
        assert logprobs[0].isnan().all() and rest[0].isnan()
        wanted = law(model, row)
        assert torch.allclose(wanted.topk(5).values.float(), logprobs[1:], atol=2e-5)
        assert torch.allclose(wanted.gather(1, ids[1:].long()).float(), logprobs[1:], atol=2e-5)
        outside = wanted.scatter(1, ids[1:].long(), -torch.inf).logsumexp(-1)
        assert torch.allclose(rest[1:], outside.float(), atol=2e-5)


@pytest.mark.parametrize("max_tokens", [7, 1000])
def test_samples_of_the_rest_are_where_its_cumulative_probabilities_reach_the_points(
    model: PreTrainedModel, max_tokens: int
) -> None:
    rows = rows_of_many_lengths(1)
    points = [np.random.default_rng(number).random((len(row), 3)) for number, row in enumerate(rows)]
    found = token_logprobs(model, rows, (END,), top_logprobs=5, tail_points=points, max_tokens=max_tokens)
    for row, point_TM, sample in zip(rows, points, found, strict=True):
        assert sample.top and sample.top.tail_ids.shape == sample.top.tail_logprobs.shape == (len(row), 3)
        assert np.isnan(sample.top.tail_logprobs[0]).all()
        wanted, ids_TM = law(model, row), torch.from_numpy(sample.top.tail_ids[1:]).long()
        outside = wanted.exp().double().scatter(1, torch.from_numpy(sample.top.ids[1:]).long(), 0.0)
        above = outside.cumsum(-1) / outside.sum(-1, keepdim=True)
        below = above - outside / outside.sum(-1, keepdim=True)
        reached = torch.from_numpy(point_TM[1:])
        assert (above.gather(1, ids_TM) > reached - 1e-5).all() and (below.gather(1, ids_TM) < reached + 1e-5).all()
        assert (outside.gather(1, ids_TM) > 0).all()
        assert np.allclose(sample.top.tail_logprobs[1:], wanted.gather(1, ids_TM), atol=2e-5)


def test_a_rest_too_small_for_one_minus_the_sum_is_kept() -> None:
    model = model_of("llama")
    model.get_output_embeddings().weight.data *= 12
    row = rows_of_many_lengths(2)[2]
    top = token_logprobs(model, [row], (END,), top_logprobs=8)[0].top
    assert top
    wanted = law(model, row).topk(VOCABULARY).values[:, 8:].logsumexp(-1)
    assert wanted.min() < -25  # float32's one minus the sum of the others ends at -16
    assert top.rest[1:].tolist() == pytest.approx(wanted.tolist(), abs=2e-3)


def test_more_alternatives_than_tokens_leave_nothing(llama: PreTrainedModel) -> None:
    top = token_logprobs(llama, [[0, 5, 6]], (END,), top_logprobs=VOCABULARY + 2)[0].top
    assert top and top.ids.shape == (3, VOCABULARY + 2)
    assert sorted(top.ids[1, :VOCABULARY].tolist()) == list(range(VOCABULARY))
    assert top.rest[1:].tolist() == [-float("inf")] * 2


def test_the_reason_is_an_end_at_the_end(llama: PreTrainedModel) -> None:
    rows = [[0, 5, END], [0, END, 5], [0], [END], [END, 7, 2]]
    assert [s.finish_reason for s in token_logprobs(llama, rows, (END, 2))] == [
        "eos",
        "length",
        "length",
        "length",
        "eos",
    ]


def test_bfloat16_models_are_scored_in_float32(llama: PreTrainedModel) -> None:
    model = model_of("llama").to(torch.bfloat16)
    row = rows_of_many_lengths()[2]
    found = token_logprobs(model, [row], (END,))[0].logprobs[1:]
    wanted = law(model, row).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    assert found == pytest.approx(wanted.tolist(), abs=1e-5)


def test_what_is_not_finite_is_named() -> None:
    model = model_of("llama")
    model.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: logits.index_fill(1, torch.tensor([3]), float("nan"))
    )
    with pytest.raises(NotFinite, match="token 4 in shard 3 is not finite"):
        token_logprobs(model, [[0, 5, 6, 9, 7, 8]], (END,), where="shard 3")
