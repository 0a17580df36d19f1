"""How many of lm-eval's requests one batch holds: by tokens, and half as many after an out-of-memory."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from cfsd.errors import OutOfMemory
from cfsd.evaluate.benchmark_size import GENERATING


class Batches:
    """Sizes of batches of at most `max_tokens`, padding included, at least one row."""

    def __init__(self, max_tokens: int) -> None:
        """Begin with batches of `max_tokens`."""
        self.max_tokens = max_tokens
        self.rows = self.longest = 0  # of the present batch

    def size(self, longest: int, *, written: bool = False) -> int:
        """Return the rows of batches whose longest row has `longest` tokens; `written` by the model, mostly."""
        tokens = self.max_tokens * (GENERATING if written else 1)
        self.longest, self.rows = longest, max(1, tokens // max(1, longest))
        return self.rows

    def tokens(self, longest: int) -> int:
        """Return how many tokens a batch holds whose longest row has `longest`."""
        self.size(longest)
        return self.max_tokens

    def retried(self, ask: Callable[[], list[Any]]) -> list[Any]:
        """Return the answers of `ask`, which is called again with half the tokens to a batch after an out-of-memory.

        Raises: OutOfMemory if one row alone does not fit.
        """
        while True:
            try:
                return ask()
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self._halve(error)
            gc.collect()  # outside the except clause, which would keep the failed pass alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self, error: RuntimeError) -> None:
        if self.rows <= 1:
            raise OutOfMemory(
                f"one request of {self.longest} tokens does not fit into memory by itself; end other programs that "
                "use the device, or lower num_fewshot or max_gen_toks of the benchmark"
            ) from error
        self.max_tokens = max(1, self.max_tokens // 2)
