"""Written answers: which part of what a model wrote is the answer, and how the writing ended."""

from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


class Answers:
    """Reads answers one after the other and counts how they ended.

    With `thinking_end` the answer is what follows the last such mark, without the white space around it, and is
    empty where the mark is missing. Differs: lm-eval's `think_end_token` takes unfinished reasoning for the answer,
    never sees a mark that is a special token, and may let the benchmark's stop sequences end the reasoning,
    depending on the other rows of the batch. Here the model writes until an eos token or the limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, thinking_end: str | None, eos_ids: Collection[int]) -> None:
        """Count from zero; the model ends a text at any of `eos_ids`."""
        self.tokenizer, self.thinking_end, self.eos_ids = tokenizer, thinking_end, frozenset(eos_ids)
        self.number = self.at_limit = self.unfinished = 0
        self.limit = 0
        self.stops: list[str] = []

    def begin(self, limit: int, stops: Sequence[str]) -> None:
        """Set what holds for the answers that follow: the most tokens of one, and the sequences that end it."""
        self.limit, self.stops = limit, [stop for stop in stops if stop]

    def read(self, tokens: list[int]) -> str:
        """Return the answer in `tokens`, not yet cut at a stop sequence."""
        end = next((i for i, token in enumerate(tokens) if token in self.eos_ids), None)
        answer = self._decoded(tokens) if self.thinking_end is None else self._after(tokens[:end], self.thinking_end)
        is_cut = end is None and len(tokens) >= self.limit
        self.number += 1
        self.unfinished += answer is None
        self.at_limit += is_cut and not (answer and any(stop in answer for stop in self.stops))
        return answer or ""

    def metadata(self) -> dict[str, Any]:
        """Return the limit in tokens and the shares of answers that reached it, or never came to an end mark."""
        if not self.number:
            return {}
        shares = {"max_gen_toks": self.limit, "at_limit": self.at_limit / self.number}
        return shares if self.thinking_end is None else shares | {"unfinished": self.unfinished / self.number}

    def _decoded(self, tokens: list[int], *, special: bool = False) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=not special))

    def _after(self, tokens: list[int], mark: str) -> str | None:
        _, mark_read, answer = self._decoded(tokens, special=True).rpartition(mark)
        for token in self.tokenizer.all_special_tokens:
            answer = answer.replace(token, "")
        return answer.lstrip() if mark_read else None
