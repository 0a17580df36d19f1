"""Greedy answers to many prompts at once: the tokens that `generate` writes, several times as fast on a CPU.

No row is padded, what all prompts begin with is read once, and rows leave the batch when they end.

B rows, V vocabulary.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.errors import NotFinite
from cfsd.generate.decoding import decode
from cfsd.generate.grouped_attention import grouped_attention
from cfsd.generate.key_value_cache import preallocated
from cfsd.generate.packed_weights import packed_weights

# Settings of a checkpoint's generation_config that do not change what greedy decoding writes.
WITHOUT_EFFECT = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version",
    "_from_model_config", "use_cache", "output_attentions", "output_hidden_states", "cache_implementation",
    "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "epsilon_cutoff", "eta_cutoff",
}  # fmt: skip


def is_greedy(model: PreTrainedModel, settings: Mapping[str, Any]) -> bool:
    """Return whether `generate` with these settings takes the likeliest token at each step and does nothing else."""
    if settings.get("do_sample") or settings.get("temperature") or set(settings) - {"do_sample", "temperature"}:
        return False
    return model.generation_config is not None and not own_settings(model)


def own_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Return the settings of the checkpoint's generation_config that change greedy answers, as repetition_penalty."""
    own: Any = model.generation_config
    return {n: value for n, value in own.to_diff_dict().items() if n not in WITHOUT_EFFECT} if own is not None else {}


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    limit: int,
    eos_ids: Collection[int],
    is_over: Callable[[list[int]], bool] | None = None,
) -> list[list[int]] | None:
    """Return what follows each of `prompts`, of `limit` tokens at most; None for a model with another kind of cache.

    A row ends with one of `eos_ids`, or when `is_over` says so of what it has written.

    Raises: NotFinite when the model gives NaN or infinity.
    """
    batch = Answers(prompts, limit, eos_ids, is_over, model.device)
    cache = preallocated(model, batch.tokens.shape[1])
    if cache is None:
        return None
    with packed_weights(model, len(prompts)), grouped_attention(model.device):
        decode(model, batch, cache)
    return batch.written()


class Answers:
    """Prompts of unequal length and what is written after them: a row's prompt goes on while others are written."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], limit: int, eos_ids: Collection[int],
        is_over: Callable[[list[int]], bool] | None, device: torch.device,
    ) -> None:  # fmt: skip
        """Lay the prompts out, with room for `limit` tokens after each."""
        lengths = [len(prompt) for prompt in prompts]
        self.limit, self.is_over = limit, is_over
        self.common = self.at = min(lengths)
        other = (i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
        self.shared = min(next(other, self.common), self.common - 1) if len(prompts) > 1 else 0
        rows = [[*prompt, *[0] * (max(lengths) + limit - len(prompt))] for prompt in prompts]
        self.tokens = torch.tensor(rows, device=device)
        self.prompt_length = torch.tensor(lengths, device=device)
        self.eos_ids = torch.tensor(list(eos_ids), device=device)
        self.ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.length = torch.zeros_like(self.prompt_length)  # of the row, once it has ended
        self.alive = torch.arange(len(prompts), device=device)

    def take(self, logits_BV: Tensor) -> Tensor:
        """Write and return the next token of every living row: its prompt's while that lasts, else the likeliest."""
        largest_B, token_B = logits_BV.max(-1)
        if not bool(largest_B.isfinite().all()):
            raise NotFinite(f"the model's logits are not finite at token {self.at}; look at its weights")
        alive, after_B = self.alive, self.at - self.prompt_length[self.alive]
        token_B = torch.where(after_B < 0, self.tokens[alive, self.at], token_B)
        self.tokens[alive, self.at] = token_B
        self.at += 1
        over_B = (after_B >= 0) & (torch.isin(token_B, self.eos_ids) | (after_B + 1 >= self.limit))
        over_B |= self._said_over(alive, (after_B >= 0) & ~over_B & ~self.ended[alive])
        newly = alive[over_B & ~self.ended[alive]]
        self.ended[newly], self.length[newly] = True, self.at
        return token_B

    def _said_over(self, alive: Tensor, writing_B: Tensor) -> Tensor:
        over_B = torch.zeros_like(writing_B)
        for place in writing_B.nonzero()[:, 0].tolist() if self.is_over else ():
            row = alive[place]
            assert self.is_over
            over_B[place] = self.is_over(self.tokens[row, self.prompt_length[row] : self.at].tolist())
        return over_B

    def written(self) -> list[list[int]]:
        """Return what was written after each prompt, the token that ended it included."""
        ranges = zip(self.tokens.tolist(), self.prompt_length.tolist(), self.length.tolist(), strict=True)
        return [row[first:end] for row, first, end in ranges]


def stop_check(decoded: Callable[[list[int]], str], stops: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Return what says whether one of `stops` is in the text of the tokens, whose last one is new; None: no stops.

    Only the last tokens are decoded first: as each is a byte at least, the longest stop sequence is among so many.
    """
    stops = [stop for stop in stops if stop]
    if not stops:
        return None
    last = 4 + max(len(stop.encode()) for stop in stops)

    def is_over(tokens: list[int]) -> bool:
        tail = decoded(tokens[-last:])
        return any(stop in tail for stop in stops) and any(stop in decoded(tokens) for stop in stops)

    return is_over
