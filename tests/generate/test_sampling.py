"""The sampler follows the model's own distribution exactly, and records the log-probabilities."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cfsd.errors import NotFinite
from cfsd.generate.grouped_attention import grouped_attention
from cfsd.generate.packed_weights import packed_weights
from cfsd.generate.sampling import Rows, Turns, sample
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.token_choice import sampled_probs, uniforms
from cfsd.model.distribution import distribution_of
from cfsd.model.loading import load_model, read_eos_ids
from cfsd.model.sample import Sample
from tests.conftest import save_model

SIGNIFICANCE = 1e-3
DRAWS = 6000


class World(NamedTuple):
    model: PreTrainedModel
    start: int
    eos_ids: tuple[int, ...]


@pytest.fixture(scope="module", params=["llama", "olmo", "gpt2", "qwen2", "gemma2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Models of several shapes; OLMo's and GPT-2's have no BOS and start from their separator, the EOS."""
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder, family=request.param, bos=request.param not in ("olmo", "gpt2"), scale=0.2)
    model = load_model(folder, "cpu").eval()
    start = 0  # <bos>, or <eos> as the separator, which is also the padding: its fresh embedding is zero
    model.get_input_embeddings().weight.data[start] = 0.2 * torch.randn(32, generator=torch.manual_seed(1))
    return World(model, start, read_eos_ids(folder))


def sampled(world: World, spec: GenerateSpec, rows: Sequence[int], stream: str = "context-free") -> list[Sample]:
    return sample(world.model, Rows(rows, [[world.start]] * len(rows), world.eos_ids, stream), spec)


@torch.inference_mode()
def next_law(world: World, contexts: list[list[int]]) -> Tensor:
    """Return p(next token | context), computed apart from the sampler, in float64."""
    probs: Tensor = world.model(torch.tensor(contexts), use_cache=False).logits[:, -1].double().softmax(-1)
    return probs


def p_value(tokens: list[int], probs: Tensor) -> float:
    """Return the chi-square p-value of the counts of `tokens`, rare tokens counted together."""
    expected = probs.numpy() / probs.sum().item() * len(tokens)
    counts = np.bincount(tokens, minlength=len(expected))
    common = expected >= 5
    rest = [expected[~common].sum()] if (~common).any() else []
    seen = [counts[~common].sum()] if (~common).any() else []
    return float(chisquare([*counts[common], *seen], [*expected[common], *rest]).pvalue)


def distributions(world: World) -> tuple[Tensor, Tensor]:
    """Return the distribution of the first token, and that of the second among texts that go on."""
    first = next_law(world, [[world.start]])[0]
    goes_on = [token for token in range(len(first)) if token not in world.eos_ids]
    after = next_law(world, [[world.start, token] for token in goes_on])
    second = (first[goes_on, None] * after).sum(0)
    return first, second / second.sum()


def p_values(world: World, spec: GenerateSpec) -> tuple[float, float]:
    tokens = [s.token_ids for s in sampled(world, spec, range(DRAWS))]
    first, second = distributions(world)
    return p_value([t[1] for t in tokens], first), p_value([t[2] for t in tokens if len(t) > 2], second)


def test_first_and_second_tokens_follow_the_models_softmax(world: World) -> None:
    assert min(p_values(world, GenerateSpec(rows=0, length=2, seed=1))) > SIGNIFICANCE


@pytest.mark.parametrize("bias", [{"temperature": 0.8}, {"top_k": 12}, {"top_p": 0.9}])
def test_every_bias_changes_the_law_and_is_reported(world: World, bias: dict[str, Any]) -> None:
    spec = GenerateSpec(rows=0, length=2, seed=1, **bias)
    assert max(p_values(world, spec)) < SIGNIFICANCE
    assert [name.split("=")[0] for name in spec.biases()] == list(bias)
    assert GenerateSpec().biases() == []


def test_biased_laws_are_those_of_their_definitions() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]], dtype=torch.float64)

    def biased(**bias: Any) -> list[list[float]]:
        kept = sampled_probs(distribution_of(probs.log()), GenerateSpec(**bias))
        return (kept / kept.sum(-1, keepdim=True)).tolist()

    def both(row: list[float]) -> list[Any]:
        return [pytest.approx(row), pytest.approx(row[::-1])]

    squares = [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]
    assert biased(temperature=0.5) == both(squares)
    assert biased(top_k=2) == both([0.625, 0.375, 0, 0])
    assert biased(top_p=0.79) == both([0.625, 0.375, 0, 0])
    assert biased(top_p=0.81) == both([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])
    assert biased(top_k=99) == both([0.5, 0.3, 0.15, 0.05])
    assert biased() == both([0.5, 0.3, 0.15, 0.05])


@pytest.mark.parametrize("bias", [{}, {"temperature": 0.7, "top_k": 5}])
def test_recorded_logprobs_are_the_models_own_whatever_is_sampled(world: World, bias: dict[str, Any]) -> None:
    for s in sampled(world, GenerateSpec(length=20, seed=2, **bias), range(48)):
        with torch.inference_mode():
            logprobs = world.model(torch.tensor([s.token_ids]), use_cache=False).logits[0].log_softmax(-1)
        fresh = [logprobs[t, token].item() for t, token in enumerate(s.token_ids[1:])]
        assert s.logprobs[0] is None
        assert s.logprobs[1:] == pytest.approx(fresh, abs=1e-4)


def test_a_text_ends_at_its_first_end_token_and_nowhere_else(world: World) -> None:
    samples = sampled(world, GenerateSpec(length=20, seed=3), range(400))
    assert {s.finish_reason for s in samples} == {"eos", "length"}
    for s in samples:
        assert s.token_ids[0] == world.start
        assert len(s.token_ids) == len(s.logprobs)
        ended = s.token_ids[-1] in world.eos_ids
        assert s.finish_reason == ("eos" if ended else "length")
        assert ended or len(s.logprobs) == 21
        assert not set(s.token_ids[1:-1]) & set(world.eos_ids)


def test_a_model_without_end_tokens_writes_to_the_end(world: World) -> None:
    samples = sample(world.model, Rows(range(50), [[world.start]] * 50, (), "context-free"), GenerateSpec(length=6))
    assert {(len(s.logprobs), s.finish_reason) for s in samples} == {(7, "length")}


def test_a_row_does_not_depend_on_its_neighbours(world: World) -> None:
    """Row 7 alone is never compacted; among 200 that end one by one it is."""
    spec = GenerateSpec(length=24, seed=4)
    together = sampled(world, spec, range(200))
    assert len({len(s.logprobs) for s in together}) > 5
    for row in (7, 60, 199, max(range(200), key=lambda r: len(together[r].logprobs))):
        alone = sampled(world, spec, [row])[0]
        assert alone.token_ids == together[row].token_ids
        assert alone.logprobs[1:] == pytest.approx(together[row].logprobs[1:], abs=1e-5)
        assert alone.finish_reason == together[row].finish_reason


def test_a_longer_length_only_continues_the_text(world: World) -> None:
    short, long = (sampled(world, GenerateSpec(length=n, seed=5), range(30)) for n in (5, 15))
    assert [s.token_ids for s in short] == [s.token_ids[:6] for s in long]


def test_streams_rows_and_seeds_have_numbers_of_their_own() -> None:
    streams = [uniforms(s, stream, r, 8) for s in (0, 1) for stream in ("probe", "context-free") for r in (0, 1)]
    assert len({tuple(numbers) for numbers in streams}) == len(streams)
    many = np.concatenate([uniforms(0, "probe", row, 50) for row in range(400)])
    assert chisquare(np.histogram(many, bins=20, range=(0, 1))[0]).pvalue > SIGNIFICANCE
    assert abs(np.corrcoef(uniforms(0, "probe", 0, 20000), uniforms(0, "probe", 1, 20000))[0, 1]) < 0.03


def test_a_model_that_gives_nan_is_named(world: World) -> None:
    head = world.model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    hook = head.register_forward_hook(lambda module, args, output: output * float("nan"))
    try:
        with pytest.raises(NotFinite, match="token 1 of shard 3"):
            sample(world.model, Rows([0], [[0]], (), "probe"), GenerateSpec(length=2), where="shard 3")
    finally:
        hook.remove()


def test_texts_end_as_often_as_the_model_says(world: World) -> None:
    """The surplus of ends over their probabilities is a martingale: its sum over sqrt(sum p(1-p)) is a z-score."""
    surplus = variance = 0.0
    eos_ids = list(world.eos_ids)
    for s in sampled(world, GenerateSpec(length=16, seed=6), range(300)):
        with torch.inference_mode():
            distributions = (
                world.model(torch.tensor([s.token_ids[:-1]]), use_cache=False).logits[0].double().softmax(-1)
            )
        chance = distributions[:, eos_ids].sum(-1)
        surplus += (s.finish_reason == "eos") - chance.sum().item()
        variance += (chance * (1 - chance)).sum().item()
    assert variance > 5
    assert abs(surplus) / variance**0.5 < 3.3


def test_prompts_of_unequal_length_are_gone_on_from_as_if_each_were_alone(world: World) -> None:
    prompts = [[world.start, *range(3, 3 + n)] for n in (2, 0, 7, 4)]
    spec = GenerateSpec(length=10, seed=7)
    together = sample(world.model, Rows(range(4), prompts, world.eos_ids, "contextual"), spec)
    for row, prompt in enumerate(prompts):
        alone = sample(world.model, Rows([row], [prompt], world.eos_ids, "contextual"), spec)[0]
        assert together[row].token_ids == alone.token_ids
        assert together[row].token_ids[: len(prompt)] == prompt
        known = [value is not None for value in together[row].logprobs]
        assert known == [False] * len(prompt) + [True] * (len(known) - len(prompt))
        assert together[row].logprobs[len(prompt) :] == pytest.approx(alone.logprobs[len(prompt) :], abs=1e-4)


def test_filled_rows_hold_several_texts_and_every_sampled_token_has_the_models_logprob(world: World) -> None:
    between = [] if world.start in world.eos_ids else [world.start]
    turns = Turns(20, between)
    spec = GenerateSpec(length=20, seed=8, fill=True)
    samples = sample(world.model, Rows(range(60), [[world.start]] * 60, world.eos_ids, "context-free", turns), spec)
    assert {len(s.token_ids) for s in samples} == {21}
    assert any(set(s.token_ids[1:-2]) & set(world.eos_ids) for s in samples)
    for s in samples:
        with torch.inference_mode():
            logprobs = world.model(torch.tensor([s.token_ids]), use_cache=False).logits[0].log_softmax(-1)
        for t in range(1, 21):
            inserted = bool(between) and s.token_ids[t - 1] in world.eos_ids
            assert (s.logprobs[t] is None) == inserted
            if inserted:
                assert s.token_ids[t] == world.start
            else:
                assert s.logprobs[t] == pytest.approx(logprobs[t - 1, s.token_ids[t]].item(), abs=1e-4)


def test_one_more_turn_is_opened_by_the_given_tokens_and_ends_the_row(world: World) -> None:
    spec = GenerateSpec(length=40, seed=9)
    samples = sample(
        world.model, Rows(range(80), [[world.start]] * 80, world.eos_ids, "template", Turns(1, [5, 6])), spec
    )
    finished = [s for s in samples if s.finish_reason == "eos"]
    assert finished
    for s in finished:
        ends = [t for t, token in enumerate(s.token_ids) if token in world.eos_ids and s.logprobs[t] is not None]
        assert len(ends) == 2
        assert s.token_ids[ends[0] + 1 : ends[0] + 3] == [5, 6]
        assert s.logprobs[ends[0] + 1 : ends[0] + 3] == [None, None]
        assert ends[1] == len(s.token_ids) - 1


def test_the_last_turn_has_ends_of_its_own(world: World) -> None:
    (end, *_), spec = world.eos_ids, GenerateSpec(length=40, seed=9)
    turns = Turns(1, [5, 6], last_ends=[7])
    samples = sample(world.model, Rows(range(80), [[world.start]] * 80, [end], "template", turns), spec)
    opened = [s for s in samples if end in s.token_ids[1:]]
    assert any(s.token_ids.count(end) > 1 for s in opened)  # the first turn's end ends nothing in the last one
    for s in opened:
        last = s.token_ids[s.token_ids.index(end, 1) + 3 :]
        assert last.index(7) == len(last) - 1 if s.finish_reason == "eos" else 7 not in last


@pytest.mark.parametrize("between", [[5, 6], []])
def test_a_turn_that_another_token_ended_is_closed_before_the_next_is_opened(world: World, between: list[int]) -> None:
    """As where a chat's user ends with the end of a text: without it the assistant's turn would not be opened."""
    closing, spec = 9, GenerateSpec(length=40, seed=9)
    turns = Turns(1, between, closing=closing)
    ends = (*world.eos_ids, closing)
    samples = sample(world.model, Rows(range(80), [[world.start]] * 80, ends, "template", turns), spec)
    seen = set()
    for s in samples:
        if (end := next((t for t in range(1, len(s.token_ids)) if s.token_ids[t] in ends), None)) is None:
            continue
        after = [*([] if s.token_ids[end] == closing else [closing]), *between]
        assert turns.inserted(s.token_ids[end]) == after
        given = s.token_ids[end + 1 : end + 1 + len(after)]
        assert given == after[: len(given)] and set(s.logprobs[end + 1 : end + 1 + len(given)]) <= {None}
        assert all(value is not None for value in s.logprobs[end + 1 + len(after) :])
        seen.add(s.token_ids[end] == closing)
    assert seen == {True, False}


def test_no_text_ends_before_the_least_length(world: World) -> None:
    spec = GenerateSpec(length=12, seed=3, min_length=5)
    counts = [len(s.token_ids) - 1 for s in sampled(world, spec, range(300))]
    assert min(counts) == 6
    assert spec.biases() == ["min_length=5"]
    assert min(len(s.token_ids) - 1 for s in sampled(world, GenerateSpec(length=12, seed=3), range(300))) == 1


@pytest.mark.parametrize("count", [3, 99])
def test_the_likeliest_tokens_are_stored_with_what_is_left(world: World, count: int) -> None:
    for s in sampled(world, GenerateSpec(length=8, seed=10, top_logprobs=count), range(20)):
        with torch.inference_mode():
            logprobs = world.model(torch.tensor([s.token_ids]), use_cache=False).logits[0].log_softmax(-1)
        assert s.top is not None
        assert np.isnan(s.top.logprobs[0]).all()
        kept = min(count, logprobs.shape[1])
        for t in range(1, len(s.token_ids)):
            best = logprobs[t - 1].topk(kept)
            assert s.top.ids[t, :kept].tolist() == best.indices.tolist()
            assert s.top.logprobs[t, :kept] == pytest.approx(best.values.numpy(), abs=1e-4)
            others = logprobs[t - 1].double().exp().sum() - best.values.double().exp().sum()
            assert np.exp(s.top.rest[t]) == pytest.approx(others.item(), abs=1e-6)


def parts(samples: list[Sample]) -> list[Any]:
    """Return all but the samples of the tail, which are asserted to be absent where the top is."""
    tops = [s.top for s in samples if s.top is not None]
    values = [part.tobytes() for top in tops for part in (top.ids, top.logprobs, top.rest)]
    return [*((s.token_ids, s.logprobs, s.finish_reason) for s in samples), *values]


@pytest.mark.parametrize("bias", [{}, {"temperature": 0.6, "top_k": 9}, {"fill": True}])
def test_samples_of_the_tail_change_nothing_else(world: World, bias: dict[str, Any]) -> None:
    spec = GenerateSpec(length=12, seed=4, top_logprobs=3, tail_samples=0, **bias)
    plain = sampled(world, spec, range(12))
    assert plain[0].top is not None and plain[0].top.tail_ids.shape[1] == 0
    for count in (1, 5):
        assert parts(sampled(world, spec.model_copy(update={"tail_samples": count}), range(12))) == parts(plain)
    nothing = sampled(world, spec.model_copy(update={"top_logprobs": 0, "tail_samples": 5}), range(12))
    assert [s[:3] for s in nothing] == [s[:3] for s in plain] and nothing[0].top is None


def test_samples_of_the_tail_do_not_depend_on_the_batch(world: World) -> None:
    spec = GenerateSpec(length=10, seed=3, top_logprobs=3, tail_samples=4)
    together = sampled(world, spec, range(8))
    for row in (0, 5):
        (alone,) = sampled(world, spec, [row])
        assert alone.top is not None and together[row].top is not None
        assert alone.top.tail_ids.tolist() == together[row].top.tail_ids.tolist()
    assert together[0].top.tail_ids[1].tolist() != together[1].top.tail_ids[1].tolist()  # each row has its own
    assert together[0].top.tail_ids[1].tolist() != together[0].top.tail_ids[2].tolist()


@pytest.mark.parametrize("count", [1, 4])
def test_samples_of_the_tail_follow_the_base_outside_the_top_whatever_the_text(world: World, count: int) -> None:
    """Chi-square at the first position against the tail's law; at a low temperature too the law is the base's own."""
    spec = GenerateSpec(length=3, seed=8, top_logprobs=3, tail_samples=count, temperature=0.5)
    samples = sampled(world, spec, range(2000 // count))
    law = next_law(world, [[0]])[0].double()
    _, tail = law.sort(descending=True)[1].split([3, len(law) - 3])
    place = {token: number for number, token in enumerate(tail.tolist())}
    first = [place[token] for s in samples if s.top is not None for token in s.top.tail_ids[1].tolist()]
    assert p_value(first, law[tail]) > SIGNIFICANCE
    for s in samples[:20]:
        with torch.inference_mode():
            logprobs = world.model(torch.tensor([s.token_ids])).logits[0].log_softmax(-1).numpy()
        assert s.top is not None and np.isnan(s.top.tail_logprobs[0]).all() and not s.top.tail_ids[0].any()
        for t in range(1, len(s.token_ids)):
            assert s.top.tail_logprobs[t] == pytest.approx(logprobs[t - 1][s.top.tail_ids[t]], abs=1e-4)
            assert not set(s.top.tail_ids[t].tolist()) & set(s.top.ids[t].tolist())


def test_a_model_with_a_state_of_its_own_goes_through_generate(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.5)
    world = World(MambaForCausalLM(config).eval(), 0, (1,))
    world.model.generation_config.repetition_penalty = 1.7  # the checkpoint's own settings must not count
    samples = sampled(world, GenerateSpec(length=6, seed=2), range(300))
    assert "slower" in caplog.text
    assert p_value([s.token_ids[1] for s in samples], next_law(world, [[0]])[0]) > SIGNIFICANCE
    assert {s.finish_reason for s in samples} == {"eos", "length"}
    for s in samples[:40]:
        with torch.inference_mode():
            logprobs = world.model(torch.tensor([s.token_ids])).logits[0].log_softmax(-1)
        fresh = [logprobs[t, token].item() for t, token in enumerate(s.token_ids[1:])]
        assert s.logprobs[1:] == pytest.approx(fresh, abs=1e-4)
    prompts = [[0], [0, 5, 6]]
    written = sample(world.model, Rows(range(2), prompts, (1,), "template", Turns(1, [1, 0])), GenerateSpec(length=4))
    assert [s.token_ids[: len(prompt)] for s, prompt in zip(written, prompts, strict=True)] == prompts


def test_packed_weights_multiply_as_the_layers_do_and_leave_them_as_they_were(world: World) -> None:
    layers = [layer for layer in world.model.modules() if type(layer) is nn.Linear]
    states = [torch.randn(5, 1, layer.in_features, generator=torch.manual_seed(0)) for layer in layers]
    with torch.inference_mode():
        with packed_weights(world.model, 5):
            assert all("forward" in vars(layer) for layer in layers)
            packed = [layer(states) for layer, states in zip(layers, states, strict=True)]
        plain = [layer(states) for layer, states in zip(layers, states, strict=True)]
    assert not any("forward" in vars(layer) for layer in layers)
    for one, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_where_memory_is_small_only_the_output_layer_is_copied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfsd.generate.packed_weights.room_for_a_copy", lambda size: False)
    with packed_weights(world.model, 5):
        own = [layer for layer in world.model.modules() if isinstance(layer, nn.Linear) and "forward" in vars(layer)]
    assert own == [world.model.get_output_embeddings()]


@pytest.mark.parametrize("groups", [1, 3, 9])
def test_heads_that_share_keys_attend_as_each_would_alone(groups: int) -> None:
    generator = torch.manual_seed(0)
    query = torch.randn(4, 9, 1, 8, generator=generator)
    cache = torch.randn(2, 4, groups, 20, 8, generator=generator)
    key, value = cache[:, :, :, :13]  # views of memory that is laid out for more
    with grouped_attention(query.device):
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out = attend(nn.Module(), query, key, value, None, scaling=0.3)[0]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not attend
    assert out.shape == (4, 1, 9, 8)
    for row in range(4):
        for head in range(9):
            mine = (x[row, head // (9 // groups)].double() for x in (key, value))
            keys, values = mine
            weights = (0.3 * keys @ query[row, head, 0].double()).softmax(-1)
            torch.testing.assert_close(out[row, 0, head].double(), weights @ values, atol=1e-6, rtol=1e-6)
