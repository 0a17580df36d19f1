"""Losses per token from the last hidden states, with their gradients, over a few tokens' logits at a time.

N tokens, M of them compared with the base, C of a chunk, D hidden width, V vocabulary, K stored likeliest tokens,
S stored samples of the others.

Logits of a whole batch never exist: each chunk makes its logits, losses and gradients, and is forgotten. Peak memory
grows with C x V and one gradient of the output layer. torch's own linear_cross_entropy does the same for -log p; it
knows neither the divergence nor a coefficient per token.

Every loss here is const - sum_v a_v log p(v) for some a >= 0, whose gradient by the logits is (sum a) p - a:
a is the sampled token for -log p, the base's distribution for the whole divergence, and its top plus, for the sampled
tail, r*/S at each of S tokens sampled from the rest, whose mass is r*; without such samples 1 at the drawn token, if
that is not in the top. The bucket's rest is one event, with a = p* on the top and r*/r x p on the rest.

With samples the expectation is the whole divergence for every S, whichever text the tokens before are: it is
sum_top p* log(p*/p) + r* log(r*/r) + r* (1/S) sum_i [log(p*(x_i)/r*) - log(p(x_i)/r)], in which r* log(r*/r) cancels.
Compare sampled distillation, arXiv:2503.16870. Differs: the top is exact, the rest alone is sampled.

Of a target token the loss is f x -log p + w x divergence: a is f at the token plus w x the divergence's, f is a number.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfsd.model.head import Head
from cfsd.train.memory import CHUNK, CUDA_CHUNK


class Stored(NamedTuple):
    """What is stored of the base's distribution at M tokens, in nats."""

    ids_MK: Tensor
    logprobs_MK: Tensor
    rest_M: Tensor  # log of the mass outside the K likeliest
    sampled_M: Tensor  # log p* of the drawn token
    tail_ids_MS: Tensor = torch.zeros(0, 0, dtype=torch.int32)  # sampled from the mass outside; S may be 0
    tail_logprobs_MS: Tensor = torch.zeros(0, 0)

    def part(self, rows: slice) -> "Stored":
        """Return some of the tokens."""
        return Stored(*(tensor[rows] for tensor in self))


class Reference(NamedTuple):
    """The base's distribution at M tokens: as stored, or to be computed from its own hidden states."""

    stored: Stored | None = None
    tail: str = "sampled"
    hidden_MD: Tensor | None = None
    head: Head = Head(None)

    def num_tokens(self) -> int:
        """Return M."""
        known = self.hidden_MD if self.stored is None else self.stored.rest_M
        assert known is not None, "one of both is there"
        return len(known)

    def part(self, rows: slice) -> "Reference":
        """Return some of the tokens."""
        hidden_MD = None if self.hidden_MD is None else self.hidden_MD[rows]
        return self._replace(stored=self.stored.part(rows) if self.stored else None, hidden_MD=hidden_MD)

    def logits(self, dtype: torch.dtype) -> Tensor:
        """Return the base's logits from its hidden states."""
        assert self.hidden_MD is not None
        used = self.head.cast(self.hidden_MD.dtype)
        return used.limited(used.product(self.hidden_MD).to(dtype))


class TargetLoss(NamedTuple):
    """The loss of the first `size` tokens: factor x -log p + weight x divergence from `reference`, if there is one.

    `factor` makes a number of what the model says of each token (a TargetTokens of `cfsd.train.methods.method`), which
    is not differentiated; None: 1.
    """

    size: int
    factor: Callable[[Any], Tensor] | None = None
    reference: Reference | None = None
    weight: float = 0.0

    def part(self, rows: slice) -> "TargetLoss":
        """Return that of some of the tokens."""
        return self._replace(reference=self.reference.part(rows) if self.reference else None)


class TokenLosses(NamedTuple):
    """Sum of coefficient x loss, to be differentiated; per token, in nats, the loss and what it is made from."""

    total: Tensor
    loss_N: Tensor
    nll_N: Tensor  # -log p
    divergence_N: Tensor  # from the reference; 0 without one
    factor_N: Tensor  # of -log p


def token_losses(
    hidden_ND: Tensor, head: Head, next_N: Tensor, coefficient_N: Tensor, reference: Reference | None = None,
    target: TargetLoss | None = None,
) -> TokenLosses:  # fmt: skip
    """Return the losses of N tokens: those of `target` for the first, of `reference` for the last M, else -log p."""
    apply: Any = _ChunkedLoss.apply
    differentiated = torch.is_grad_enabled()  # within it never
    inputs = hidden_ND, head.weight_VD, head.bias_V, head, next_N, coefficient_N, reference, target
    return TokenLosses(*apply(*inputs, differentiated))


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, while a chunk's logits are there, and only scaled in the backward one."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor | None, bias_V: Tensor | None, head: Head, next_N: Tensor,
        coefficient_N: Tensor, reference: Reference | None, target: TargetLoss | None, differentiated: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        device = hidden_ND.device.type
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        if cast == torch.float16:  # slopes of a token among thousands are below its least number
            cast = torch.float32
        inputs = (hidden_ND, weight_VD, bias_V)
        grads = [
            torch.zeros_like(t, dtype=exact) if t is not None and need and differentiated else None
            for t, need in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        parts = [hidden_ND.new_zeros(len(next_N), dtype=exact) for _ in range(4)]
        coefficient_N = coefficient_N.to(exact)
        with torch.autocast(device, enabled=False):
            used = head.cast(cast)
            size = CUDA_CHUNK if device == "cuda" else CHUNK
            for rows, compared, learned in _chunks(len(next_N), reference, target, size):
                chunk = _Chunk(used.product(hidden_ND[rows].to(cast)).to(exact), head, next_N[rows])
                for whole_N, part_C in zip(parts, chunk.measure(compared, learned), strict=True):
                    whole_N[rows] = part_C
                if any(grad is not None for grad in grads):
                    slope_CV = chunk.slope(coefficient_N[rows]).to(cast)
                    _accumulate(grads, rows, slope_CV, hidden_ND[rows].to(cast), used)
                    del slope_CV
                del chunk  # or it would live on beside the next one
        ctx.grads, ctx.dtypes = grads, [None if t is None else t.dtype for t in inputs]
        ctx.mark_non_differentiable(*parts)
        return (coefficient_N * parts[0]).sum(), *parts

    @staticmethod
    def backward(ctx: Any, outer: Tensor, *_: Any) -> Any:
        grads = [None if g is None else g.mul_(outer).to(t) for g, t in zip(ctx.grads, ctx.dtypes, strict=True)]
        ctx.grads = []
        return (*grads, *[None] * 6)


def _accumulate(grads: list[Tensor | None], rows: slice, slope_CV: Tensor, hidden_CD: Tensor, head: Head) -> None:
    """Add a chunk's share to the gradients of hidden states, weights and bias."""
    hidden, weight, bias = grads
    if head.weight_VD is None:
        if hidden is not None:
            hidden[rows] = slope_CV
        return
    if head.scale != 1:
        hidden_CD = hidden_CD * head.scale
    if hidden is not None:
        hidden[rows] = (slope_CV @ head.weight_VD).mul_(head.scale)
    if weight is not None and weight.dtype == slope_CV.dtype:
        weight.addmm_(slope_CV.t(), hidden_CD)
    elif weight is not None:
        weight += slope_CV.t() @ hidden_CD
    if bias is not None:
        bias += slope_CV.sum(0)


def _chunks(
    count: int, reference: Reference | None, target: TargetLoss | None, size: int
) -> Iterator[tuple[slice, Reference | None, TargetLoss | None]]:
    """Yield rows of a chunk, and what belongs to them of both; no chunk holds rows of two kinds."""
    learned = 0 if target is None else target.size
    plain = count - (0 if reference is None else reference.num_tokens())
    for start, end in ((0, learned), (learned, plain), (plain, count)):
        for first in range(start, end, size):
            rows = slice(first, min(first + size, end))
            own = slice(rows.start - start, rows.stop - start)
            compared = reference.part(own) if reference and start == plain else None
            yield rows, compared, target.part(own) if target and end == learned else None


def _distribution(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities, and the log of the sum of exponentials: the likeliest token never underflows."""
    max_C1, at_C1 = logits_CV.max(-1, keepdim=True)
    probs_CV = logits_CV.softmax(-1)
    return probs_CV, max_C1 - probs_CV.gather(1, at_C1).log()


class _Chunk:
    """One chunk's distribution p, its losses, and then, in place of p, the slope of the loss by the logits."""

    def __init__(self, product_CV: Tensor, head: Head, next_C: Tensor) -> None:
        self.softcap, self.next_C1 = head.softcap, next_C[:, None]
        self.logits_CV = head.limited(product_CV)
        self.probs_CV, self.norm_C1 = _distribution(self.logits_CV)
        self.nll_C = (self.norm_C1 - self.logits_CV.gather(1, self.next_C1))[:, 0]
        # the slope is mass x p - a, a being amounts at ids, or a whole distribution
        self.mass_C1: Tensor | float = 1.0
        self.pulled: tuple[Tensor, Tensor] | Tensor = (self.next_C1, torch.ones_like(self.norm_C1))
        self.tail_share_C1: Tensor | None = None  # bucket: r*/r

    def measure(
        self, reference: Reference | None, target: TargetLoss | None
    ) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float]:
        """Return per token the loss, -log p, the divergence and the factor, and keep what the slope needs."""
        if target is not None:
            return self._learned(target)
        if reference is None:
            return self.nll_C, self.nll_C, 0.0, 1.0
        divergence_C = self._divergence(reference)
        return divergence_C, self.nll_C, divergence_C, 1.0

    def _learned(self, target: TargetLoss) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float]:
        """Add up a target's likelihood and divergence, and their slopes."""
        factor_C = torch.ones_like(self.nll_C) if target.factor is None else target.factor(self)
        amount_C1 = factor_C[:, None]
        if target.reference is None:
            self.mass_C1, self.pulled = amount_C1, (self.next_C1, amount_C1)
            return factor_C * self.nll_C, self.nll_C, 0.0, factor_C
        divergence_C = self._divergence(target.reference)
        assert self.tail_share_C1 is None, "of the target the tail is whole or sampled"
        self.mass_C1 = target.weight * self.mass_C1 + amount_C1
        if isinstance(self.pulled, Tensor):
            self.pulled = self.pulled.mul_(target.weight).scatter_add_(1, self.next_C1, amount_C1)
        else:
            ids_CK, probs_CK = self.pulled
            amounts = torch.cat([target.weight * probs_CK, amount_C1], 1)
            self.pulled = torch.cat([ids_CK, self.next_C1], 1), amounts
        return factor_C * self.nll_C + target.weight * divergence_C, self.nll_C, divergence_C, factor_C

    @property
    def probability(self) -> Tensor:
        """What the model gives to the target's token."""
        return (-self.nll_C).exp()

    def entropy(self, likeliest: int) -> Tensor:
        """Return the entropy of the `likeliest` tokens' distribution, renormalised, in nats."""
        count = min(likeliest, self.logits_CV.shape[-1])
        logprobs_CK = self.logits_CV.topk(count, -1).values.log_softmax(-1)
        return -(logprobs_CK.exp() * logprobs_CK).sum(-1)

    def _divergence(self, part: Reference) -> Tensor:
        """Return the divergence from the reference, and keep what its slope needs."""
        stored, dtype = part.stored, self.probs_CV.dtype
        if stored is None:
            return self._whole(part.logits(dtype))
        ids_CK, logprobs_CK = stored.ids_MK.long(), stored.logprobs_MK.to(dtype)
        probs_CK = logprobs_CK.exp()
        on_top_C = (probs_CK * (logprobs_CK - (self.logits_CV.gather(1, ids_CK) - self.norm_C1))).sum(-1)
        if part.tail == "bucket":
            return on_top_C + self._bucket(ids_CK, probs_CK, stored.rest_M.to(dtype))
        tail_CS, amount_CS, logprobs_CS = self._tail(stored, ids_CK, dtype)
        self.mass_C1 = (probs_CK.sum(-1) + amount_CS.sum(-1))[:, None]
        self.pulled = torch.cat([ids_CK, tail_CS], 1), torch.cat([probs_CK, amount_CS], 1)
        excess_CS = logprobs_CS - (self.logits_CV.gather(1, tail_CS) - self.norm_C1)
        return on_top_C + torch.where(amount_CS > 0, amount_CS * excess_CS, 0.0).sum(-1)

    def _tail(self, stored: Stored, ids_CK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens that stand for the base's tail, how much of it each has, and log p* of each."""
        if count := stored.tail_ids_MS.shape[1]:
            amount_CS = (stored.rest_M.to(dtype).exp() / count)[:, None].expand(-1, count)
            return stored.tail_ids_MS.long(), amount_CS, stored.tail_logprobs_MS.to(dtype)
        outside_C1 = (ids_CK != self.next_C1).all(-1, keepdim=True).to(dtype)
        return self.next_C1, outside_C1, stored.sampled_M.to(dtype)[:, None]

    def _whole(self, base_CV: Tensor) -> Tensor:
        """Return the divergence from the base's logits: exactly 0, and without a slope, where they are the model's."""
        probs_CV, norm_C1 = _distribution(base_CV)
        self.pulled = probs_CV
        return (probs_CV * base_CV.sub_(self.logits_CV).add_(self.norm_C1 - norm_C1)).sum(-1)

    def _bucket(self, ids_CK: Tensor, probs_CK: Tensor, rest_C: Tensor) -> Tensor:
        """Return r* log(r*/r), r being the mass that the model gives to all but the top."""
        tail_C1 = self.logits_CV.scatter(1, ids_CK, -torch.inf).logsumexp(-1, keepdim=True) - self.norm_C1
        mass_C1 = rest_C.exp()[:, None]
        self.mass_C1 = probs_CK.sum(-1, keepdim=True) + mass_C1
        share_C1 = (rest_C[:, None] - tail_C1).clamp(max=80).exp()  # r may underflow: 0 x infinity in the slope
        self.pulled, self.tail_share_C1 = (ids_CK, probs_CK), share_C1
        return (mass_C1 * (rest_C[:, None] - tail_C1))[:, 0].nan_to_num(0.0)  # no rest at all: 0 x infinity

    def slope(self, coefficient_C: Tensor) -> Tensor:
        """Return the gradient of coefficient x loss by the logits before the soft limit; p is used up."""
        scale_C1, slope_CV = coefficient_C[:, None], self.probs_CV
        if isinstance(self.pulled, Tensor):
            whole_CV = slope_CV if isinstance(self.mass_C1, float) else slope_CV.mul_(self.mass_C1)
            whole_CV.sub_(self.pulled).mul_(scale_C1)
        elif self.tail_share_C1 is None:
            slope_CV.mul_(scale_C1 * self.mass_C1)
            slope_CV.scatter_add_(1, self.pulled[0], -scale_C1 * self.pulled[1])
        else:
            ids_CK, probs_CK = self.pulled
            top_CK = scale_C1 * (self.mass_C1 * slope_CV.gather(1, ids_CK) - probs_CK)
            slope_CV.mul_(scale_C1 * (self.mass_C1 - self.tail_share_C1.nan_to_num(0.0)))
            slope_CV.scatter_(1, ids_CK, top_CK)
        if self.softcap is not None:
            slope_CV.mul_(1 - (self.logits_CV / self.softcap).square_())
        return slope_CV
