"""One token per row: it follows the probabilities of large vocabularies, rare tokens included."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from cfsd.model.distribution import distribution_of, likeliest
from cfsd.model.inversion import sample_token


def grid(count: int) -> torch.Tensor:
    """Return the midpoints of `count` equal parts of [0, 1): tokens follow the probabilities as closely as can be."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("vocabulary", [5, 256, 257, 1000, 2048])
def test_equally_spaced_points_meet_each_token_as_often_as_its_probability_says(vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    probs = (2 * torch.randn(vocabulary)).softmax(-1)
    points = grid(20_000)
    tokens = torch.cat([sample_token(probs.expand(len(part), -1), part) for part in points.split(2000)])
    counts = torch.bincount(tokens, minlength=vocabulary)
    assert len(counts) == vocabulary
    assert (counts - probs.double() * len(points)).abs().max() <= 1.01


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True, allow_subnormal=False))
@settings(max_examples=200, deadline=None)
def test_a_token_that_cannot_be_is_never_sampled(seed: int, point: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(1, 700, generator=generator)
    probs[:, torch.randperm(700, generator=generator)[:690]] = 0
    probs[:, 256:512] = 0
    for at in (point, 0.0, math.nextafter(1.0, 0.0)):
        token = sample_token(probs, torch.tensor([at], dtype=torch.float64))
        assert probs[0, token].item() > 0


def test_rare_tokens_keep_their_share_beside_likely_ones() -> None:
    """A float32 running sum loses tokens of 1e-9 behind one of 0.5: here half of the mass is theirs to meet."""
    vocabulary, rare = 50_000, 1e-9
    probs = torch.full((1, vocabulary), rare)
    probs[0, 0] = 1 - rare * (vocabulary - 1)
    share = rare * (vocabulary - 1)
    points = 1 - share * (1 - grid(500))  # all in the rare part, spread evenly over it
    tokens = torch.cat([sample_token(probs, point[None]) for point in points]).numpy()
    assert tokens.min() > 0
    assert chisquare(np.histogram(tokens, bins=10, range=(1, vocabulary))[0]).pvalue > 0.99


@pytest.mark.parametrize(("vocabulary", "count"), [(49_152, 64), (5000, 8), (50_257, 16), (300, 64), (40, 64)])
def test_the_likeliest_are_those_of_a_full_sort(vocabulary: int, count: int) -> None:
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(count)) * 3
    logits[0, -3:] = 50.0 + torch.arange(3)  # in the part that no whole block covers
    logits[1, 7 : 7 + 20] += 40  # many in one block
    count = min(count, vocabulary)
    expected = logits.double().log_softmax(-1).sort(-1, descending=True)
    ids, logprobs, rest, *_ = likeliest(distribution_of(logits), count, torch.zeros(6, 0))
    assert ids.tolist() == expected.indices[:, :count].tolist()
    assert torch.allclose(logprobs.double(), expected.values[:, :count], atol=1e-4)
    others = expected.values[:, count:].logsumexp(-1)
    assert torch.allclose(rest.double(), others, rtol=1e-4, atol=1e-4) or count == vocabulary


def test_log_probabilities_add_up_in_every_precision() -> None:
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        logits = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)).to(kind)
        distribution = distribution_of(logits)
        assert distribution.logits_BV.dtype in (torch.float32, torch.float64)
        everything = distribution.logprobs(torch.arange(400).expand(3, -1))
        assert torch.allclose(everything.double().exp().sum(-1), torch.ones(3, dtype=torch.float64), atol=1e-5)
