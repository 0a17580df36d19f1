"""The sampler draws from the model's own law, exactly, and records what it drew."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfsd.artifact import Artifact, Store, key_of
from cfsd.checkpoint import end_tokens, load_model, read_start_token
from cfsd.errors import BadInput, NotFinite
from cfsd.generate import GenerateSpec, ProbeSpec, check_context, generate, probe
from cfsd.machine import Machine
from cfsd.rows import read_rows
from cfsd.sampling import Sample, sample, truncated, uniforms
from tests.conftest import fetched, save_model

MACHINE = Machine(device="cpu", threads=1, sampling_rows=32)
SIGNIFICANCE = 1e-3
DRAWS = 6000


class World(NamedTuple):
    model: PreTrainedModel
    start: int
    ends: tuple[int, ...]


@pytest.fixture(scope="module", params=["llama", "olmo"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A Llama-shaped model with BOS, and an OLMo-shaped one without, which starts from its separator, the EOS."""
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder, family=request.param, bos=request.param == "llama", scale=0.2)
    model = load_model(folder, "cpu").eval()
    start = 0  # <bos>, or <eos> as the separator, which is also the padding: its fresh embedding is zero
    model.get_input_embeddings().weight.data[start] = 0.2 * torch.randn(32, generator=torch.manual_seed(1))
    return World(model, start, end_tokens(folder))


def drawn(world: World, law: GenerateSpec, rows: Sequence[int], stream: str = "context-free") -> list[Sample]:
    return sample(world.model, world.start, world.ends, law, rows, stream=stream)


@torch.inference_mode()
def next_law(world: World, contexts: list[list[int]]) -> Tensor:
    """Return p(next token | context), computed apart from the sampler, in float64."""
    law: Tensor = world.model(torch.tensor(contexts), use_cache=False).logits[:, -1].double().softmax(-1)
    return law


def p_value(tokens: list[int], law: Tensor) -> float:
    """Return the chi-square p-value of the counts of `tokens`, rare tokens counted together."""
    expected = law.numpy() / law.sum().item() * len(tokens)
    counts = np.bincount(tokens, minlength=len(expected))
    common = expected >= 5
    rest = [expected[~common].sum()] if (~common).any() else []
    seen = [counts[~common].sum()] if (~common).any() else []
    return float(chisquare([*counts[common], *seen], [*expected[common], *rest]).pvalue)


def laws(world: World) -> tuple[Tensor, Tensor]:
    """Return the law of the first token, and that of the second among texts that go on."""
    first = next_law(world, [[world.start]])[0]
    goes_on = [token for token in range(len(first)) if token not in world.ends]
    after = next_law(world, [[world.start, token] for token in goes_on])
    second = (first[goes_on, None] * after).sum(0)
    return first, second / second.sum()


def p_values(world: World, law: GenerateSpec) -> tuple[float, float]:
    tokens = [s.token_ids for s in drawn(world, law, range(DRAWS))]
    first, second = laws(world)
    return p_value([t[1] for t in tokens], first), p_value([t[2] for t in tokens if len(t) > 2], second)


def test_first_and_second_tokens_follow_the_models_softmax(world: World) -> None:
    assert min(p_values(world, GenerateSpec(rows=0, length=2, seed=1))) > SIGNIFICANCE


@pytest.mark.parametrize("bias", [{"temperature": 0.8}, {"top_k": 12}, {"top_p": 0.9}])
def test_every_bias_changes_the_law_and_is_reported(world: World, bias: dict[str, Any]) -> None:
    law = GenerateSpec(rows=0, length=2, seed=1, **bias)
    assert max(p_values(world, law)) < SIGNIFICANCE
    assert [name.split("=")[0] for name in law.biases()] == list(bias)
    assert GenerateSpec().biases() == []


def test_biased_laws_are_those_of_their_definitions() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]], dtype=torch.float64)

    def law(**bias: Any) -> list[list[float]]:
        kept = truncated(probs.log(), GenerateSpec(**bias))
        return (kept / kept.sum(-1, keepdim=True)).tolist()

    def both(row: list[float]) -> list[Any]:
        return [pytest.approx(row), pytest.approx(row[::-1])]

    squares = [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]
    assert law(temperature=0.5) == both(squares)
    assert law(top_k=2) == both([0.625, 0.375, 0, 0])
    assert law(top_p=0.79) == both([0.625, 0.375, 0, 0])
    assert law(top_p=0.81) == both([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])
    assert law(top_k=99) == both([0.5, 0.3, 0.15, 0.05])
    assert law() == both([0.5, 0.3, 0.15, 0.05])


@pytest.mark.parametrize("bias", [{}, {"temperature": 0.7, "top_k": 5}])
def test_recorded_logprobs_are_the_models_own_whatever_is_sampled(world: World, bias: dict[str, Any]) -> None:
    for s in drawn(world, GenerateSpec(length=20, seed=2, **bias), range(48)):
        with torch.inference_mode():
            logprobs = world.model(torch.tensor([s.token_ids]), use_cache=False).logits[0].log_softmax(-1)
        fresh = [logprobs[t, token].item() for t, token in enumerate(s.token_ids[1:])]
        assert s.logprobs == pytest.approx(fresh, abs=1e-5)


def test_a_text_ends_at_its_first_end_token_and_nowhere_else(world: World) -> None:
    samples = drawn(world, GenerateSpec(length=20, seed=3), range(400))
    assert {s.finish_reason for s in samples} == {"eos", "length"}
    for s in samples:
        assert s.token_ids[0] == world.start
        assert len(s.token_ids) == len(s.logprobs) + 1
        ended = s.token_ids[-1] in world.ends
        assert s.finish_reason == ("eos" if ended else "length")
        assert ended or len(s.logprobs) == 20
        assert not set(s.token_ids[1:-1]) & set(world.ends)


def test_a_model_without_end_tokens_writes_to_the_end(world: World) -> None:
    samples = sample(world.model, world.start, (), GenerateSpec(length=6), range(50), stream="context-free")
    assert {(len(s.logprobs), s.finish_reason) for s in samples} == {(6, "length")}


def test_a_row_does_not_depend_on_its_neighbours(world: World) -> None:
    """Row 7 alone is never compacted; among 200 that end one by one it is."""
    law = GenerateSpec(length=24, seed=4)
    together = drawn(world, law, range(200))
    assert len({len(s.logprobs) for s in together}) > 5
    for row in (7, 60, 199, max(range(200), key=lambda r: len(together[r].logprobs))):
        alone = drawn(world, law, [row])[0]
        assert alone.token_ids == together[row].token_ids
        assert alone.logprobs == pytest.approx(together[row].logprobs, abs=1e-5)
        assert alone.finish_reason == together[row].finish_reason


def test_a_longer_length_only_continues_the_text(world: World) -> None:
    short, long = (drawn(world, GenerateSpec(length=n, seed=5), range(30)) for n in (5, 15))
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
        with pytest.raises(NotFinite, match="token 0 of shard 3"):
            sample(world.model, 0, (), GenerateSpec(length=2), [0], stream="probe", where="shard 3")
    finally:
        hook.remove()


def test_the_corpus_is_what_was_sampled_and_the_probe_is_another(store: Store, model_folder: Path) -> None:
    base = fetched(store, model_folder)
    law, look = GenerateSpec(rows=70, length=12, seed=0), ProbeSpec(rows=70, length=12, seed=0)
    corpus = store.make("corpus", key_of("generate", base, law), lambda draft: generate(base, law, draft, MACHINE))[0]
    held = store.make("corpus", key_of("probe", base, look), lambda draft: probe(base, look, draft, MACHINE))[0]
    rows, probed = (read_rows(store.path(artifact), "corpus") for artifact in (corpus, held))
    assert [row["row_id"] for row in rows] == list(range(70))
    assert [row["shard"] for row in rows] == [i // 32 for i in range(70)]
    folder = store.path(base)
    model = load_model(folder, "cpu").eval()
    again = sample(model, read_start_token(folder), end_tokens(folder), law, range(70), stream="context-free")
    assert [row["token_ids"] for row in rows] == [s.token_ids for s in again]
    assert all(row["logprobs"][0] is None and len(row["logprobs"]) == len(row["token_ids"]) for row in rows)
    assert [row["token_ids"] for row in probed] != [row["token_ids"] for row in rows]
    tokens = sum(len(s.logprobs) for s in again)
    assert corpus.facts["tokens"] == tokens
    assert corpus.facts["mean_logprob"] == pytest.approx(sum(sum(s.logprobs) for s in again) / tokens, abs=1e-6)
    assert (corpus.facts["biased"], held.facts["rows"]) == ("", 70)


def test_finished_shards_of_a_draft_are_kept(store: Store, model_folder: Path) -> None:
    base, law = fetched(store, model_folder), GenerateSpec(rows=70, length=12, seed=0)

    def interrupted(draft: Any) -> None:
        generate(base, law.model_copy(update={"rows": 64}), draft, MACHINE)
        stamps.extend(path.stat().st_mtime_ns for path in sorted(draft.folder.glob("corpus-*")))
        raise OSError("interrupted")

    stamps: list[int] = []
    with pytest.raises(OSError, match="interrupted"):
        store.make("corpus", "a" * 16, interrupted)
    made = store.make("corpus", "a" * 16, lambda draft: generate(base, law, draft, MACHINE))[0]
    shards = sorted(store.path(made).glob("corpus-*"))
    assert [path.stat().st_mtime_ns for path in shards[:2]] == stamps
    whole = store.make("corpus", "b" * 16, lambda draft: generate(base, law, draft, MACHINE))[0]
    assert made.content == whole.content


def test_a_length_beyond_the_models_context_is_refused(base: Artifact) -> None:
    check_context(base, GenerateSpec(length=127), "generate")
    with pytest.raises(BadInput, match=r"generate\.length to at most 127"):
        check_context(base, GenerateSpec(length=128), "generate")
