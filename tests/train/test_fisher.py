"""The Fisher matrix is what it claims: half of F eps^2 is the divergence that a step of eps causes, per token.

A tiny GPT-2 in float64 knows 4 tokens and writes 3: its 64 texts can be enumerated.
"""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.model.loading import load_model
from cfsd.store import journal
from cfsd.store.artifact import CHECKPOINTS, Artifact, Draft, Store
from cfsd.store.tables import CORPUS, table_of, write_shard
from cfsd.train.methods.ewc import FisherSpec
from cfsd.train.methods.fisher import FILE, Sums, Text, fisher
from tests.conftest import fetched

MACHINE = Machine(device="cpu", threads=1)
TOKENS, LENGTH = 4, 3
TEXTS = [[0, *text] for text in product(range(TOKENS), repeat=LENGTH)]
SAMPLED = [False] + [True] * LENGTH
COORDINATES = [
    ("transformer.wte.weight", 5), ("transformer.wte.weight", 40), ("transformer.h.0.attn.c_attn.weight", 7),
    ("transformer.h.0.mlp.c_proj.weight", 100), ("transformer.ln_f.weight", 2), ("transformer.wpe.weight", 17),
]  # fmt: skip


def fisher_of(model: torch.nn.Module, texts: list[Text], weights: list[float]) -> dict[str, Tensor]:
    """Return F by parameter name; row i counts `weights[i]` times, whatever they add up to."""
    sums = Sums(model)
    for text, weight in zip(texts, weights, strict=True):
        sums.add(text, weight)
    return sums.fisher()


def toy() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=TOKENS, n_embd=16, n_layer=1, n_head=2, n_positions=8, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model: GPT2LMHeadModel = GPT2LMHeadModel(config).double()
    model.eval()
    return model


@torch.no_grad()
def log_distribution(model: GPT2LMHeadModel) -> Tensor:
    """Return log p of each of TEXTS."""
    ids = torch.tensor(TEXTS)
    found: Tensor = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].sum(1)
    return found


@pytest.fixture(scope="module")
def exact() -> dict[str, Tensor]:
    """F over all texts, each as often as the model writes it."""
    model = toy()
    return fisher_of(model, [Text(text, SAMPLED) for text in TEXTS], log_distribution(model).exp().tolist())


def kl_after(name: str, coordinate: int, step: float) -> float:
    base, model = toy(), toy()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[coordinate] += step
    at_base = log_distribution(base)
    return float(at_base.exp() @ (at_base - log_distribution(model)))


@pytest.mark.parametrize(("name", "coordinate"), COORDINATES)
def test_half_of_f_is_the_divergence_of_a_small_step_per_token(
    name: str, coordinate: int, exact: dict[str, Tensor]
) -> None:
    """The quotient misses by O(eps): a tenth of the step misses by about a tenth."""
    wanted = float(exact[name].view(-1)[coordinate]) * LENGTH / 2
    misses = [abs(kl_after(name, coordinate, step) / step**2 - wanted) / wanted for step in (1e-2, 1e-3)]
    assert wanted > 1e-7
    assert misses[1] < 1e-2
    assert misses[1] < 0.2 * misses[0] + 1e-4


def test_every_parameter_has_its_f_a_tied_one_once(exact: dict[str, Tensor]) -> None:
    model = toy()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {name: p.shape for name, p in model.named_parameters()} == {name: f.shape for name, f in exact.items()}


def test_sampled_rows_agree_within_the_error_of_sampling(exact: dict[str, Tensor]) -> None:
    """Per coordinate the squared gradient's spread over texts tells how far the mean of n of them lies off."""
    model, count = toy(), 256
    law = log_distribution(model).exp()
    drawn = torch.multinomial(law, count, replacement=True, generator=torch.Generator().manual_seed(0))
    found = fisher_of(model, [Text(TEXTS[i], SAMPLED) for i in drawn.tolist()], [1.0] * count)
    scores = []
    squares = torch.tensor([_squared(model, text) for text in TEXTS], dtype=torch.float64)
    for (name, coordinate), per_text in zip(COORDINATES, squares.T, strict=True):
        mean = float(law @ per_text)
        spread = float(law @ (per_text - mean).square()) ** 0.5
        assert float(exact[name].view(-1)[coordinate]) == pytest.approx(mean / LENGTH, rel=1e-9)
        scores.append((float(found[name].view(-1)[coordinate]) * LENGTH - mean) / (spread / count**0.5))
    assert all(abs(score) < 4 for score in scores)
    assert any(abs(score) > 0.05 for score in scores)


def _squared(model: GPT2LMHeadModel, text: list[int]) -> list[float]:
    """Return the squares of d log p(text) / d theta_i at COORDINATES, computed apart from the stage."""
    ids = torch.tensor([text])
    log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum()
    gradients = torch.autograd.grad(log_p, [model.get_parameter(name) for name, _ in COORDINATES])
    return [float(g.view(-1)[i]) ** 2 for g, (_, i) in zip(gradients, COORDINATES, strict=True)]


def test_given_tokens_do_not_count_and_weights_need_not_add_up_to_one() -> None:
    model, texts = toy(), [Text(TEXTS[7], SAMPLED), Text(TEXTS[40], [False, False, True, True])]
    one, other = fisher_of(model, texts, [1.0, 1.0]), fisher_of(model, texts, [0.5, 0.5])
    sums = Sums(model)
    sums.add(texts[1])
    assert sums.tokens == 2
    assert all(torch.allclose(one[name], other[name], rtol=1e-12) for name in one)
    changed = fisher_of(model, [texts[0], Text(TEXTS[40], SAMPLED)], [1.0, 1.0])
    assert not torch.allclose(changed["transformer.wte.weight"], one["transformer.wte.weight"], rtol=1e-3)


def test_no_gradient_is_left_and_none_is_held() -> None:
    model = toy()
    fisher_of(model, [Text(TEXTS[3], SAMPLED)], [1.0])
    assert all(parameter.grad is None for parameter in model.parameters())


# The stage


def corpus_of(store: Store, key: str, rows: list[tuple[str, list[int]]]) -> Artifact:
    """Return a corpus as the sampler writes it: the start token given, the rest drawn."""

    def work(draft: Draft) -> None:
        table = [
            {"row_id": i, "source": source, "token_ids": ids, "logprobs": [None] + [-1.0] * (len(ids) - 1)}
            for i, (source, ids) in enumerate(rows)
        ]
        write_shard(draft.folder, "corpus", 0, table_of(CORPUS, table))

    return store.make("corpus", key, work)[0]


ROWS = [("context-free", [0, 5 + i, 9, 3 + i, 17][: 3 + i % 3]) for i in range(6)]


def run(
    store: Store, base: Artifact, corpus: Artifact, rows: int, key: str, before: Callable[[Draft], Any] | None = None
) -> Artifact:
    def work(draft: Draft) -> None:
        if before:
            before(draft)
        fisher(base, corpus, FisherSpec(rows=rows), draft, MACHINE)

    return store.make("fisher", key, work)[0]


def test_the_stage_writes_f_of_the_first_context_free_rows(store: Store, base: Artifact) -> None:
    corpus = corpus_of(store, "a", [("replay", [0, 8, 8, 8]), *ROWS])
    made = run(store, base, corpus, 4, "f")
    found = load_file(store.path(made) / FILE)
    texts = [Text(ids, [False] + [True] * (len(ids) - 1)) for _, ids in ROWS[:4]]
    wanted = fisher_of(load_model(store.path(base), "cpu").eval(), texts, [1.0] * 4)
    assert made.metadata == {"rows": 4, "tokens": sum(len(ids) - 1 for _, ids in ROWS[:4])}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {path.name for path in store.path(made).iterdir()} == {FILE, "manifest.json"}


def test_a_half_precision_base_is_differentiated_in_float32(store: Store, model_folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (half / name).write_bytes((model_folder / name).read_bytes())
    load_model(model_folder, "cpu", "bfloat16").save_pretrained(half)
    made = run(store, fetched(store, half), corpus_of(store, "a", ROWS), 2, "f")
    assert {tensor.dtype for tensor in load_file(store.path(made) / FILE).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("rows", "wanted", "says"),
    [
        (ROWS, 7, "7 rows.*6 of source context-free.*ewc.rows"),
        ([("contextual", [0, 4, 5])] * 3, 2, "3 of source contextual.*generate.source context-free"),
        ([*ROWS[:1], ("replay", [0, 4, 5])], 2, "1 of source context-free, 1 of source replay"),
        ([], 1, "no rows at all"),
    ],
)
def test_a_corpus_that_cannot_tell_is_refused(
    rows: list[tuple[str, list[int]]], wanted: int, says: str, store: Store, base: Artifact
) -> None:
    with pytest.raises(BadInput, match=says):
        run(store, base, corpus_of(store, "a", rows), wanted, "f")


def test_an_interrupted_stage_goes_on_to_the_same_bits(
    store: Store, base: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, real = corpus_of(store, "a", ROWS), Sums.add
    whole = run(store, base, corpus, 6, "whole")
    seen: list[int] = []

    def dies_at_the_fourth(sums: Sums, text: Text, weight: float = 1.0) -> None:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(text.token_ids))
        real(sums, text, weight)

    monkeypatch.setattr("cfsd.train.methods.fisher.SAVE_SECONDS", -1.0)
    with monkeypatch.context() as broken:
        broken.setattr(Sums, "add", dies_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            run(store, base, corpus, 6, "broken")
    saved: list[bool] = []
    again = run(store, base, corpus, 6, "broken", lambda d: saved.append((d.folder / CHECKPOINTS / FILE).exists()))
    assert saved == [True] and len(seen) == 3
    assert again.content == whole.content and again.metadata == whole.metadata


def test_progress_is_told_row_by_row(store: Store, base: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "EVERY", 0)  # of calls in quick succession not all are written
    told: list[int] = []

    def listen(draft: Draft) -> None:
        inner = draft.journal.progress

        def progress(done: int, total: int, unit: str) -> None:
            inner(done, total, unit)
            told.append(json.loads((draft.folder / "progress.json").read_text())["done"])

        draft.journal.progress = progress  # type: ignore[method-assign]

    run(store, base, corpus_of(store, "a", ROWS), 3, "f", listen)
    assert told == [1, 2, 3]
