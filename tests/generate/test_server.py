"""The server engine against a real HTTP server: exact rows, honest about doubt, stubborn where it helps."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import chisquare
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsd.errors import BadInput, Crashed
from cfsd.generate.sampling import Turns
from cfsd.generate.server import client
from cfsd.generate.server.check import check_server
from cfsd.generate.server.client import ServerGone
from cfsd.generate.server.protocol import ServerSampling
from cfsd.generate.server.sampler import sample_from_server
from cfsd.generate.spec import GenerateSpec
from cfsd.machine import Machine
from cfsd.model.loading import load_model, load_tokenizer
from cfsd.model.sample import Sample
from tests.conftest import save_model
from tests.loopback_server import Loopback, Manners, serving

START, END = 0, 1
LENGTH = 8
SIGNIFICANCE = 1e-3


class World(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = save_model(tmp_path_factory.mktemp("served"), scale=0.2)
    return World(load_model(folder, "cpu").eval(), load_tokenizer(folder))


Serve = Callable[..., Loopback]


@pytest.fixture
def serve(world: World) -> Iterator[Serve]:
    """Start servers of the tiny model, or of another, with the manners that are named."""
    with ExitStack() as stack:

        def start(model: PreTrainedModel | None = None, port: int = 0, **manners: Any) -> Loopback:
            return stack.enter_context(serving(model or world.model, world.tokenizer, Manners(**manners), port))

        yield start


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)


def to(server: Loopback, **settings: Any) -> Machine:
    return Machine(engine="server", base_url=server.url, **settings)


def rows(world: World, machine: Machine, count: int, **settings: Any) -> list[Sample | str]:
    spec = GenerateSpec(rows=count, **{"length": LENGTH, "seed": 5, **settings})
    wanted = ServerSampling(machine, spec, (END,), world.tokenizer, "context-free")
    return sample_from_server(wanted, [[START]] * count, range(count))


def samples(world: World, machine: Machine, count: int, **settings: Any) -> list[Sample]:
    sampled = [row for row in rows(world, machine, count, **settings) if isinstance(row, Sample)]
    assert len(sampled) == count
    return sampled


def check(world: World, machine: Machine, **settings: Any) -> dict[str, Any]:
    spec = GenerateSpec(**{"length": LENGTH, "seed": 5, **settings})
    return check_server(ServerSampling(machine, spec, (END,), world.tokenizer), world.model, START)


@torch.inference_mode()
def fresh(world: World, sample: Sample) -> list[float]:
    """Return log p of each token after the first, from one pass over the row."""
    logprobs = world.model(torch.tensor([sample.token_ids]), use_cache=False).logits[0].log_softmax(-1)
    return [logprobs[t, token].item() for t, token in enumerate(sample.token_ids[1:])]


def assert_exact(world: World, sampled: list[Sample]) -> None:
    """Fail unless rows end where they should and carry the model's own log-probabilities."""
    for s in sampled:
        assert s.token_ids[0] == START and s.logprobs[0] is None
        assert s.logprobs[1:] == pytest.approx(fresh(world, s), abs=1e-4)
        assert END not in s.token_ids[1:-1]
        assert s.finish_reason == ("eos" if s.token_ids[-1] == END else "length")
        assert s.finish_reason == "eos" or len(s.token_ids) == LENGTH + 1
    assert {s.finish_reason for s in sampled} == {"eos", "length"}


def p_value(tokens: list[int], probs: torch.Tensor) -> float:
    expected = probs.double().numpy() * len(tokens)
    common = expected >= 5
    counts = np.bincount(tokens, minlength=len(expected))
    seen, wanted = [*counts[common], counts[~common].sum()], [*expected[common], expected[~common].sum()]
    return float(chisquare(seen, np.array(wanted) / sum(wanted) * sum(seen)).pvalue)


def test_first_and_second_tokens_follow_the_models_softmax(world: World, serve: Serve) -> None:
    sampled = samples(world, to(serve()), 600, length=2)
    with torch.inference_mode():
        first = world.model(torch.tensor([[START]])).logits[0, -1].softmax(-1)
        goes_on = [token for token in range(len(first)) if token != END]
        after = world.model(torch.tensor([[START, token] for token in goes_on])).logits[:, -1].softmax(-1)
    second = (first[goes_on, None] * after).sum(0)
    assert p_value([s.token_ids[1] for s in sampled], first) > SIGNIFICANCE
    assert p_value([s.token_ids[2] for s in sampled if len(s.token_ids) > 2], second / second.sum()) > SIGNIFICANCE


@pytest.mark.parametrize("owned_by", ["vllm", "sglang", "llamacpp", "unheard-of"])
def test_rows_are_exact_whoever_serves(world: World, serve: Serve, owned_by: str) -> None:
    assert_exact(world, samples(world, to(serve(owned_by=owned_by)), 24))


def test_log_probabilities_are_the_models_own_under_a_biased_settings(world: World, serve: Serve) -> None:
    assert_exact(world, samples(world, to(serve()), 32, temperature=1.5, top_k=20))


def test_no_parameter_of_the_law_is_left_to_the_servers_defaults(world: World, serve: Serve) -> None:
    for owned_by, off in {"vllm": -1, "sglang": -1, "llamacpp": 0}.items():
        server = serve(owned_by=owned_by)
        samples(world, to(server), 3)
        for body in server.requests:
            neutral = {"temperature": 1, "top_p": 1, "top_k": off, "min_p": 0, "n": 1}
            neutral |= {"presence_penalty": 0, "frequency_penalty": 0}
            assert neutral.items() <= body.items()
            assert body.get("repetition_penalty", body.get("repeat_penalty")) == 1
        assert len({body["seed"] for body in server.requests[-3:]}) == 3


def test_a_row_depends_on_seed_stream_and_number_alone(world: World, serve: Serve) -> None:
    server = serve()
    alone = samples(world, to(server, in_flight=1), 12)
    assert samples(world, to(server), 12) == alone
    assert samples(world, to(server), 12, seed=6) != alone
    assert len({tuple(s.token_ids) for s in alone}) > 8


def test_top_logprobs_are_the_models_likeliest(world: World, serve: Serve) -> None:
    for s in samples(world, to(serve()), 8, top_logprobs=5):
        assert s.top is not None
        with torch.inference_mode():
            logprobs = world.model(torch.tensor([s.token_ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        best = logprobs.topk(5)
        assert s.top.ids[1:].tolist() == best.indices.tolist()
        np.testing.assert_allclose(s.top.logprobs[1:], best.values, atol=1e-4)
        np.testing.assert_allclose(s.top.rest[1:], (1 - best.values.exp().sum(-1)).log(), atol=1e-3)
        assert np.isnan(s.top.logprobs[0]).all() and np.isnan(s.top.rest[0])


def test_no_row_ends_before_min_length(world: World, serve: Serve) -> None:
    def shortest(**settings: Any) -> int:
        ended = [s for s in samples(world, to(serve()), 60, **settings) if s.finish_reason == "eos"]
        return min(len(s.token_ids) - 1 for s in ended)

    assert shortest() < 7 < shortest(min_length=7)
    with pytest.raises(BadInput, match="min_length is 7"):
        rows(world, to(serve(owned_by="llamacpp")), 1, min_length=7)


TURNS = Turns(1, (7, 9))


def test_after_the_end_of_a_turn_the_next_one_is_opened_and_sampled(world: World, serve: Serve) -> None:
    spec = GenerateSpec(rows=1200, length=LENGTH, seed=5, top_logprobs=4)
    wanted = ServerSampling(to(serve()), spec, (END,), world.tokenizer, "template", TURNS)
    two_turns = []
    for s in sample_from_server(wanted, [[START]] * 1200, range(1200)):
        assert isinstance(s, Sample) and s.top is not None
        end = next((t for t, token in enumerate(s.token_ids) if token == END), len(s.token_ids))
        given = {0, *range(end + 1, min(end + 3, len(s.token_ids)))}
        assert s.token_ids[end + 1 : end + 3] == [7, 9][: max(0, LENGTH - end)]
        assert [t for t, logprob in enumerate(s.logprobs) if logprob is None] == sorted(given)
        assert np.flatnonzero(np.isnan(s.top.logprobs).all(1)).tolist() == sorted(given)
        ended = s.token_ids.count(END) == 2
        assert s.finish_reason == ("eos" if ended else "length") and (ended or len(s.token_ids) == LENGTH + 1)
        sampled = [
            (known, new) for known, new in zip(s.logprobs[1:], fresh(world, s), strict=True) if known is not None
        ]
        assert [known for known, _ in sampled] == pytest.approx([new for _, new in sampled], abs=1e-4)
        two_turns += [s.token_ids] if end + 3 < len(s.token_ids) else []
    opened = [tokens[: tokens.index(END) + 3] for tokens in two_turns]
    with torch.inference_mode():
        next_probs = [world.model(torch.tensor([prefix])).logits[0, -1].softmax(-1) for prefix in opened]
    firsts = [tokens[len(prefix)] for tokens, prefix in zip(two_turns, opened, strict=True)]
    assert len(firsts) > 50 and p_value(firsts, torch.stack(next_probs).mean(0)) > SIGNIFICANCE


def test_the_last_turn_has_ends_of_its_own(world: World, serve: Serve) -> None:
    turns, spec = Turns(1, (7, 9), last_ends=(11,)), GenerateSpec(rows=300, length=LENGTH, seed=5)
    wanted = ServerSampling(to(serve()), spec, (END,), world.tokenizer, "template", turns)
    found = [s for s in sample_from_server(wanted, [[START]] * 300, range(300)) if isinstance(s, Sample)]
    opened = [s for s in found if END in s.token_ids[1:]]
    assert any(s.token_ids.count(END) > 1 for s in opened)
    for s in opened:
        last = s.token_ids[s.token_ids.index(END, 1) + 3 :]
        assert last.index(11) == len(last) - 1 if s.finish_reason == "eos" else 11 not in last


def test_never_more_requests_at_once_than_allowed(world: World, serve: Serve) -> None:
    server = serve(seconds=0.02)
    done: list[int] = []
    wanted = ServerSampling(to(server, in_flight=3), GenerateSpec(length=4), (END,), world.tokenizer, "s")
    sample_from_server(wanted, [[START]] * 20, range(20), done.append)
    assert server.most == 3
    assert done == list(range(1, 21))


def test_failures_that_pass_are_tried_again_and_leave_no_trace(world: World, serve: Serve) -> None:
    expected = samples(world, to(serve()), 16)
    server = serve(failures={0: 503, 3: 500, 4: 429, 5: 0, 9: 502})
    assert samples(world, to(server), 16) == expected
    assert len(server.requests) == 1 + 16 + 5


def test_a_server_that_asks_to_wait_is_given_its_time(world: World, serve: Serve) -> None:
    started = time.monotonic()
    samples(world, to(serve(failures={1: 429}, retry_after="1")), 2)
    assert time.monotonic() - started >= 1


def test_a_server_that_died_is_reported_as_worth_a_retry_and_its_successor_goes_on(world: World, serve: Serve) -> None:
    expected = samples(world, to(serve()), 24)
    with serving(world.model, world.tokenizer, Manners(die_after=10)) as dying:
        machine = to(dying)
        with pytest.raises(ServerGone, match=r"finished shards are kept: start the server and run the same command"):
            rows(world, machine, 24)
    with pytest.raises(Crashed, match=str(machine.base_url)):  # nobody there at all
        rows(world, machine, 24)
    serve(port=int(str(machine.base_url).rsplit(":", 1)[1].removesuffix("/v1")))
    assert samples(world, machine, 24) == expected


def test_a_refusal_is_final_and_says_what_the_server_said_without_the_key(
    world: World, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret\n")
    server = serve(failures=dict.fromkeys(range(9), 401), complaint="no such key: {key}")
    with pytest.raises(BadInput, match=r"401: no such key: Bearer \*\*\*") as caught:
        rows(world, to(server), 3)
    assert "secret" not in str(caught.value)
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer sk-very-secret"]
    with pytest.raises(ValidationError) as refused:
        Machine(engine="server", base_url="http://me:sk-very-secret@host/v1")
    assert "secret" not in str(refused.value)


def test_one_model_is_served_or_one_is_named(world: World, serve: Serve) -> None:
    server = serve(models=["tiny", "tiny-lora"])
    with pytest.raises(BadInput, match=r"serves 2 models; set machine.served_model to one of: tiny, tiny-lora"):
        rows(world, to(server), 1)
    with pytest.raises(BadInput, match="does not serve 'other'"):
        rows(world, to(server, served_model="other"), 1)
    samples(world, to(server, served_model="tiny-lora"), 1)
    assert server.requests[-1]["model"] == "tiny-lora"


def test_a_server_with_a_larger_vocabulary_is_another_model(world: World, serve: Serve) -> None:
    small = deepcopy(world.model)
    small.resize_token_embeddings(5)
    with pytest.raises(BadInput, match=r"sampled token \d+, but the recipe's model has 5 tokens"):
        check(world._replace(model=small), to(serve()))


def test_a_server_that_reads_another_prompt_is_refused(world: World, serve: Serve) -> None:
    with pytest.raises(BadInput, match=r"where \[0\] was sent \(1 in all\)"):
        rows(world, to(serve(extra_start=True)), 1)


@pytest.mark.parametrize("counted", [False, True])
def test_an_end_that_is_not_listed_is_refused(world: World, serve: Serve, counted: bool) -> None:
    with pytest.raises(BadInput, match="does not list the token that ends a text"):
        rows(world, to(serve(owned_by="other", list_end=False, count_end=counted)), 40)


def test_a_row_goes_on_where_a_server_stops_at_a_token_that_ends_nothing(world: World, serve: Serve) -> None:
    sampled = samples(world, to(serve(own_stops=(START,))), 60)
    assert_exact(world, sampled)
    assert any(START in s.token_ids[1:-1] for s in sampled)


def test_rows_with_tokens_that_are_not_listed_are_dropped_and_the_check_counts_them(world: World, serve: Serve) -> None:
    hidden = world.tokenizer.convert_tokens_to_ids(list("ab"))
    machine = to(serve(owned_by="llamacpp", hidden=tuple(hidden)))
    whole = rows(world, to(serve(owned_by="llamacpp")), 40)
    for row, sampled in zip(whole, rows(world, machine, 40), strict=True):
        assert isinstance(row, Sample)
        assert sampled == ("the server did not list all tokens" if set(hidden) & set(row.token_ids) else row)
    with pytest.raises(BadInput, match=r"first tokens .* do not follow"):  # neither of the two is half a character
        check(world, machine)


@pytest.mark.parametrize(
    ("manners", "settings", "message"),
    [
        ({"context": 6}, {}, "cut a row after 5 of 8 tokens"),
        ({"no_logprobs": True}, {}, "gives no log-probabilities"),
        ({}, {"top_logprobs": 25}, "--max-logprobs"),
        ({"strings": True}, {}, "names tokens by their text, .* use a server that takes and gives token ids: vLLM"),
        ({"text_prompts": True}, {}, "should be a valid string; use a server that takes and gives token ids: vLLM"),
    ],
)
def test_what_a_server_cannot_do_is_refused_with_the_remedy(
    world: World, serve: Serve, manners: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        rows(world, to(serve(**manners)), 8, **settings)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 9, "min_length": 4}])
def test_the_start_check_passes_the_recipes_own(world: World, serve: Serve, settings: dict[str, Any]) -> None:
    metadata = check(world, to(serve()), **settings)
    assert metadata["first_token_p_value"] > SIGNIFICANCE
    assert metadata["logprob_difference_max"] < 1e-4
    assert (metadata["ids"], metadata["checked_rows_dropped"]) == ("exact", 0)


@pytest.mark.parametrize(
    ("manners", "message"),
    [
        ({"temperature": 0.6}, r"first tokens .* do not follow .* They look like temperature=0\.\d"),
        ({"top_k": 8}, r"first tokens .* do not follow .* They look like top_k=8"),
        (
            {"temperature": 0.6, "scale_logprobs": True},
            r"log-probabilities .* after a temperature of 0\.\d.*raw_logprobs",
        ),
    ],
)
def test_the_start_check_names_what_the_server_does_otherwise(
    world: World, serve: Serve, manners: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        check(world, to(serve(**manners)))


def test_the_start_check_refuses_other_weights(world: World, serve: Serve, tmp_path: Path) -> None:
    other = load_model(save_model(tmp_path, seed=1, scale=0.2), "cpu").eval()
    with pytest.raises(BadInput, match=r"not those of the recipe's model: .* serve the model of the recipe's base"):
        check(world, to(serve(other)))
