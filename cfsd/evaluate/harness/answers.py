"""Written answers: what is the answer in what a model wrote, and how its writing ended."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

# lm-eval takes the first of these that a benchmark gives.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def length_limit(settings: Mapping[str, Any], default: int) -> int:
    """Return the most tokens of an answer that generation `settings` allow."""
    return int(next((settings[name] for name in LIMITS if settings.get(name) is not None), default))


class Answers:
    """Reads answers one after the other and counts how they ended.

    With `thinking_end` the answer is what follows the last end mark, without the white space around the mark, and
    is empty where there is none. Differs: lm-eval's `think_end_token` takes an unfinished reasoning for the answer,
    never sees a mark that is a special token, and lets the benchmark's stop sequences end the reasoning too, or not,
    as the other rows of the batch have it. Here the model writes until its end token or the limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, thinking_end: str | None, ends: Collection[int]) -> None:
        """`ends`: the ids at which the model ends a text."""
        self.tokenizer, self.thinking_end, self.ends = tokenizer, thinking_end, frozenset(ends)
        self.number = self.at_limit = self.unfinished = 0
        self.limit = 0
        self.stops: list[str] = []

    def begin(self, limit: int, stops: Sequence[str]) -> None:
        """Say what holds for the answers that follow: their most tokens, and the sequences that end one."""
        self.limit, self.stops = limit, [stop for stop in stops if stop]

    def read(self, tokens: list[int]) -> str:
        """Return the answer in `tokens`, not yet cut at a stop sequence."""
        end = next((i for i, token in enumerate(tokens) if token in self.ends), None)
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
        _, found, answer = self._decoded(tokens, special=True).rpartition(mark)
        for token in self.tokenizer.all_special_tokens:
            answer = answer.replace(token, "")
        return answer.lstrip() if found else None
