"""What the choices of a document have in common is read once, and every likelihood is that of the text alone."""

import random
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from benchmarks._families import FAMILIES
from cfsd.evaluate.harness.likelihoods import Pair, Request, can_share, likelihoods, rows_of

VOCABULARY, CONTEXT = 40, 24
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4,
}  # fmt: skip


def llama(attention: str = "sdpa") -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=attention))


def gpt2() -> Any:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.4))


def gemma2() -> Any:
    """Logits are bent after the output layer, and every second layer sees 4 tokens."""
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, sliding_window=4))


def mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))


def gpt_neo() -> Any:
    """Every second layer sees 12 tokens: more than a short trial has, and by places in the row."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "window_size": 12}
    layers = [[["global", "local"], 1]]
    return GPTNeoForCausalLM(
        GPTNeoConfig(**sizes, attention_types=layers, max_position_embeddings=64, initializer_range=0.4)
    )


MODELS = {
    "llama": (llama, True),
    "llama-eager": (lambda: llama("eager"), True),
    "gpt2": (gpt2, True),
    "gemma2": (gemma2, False),
    "mistral": (mistral, False),
    "gpt-neo": (gpt_neo, False),
}


def made(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return MODELS[name][0]().eval()


def pairs() -> tuple[list[Pair], list[int]]:
    """Return choices of 12 documents: of one token and of more, with a common beginning and without, one cut."""
    draw = random.Random(5)

    def text(length: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(length)]

    found, documents = list[Pair](), list[int]()
    for document in range(12):
        context = text(1 + 2 * document)  # the longest is cut, by another number of tokens for each choice
        choices = [text(1), text(1), text(3), text(1 + document % 4)]
        choices += [choices[2][:2] + text(2), choices[0]]  # begins as another one, is another one
        found += [(context, choice) for choice in choices]
        documents += [document] * len(choices)
    return found, documents


@torch.inference_mode()
def alone(model: Any, request: Request) -> tuple[float, bool]:
    """Return the answer of one plain forward pass over one text."""
    read, wanted = request
    logprobs = model(torch.tensor([read])).logits[0, -len(wanted) :].log_softmax(-1)
    picked = logprobs.gather(1, torch.tensor(wanted)[:, None])
    return picked.sum().item(), logprobs.argmax(-1).tolist() == wanted


@pytest.mark.parametrize("name", MODELS)
def test_models_in_16_bits_share_where_those_in_32_do(name: str) -> None:
    """Kernels with and without a mask round otherwise: on GPUs every context was read once for each choice, unsaid."""
    assert can_share(made(name).bfloat16()) == MODELS[name][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_does_not_read_where_tokens_stand_shares_nothing(dtype: torch.dtype) -> None:
    (mpt,) = (family for family in FAMILIES if family.name == "MPT")
    assert not can_share(mpt.model().to(dtype))


@pytest.mark.parametrize("name", MODELS)
def test_each_choice_is_as_likely_as_by_itself(name: str) -> None:
    model, (asked, documents) = made(name), pairs()
    requests = [Request.of(pair, CONTEXT) for pair in asked]
    assert max(len(request.read) for request in requests) == CONTEXT
    assert can_share(model) == MODELS[name][1]
    done: list[int] = []
    rows = rows_of(requests, documents, CONTEXT + 12 if can_share(model) else 0)
    told = likelihoods(model, requests, rows, lambda longest: 100, done.append)
    wanted = [alone(model, request) for request in requests]
    assert [value for value, _ in told] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in told] == [greedy for _, greedy in wanted]
    assert sum(done) == len(requests) and len(done) > 3


def test_the_likeliest_choice_is_called_so() -> None:
    model, context = made("llama"), [1, 2, 3]
    best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    requests = [Request.of((context, [token]), CONTEXT) for token in range(VOCABULARY)]
    told = likelihoods(model, requests, rows_of(requests, [0] * VOCABULARY, CONTEXT), lambda longest: 100)
    assert [token for token, (_, greedy) in enumerate(told) if greedy] == [best]
    assert sum(torch.tensor([value for value, _ in told]).exp()) == pytest.approx(1, abs=1e-5)


def test_what_is_common_is_read_once() -> None:
    context, choices = list(range(20)), [[21, 22, 23], [21, 24], [25], [26]]
    requests = [Request.of((context, choice), 64) for choice in choices]
    (row,) = rows_of(requests, [0] * 4, 23)
    assert (row.trunk, row.branches) == (context, [[21, 22], [21], []])
    assert len(row.tokens()) == 23
    apart = rows_of(requests, [0] * 4, 22)
    assert [len(row.tokens()) for row in apart] == [22, 21, 20]  # choices of one token share a reading all the same
    assert len(rows_of(requests, [0, 1, 2, 3], 23)) == 4
