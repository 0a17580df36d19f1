"""The claim itself: the loss on sampled text estimates KL(base || model), whatever way the batch is cut.

A tiny GPT-2 in float64 knows 4 tokens and writes 3, without end tokens: its 64 texts can be enumerated. Llama and OLMo
round to float32 in their norms: the same holds for them to about its eighth digit.
"""

import copy
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from cfsd.generate.sampling import Rows, sample
from cfsd.generate.spec import GenerateSpec
from cfsd.model.head import head_of
from cfsd.train.batches.micro_batches import MicroBatch, Row, micro_batches_of
from cfsd.train.loss.objective import Losses, Objective, losses
from cfsd.train.loss.token_loss import Stored
from cfsd.train.spec import RehearsalSpec

TOKENS, LENGTH, START = 4, 3, 0
TEXTS = [[START, *text] for text in product(range(TOKENS), repeat=LENGTH)]
NLL, LIVE = RehearsalSpec(), RehearsalSpec(loss="kl", reference="base")
SAMPLED, BUCKET = (RehearsalSpec(loss="kl", tail=tail) for tail in ("sampled", "bucket"))
ROUNDING = {"gpt2": 1e-9, "llama": 1e-6, "olmo": 1e-6}  # relative
FAMILIES = list(ROUNDING)


def toy(seed: int, vocabulary: int = TOKENS, family: str = "gpt2") -> Any:
    tokens: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None}
    tokens["initializer_range"] = 0.5
    torch.manual_seed(seed)
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **tokens))
    else:
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}
        config, kind = {"llama": (LlamaConfig, LlamaForCausalLM), "olmo": (OlmoConfig, OlmoForCausalLM)}[family]
        model = kind(config(**sizes, **tokens))
    return model.double().eval()


def moved_from(base: Any, family: str = "gpt2") -> Any:
    """Return another model nearby."""
    moved, other = copy.deepcopy(base), toy(1, family=family)
    with torch.no_grad():
        for own, far in zip(moved.parameters(), other.parameters(), strict=True):
            own.lerp_(far, 0.3)
    return moved


@pytest.fixture(scope="module")
def base() -> Any:
    return toy(0)


@pytest.fixture(scope="module")
def tuned(base: Any) -> Any:
    return moved_from(base)


@torch.no_grad()
def log_distribution(model: Any) -> Tensor:
    """Return log p of each of TEXTS, computed apart from the objective."""
    texts = torch.tensor(TEXTS)
    logprobs = model(texts).logits.log_softmax(-1)
    sums: Tensor = logprobs[:, :-1].gather(2, texts[:, 1:, None])[..., 0].sum(1)
    return sums


def entropy_and_kl(base: Any, model: Any) -> tuple[float, float]:
    at_base, at_model = log_distribution(base), log_distribution(model)
    return float(-(at_base.exp() * at_base).sum()), float((at_base.exp() * (at_base - at_model)).sum())


class Laws:
    """The base's law at given rows as the sampler stores it, at full precision or in the corpus' float16."""

    def __init__(self, base: Any, count: int, kept: torch.dtype = torch.float64) -> None:
        self.base, self.count, self.kept = base, count, kept
        self.known: dict[tuple[int, ...], Stored] = {}

    def at(self, rows: Sequence[tuple[int, list[int], list[bool]]]) -> Stored:
        parts = [self._row(token_ids, supervised) for _, token_ids, supervised in rows]
        blank = torch.zeros(0, self.count), torch.zeros(0)
        parts = parts or [Stored(blank[0].int(), blank[0], blank[1], blank[1])]
        return Stored(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @torch.no_grad()
    def _row(self, token_ids: list[int], supervised: list[bool]) -> Stored:
        if tuple(token_ids) not in self.known:
            counted = torch.tensor(supervised[1:])
            law_TV = self.base(torch.tensor([token_ids])).logits[0, :-1][counted].log_softmax(-1)
            top_TK, ids_TK = law_TV.topk(self.count)
            rest_T = law_TV.scatter(1, ids_TK, -torch.inf).logsumexp(1)
            drawn_T = law_TV.gather(1, torch.tensor(token_ids[1:])[counted][:, None])[:, 0]
            self.known[tuple(token_ids)] = Stored(ids_TK.int(), top_TK.to(self.kept), rest_T, drawn_T)
        return self.known[tuple(token_ids)]


stored_laws = cache(Laws)


class Form(NamedTuple):
    """One form of the rehearsal's loss, with how many tokens are stored for it."""

    spec: RehearsalSpec
    stored: int = 0


FORMS = {"nll": Form(NLL), "live": Form(LIVE), "sampled": Form(SAMPLED, 2), "bucket": Form(BUCKET, 2)}


def cut(
    rows: Sequence[Row], max_tokens: int, base: Any = None, stored: int = 0, kept: torch.dtype = torch.float64
) -> list[MicroBatch]:
    """Return the packs of one global batch, with the base's law at its rehearsal rows if `stored`."""
    distributions: Any = stored_laws(base, stored, kept) if stored else None
    return micro_batches_of(rows, max_tokens, fresh=[True] * len(rows), distributions=distributions)


def rehearsal(texts: Sequence[list[int]], weights: Sequence[float] | None = None) -> list[Row]:
    supervised = [False] + [True] * LENGTH
    return [Row("context-free", t, supervised, w) for t, w in zip(texts, weights or [1.0] * len(texts), strict=True)]


def every_text(base: Any) -> list[Row]:
    """Return every text once, weighted by its probability: the expectation without sampling."""
    return rehearsal(TEXTS, (len(TEXTS) * log_distribution(base).exp()).tolist())


def loss_and_gradient(
    model: Any, micro_batches: Sequence[MicroBatch], spec: RehearsalSpec = NLL, base: Any = None, weight: float = 1.0
) -> tuple[float, Tensor]:
    objective = Objective(model, spec, base)
    model.zero_grad()
    total = 0.0
    for micro_batch in micro_batches:
        loss = losses(model, micro_batch, weight).loss
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    objective.remove()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def sampled(base: Any, count: int, seed: int) -> list[Row]:
    law = GenerateSpec(length=LENGTH, seed=seed)
    return rehearsal(
        [s.token_ids for s in sample(base, Rows(range(count), [[START]] * count, (), "context-free"), law)]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expected_loss_is_entropy_plus_kl(family: str) -> None:
    base = toy(0, family=family)
    tuned = moved_from(base, family)
    entropy, kl = entropy_and_kl(base, tuned)
    loss, _ = loss_and_gradient(tuned, cut(every_text(base), 64))
    assert kl > 0.05
    assert LENGTH * loss - entropy == pytest.approx(kl, rel=ROUNDING[family])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [0, 1, 3, TOKENS])
def test_the_expected_divergence_is_the_kl_itself(family: str, count: int) -> None:
    """From the live base (0 stored), and from the 1, 3 or all likeliest tokens with the tail as drawn."""
    base = toy(0, family=family)
    tuned = moved_from(base, family)
    spec, micro_batches = (SAMPLED if count else LIVE), cut(every_text(base), 64, base, count)
    loss, gradient = loss_and_gradient(tuned, micro_batches, spec, base)
    assert LENGTH * loss == pytest.approx(entropy_and_kl(base, tuned)[1], rel=ROUNDING[family])
    _, likelihood = loss_and_gradient(tuned, micro_batches)
    assert relative(gradient, likelihood) < 100 * ROUNDING[family]  # the entropy has no slope


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bucket_is_a_lower_bound_that_rises_to_the_kl(family: str) -> None:
    base = toy(0, family=family)
    tuned = moved_from(base, family)
    _, kl = entropy_and_kl(base, tuned)
    found = [
        LENGTH * loss_and_gradient(tuned, cut(every_text(base), 64, base, count), BUCKET)[0]
        for count in range(1, TOKENS + 1)
    ]
    assert 0 < found[0] < found[1] < 0.999 * kl
    assert found[2:] == pytest.approx([kl, kl], rel=ROUNDING[family])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_vanishes_at_the_base_and_nowhere_else(form: str, family: str) -> None:
    """In expectation where drawn tokens have a part in it, else for every text alone."""
    base, (spec, stored) = toy(0, family=family), FORMS[form]
    rows = every_text(base)
    alone = cut(rows[27:28], 64, base, stored)
    for micro_batches in (cut(rows, 64, base, stored), alone):
        zero = loss_and_gradient(copy.deepcopy(base), micro_batches, spec, base)[1].norm()
        if micro_batches is alone and form in ("nll", "sampled"):
            assert zero > 1e-2
        else:
            assert zero < (1e-12 if family == "gpt2" else 1e-6)
        assert loss_and_gradient(moved_from(base, family), micro_batches, spec, base)[1].norm() > 1e-2


def test_stored_in_float16_the_bucket_has_a_thousandth_of_a_gradient_at_the_base(base: Any) -> None:
    rows = rehearsal(TEXTS[::5])
    _, likelihood = loss_and_gradient(base, cut(rows, 64))
    _, bucket = loss_and_gradient(base, cut(rows, 64, base, 2, torch.float16), BUCKET)
    assert 1e-6 < float(bucket.norm() / likelihood.norm()) < 1e-3


def test_the_sampled_loss_converges_to_the_kl_at_the_rate_of_sampling(base: Any, tuned: Any) -> None:
    entropy, kl = entropy_and_kl(base, tuned)
    misses: dict[tuple[str, int], list[float]] = defaultdict(list)
    for count, seed in product((64, 576), range(24)):
        micro_batches = cut(sampled(base, count, seed), 4096, base, 2)
        for form in ("nll", "live", "sampled"):
            loss, _ = loss_and_gradient(tuned, micro_batches, FORMS[form].spec, base)
            misses[form, count].append(LENGTH * loss - kl - (entropy if form == "nll" else 0))
    errors = {key: math.sqrt(sum(miss**2 for miss in found) / len(found)) for key, found in misses.items()}
    spread = (
        float(
            log_distribution(tuned).sub(log_distribution(base).exp() @ log_distribution(tuned)).square()
            @ log_distribution(base).exp()
        )
        ** 0.5
    )
    for count in (64, 576):  # root mean square of 24 draws: its own error is about 15 %
        assert errors["nll", count] == pytest.approx(spread / math.sqrt(count), rel=0.5)
        assert errors["live", count] < errors["nll", count] / 3
        assert errors["live", count] < errors["sampled", count] < errors["nll", count]
    for form in ("nll", "live", "sampled"):
        assert errors[form, 64] / errors[form, 576] == pytest.approx(3, rel=0.4)


def test_the_divergence_varies_far_less_than_the_likelihood(base: Any, tuned: Any) -> None:
    """Enumerated: the variance of one text's loss and of its gradient, under the base's law."""
    likelihood = log_distribution(base).exp()
    values, slopes = {}, {}
    for form in ("nll", "live", "sampled"):
        spec, stored = FORMS[form]
        found = [loss_and_gradient(tuned, cut([row], 64, base, stored), spec, base) for row in rehearsal(TEXTS)]
        losses_X, slopes_XP = torch.tensor([loss for loss, _ in found]).double(), torch.stack([g for _, g in found])
        values[form] = float(likelihood @ (losses_X - likelihood @ losses_X).square())
        slopes[form] = float(likelihood @ (slopes_XP - likelihood @ slopes_XP).square().sum(1))
    for variance, factor in ((values, 10), (slopes, 3)):
        assert variance["live"] < variance["nll"] / factor
        assert variance["live"] < variance["sampled"] < variance["nll"]


@pytest.mark.parametrize("form", ["nll", "sampled"])
def test_the_sampled_gradient_is_noise_around_zero_at_the_base_only(form: str, base: Any, tuned: Any) -> None:
    """What averages to zero shrinks with the number of draws: the mean of 48 has 1/48 of their mean square."""
    spec, stored = FORMS[form]
    batches = [cut(sampled(base, 64, seed), 4096, base, stored) for seed in range(48)]
    excess = []
    for model in (base, tuned):
        gradients = torch.stack([loss_and_gradient(model, micro_batches, spec)[1] for micro_batches in batches])
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


def by_definition(model: Any, rows: list[Row], rehearsal_weight: float, base: Any = None) -> float:
    """Token-mean over the target + weight x token-mean over the rehearsal, row by row; with `base` its divergence."""
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for row in rows:
        ids = torch.tensor([row.token_ids])
        with torch.no_grad():
            at_model, at_base = (m(ids).logits[0].log_softmax(-1) for m in (model, base or model))
        part = row.source == "target"
        for t in range(1, len(row.token_ids)):
            if row.supervised[t]:
                kl = (at_base[t - 1].exp() * (at_base[t - 1] - at_model[t - 1])).sum()
                value = kl if base and not part else -at_model[t - 1, row.token_ids[t]]
                sums[part] += row.weight * float(value)
                counts[part] += 1
    return sums[True] / counts[True] + rehearsal_weight * sums[False] / counts[False]


@pytest.mark.parametrize("form", ["nll", "live"])
@pytest.mark.parametrize("rehearsal_weight", [0.0, 1.0, 3.0])
def test_the_loss_is_that_of_its_definition(rehearsal_weight: float, form: str) -> None:
    model, other, rows = toy(2, 11), toy(3, 11), mixed_rows(0, 11)
    base = other if form == "live" else None
    loss, _ = loss_and_gradient(model, cut(rows, 64), FORMS[form].spec, base, rehearsal_weight)
    assert loss == pytest.approx(by_definition(model, rows, rehearsal_weight, base), rel=1e-6)


def test_weights_per_token_multiply_each_tokens_loss() -> None:
    model, row = toy(2, 11), Row("target", [1, 2, 3, 4], [False, True, False, True], 0.5, [9.0, 0.2, 9.0, 1.8])
    with torch.no_grad():
        law = model(torch.tensor([row.token_ids])).logits[0].log_softmax(-1)
    wanted = -0.5 * (0.2 * float(law[0, 2]) + 1.8 * float(law[2, 4])) / 2
    assert loss_and_gradient(model, cut([row], 64))[0] == pytest.approx(wanted, rel=1e-6)


def per_micro_batch(micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Plant the classic mistake: every micro-batch divides by its own token count."""
    planted = []
    for micro_batch in micro_batches:
        counted = micro_batch.coefficient_BT != 0
        planted.append(micro_batch._replace(coefficient_BT=counted / counted.sum() / len(micro_batches)))
    return planted


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_tokens", [1, 40, 90])
def test_gradients_do_not_depend_on_how_the_batch_is_cut(max_tokens: int, form: str) -> None:
    model, base, rows, (spec, stored) = toy(2, 11), toy(3, 11), mixed_rows(0, 11), FORMS[form]
    whole, parts = (cut(rows, most, base, stored) for most in (10_000, max_tokens))
    assert len(whole) == 1 < len(parts)
    one, two = (loss_and_gradient(model, micro_batches, spec, base, 2.0)[1] for micro_batches in (parts, whole))
    assert relative(one, two) < 1e-9


@pytest.mark.parametrize("form", ["nll", "live"])
def test_normalising_per_micro_batch_would_be_noticed(form: str) -> None:
    model, base, rows = toy(2, 11), toy(3, 11), mixed_rows(0, 11)
    micro_batches = [per_micro_batch(cut(rows, most)) for most in (10_000, 40)]
    whole, parts = (
        loss_and_gradient(model, micro_batch, FORMS[form].spec, base, 2.0)[1] for micro_batch in micro_batches
    )
    assert relative(parts, whole) > 1e-2


@pytest.mark.parametrize(
    ("form", "family"), [*product(FORMS, ["gpt2"]), ("nll", "llama"), ("sampled", "llama"), ("live", "olmo")]
)
def test_weights_after_twenty_steps_do_not_depend_on_how_batches_are_cut(form: str, family: str) -> None:
    (spec, stored), trained = FORMS[form], []
    cuts = [(1, False), (10_000, False), (40, True)]
    for max_tokens, plant in cuts if form in ("nll", "live") and family == "gpt2" else cuts[:2]:
        model, base = toy(2, 11, family), toy(3, 11, family)
        Objective(model, spec, base)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(20):
            optimizer.zero_grad()
            micro_batches = cut(mixed_rows(step, 11), max_tokens, base, stored)
            for micro_batch in per_micro_batch(micro_batches) if plant else micro_batches:
                losses(model, micro_batch).loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert relative(trained[0], trained[1]) < ROUNDING[family]
    assert all(relative(planted, trained[1]) > 1e-4 for planted in trained[2:])


def after_sgd(base: Any, weight: float, rate: float) -> float:
    """Return the divergence after 80 steps on a few target rows, with every text as rehearsal."""
    target = [Row("target", text, [False, False, True, True], 1.0) for text in TEXTS[:40:7]]
    micro_batches, model = cut([*target, *every_text(base)], 400), copy.deepcopy(base)
    Objective(model, LIVE, base)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(80):
        optimizer.zero_grad()
        losses(model, micro_batches[0], weight).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert len(micro_batches) == 1
    return entropy_and_kl(base, model)[1]


def test_the_divergence_falls_to_nothing_as_lambda_grows(base: Any) -> None:
    """SGD with a rate of 1 / lambda and no clipping. Without rehearsal the same rates would move it further."""
    found = [after_sgd(base, weight, 0.05 / weight) for weight in (1.0, 10.0, 100.0, 1000.0)]
    assert all(after < before / 2 for before, after in pairwise(found))
    assert found[-1] < found[-2] / 30  # as 1 / lambda^2 in the end
    assert found[-1] < 1e-4
    assert found[-1] < after_sgd(base, 0.0, 0.05 / 1000) / 30


def looked_at(model: Any, micro_batches: Sequence[MicroBatch], spec: RehearsalSpec, base: Any) -> Losses:
    """Return the sums over all packs."""
    objective = Objective(model, spec, base)
    sums = Losses(
        *(
            sum(column)
            for column in zip(*(losses(model, micro_batch, 5.0) for micro_batch in micro_batches), strict=True)
        )
    )  # type: ignore[arg-type]
    objective.remove()
    return Losses(*(part.detach() for part in sums))


def test_what_is_looked_at_are_plain_means_per_source() -> None:
    model, base, rows = toy(2, 11), toy(3, 11), mixed_rows(0, 11)
    plain = [row._replace(weight=1.0) for row in rows]
    counts = {part: sum(sum(r.supervised) for r in rows if (r.source == "target") == part) for part in (True, False)}
    alone = by_definition(model, plain, 0.0)
    for spec, compared in ((NLL, None), (LIVE, base)):
        sums = looked_at(model, cut(rows, 40), spec, base)
        assert float(sums.target_nll) / counts[True] == pytest.approx(alone, rel=1e-6)
        rehearsed = by_definition(model, plain, 1.0, compared) - alone
        assert float(sums.rehearsal) / counts[False] == pytest.approx(rehearsed, rel=1e-6)


def test_the_divergence_is_of_rows_seen_for_the_first_time(base: Any, tuned: Any) -> None:
    """In the form trained on; with the likelihood, from the drawn tokens' stored log-probabilities."""
    rows = rehearsal(TEXTS[3:9])
    fresh = [True, False, True, True, False, False]
    texts = [row for row, first in zip(rows, fresh, strict=True) if first]
    (micro_batch,) = micro_batches_of(rows, 400, fresh=fresh, distributions=Laws(base, 2))  # type: ignore[arg-type]
    at = [TEXTS.index(row.token_ids) for row in texts]
    drawn = float((log_distribution(base) - log_distribution(tuned))[at].sum())
    assert float(looked_at(tuned, [micro_batch], NLL, None).divergence) == pytest.approx(drawn, rel=1e-9)
    dense = looked_at(tuned, cut(texts, 400), LIVE, base)
    assert float(looked_at(tuned, [micro_batch], LIVE, base).divergence) == pytest.approx(
        float(dense.rehearsal), rel=1e-9
    )
    assert float(looked_at(tuned, [micro_batch._replace(stored=None)], NLL, None).divergence) == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_rehearsal_is_plain_fine_tuning(form: str) -> None:
    model, base, (spec, stored) = toy(2, 11), toy(3, 11), FORMS[form]
    target = [row for row in mixed_rows(0, 11) if row.source == "target"]
    loss, _ = loss_and_gradient(model, cut(target, 64, base, stored), spec, base, 7.0)
    assert loss == pytest.approx(by_definition(model, [*target, *rehearsal([[0, 1, 2, 3]])], 0.0), rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_pack_has_no_loss_and_no_gradient_but_can_be_differentiated(form: str) -> None:
    model, base, (spec, stored) = toy(2, 11), toy(3, 11), FORMS[form]
    micro_batch = cut(mixed_rows(0, 11), 10_000, base, stored)[0]
    loss, gradient = loss_and_gradient(model, [micro_batch.without_loss()], spec, base)
    assert loss == 0
    assert not gradient.any()


def test_a_model_is_given_back_as_it_was(base: Any) -> None:
    model = copy.deepcopy(base)
    objective = Objective(model, NLL)
    ids = torch.tensor(TEXTS)
    assert torch.equal(model(ids).logits, base(ids).logits)  # also meanwhile: without a pack it is the model's own
    objective.remove()
    assert model.forward.__func__ is type(model).forward


class Doubled(GPT2LMHeadModel):
    """Two numbers of the output come from nowhere: no head of a known form gives its logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits + torch.arange(output.logits.shape[-1])
        return output


def unusual_heads() -> dict[str, Any]:
    """Return models whose logits are not simply a linear layer's, in float32."""
    sizes: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 11, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "initializer_range": 0.5,
    }  # fmt: skip
    torch.manual_seed(0)
    return {
        "capped": Gemma2ForCausalLM(Gemma2Config(head_dim=8, final_logit_softcapping=3.0, **sizes)),
        "scaled": CohereForCausalLM(CohereConfig(logit_scale=0.25, **sizes)),
        "divided": GraniteForCausalLM(GraniteConfig(logits_scaling=3.0, **sizes)),
        "biased": PhiForCausalLM(PhiConfig(**sizes)),
        "tied": GPT2LMHeadModel(toy(0, 11).config),
        "odd": Doubled(toy(0, 11).config),
    }


@pytest.mark.parametrize("name", ["capped", "scaled", "divided", "biased", "tied", "odd"])
def test_every_form_of_head_gives_the_loss_of_the_models_own_logits(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = unusual_heads()[name].eval(), mixed_rows(0, 11)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    loss, gradient = loss_and_gradient(model, cut(rows, 64), weight=2.0)
    model.zero_grad()
    wanted = own_logits_loss(model, rows, 2.0)
    wanted.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    own = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert relative(gradient, own) < 1e-4
    assert ("more than one linear layer" in caplog.text) == (name == "odd")
    assert (head_of(model)(model) is None) == (name == "odd")


def own_logits_loss(model: Any, rows: list[Row], rehearsal_weight: float) -> Tensor:
    totals = {part: sum(sum(row.supervised) for row in rows if (row.source == "target") == part) for part in (0, 1)}
    loss = torch.zeros(())
    for row in rows:
        nll_T = cross_entropy(
            model(torch.tensor([row.token_ids])).logits[0, :-1], torch.tensor(row.token_ids[1:]), reduction="none"
        )
        factor = row.weight / totals[row.source == "target"] * (1 if row.source == "target" else rehearsal_weight)
        loss = loss + factor * nll_T[torch.tensor(row.supervised[1:])].sum()
    return loss


def test_an_odd_head_is_followed_in_the_live_base_too() -> None:
    model = unusual_heads()["odd"].eval()
    rows = [row for row in mixed_rows(0, 11) if row.source != "target"]
    at_itself, gradient = loss_and_gradient(model, cut(rows, 64), LIVE, copy.deepcopy(model))
    assert abs(at_itself) < 1e-6 and gradient.norm() < 1e-5
    assert loss_and_gradient(model, cut(rows, 64), LIVE, Doubled(toy(3, 11).config).eval())[0] > 1e-2
