"""Losses in chunks are those of plain autograd over all logits, and the logits of all tokens never exist.

N tokens, M of them against the base's law, V vocabulary, D hidden width, K stored likeliest tokens.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from cfsd.model.head import Head
from cfsd.train.loss import token_loss
from cfsd.train.loss.token_loss import Reference, Stored, TokenLosses, token_losses

N, D, V, K = 40, 16, 50, 8
KINDS = ["nll", "kl", "sampled", "bucket"]


class Case(NamedTuple):
    """One batch: what is differentiated, the head's form, the tokens and the base."""

    given: tuple[Tensor, Tensor, Tensor]  # hidden states, weights, bias
    next_N: Tensor
    coefficient_N: Tensor
    base_ND: Tensor
    base_head: Head
    softcap: float | None
    scale: float


def case(dtype: torch.dtype = torch.float64, softcap: float | None = None, scale: float = 1.0) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    given = normal(N, D).requires_grad_(), normal(V, D).requires_grad_(), normal(V).requires_grad_()
    next_N = torch.randint(0, V, (N,), generator=generator)
    head = Head(normal(V, D), None, softcap, scale)
    return Case(given, next_N, normal(N).abs(), normal(N, D), head, softcap, scale)


def test_what_is_only_measured_makes_no_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a trained output layer it would be as large as the layer."""
    c = case()
    wanted = token_losses(c.given[0], Head(*c.given[1:]), c.next_N, c.coefficient_N).loss_N
    monkeypatch.setattr(token_loss._Chunk, "slope", None)
    with torch.no_grad():
        found = token_losses(c.given[0], Head(*c.given[1:]), c.next_N, c.coefficient_N)
    assert torch.equal(found.loss_N, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_under_float16_a_token_among_thousands_keeps_its_slope(kind: str) -> None:
    """1/16384 of a flat law is below float16's least number."""
    many, width = 4000, 16
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(many, width, generator=generator) * 0.1).requires_grad_()
    hidden = torch.randn(N, width, generator=generator)
    next_N, coefficient_N = torch.randint(0, many, (N,), generator=generator), torch.full((N,), 1 / 16384)
    law_NV = ((hidden + 0.1) @ weight.detach().T).log_softmax(-1)
    top = law_NV.topk(K)
    drawn_N = law_NV.gather(1, next_N[:, None])[:, 0]
    rest_N = law_NV.scatter(1, top.indices, -torch.inf).logsumexp(-1)
    stored = Stored(top.indices, top.values, rest_N, drawn_N)
    live = Reference(hidden_MD=hidden + 0.1, head=Head(weight.detach()))
    reference = {"nll": None, "kl": live, "sampled": Reference(stored), "bucket": Reference(stored, "bucket")}[kind]

    def gradients(*, half: bool) -> list[Tensor]:
        states, weight.grad = hidden.clone().requires_grad_(), None
        with torch.autocast("cpu", torch.float16, enabled=half):
            total = token_losses(states, Head(weight), next_N, coefficient_N, reference).total
        (total * 65536).backward()
        assert states.grad is not None and weight.grad is not None
        return [states.grad / 65536, weight.grad / 65536]

    for wanted, found in zip(gradients(half=False), gradients(half=True), strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 0.01


def log_distribution(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    logits = scale * hidden @ weight.T + (0 if bias is None else bias)
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)


def base_law(c: Case) -> Tensor:
    assert c.base_head.weight_VD is not None
    return log_distribution(c.base_ND, c.base_head.weight_VD, None, c.softcap, c.scale)


def stored_of(c: Case, count: int = K) -> Stored:
    """Return the base's law as the sampler keeps it, at full precision."""
    law_NV = base_law(c)
    top_NK, ids_NK = law_NV.topk(count, -1)
    outside_NV = law_NV.scatter(1, ids_NK, -torch.inf)
    return Stored(ids_NK, top_NK, outside_NV.logsumexp(-1), law_NV.gather(1, c.next_N[:, None])[:, 0])


def reference(c: Case, kind: str, first: int, count: int = K) -> Reference | None:
    """Return what the tokens from `first` on are compared to."""
    if kind == "nll":
        return None
    if kind == "kl":
        return Reference(hidden_MD=c.base_ND[first:], head=c.base_head)
    return Reference(stored_of(c, count).part(slice(first, None)), kind)


def by_definition(c: Case, kind: str, first: int, count: int = K) -> Tensor:
    """Return the loss of every token, by autograd over all logits at once."""
    law_NV, base_NV, drawn_N1 = log_distribution(*c.given, c.softcap, c.scale), base_law(c), c.next_N[:, None]
    nll_N = -law_NV.gather(1, drawn_N1)[:, 0]
    stored = stored_of(c, count)
    on_top_N = (stored.logprobs_MK.exp() * (stored.logprobs_MK - law_NV.gather(1, stored.ids_MK))).sum(-1)
    if kind == "kl":
        loss_N = (base_NV.exp() * (base_NV - law_NV)).sum(-1)
    elif kind == "sampled":
        loss_N = on_top_N + (stored.ids_MK != drawn_N1).all(-1) * (stored.sampled_M + nll_N)
    elif kind == "bucket":
        rest_N = (1 - law_NV.gather(1, stored.ids_MK).exp().sum(-1)).log()
        loss_N = on_top_N + stored.rest_M.exp() * (stored.rest_M - rest_N)
    else:
        loss_N = nll_N
    return torch.cat([nll_N[:first], loss_N[first:]])


def ours(c: Case, kind: str, first: int, count: int = K) -> TokenLosses:
    hidden, weight, bias = c.given
    head = Head(weight, bias, c.softcap, c.scale)
    return token_losses(hidden, head, c.next_N, c.coefficient_N, reference(c, kind, first, count))


def differentiated(c: Case, total: Tensor) -> Tensor:
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(total, c.given)])


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).detach().norm() / two.detach().norm())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that end inside both parts of a batch."""
    monkeypatch.setattr(token_loss, "CHUNK", 7)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 1.0), (None, 0.3), (2.0, 0.7)])
@pytest.mark.parametrize("first", [0, 15, N])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_definition(
    kind: str, first: int, softcap: float | None, scale: float
) -> None:
    c = case(softcap=softcap, scale=scale)
    wanted_N, found = by_definition(c, kind, first), ours(c, kind, first)
    assert torch.allclose(found.loss_N, wanted_N, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found.nll_N, by_definition(c, "nll", 0), rtol=1e-10)
    wanted = (c.coefficient_N * wanted_N).sum()
    assert found.total.item() == pytest.approx(wanted.item(), rel=1e-10)
    assert relative(differentiated(c, 3 * found.total), 3 * differentiated(c, wanted)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_near_float64(kind: str) -> None:
    exact, single = (case(dtype, softcap=5.0) for dtype in (torch.float64, torch.float32))
    slopes = [differentiated(c, ours(c, kind, 15).total).double() for c in (single, exact)]
    assert relative(*slopes) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_depends_on_the_size_of_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1, 7, 1000):
        monkeypatch.setattr(token_loss, "CHUNK", size)
        c = case(softcap=3.0)
        losses = ours(c, kind, 15)
        found.append(torch.cat([losses.loss_N.detach(), losses.nll_N, differentiated(c, losses.total)]))
    assert relative(found[0], found[2]) < 1e-12
    assert relative(found[1], found[2]) < 1e-12


def test_logits_in_place_of_hidden_states_give_the_same_losses() -> None:
    c = case()
    logits_NV = (c.given[0] @ c.given[1].T + c.given[2]).detach().requires_grad_()
    found = token_losses(logits_NV, Head(None), c.next_N, c.coefficient_N, reference(c, "sampled", 15))
    wanted = (c.coefficient_N * by_definition(c, "sampled", 15)).sum()
    assert found.total.item() == pytest.approx(wanted.item(), rel=1e-10)
    (slope_NV,) = torch.autograd.grad(found.total, logits_NV)
    assert relative(slope_NV.T @ c.given[0], torch.autograd.grad(wanted, c.given[1])[0]) < 1e-10


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same() -> None:
    c, frozen = case(), case()
    whole = differentiated(c, ours(c, "kl", 15).total)[: N * D]
    for tensor in frozen.given[1:]:
        tensor.requires_grad_(False)
    ours(frozen, "kl", 15).total.backward()
    assert frozen.given[0].grad is not None and torch.equal(frozen.given[0].grad.flatten(), whole)
    assert frozen.given[1].grad is None


def test_without_gradients_the_losses_are_the_same() -> None:
    c = case()
    with torch.no_grad():
        still = ours(c, "bucket", 15)
    assert torch.equal(still.loss_N, ours(c, "bucket", 15).loss_N)
    assert not still.total.requires_grad


def test_under_autocast_products_are_in_bfloat16_and_sums_in_float32() -> None:
    c = case(torch.float32)
    exact = ours(c, "kl", 15)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ours(c, "kl", 15)
    assert rounded.loss_N.dtype == torch.float32
    assert 1e-6 < relative(rounded.loss_N, exact.loss_N) < 2e-2
    slopes = [differentiated(c, losses.total) for losses in (rounded, exact)]
    assert slopes[0].dtype == torch.float32
    assert relative(*slopes) < 2e-2


def at_itself(token: int) -> Case:
    """Return one position as often as there are tokens, each drawn once, its weight its probability under the base.

    The model is its own base there.
    """
    c = case()
    hidden_VD = c.given[0].detach()[token].expand(V, D).clone().requires_grad_()
    c = c._replace(given=(hidden_VD, c.given[1], torch.zeros(V, dtype=torch.float64).requires_grad_()))
    c = c._replace(next_N=torch.arange(V), base_ND=hidden_VD.detach(), base_head=Head(c.given[1].detach()))
    return c._replace(coefficient_N=base_law(c)[0].exp())


@pytest.mark.parametrize("kind", ["kl", "bucket"])
def test_at_the_base_the_whole_divergence_has_no_slope_at_any_token(kind: str) -> None:
    c = at_itself(3)
    losses = ours(c, kind, 0)
    assert losses.loss_N.abs().max() < 1e-12
    (slope_VD,) = torch.autograd.grad(losses.total, c.given[:1])
    assert slope_VD.abs().max() < 1e-13


def test_at_the_base_the_sampled_tail_has_no_slope_in_expectation_only() -> None:
    c = at_itself(3)
    (slope_VD,) = torch.autograd.grad(ours(c, "sampled", 0).total, c.given[:1])
    assert slope_VD.sum(0).abs().max() < 1e-13
    assert slope_VD.abs().max() > 1e-3


def test_the_sampled_tail_is_the_whole_divergence_in_expectation_over_the_drawn_token() -> None:
    c = case()
    at = c._replace(next_N=torch.arange(V), base_ND=c.base_ND[0].expand(V, D))
    likelihood_V, head = base_law(at)[0].exp(), Head(c.given[1], c.given[2])
    hidden_VD = c.given[0][0].expand(V, D)
    for count in (1, K, V):
        found = token_losses(hidden_VD, head, at.next_N, likelihood_V, reference(at, "sampled", 0, count))
        whole = token_losses(hidden_VD, head, at.next_N, likelihood_V, reference(at, "kl", 0))
        assert found.total.item() == pytest.approx(whole.total.item(), rel=1e-12)
        slopes = [torch.autograd.grad(losses.total, c.given[1], retain_graph=True)[0] for losses in (found, whole)]
        assert relative(*slopes) < 1e-11


def test_the_bucket_is_below_the_whole_divergence_and_grows_to_it_with_k() -> None:
    c = case()
    whole_N = ours(c, "kl", 0).loss_N
    rising = [ours(c, "bucket", 0, count).loss_N for count in (1, 2, 5, 20, V - 1, V)]
    for lower_N, upper_N in pairwise(rising):
        assert (lower_N <= upper_N + 1e-12).all()
    assert (rising[0] < whole_N - 1e-3).all()
    for exact_N in rising[-2:]:  # a tail of one token is that token; no tail at all must not make NaN
        assert torch.allclose(exact_N, whole_N, rtol=1e-10)
    slopes = [differentiated(c, ours(c, kind, 0, V).total) for kind in ("bucket", "kl")]
    assert relative(*slopes) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_sharp_laws_stay_finite(kind: str) -> None:
    """Logits in the thousands: most probabilities are 0 in float32."""
    c = case(torch.float32)
    sharp = c._replace(given=(c.given[0], (c.given[1] * 1000).detach().requires_grad_(), c.given[2]))
    losses = ours(sharp, kind, 15)
    assert losses.loss_N.isfinite().all()
    assert differentiated(sharp, losses.total).isfinite().all()


class Sizes(TorchDispatchMode):
    """Largest tensor that any operation returns, and the most that their memory held at once, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.most = 0
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes() // tensor.element_size()
        self.held = {key: (ref, size) for key, (ref, size) in self.held.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return made


def sizes_of(tokens: int, vocabulary: int, kind: str, plain: bool = False) -> Sizes:
    generator = torch.Generator().manual_seed(0)
    width = 8
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    next_N = torch.randint(0, vocabulary, (tokens,), generator=generator)
    half = tokens // 2
    top = torch.full((half, K), -3.0), torch.full((half,), -1.0), torch.full((half,), -4.0)
    stored = Stored(torch.arange(K).expand(half, K).contiguous(), *top)
    live = Reference(hidden_MD=hidden.detach()[half:].clone(), head=Head(weight.detach().clone()))
    compared = {"nll": None, "kl": live}.get(kind, Reference(stored, kind))
    with Sizes() as sizes:
        if plain:
            total = torch.nn.functional.cross_entropy(hidden @ weight.T, next_N)
        else:
            total = token_losses(hidden, Head(weight), next_N, torch.ones(tokens), compared).total
        total.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    return sizes


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_chunk_times_vocabulary_not_with_tokens(kind: str) -> None:
    vocabulary = 5000
    chunk = token_loss.CHUNK * vocabulary
    few, many = (sizes_of(tokens, vocabulary, kind) for tokens in (2000, 4000))
    assert many.largest == few.largest < 2 * chunk
    assert many.most < 1.1 * few.most < 6 * chunk < 4000 * vocabulary / 2


def test_the_measure_sees_all_logits_where_they_exist() -> None:
    assert sizes_of(2000, 5000, "nll", plain=True).largest == 2000 * 5000
