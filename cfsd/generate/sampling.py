"""Sequences sampled from a causal language model, exactly by its own distribution.

B rows, V vocabulary, P prompt tokens.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from cfsd.errors import NotFinite
from cfsd.generate.decoding import decode
from cfsd.generate.grouped_attention import grouped_attention
from cfsd.generate.key_value_cache import preallocated
from cfsd.generate.packed_weights import packed_weights
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.token_choice import sampled_probs, tail_points, uniforms
from cfsd.model.distribution import Distribution, Top, distribution_of, likeliest
from cfsd.model.inversion import sample_token
from cfsd.model.sample import Sample
from cfsd.spec import seed_of

log = logging.getLogger(__name__)


class Turns(NamedTuple):
    """After the end of a text `between` is inserted and the row continues, at most `more` times.

    `last_ends` are the tokens that end the last text, where they are others than those that end the ones before it.
    `closing` is the token that closes a text before it continues: inserted first where another end was sampled.
    """

    more: int = 0
    between: Sequence[int] = ()
    last_ends: Sequence[int] = ()
    closing: int | None = None

    def inserted(self, end: int) -> list[int]:
        """Return what is inserted after the sampled token `end`."""
        if self.closing is None or self.closing == end:
            return [*self.between]
        return [self.closing, *self.between]


class Rows(NamedTuple):
    """Rows to be written: their numbers and prompts, the tokens that end a text, and what follows such an end."""

    ids: Sequence[int]
    prompts: Sequence[Sequence[int]]  # of one token at least
    eos_ids: Sequence[int]
    stream: str = ""  # of random numbers; rows of the same number in two streams are independent
    turns: Turns = Turns()
    learned: Sequence[Sequence[bool] | None] = ()  # of whole rows: which tokens count; None: all but the first

    def part(self, first: int, last: int) -> "Rows":
        """Return the rows at places `first` to `last` - 1."""
        part = slice(first, last)
        return self._replace(ids=self.ids[part], prompts=self.prompts[part], learned=self.learned[part])


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    rows: Rows,
    spec: GenerateSpec,
    *,
    where: str = "the batch",
    on_step: Callable[[int], object] = lambda step: None,
) -> list[Sample]:
    """Return the rows: each its prompt, then `spec.length` tokens or up to an end.

    Prompts of unequal length need no padding: while a row's prompt lasts, its tokens are taken in place of sampled
    ones. Token t after the prompt of row r is sampled with random number t of (spec.seed, rows.stream, r), whatever
    the batch. `on_step` gets the number of positions that are done after the longest common part of the prompts.

    Raises NotFinite naming `where` when the model gives NaN.
    """
    numbers = np.stack([uniforms(seed_of(spec), rows.stream, row, spec.length) for row in rows.ids])
    batch = Batch(rows, torch.from_numpy(numbers).to(model.device), spec, where)
    cache = preallocated(model, batch.capacity)
    with packed_weights(model, len(rows.ids)), grouped_attention(model.device):
        if cache is None:
            _with_generate(model, batch, on_step)
        else:
            decode(model, batch, cache, on_step)
    return batch.samples()


class Batch:
    """Rows that are written together: their prompts, their sampled tokens, and which of them have ended.

    tokens, logprobs: B x capacity; `at` is the position that is written next, the same in all rows.
    """

    def __init__(self, rows: Rows, uniform_BT: Tensor, spec: GenerateSpec, where: str) -> None:
        """Lay out the prompts on the device of the random numbers; errors name `where`."""
        self.spec, self.where, self.turns, self.eos_ids = spec, where, rows.turns, list(rows.eos_ids)
        self.uniform, device = uniform_BT, uniform_BT.device
        lengths = [len(prompt) for prompt in rows.prompts]
        self.capacity, self.common, self.at = max(lengths) + spec.length, min(lengths), min(lengths)
        self.shared, count = 0, len(lengths)
        tokens = np.zeros((count, self.capacity), dtype=np.int64)
        for row, prompt in enumerate(rows.prompts):
            tokens[row, : len(prompt)] = prompt
        self.tokens = torch.from_numpy(tokens).to(device)
        self.prompt_length = torch.tensor(lengths, device=device)
        shape, nan = (count, self.capacity), float("nan")
        top_shape, tail_shape = (*shape, spec.top_logprobs), (*shape, spec.stored_tail())
        self.logprobs = torch.full(shape, nan, device=device)
        self.top = Top(
            torch.zeros(top_shape, dtype=torch.int32, device=device),
            torch.full(top_shape, nan, device=device),
            torch.full(shape, nan, device=device),
            torch.zeros(tail_shape, dtype=torch.int32, device=device),
            torch.full(tail_shape, nan, device=device),
        )
        points = [tail_points(seed_of(spec), rows.stream, row, spec.length, spec.stored_tail()) for row in rows.ids]
        self.tail_points = torch.from_numpy(np.stack(points)).to(device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.by_end = torch.zeros_like(self.ended)  # whether an end token was the reason
        self.length = torch.full((count,), self.capacity, device=device)  # tokens of the row, once it has ended
        self.alive = torch.arange(count, device=device)  # the rows of the batch that still go through the model
        self.turns_left = torch.full((count,), rows.turns.more, device=device)
        self.inserting = torch.full((count,), -1, device=device)  # place in `between`; -1: the row is sampled
        self.between = torch.tensor([-1 if (token := rows.turns.closing) is None else token, *rows.turns.between])
        self.between = self.between.to(device)  # the closing token first, which no end is where there is none
        self.read_eos_ids = torch.tensor(self.eos_ids or [-1], device=device)
        self.last_ends = torch.tensor(list(rows.turns.last_ends) or self.eos_ids or [-1], device=device)

    def take(self, logits_BV: Tensor) -> Tensor:
        """Write and return the next token of every living row: its prompt's while that lasts, else a sampled one.

        Raises NotFinite.
        """
        distribution = distribution_of(logits_BV)
        if not distribution.finite():
            raise NotFinite(f"the base model's logits are not finite at token {self.at} of {self.where}")
        alive, at = self.alive, self.at
        after_B = at - self.prompt_length[alive]  # tokens since the prompt; negative while it lasts
        probs_BV = sampled_probs(distribution, self.spec, self.eos_ids, after_B < self.spec.min_length)
        new_B = sample_token(probs_BV, self.uniform[alive, after_B.clamp(0, self.spec.length - 1)])
        inserting_B = self.inserting[alive]
        token_B = torch.where(inserting_B >= 0, self.between[inserting_B.clamp(min=0)], new_B)
        token_B = torch.where(after_B < 0, self.tokens[alive, at], token_B)
        sampled_B = (after_B >= 0) & (inserting_B < 0) & ~self.ended[alive]
        self._write(distribution, token_B, sampled_B, after_B)
        self._turn(token_B, sampled_B, after_B)
        self.at += 1
        return token_B

    def _write(self, distribution: Distribution, token_B: Tensor, sampled_B: Tensor, after_B: Tensor) -> None:
        alive, at = self.alive, self.at
        self.tokens[alive, at] = token_B
        logprob_B = distribution.logprobs(token_B[:, None])[:, 0].float()
        given_B = ~sampled_B
        self.logprobs[alive, at] = logprob_B.masked_fill(given_B, torch.nan)
        if not self.spec.top_logprobs:
            return
        points_BM = self.tail_points[alive, after_B.clamp(0, self.spec.length - 1)]
        found = likeliest(distribution, self.spec.top_logprobs, points_BM)
        width = found.ids.shape[1]
        self.top.ids[alive, at, :width] = found.ids.int()
        self.top.logprobs[alive, at, :width] = found.logprobs.float().masked_fill(given_B[:, None], torch.nan)
        self.top.rest[alive, at] = found.rest.float().masked_fill(given_B, torch.nan)
        self.top.tail_ids[alive, at] = found.tail_ids.int()
        self.top.tail_logprobs[alive, at] = found.tail_logprobs.float().masked_fill(given_B[:, None], torch.nan)

    def _turn(self, token_B: Tensor, sampled_B: Tensor, after_B: Tensor) -> None:
        """End rows, or begin and continue what is inserted after an end."""
        alive = self.alive
        inserting_B = self.inserting[alive]
        inserting_B = torch.where(inserting_B >= 0, inserting_B + 1, inserting_B)
        more_B = self.turns_left[alive] > 0
        ends_B = torch.where(more_B, torch.isin(token_B, self.read_eos_ids), torch.isin(token_B, self.last_ends))
        end_B = sampled_B & ends_B
        another_B = end_B & more_B
        self.turns_left[alive] -= another_B.long()
        closed_B = (token_B == self.between[0]) | (self.turns.closing is None)
        inserting_B = torch.where(another_B, closed_B.long(), inserting_B)
        self.inserting[alive] = inserting_B.masked_fill(inserting_B >= len(self.between), -1)
        over_B = (end_B & ~another_B) | (after_B + 1 >= self.spec.length)
        newly_B = over_B & ~self.ended[alive]
        self.length[alive] = torch.where(newly_B, self.at + 1, self.length[alive])
        self.by_end[alive] |= newly_B & end_B & ~another_B
        self.ended[alive] |= newly_B

    def samples(self) -> list[Sample]:
        """Return the rows as they were written."""
        lengths, by_end = self.length.tolist(), self.by_end.tolist()
        tokens, logprobs = self.tokens.cpu().numpy(), self.logprobs.cpu().numpy()
        top = [part.cpu().numpy() for part in self.top] if self.spec.top_logprobs else []
        samples = []
        for row, length in enumerate(lengths):
            known = [None if math.isnan(value) else value for value in logprobs[row, :length].tolist()]
            own_top = Top(*(part[row, :length] for part in top)) if top else None
            samples.append(Sample(tokens[row, :length].tolist(), known, "eos" if by_end[row] else "length", own_top))
        return samples


def _with_generate(model: PreTrainedModel, batch: "Batch", on_step: Callable[[int], object]) -> None:
    """Write the rows through `generate`, whose bookkeeping knows this model's own kind of cache.

    The tokens are chosen here all the same: a processor leaves `generate` one token to choose from. No row leaves the
    batch before all have ended.
    """
    log.warning("%s keeps its own kind of state: sampling through generate, which is slower", type(model).__name__)

    class OneChoice(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
            token_B = batch.take(scores)
            on_step(batch.at - batch.common)
            return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)

    class AllEnded(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **named: Any) -> Any:
            return batch.ended.all().expand(len(input_ids))

    plain = GenerationConfig(do_sample=False, max_new_tokens=batch.capacity - batch.common, pad_token_id=0)
    writer: Any = model
    own, prompt_BT = writer.generation_config, batch.tokens[:, : batch.common]
    writer.generation_config = plain  # generate fills from here what it is not given: penalties, truncation, ends
    try:
        writer.generate(
            prompt_BT, attention_mask=torch.ones_like(prompt_BT), logits_processor=LogitsProcessorList([OneChoice()]),
            stopping_criteria=StoppingCriteriaList([AllEnded()]),
        )  # fmt: skip
    finally:
        writer.generation_config = own
