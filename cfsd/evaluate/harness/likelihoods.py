"""Log-likelihoods of continuations: what requests about one document have in common passes through the model once.

B rows, T tokens of the longest, N positions whose predictions are asked for, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.model.architecture import sees_all
from cfsd.model.batching import arrange, pad
from cfsd.model.causal import small_copy

CHUNK = 256  # positions whose whole distributions are in memory at once
TRIAL = ([5, 6, 7, 8], [5, 6, 7, 9, 10], [5, 6, 11])  # of three branches
EXACT = 4  # bytes of a number with which a trial tells rounding from a mistake
SAME = 1e-5  # of 1 + the log-likelihood; of the families in `benchmarks/_families.py` 4e-7 at most, or 2e-3 and more
Pair = tuple[list[int], list[int]]  # context and continuation
Answer = tuple[float, bool]  # log-likelihood of the continuation, and whether each token of it is the likeliest


class Request(NamedTuple):
    """What the model reads, and the tokens that are asked for, each predicted by one of the last positions of it."""

    read: list[int]
    wanted: list[int]

    @classmethod
    def of(cls, pair: Pair, max_length: int) -> Self:
        """Return the request for `pair`, cut at its beginning to what a context of `max_length` holds."""
        context, continuation = pair
        return cls((context + continuation)[-(max_length + 1) :][:-1], continuation)


class Row(NamedTuple):
    """Requests that begin with the same tokens, the trunk, after which each distinct end is a branch of its own."""

    trunk: list[int]
    branches: list[list[int]]
    members: list[tuple[int, int]]  # number of each request, and which branch is its end

    @classmethod
    def of(cls, numbers: Sequence[int], requests: Sequence[Request]) -> Self:
        """Return the row of the requests with these `numbers`."""
        texts = [requests[number].read for number in numbers]
        common = next((i for i, tokens in enumerate(zip(*texts, strict=False)) if len(set(tokens)) > 1), None)
        length = min(map(len, texts)) if common is None else common
        ends = list(dict.fromkeys(tuple(text[length:]) for text in texts))
        members = [(number, ends.index(tuple(text[length:]))) for number, text in zip(numbers, texts, strict=True)]
        return cls(texts[0][:length], [list(end) for end in ends], members)

    def tokens(self) -> list[int]:
        """Return the trunk and all branches."""
        return sum(self.branches, self.trunk)

    def segments(self) -> list[int]:
        """Return 0 for each token of the trunk, and the number of its branch, from 1, for each other token."""
        parts = (len(branch) * [number] for number, branch in enumerate(self.branches, 1))
        return sum(parts, len(self.trunk) * [0])

    def positions(self) -> list[int]:
        """Return the place of each token in its own text."""
        first = len(self.trunk)
        return sum((list(range(first, first + len(branch))) for branch in self.branches), list(range(first)))

    def places(self, branch: int, count: int) -> list[int]:
        """Return where in the row the last `count` tokens of the text with this branch are."""
        start = len(self.trunk) + sum(map(len, self.branches[:branch]))
        text = [*range(len(self.trunk)), *range(start, start + len(self.branches[branch]))]
        return text[-count:]


def rows_of(requests: Sequence[Request], documents: Sequence[int], most: int) -> list[Row]:
    """Return the rows that answer `requests`: one for the neighbours about a document, or for those that read the same.

    Requests that have no token in common get rows of their own, and so do those that together would be longer than
    `most` tokens, of which some models have no more places; 0: nothing is shared.
    """
    rows = []
    for _, same in groupby(range(len(requests)), key=documents.__getitem__):
        for numbers in _grouped(same, lambda number: tuple(requests[number].read[:1])):
            row = Row.of(numbers, requests)
            fits = len(row.tokens()) <= most
            apart = _grouped(numbers, lambda number: tuple(requests[number].read))
            rows += [row] if fits else [Row.of(alike, requests) for alike in apart]
    return rows


def _grouped(numbers: Iterable[int], key: Callable[[int], tuple[int, ...]]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for number in numbers:
        groups.setdefault(key(number), []).append(number)
    return list(groups.values())


@torch.inference_mode()
def likelihoods(
    model: PreTrainedModel, requests: Sequence[Request], rows: Sequence[Row], max_tokens: Callable[[int], int],
    on_done: Callable[[int], object] = lambda number: None,
) -> list[Answer]:  # fmt: skip
    """Return the answer to each of `requests`, in batches of like length; `on_done` gets how many a batch answered.

    `max_tokens` says how many tokens a batch holds, padding included, whose longest row has so many.
    """
    answers: dict[int, Answer] = {}
    lengths = [len(row.trunk) + sum(map(len, row.branches)) for row in rows]
    for group in arrange(lengths, max_tokens(max(lengths, default=0))):
        found = dict(_answers(model, requests, [rows[i] for i in group]))
        answers |= found
        on_done(len(found))
    return [answers[number] for number in range(len(requests))]


def _answers(model: PreTrainedModel, requests: Sequence[Request], rows: Sequence[Row]) -> Iterator[tuple[int, Answer]]:
    asked = [
        (number, i, row.places(branch, len(requests[number].wanted)))
        for i, row in enumerate(rows)
        for number, branch in row.members
    ]
    flat = sorted({(i, place) for _, i, places in asked for place in places})
    order = {where: n for n, where in enumerate(flat)}
    logits_NV = _predictions(model, rows, torch.tensor(flat, device=model.device))
    picked = torch.tensor([order[i, place] for _, i, places in asked for place in places], device=model.device)
    wanted = torch.tensor([token for number, _, _ in asked for token in requests[number].wanted], device=model.device)
    parts = [_likelihoods(logits_NV, *part) for part in zip(picked.split(CHUNK), wanted.split(CHUNK), strict=True)]
    logprobs, greedy = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    counts = [len(places) for _, _, places in asked]
    for (number, _, _), part, best in zip(asked, logprobs.split(counts), greedy.split(counts), strict=True):
        yield number, (float(part.sum()), bool(best.all()))


def _likelihoods(logits_NV: Tensor, picked: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    chunk = logits_NV[picked].float()
    of_wanted = chunk.gather(1, wanted[:, None])[:, 0]
    return of_wanted - chunk.logsumexp(-1), chunk.argmax(-1) == wanted


def _predictions(model: PreTrainedModel, rows: Sequence[Row], places_N2: Tensor) -> Tensor:
    """Return the logits at `places_N2`: numbers of rows and of places in them."""
    token_ids_BT = pad([row.tokens() for row in rows]).to(model.device)
    branching = any(len(list(filter(None, row.branches))) > 1 for row in rows)
    named = _branches(model, rows, token_ids_BT.shape[1]) if branching else {}
    picks = places_N2.unbind(1)

    def pick(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][picks][None], *inputs[1:]) if inputs[0].shape[:2] == token_ids_BT.shape else inputs

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        output: Any = model(input_ids=token_ids_BT, use_cache=False, **named)
    finally:
        if hook:
            hook.remove()
    logits: Tensor = output.logits
    return logits[picks] if logits.shape[:2] == token_ids_BT.shape else logits[0]


def _branches(model: PreTrainedModel, rows: Sequence[Row], longest: int) -> dict[str, Tensor]:
    """Return where each token stands in its own text, and that it attends to the trunk and to its own branch only."""
    segments_BT, positions_BT = (
        pad([numbers(row) for row in rows]).to(model.device) for numbers in (Row.segments, Row.positions)
    )
    before_TT = torch.ones(longest, longest, dtype=torch.bool, device=model.device).tril()
    same_BTT = (segments_BT[:, None, :] == 0) | (segments_BT[:, None, :] == segments_BT[:, :, None])
    mask_BTT = torch.zeros(same_BTT.shape, dtype=model.dtype, device=model.device)
    mask_BTT.masked_fill_(~(same_BTT & before_TT), torch.finfo(model.dtype).min)
    return {"attention_mask": mask_BTT[:, None], "position_ids": positions_BT}


def can_share(model: PreTrainedModel) -> bool:
    """Say whether branches after one trunk are predicted as texts of their own; it is tried where layers see all.

    A model in 16 bits is tried as a small copy in 32: kernels with and without a mask round otherwise, by more than
    a wrong model is wrong.
    """
    if not sees_all(model.config.get_text_config().to_dict()):
        return False
    requests = [Request(text, text[-1:]) for text in TRIAL]
    whole, shared = (rows_of(requests, [0] * len(TRIAL), most) for most in (0, 64))
    try:
        tried = small_copy(model.config, divided=True) if model.dtype.itemsize < EXACT else model
        told = [likelihoods(tried, requests, rows, lambda longest: 64) for rows in (whole, shared)]
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):  # a model that takes no such arguments
        return False
    return all(abs(one - other) < SAME * (1 + abs(one)) for (one, _), (other, _) in zip(*told, strict=True))
