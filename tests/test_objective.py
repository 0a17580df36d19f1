"""The claim itself: the loss on sampled text estimates KL(base || model), whatever way the batch is cut.

A tiny GPT-2 (Llama rounds to float32 inside) in float64 knows 4 tokens and writes 3, without end tokens: its
64 texts can be enumerated.
"""

import copy
import math
import random
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cfsd.generate import GenerateSpec
from cfsd.objective import Pack, Row, losses, packs_of
from cfsd.sampling import sample

TOKENS, LENGTH, START = 4, 3, 0
TEXTS = [[START, *text] for text in product(range(TOKENS), repeat=LENGTH)]


def toy(seed: int, vocabulary: int = TOKENS) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model: GPT2LMHeadModel = GPT2LMHeadModel(config).double()
    model.eval()
    return model


@pytest.fixture(scope="module")
def base() -> GPT2LMHeadModel:
    return toy(0)


@pytest.fixture(scope="module")
def tuned(base: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Another model nearby."""
    moved, other = copy.deepcopy(base), toy(1)
    with torch.no_grad():
        for own, far in zip(moved.parameters(), other.parameters(), strict=True):
            own.lerp_(far, 0.3)
    return moved


@torch.no_grad()
def log_law(model: GPT2LMHeadModel) -> Tensor:
    """Return log p of each of TEXTS, computed apart from the objective."""
    texts = torch.tensor(TEXTS)
    logprobs = model(texts).logits.log_softmax(-1)
    sums: Tensor = logprobs[:, :-1].gather(2, texts[:, 1:, None])[..., 0].sum(1)
    return sums


def entropy_and_kl(base: GPT2LMHeadModel, model: GPT2LMHeadModel) -> tuple[float, float]:
    at_base, at_model = log_law(base), log_law(model)
    return float(-(at_base.exp() * at_base).sum()), float((at_base.exp() * (at_base - at_model)).sum())


def rehearsal(texts: Sequence[list[int]], weights: Sequence[float] | None = None) -> list[Row]:
    supervised = [False] + [True] * LENGTH
    return [Row("context-free", t, supervised, w) for t, w in zip(texts, weights or [1.0] * len(texts), strict=True)]


def loss_and_gradient(model: GPT2LMHeadModel, packs: Sequence[Pack]) -> tuple[float, Tensor]:
    model.zero_grad()
    total = 0.0
    for pack in packs:
        loss = losses(model, pack).loss
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def sampled(base: GPT2LMHeadModel, count: int, seed: int) -> list[Row]:
    law = GenerateSpec(length=LENGTH, seed=seed)
    return rehearsal(
        [s.token_ids for s in sample(base, [[START]] * count, (), law, range(count), stream="context-free")]
    )


def test_the_expected_loss_is_entropy_plus_kl(base: GPT2LMHeadModel, tuned: GPT2LMHeadModel) -> None:
    """Every text once, weighted by its probability: the expectation without sampling."""
    entropy, kl = entropy_and_kl(base, tuned)
    rows = rehearsal(TEXTS, (len(TEXTS) * log_law(base).exp()).tolist())
    loss, _ = loss_and_gradient(tuned, packs_of(rows, 1.0, 64))
    assert kl > 0.05
    assert LENGTH * loss - entropy == pytest.approx(kl, rel=1e-9)


def test_the_expected_gradient_vanishes_at_the_base_and_nowhere_else(
    base: GPT2LMHeadModel, tuned: GPT2LMHeadModel
) -> None:
    rows = rehearsal(TEXTS, (len(TEXTS) * log_law(base).exp()).tolist())
    packs = packs_of(rows, 1.0, 64)
    assert loss_and_gradient(base, packs)[1].norm() < 1e-12
    assert loss_and_gradient(tuned, packs)[1].norm() > 1e-2


def test_the_sampled_loss_converges_to_the_kl_at_the_rate_of_sampling(
    base: GPT2LMHeadModel, tuned: GPT2LMHeadModel
) -> None:
    entropy, kl = entropy_and_kl(base, tuned)
    errors = {}
    for count in (64, 1024):
        found = []
        for seed in range(24):
            loss, _ = loss_and_gradient(tuned, packs_of(sampled(base, count, seed), 1.0, 4096))
            found.append(LENGTH * loss - entropy - kl)
        errors[count] = math.sqrt(sum(error**2 for error in found) / len(found))
    spread = float(log_law(tuned).sub(log_law(base).exp() @ log_law(tuned)).square() @ log_law(base).exp()) ** 0.5
    for count, error in errors.items():  # root mean square of 24 draws: its own error is about 15 %
        assert error == pytest.approx(spread / math.sqrt(count), rel=0.5)
    assert errors[64] / errors[1024] == pytest.approx(4, rel=0.4)


def test_the_sampled_gradient_is_noise_around_zero_at_the_base_only(
    base: GPT2LMHeadModel, tuned: GPT2LMHeadModel
) -> None:
    """What averages to zero shrinks with the number of draws: the mean of 48 has 1/48 of their mean square."""
    batches = [packs_of(sampled(base, 64, seed), 1.0, 4096) for seed in range(48)]
    excess = []
    for model in (base, tuned):
        gradients = torch.stack([loss_and_gradient(model, packs)[1] for packs in batches])
        excess.append(float(gradients.mean(0).square().sum() / (gradients.square().sum(1).mean() / 48)))
    assert excess[0] < 4 < 10 < excess[1]


def mixed_rows(seed: int, vocabulary: int) -> list[Row]:
    """Return rows of very different lengths and two sources, as in one global batch."""
    rng = random.Random(seed)
    rows = []
    for source, count in (("target", 5), ("context-free", 4)):
        for length in rng.sample(range(3, 30), count):
            start = 1 if source == "context-free" else rng.randint(1, length - 1)
            supervised = [False] * start + [True] * (length - start)
            rows.append(Row(source, rng.choices(range(vocabulary), k=length), supervised, rng.uniform(0.5, 2)))
    return rows


def by_definition(model: GPT2LMHeadModel, rows: list[Row], rehearsal_weight: float) -> float:
    """Token-mean over the target + weight x token-mean over the rehearsal, row by row."""
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for row in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([row.token_ids])).logits[0].log_softmax(-1)
        part = row.source == "target"
        for t in range(1, len(row.token_ids)):
            if row.supervised[t]:
                sums[part] -= row.weight * float(logprobs[t - 1, row.token_ids[t]])
                counts[part] += 1
    return sums[True] / counts[True] + rehearsal_weight * sums[False] / counts[False]


@pytest.mark.parametrize("rehearsal_weight", [0.0, 1.0, 3.0])
def test_the_loss_is_that_of_its_definition(rehearsal_weight: float) -> None:
    model, rows = toy(2, 11), mixed_rows(0, 11)
    loss, _ = loss_and_gradient(model, packs_of(rows, rehearsal_weight, 64))
    assert loss == pytest.approx(by_definition(model, rows, rehearsal_weight), rel=1e-6)


def per_micro_batch(packs: Sequence[Pack]) -> list[Pack]:
    """Plant the classic mistake: every micro-batch divides by its own token count."""
    planted = []
    for pack in packs:
        counted = pack.coefficient_BT != 0
        planted.append(pack._replace(coefficient_BT=counted / counted.sum() / len(packs)))
    return planted


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("most_tokens", [1, 40, 90])
def test_gradients_do_not_depend_on_how_the_batch_is_cut(most_tokens: int) -> None:
    model, rows = toy(2, 11), mixed_rows(0, 11)
    whole, cut = packs_of(rows, 2.0, 10_000), packs_of(rows, 2.0, most_tokens)
    assert len(whole) == 1 < len(cut)
    assert relative(loss_and_gradient(model, cut)[1], loss_and_gradient(model, whole)[1]) < 1e-9


def test_normalising_per_micro_batch_would_be_noticed() -> None:
    model, rows = toy(2, 11), mixed_rows(0, 11)
    packs = [per_micro_batch(packs_of(rows, 2.0, most)) for most in (10_000, 40)]
    whole, cut = (loss_and_gradient(model, pack)[1] for pack in packs)
    assert relative(cut, whole) > 1e-2


def test_weights_after_twenty_steps_do_not_depend_on_how_batches_are_cut() -> None:
    trained = []
    for most_tokens in (1, 10_000):
        model = toy(2, 11)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(20):
            optimizer.zero_grad()
            for pack in packs_of(mixed_rows(step, 11), 1.0, most_tokens):
                losses(model, pack).loss.backward()
            optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert relative(*trained) < 1e-9


def test_what_is_looked_at_are_plain_means_per_source() -> None:
    model, rows = toy(2, 11), mixed_rows(0, 11)
    parts = [losses(model, pack) for pack in packs_of(rows, 5.0, 40)]
    target, rehearsed = (float(sum(p[i].item() for p in parts)) for i in (1, 2))
    plain = [row._replace(weight=1.0) for row in rows]
    counts = {part: sum(sum(r.supervised) for r in rows if (r.source == "target") == part) for part in (True, False)}
    alone = by_definition(model, plain, 0.0)
    assert target / counts[True] == pytest.approx(alone, rel=1e-6)
    assert rehearsed / counts[False] == pytest.approx(by_definition(model, plain, 1.0) - alone, rel=1e-6)


def test_a_batch_without_rehearsal_is_plain_fine_tuning() -> None:
    model = toy(2, 11)
    target = [row for row in mixed_rows(0, 11) if row.source == "target"]
    loss, _ = loss_and_gradient(model, packs_of(target, 7.0, 64))
    assert loss == pytest.approx(by_definition(model, [*target, *rehearsal([[0, 1, 2, 3]])], 0.0), rel=1e-6)


def test_an_empty_pack_has_no_loss_and_no_gradient_but_can_be_differentiated() -> None:
    model, pack = toy(2, 11), packs_of(mixed_rows(0, 11), 1.0, 10_000)[0]
    idle = pack._replace(coefficient_BT=torch.zeros_like(pack.coefficient_BT))
    loss, gradient = loss_and_gradient(model, [idle])
    assert loss == 0
    assert not gradient.any()
