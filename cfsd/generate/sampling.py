"""Sample sequences from a causal language model, exactly by its own distribution.

B rows, V vocabulary, P prompt tokens.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache

from cfsd.errors import BadInput, NotFinite
from cfsd.generate.cache import preallocated
from cfsd.generate.drawing import sample_token, sampled_probs, uniforms
from cfsd.generate.output_layer import packed_head
from cfsd.generate.spec import GenerateSpec
from cfsd.model.distribution import Distribution, Top, distribution_of, likeliest
from cfsd.model.sample import Sample
from cfsd.spec import seed_of

COMPACT_BELOW = 0.75  # rows that ended are carried along until this share is left: compacting copies the cache
log = logging.getLogger(__name__)


class Turns(NamedTuple):
    """What happens when a text ends: `between` is inserted and the row goes on, at most `more` times."""

    more: int = 0
    between: Sequence[int] = ()


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    eos_ids: Sequence[int],
    spec: GenerateSpec,
    rows: Sequence[int],
    *,
    stream: str,
    turns: Turns = Turns(),  # noqa: B008
    where: str = "",
    on_step: Callable[[int], None] = lambda step: None,
) -> list[Sample]:
    """Return one row per entry of `rows`: its prompt (one token at least), then `spec.length` tokens or up to an end.

    Prompts of unequal length need no padding: while a row's prompt lasts, its tokens are taken in place of draws.
    Number t after the prompt of row r is drawn with number t of (spec.seed, stream, r), whatever the batch.
    `on_step` gets the number of positions that are done after the longest common part of the prompts.

    Raises NotFinite naming `where` when the model gives NaN.
    """
    drawn = np.stack([uniforms(seed_of(spec), stream, row, spec.length) for row in rows])
    batch = Batch(prompts, torch.from_numpy(drawn), eos_ids, spec, turns, where, model.device)
    cache = preallocated(model, batch.capacity)
    with packed_head(model, len(rows)):
        if cache is None:
            _with_generate(model, batch)
        else:
            _decode(model, batch, cache, on_step)
    return batch.samples()


def _decode(model: PreTrainedModel, batch: "Batch", cache: Cache, on_step: Callable[[int], None]) -> None:
    new_BT, step = batch.tokens[:, : batch.common], 0
    while True:
        logits_BV = model(input_ids=new_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        last_B = batch.take(distribution_of(logits_BV))
        step += 1
        on_step(step)
        going_B = ~batch.ended[batch.alive]
        count = int(going_B.sum())
        if count == 0:
            return
        if count < COMPACT_BELOW * len(going_B):
            left = going_B.nonzero()[:, 0]
            cache.batch_select_indices(left)
            batch.alive, last_B = batch.alive[left], last_B[left]
        new_BT = last_B[:, None]


class Batch:
    """Rows that are written together: what is given, what was drawn, who has ended.

    tokens, logprobs: B x capacity; `at` is the position that is written next, the same in all rows.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        uniform_BT: Tensor,
        eos_ids: Sequence[int],
        spec: GenerateSpec,
        turns: Turns,
        where: str,
        device: torch.device,
    ) -> None:
        """Lay out the prompts."""
        self.spec, self.turns, self.eos_ids, self.where = spec, turns, list(eos_ids), where
        lengths = [len(prompt) for prompt in prompts]
        self.capacity, self.common, self.at = max(lengths) + spec.length, min(lengths), min(lengths)
        rows = len(lengths)
        given = np.zeros((rows, self.capacity), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            given[row, : len(prompt)] = prompt
        self.tokens = torch.from_numpy(given).to(device)
        self.uniform = uniform_BT.to(device)
        self.prompt_length = torch.tensor(lengths, device=device)
        self.logprobs = torch.full((rows, self.capacity), float("nan"), device=device)
        self.top = self._room_for_top(rows, device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.by_end = torch.zeros_like(self.ended)  # whether an end token was the reason
        self.length = torch.full((rows,), self.capacity, device=device)  # tokens of the row, once it has ended
        self.alive = torch.arange(rows, device=device)  # the rows of the batch that still go through the model
        self.turns_left = torch.full((rows,), turns.more, device=device)
        self.inserting = torch.full((rows,), -1, device=device)  # place in turns.between; -1: drawing
        self.between = torch.tensor(list(turns.between) or [0], device=device)
        self.read_eos_ids = torch.tensor(self.eos_ids or [-1], device=device)

    def _room_for_top(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
        if not (count := self.spec.top_logprobs):
            return None
        shape = (rows, self.capacity, count)
        ids = torch.zeros(shape, dtype=torch.int32, device=device)
        nan = torch.full(shape, float("nan"), device=device)
        return ids, nan, torch.full(shape[:2], float("nan"), device=device)

    def take(self, distribution: Distribution) -> Tensor:
        """Write the next token of every living row, drawn from `distribution` where it is not given, and return them.

        Raises NotFinite.
        """
        if not distribution.finite():
            raise NotFinite(f"the base model's logits are not finite at token {self.at} of {self.where or 'the batch'}")
        alive, at = self.alive, self.at
        after_B = at - self.prompt_length[alive]  # tokens since the prompt; negative while it lasts
        probs_BV = sampled_probs(distribution, self.spec, self.eos_ids, after_B < self.spec.min_length)
        drawn_B = sample_token(probs_BV, self.uniform[alive, after_B.clamp(0, self.spec.length - 1)])
        inserting_B = self.inserting[alive]
        token_B = torch.where(inserting_B >= 0, self.between[inserting_B.clamp(min=0)], drawn_B)
        token_B = torch.where(after_B < 0, self.tokens[alive, at], token_B)
        sampled_B = (after_B >= 0) & (inserting_B < 0) & ~self.ended[alive]
        self._write(distribution, token_B, sampled_B)
        self._turn(token_B, sampled_B, after_B)
        self.at += 1
        return token_B

    def _write(self, distribution: Distribution, token_B: Tensor, sampled_B: Tensor) -> None:
        alive, at = self.alive, self.at
        self.tokens[alive, at] = token_B
        chosen_B = distribution.logprobs(token_B[:, None])[:, 0].float()
        self.logprobs[alive, at] = chosen_B.masked_fill(~sampled_B, float("nan"))
        if self.top is None:
            return
        ids_BK, logprobs_BK, rest_B = likeliest(distribution, self.spec.top_logprobs)
        ids, logprobs, rest = self.top
        ids[alive, at, : ids_BK.shape[1]] = ids_BK.int()
        logprobs[alive, at, : ids_BK.shape[1]] = logprobs_BK.float().masked_fill(~sampled_B[:, None], float("nan"))
        rest[alive, at] = rest_B.float().masked_fill(~sampled_B, float("nan"))

    def _turn(self, token_B: Tensor, sampled_B: Tensor, after_B: Tensor) -> None:
        """End rows, or begin and continue what is inserted after an end."""
        alive = self.alive
        inserting_B = self.inserting[alive]
        inserting_B = torch.where(inserting_B >= 0, inserting_B + 1, inserting_B)
        inserting_B = inserting_B.masked_fill(inserting_B >= len(self.turns.between), -1)
        end_B = sampled_B & torch.isin(token_B, self.read_eos_ids)
        another_B = end_B & (self.turns_left[alive] > 0)
        self.turns_left[alive] -= another_B.long()
        if self.turns.between:
            inserting_B = inserting_B.masked_fill(another_B, 0)
        self.inserting[alive] = inserting_B
        over_B = (end_B & ~another_B) | (after_B + 1 >= self.spec.length)
        newly_B = over_B & ~self.ended[alive]
        self.length[alive] = torch.where(newly_B, self.at + 1, self.length[alive])
        self.by_end[alive] |= newly_B & end_B & ~another_B
        self.ended[alive] |= newly_B

    def samples(self) -> list[Sample]:
        """Return the rows as they were written."""
        lengths, by_end = self.length.tolist(), self.by_end.tolist()
        tokens, logprobs = self.tokens.cpu().numpy(), self.logprobs.cpu().numpy()
        top = [part.cpu().numpy() for part in self.top] if self.top else None
        found = []
        for row, length in enumerate(lengths):
            ids = tokens[row, :length].tolist()
            given = np.isnan(logprobs[row, :length])
            known = [None if g else v for g, v in zip(given.tolist(), logprobs[row, :length].tolist(), strict=True)]
            reason = "eos" if by_end[row] else "length"
            found.append(Sample(ids, known, reason, Top(*(part[row, :length] for part in top)) if top else None))
        return found


def _with_generate(model: PreTrainedModel, batch: Batch) -> None:
    """Write the rows through `generate`, whose bookkeeping knows this model's own kind of cache.

    The draw is ours all the same: a processor leaves `generate` one token to choose from.
    """
    if batch.turns.more or batch.common != batch.capacity - batch.spec.length:
        raise BadInput(
            f"{type(model).__name__} keeps its own kind of state, so rows go through transformers' generate, which "
            "needs prompts of one length and one text to a row; use generate.source context-free without fill"
        )
    log.warning("%s keeps its own kind of state: sampling through generate, which is slower", type(model).__name__)

    class Drawn(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
            token_B = batch.take(distribution_of(scores))
            return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)

    plain = GenerationConfig(
        do_sample=False, max_new_tokens=batch.spec.length, eos_token_id=batch.eos_ids or None,
        pad_token_id=batch.eos_ids[0] if batch.eos_ids else 0,
    )  # fmt: skip
    writer: Any = model
    own, prompt_BT = writer.generation_config, batch.tokens[:, : batch.common]
    writer.generation_config = plain  # whatever `plain` leaves open is filled from here: penalties, truncation
    try:
        processors = LogitsProcessorList([Drawn()])
        writer.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), logits_processor=processors)
    finally:
        writer.generation_config = own
