"""Where along the rows, and on which tokens, the tuned model's distributions left the base's.

Collected in the pass that measures the divergence, while the distributions of a chunk of positions are in memory.
N positions, V vocabulary; nats.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MAX_POSITIONS = 30  # that are kept to be read
MAX_TOKENS = 20  # of the vocabulary that are kept: so many that became likelier, and so many less likely
LIKELIEST = 5  # tokens that are kept of a distribution
CONTEXT = 48  # tokens before a position that are kept to be read

Floats = NDArray[np.float32]
Likeliest = list[tuple[int, float]]  # token and probability


class Chunk(NamedTuple):
    """The distributions of the next token at some positions."""

    base_NV: Tensor  # log p*
    tuned_NV: Tensor  # log p
    gap_NV: Tensor  # log p* - log p
    probs_NV: Tensor  # p*
    terms_NV: Tensor  # p* (log p* - log p), whose sum over the vocabulary is the divergence
    kl_N: Tensor


class Position(NamedTuple):
    """What base and tuned expect at one position of a row."""

    row: int
    place: int  # in the row, of the token that is predicted
    kl: float
    base: Likeliest
    tuned: Likeliest
    next: tuple[float, float]  # probability of the token that the row has there, under base and tuned


class Movement:
    """Each position's divergences and entropy, sums per token of the vocabulary, and the positions that moved most."""

    def __init__(self, rows: Sequence[Sequence[int]], begin: Sequence[int] = ()) -> None:
        """Begin with nothing seen of `rows`; in each, what is before the place in `begin` will not be looked at."""
        self.rows, self.begin = rows, begin
        self.seen: list[tuple[NDArray[np.int64], Floats]] = []
        self.sums_3V: Tensor | None = None  # over positions, of p*, of p and of p* (log p* - log p)
        self.largest: dict[tuple[int, ...], Position] = {}  # by the tokens before: some rows begin alike

    def add(self, row_N: Sequence[int], place_N: Sequence[int], chunk: Chunk) -> None:
        """Take in the positions of a chunk, which predict tokens `place_N` of rows `row_N`, in order."""
        if any(self.begin):
            seen = [n for n, (row, place) in enumerate(zip(row_N, place_N, strict=True)) if place >= self.begin[row]]
            row_N, place_N = ([of[n] for n in seen] for of in (row_N, place_N))
            chunk = Chunk(*(part[seen] for part in chunk))
        if not row_N:
            return
        tuned_probs_NV = chunk.tuned_NV.exp()
        reverse_N = -torch.linalg.vecdot(tuned_probs_NV, chunk.gap_NV)
        entropy_N = -torch.linalg.vecdot(chunk.probs_NV, chunk.base_NV)
        values_N3 = torch.stack([chunk.kl_N, reverse_N, entropy_N], -1).float().cpu().numpy()
        self.seen.append((np.array(row_N, np.int64), values_N3))
        sums_3V = torch.stack([part.sum(0) for part in (chunk.probs_NV, tuned_probs_NV, chunk.terms_NV)]).double()
        self.sums_3V = sums_3V if self.sums_3V is None else self.sums_3V + sums_3V
        self._keep(row_N, place_N, values_N3[:, 0], chunk)

    def _keep(self, row_N: Sequence[int], place_N: Sequence[int], kl_N: Floats, chunk: Chunk) -> None:
        """Keep the positions that are among the largest so far, of equal contexts one."""
        new = self._larger(row_N, place_N, kl_N)
        if not new:
            return
        at = torch.tensor(list(new.values()), device=chunk.kl_N.device)
        following_N1 = torch.tensor([[self.rows[row_N[n]][place_N[n]]] for n in new.values()], device=at.device)
        sides = [logprobs_NV[at] for logprobs_NV in (chunk.base_NV, chunk.tuned_NV)]
        following = [side.gather(1, following_N1)[:, 0].exp().tolist() for side in sides]
        seen = zip(new.items(), *map(_likeliest, sides), zip(*following, strict=True), strict=True)
        for (before, n), base, tuned, probs in seen:
            self.largest[before] = Position(row_N[n], place_N[n], float(kl_N[n]), base, tuned, probs)
        self.largest = dict(sorted(self.largest.items(), key=lambda item: -item[1].kl)[:MAX_POSITIONS])

    def _larger(self, row_N: Sequence[int], place_N: Sequence[int], kl_N: Floats) -> dict[tuple[int, ...], int]:
        """Return which positions of a chunk are larger than the least of those kept, by their contexts."""
        is_full = len(self.largest) == MAX_POSITIONS
        least = min(position.kl for position in self.largest.values()) if is_full else 0.0
        new: dict[tuple[int, ...], int] = {}
        for n in np.argsort(-kl_N, kind="stable").tolist():
            if kl_N[n] <= least or len(new) == MAX_POSITIONS:
                break
            before = tuple(self.rows[row_N[n]][: place_N[n]])
            if before not in self.largest:
                new.setdefault(before, n)
        return new

    def by_row(self) -> list[Floats]:
        """Return for each row, in the order of its counted tokens: divergence, reverse divergence, base's entropy."""
        if not self.seen:
            return [np.zeros((0, 3), np.float32) for _ in self.rows]
        row_N, values_N3 = (np.concatenate(parts) for parts in zip(*self.seen, strict=True))
        order = np.argsort(row_N, kind="stable")
        ends = np.cumsum(np.bincount(row_N, minlength=len(self.rows)))[:-1]
        return np.split(values_N3[order], ends)

    def positions(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return the positions that moved most, largest first, readable; `ids` are the rows' numbers."""
        return [_readable(tokenizer, position, self.rows[position.row], ids) for position in self.largest.values()]

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Return the tokens of the vocabulary whose mean probability rose most, then those for which it fell most."""
        assert self.sums_3V is not None
        count = sum(len(row) for row, _ in self.seen)
        means_3V = (self.sums_3V / count).cpu()
        change_V = means_3V[1] - means_3V[0]
        order = change_V.argsort(stable=True).tolist()
        risen = [token for token in order[: -MAX_TOKENS - 1 : -1] if change_V[token] > 0]
        fallen = [token for token in order[:MAX_TOKENS] if change_V[token] < 0]
        return [
            {"token_id": token, "text": token_text(tokenizer, token)}
            | dict(zip(("base_p", "tuned_p", "kl"), means_3V[:, token].tolist(), strict=True))
            for token in (*risen, *fallen)
        ]


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return what `token` writes; its own name where it is a part of a character, its number where it has no name."""
    text = str(tokenizer.decode([token]))
    name = tokenizer.convert_ids_to_tokens([token])[0]
    return str(token if name is None else name) if "\ufffd" in text or not text else text


def _likeliest(logprobs_NV: Tensor) -> Iterator[Likeliest]:
    top = logprobs_NV.topk(min(LIKELIEST, logprobs_NV.shape[1]))
    for ids, probs in zip(top.indices.tolist(), top.values.exp().tolist(), strict=True):
        yield list(zip(ids, probs, strict=True))


def _readable(
    tokenizer: PreTrainedTokenizerBase, position: Position, row: Sequence[int], ids: Sequence[int]
) -> dict[str, Any]:  # fmt: skip
    place = position.place
    sides: dict[str, Any] = {}
    for side, likeliest in (("base", position.base), ("tuned", position.tuned)):
        sides |= {
            side: [token_text(tokenizer, token) for token, _ in likeliest],
            f"{side}_p": [p for _, p in likeliest],
        }
    context = str(tokenizer.decode(list(row[max(0, place - CONTEXT) : place])))
    named = {"row_id": ids[position.row], "place": place, "kl": position.kl, "context": context}
    following = dict(zip(("next_base_p", "next_tuned_p"), position.next, strict=True))
    return named | {"next": token_text(tokenizer, row[place])} | following | sides
