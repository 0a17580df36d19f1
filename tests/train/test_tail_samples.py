"""The divergence from a stored top and samples of the tail is the whole divergence in expectation, for every count.

V vocabulary, K stored likeliest tokens, S samples of the others.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from cfsd.generate.token_choice import tail_points
from cfsd.model.distribution import distribution_of, likeliest
from cfsd.model.head import Head
from cfsd.train.loss.token_loss import Reference, Stored, token_losses

V, K = 7, 3
BASE_V = torch.tensor([0.9, -0.3, 2.0, 0.1, -1.1, 1.4, -0.6], dtype=torch.float64)
TUNED_V = torch.tensor([0.2, 0.5, 1.1, -0.9, -0.2, 1.9, 0.3], dtype=torch.float64)


def whole(base_V: Tensor, tuned_V: Tensor) -> tuple[float, Tensor]:
    """Return KL(base || tuned) and its gradient by the tuned logits, p - p*."""
    base_V, tuned_V = base_V.log_softmax(0), tuned_V.log_softmax(0)
    return float((base_V.exp() * (base_V - tuned_V)).sum()), tuned_V.exp() - base_V.exp()


def stored(base_V: Tensor, tail_NS: Tensor, drawn: int = 0) -> Stored:
    """Return the base's law at N tokens, with the given samples of the tail."""
    law_V = base_V.log_softmax(0)
    top_K, ids_K = law_V.topk(K)
    rest = law_V.scatter(0, ids_K, -torch.inf).logsumexp(0)
    alike = (tensor.expand(len(tail_NS), *tensor.shape) for tensor in (ids_K, top_K, rest, law_V[drawn]))
    return Stored(*alike, tail_NS, law_V[tail_NS])


def found(tuned_V: Tensor, given: Stored, next_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each of N equal tokens, and its gradient by that token's logits."""
    logits_NV = tuned_V.repeat(len(next_N), 1).requires_grad_()
    losses = token_losses(logits_NV, Head(None), next_N, torch.ones(len(next_N)), Reference(given))
    return losses.loss_N, torch.autograd.grad(losses.total, logits_NV)[0]


def strata(base_V: Tensor, count: int) -> Tensor:
    """Return count x V: the tail's conditional law in each of `count` equal parts of its cumulative probabilities."""
    law_V = base_V.softmax(0)
    tail_V = law_V.scatter(0, law_V.topk(K).indices, 0.0)
    ends_V = tail_V.cumsum(0) / tail_V.sum()
    begins_V = ends_V - tail_V / tail_V.sum()
    edges = torch.arange(count + 1, dtype=torch.float64) / count
    overlap_SV = torch.minimum(edges[1:, None], ends_V) - torch.maximum(edges[:-1, None], begins_V)
    return overlap_SV.clamp(min=0) * count


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("tuned_V", [TUNED_V, BASE_V], ids=["moved", "at the base"])
def test_over_all_samples_loss_and_gradient_are_those_of_the_whole_divergence(count: int, tuned_V: Tensor) -> None:
    """Every combination of samples with its probability; which token was drawn makes no difference at all."""
    laws_SV = strata(BASE_V, count)
    assert torch.allclose(laws_SV.mean(0) * stored(BASE_V, torch.zeros(1, 0).long()).rest_M.exp(),
                          BASE_V.softmax(0).scatter(0, BASE_V.topk(K).indices, 0.0))  # fmt: skip
    outcomes = torch.tensor(list(product(range(V), repeat=count)))
    weights_N = torch.stack([laws_SV[s][outcomes[:, s]] for s in range(count)]).prod(0)
    outcomes, weights_N = outcomes[weights_N > 0], weights_N[weights_N > 0]
    value, slope_V = whole(BASE_V, tuned_V)
    for drawn in (0, 4):
        next_N = torch.full((len(outcomes),), drawn)
        loss_N, slope_NV = found(tuned_V, stored(BASE_V, outcomes, drawn), next_N)
        assert float(weights_N @ loss_N) == pytest.approx(value, abs=1e-12)
        assert torch.allclose(weights_N @ slope_NV, slope_V, atol=1e-12)


def spread(count: int) -> float:
    """Return the standard deviation of the loss over all samples."""
    laws_SV = strata(BASE_V, count)
    outcomes = torch.tensor(list(product(range(V), repeat=count)))
    weights_N = torch.stack([laws_SV[s][outcomes[:, s]] for s in range(count)]).prod(0)
    loss_N, _ = found(TUNED_V, stored(BASE_V, outcomes), torch.zeros(len(outcomes), dtype=torch.long))
    return float((weights_N @ (loss_N - weights_N @ loss_N) ** 2).sqrt())


def test_more_samples_vary_less_and_less_than_independent_ones() -> None:
    """Independent samples would have the spread of one, divided by the root of their count."""
    spreads = [spread(count) for count in (1, 2, 4)]
    assert spreads[1] < spreads[0] / 2**0.5 and spreads[2] < spreads[0] / 2
    assert spreads == sorted(spreads, reverse=True)


def test_a_tail_that_is_covered_in_proportion_gives_the_divergence_itself() -> None:
    """Equal probabilities of 4 tokens outside the top, and 4 samples: each is counted once."""
    base_V = torch.log(torch.tensor([0.3, 0.05, 0.25, 0.05, 0.25, 0.05, 0.05], dtype=torch.float64))
    points = torch.from_numpy(tail_points(0, "any", 0, 50, 4))
    top = likeliest(distribution_of(base_V.expand(50, V).clone()), K, points)
    assert all(sorted(row) == [1, 3, 5, 6] for row in top.tail_ids.tolist())
    given = Stored(top.ids, top.logprobs, top.rest, top.rest, top.tail_ids, top.tail_logprobs)
    loss_N, slope_NV = found(TUNED_V, given, torch.zeros(50, dtype=torch.long))
    value, slope_V = whole(base_V, TUNED_V)
    assert torch.allclose(loss_N, torch.tensor(value).double(), atol=1e-12)
    assert torch.allclose(slope_NV, slope_V.expand(50, V), atol=1e-12)


def test_where_filtered_rows_bend_the_drawn_token_the_samples_are_right() -> None:
    """Rows are kept that a filter likes, or drawn at another temperature: the law of the drawn token is another."""
    law_V = BASE_V.softmax(0)
    value, slope_V = whole(BASE_V, TUNED_V)
    laws_1V = strata(BASE_V, 1)
    tail_N1 = laws_1V[0].nonzero()
    for drawn_V in (law_V * torch.tensor([0.4, 0.4, 1.0, 1.0, 0.4, 1.0, 0.4]), (BASE_V / 0.7).softmax(0)):
        drawn_V = drawn_V / drawn_V.sum()
        plain = stored(BASE_V, torch.zeros(V, 0).long())._replace(sampled_M=BASE_V.log_softmax(0))
        loss_V, slope_VV = found(TUNED_V, plain, torch.arange(V))
        assert abs(float(drawn_V @ loss_V) - value) > 0.01
        assert (drawn_V @ slope_VV - slope_V).abs().max() > 0.01
        loss_N, slope_NV = found(TUNED_V, stored(BASE_V, tail_N1), torch.zeros(len(tail_N1), dtype=torch.long))
        weights_N = laws_1V[0, tail_N1[:, 0]]
        assert float(weights_N @ loss_N) == pytest.approx(value, abs=1e-12)
        assert torch.allclose(weights_N @ slope_NV, slope_V, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_tail_nothing_is_sampled_and_nothing_is_not_a_number(dtype: torch.dtype) -> None:
    """All tokens in the top, and a tail of probability 0."""
    for logits_V, count in ((BASE_V, V), (BASE_V.masked_fill(BASE_V < 0.5, -torch.inf), K)):
        top = likeliest(distribution_of(logits_V.to(dtype)[None]), count, torch.tensor([[0.1, 0.6, 1.0]]).double())
        assert top.rest.tolist() == [-torch.inf] and top.tail_ids.tolist() == [[0, 0, 0]]
        assert top.tail_logprobs.isnan().all()
        given = Stored(top.ids, top.logprobs, top.rest, top.rest, top.tail_ids, top.tail_logprobs)
        loss_1, slope_1V = found(TUNED_V.to(dtype), given, torch.zeros(1, dtype=torch.long))
        law_V = logits_V.softmax(0)
        value = torch.where(law_V > 0, law_V * (law_V.log() - TUNED_V.log_softmax(0)), 0.0).sum()
        assert loss_1.item() == pytest.approx(value.item(), rel=1e-5)
        assert torch.allclose(slope_1V[0].double(), TUNED_V.softmax(0) - law_V, atol=1e-6)
