"""What is changed in lm-eval's model class: batches that fit, progress, and our own reading of written answers."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import WRITTEN, Benchmark
from cfsd.evaluate.benchmark_settings import length_limit
from cfsd.evaluate.harness.batch_sizes import Batches
from cfsd.evaluate.harness.greedy import is_greedy, stop_check, write
from cfsd.evaluate.harness.likelihoods import Request, can_share, likelihoods, rows_of
from cfsd.evaluate.harness.window import Window
from cfsd.evaluate.harness.written_answers import Answers

Progress = Callable[[int, int], None]


class _Counter:
    """Takes the place of lm-eval's cache hook, which sees every answered request, and reports each new percent."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        if attr == WRITTEN:  # the others are counted per batch below
            self.advance(1)

    def advance(self, number: int) -> None:
        before, self.done = self.done, min(self.done + number, self.total)
        if self.on_progress and 100 * before // self.total < 100 * self.done // self.total:
            self.on_progress(self.done, self.total)


class BatchedModel(HFLM):  # type: ignore[misc]
    """Overrides of HFLM: no bars, `on_progress`, sizes of batches and answers of our own."""

    def prepare(self, benchmark: Benchmark, task: Any, batches: Batches, on_progress: Progress | None) -> None:
        """Get ready for `task`. Raises BadInput if its answers have no room in the model's context."""
        self.batches, self.on_progress, self.benchmark = batches, on_progress, benchmark
        self.limit = length_limit(task.get_config("generation_kwargs") or {}, self.max_gen_toks)
        if task.OUTPUT_TYPE == WRITTEN:
            benchmark.check_room(self.limit, self.max_length)
        self.answers = self._no_answers()
        self.shares = task.OUTPUT_TYPE != WRITTEN and can_share(self.model)
        self.window = Window(benchmark.name, self.max_length)

    def _no_answers(self) -> Answers:
        eos = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return Answers(self.tokenizer, self.benchmark.thinking_end, [*eos_ids, self.eot_token_id])

    def _counted(self, method: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
        self.window.begin([request.doc_id for request in requests])

        def ask() -> list[Any]:
            self.cache_hook, self.answers = _Counter(len(requests), self.on_progress), self._no_answers()
            return method(requests, disable_tqdm=True)

        return self.batches.retried(ask)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Answer requests of one text after another."""
        return self._counted(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Answer requests of whole texts."""
        self._check_texts(requests, 0)
        self.batch_size_per_gpu = sys.maxsize  # all windows at once, which are put into batches below
        return self._counted(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Answer requests to write."""
        longest = min(1 + self._check_texts(requests, self.limit) + self.limit, self.max_length)
        write = super().generate_until

        def sized(requests: list[Any], disable_tqdm: bool) -> list[Any]:
            self.batch_size_per_gpu = self.batches.size(longest, written=True)
            return list(write(requests, disable_tqdm))

        return self._counted(sized, requests)

    def _check_texts(self, requests: list[Any], written: int) -> int:
        """Check that texts, and `written` tokens after them, have room. Return the tokens of the longest text."""
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        self.window.begin([request.doc_id for request in requests])
        self.window.check_texts(lengths, written)
        return max(lengths, default=0)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Any]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        documents = self.window.documents
        if rolling := bool(requests) and requests[0][0] is None:
            documents = list(range(len(pairs)))
        else:
            self.window.check_pairs([(len(context), len(continuation)) for context, continuation in pairs])
        asked = [Request.of(pair, self.max_length) for pair in pairs]
        most = min(self.batches.max_tokens, self.max_length) if self.shares and not rolling else 0
        rows = rows_of(asked, documents, most)
        return likelihoods(self.model, asked, rows, self.batches.tokens, self.cache_hook.advance)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        self.answers.begin(max_length - context.shape[1], stop)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        if self.benchmark.thinking_end is not None:  # stop sequences are for what follows the reasoning
            stop = [end]
        if (written := self._written(context, [text for text in stop if text != end], **settings)) is not None:
            return written
        try:
            settings |= {"max_new_tokens": self.answers.limit}  # or the checkpoint's own would count, not max_length
            generated: torch.Tensor = super()._model_generate(context, max_length, stop, **settings)
        except (TypeError, ValueError) as error:  # of settings that do not go together, or with this model
            raise BadInput(f"benchmark {self.benchmark.name}: its generation_kwargs do not work ({error})") from error
        return generated

    def _written(
        self, context: torch.Tensor, stop: list[str], attention_mask: torch.Tensor, **settings: Any
    ) -> torch.Tensor | None:
        """Return padded prompts and greedy answers, None where the settings or the model ask for `generate`."""
        if self.mixed_precision_dtype is not None or not is_greedy(self.model, settings):
            return None
        prompts = [row[kept].tolist() for row, kept in zip(context, attention_mask.bool(), strict=True)]
        is_over = stop_check(self.tokenizer.decode, stop)
        answers = write(self.model, prompts, self.answers.limit, self.answers.eos_ids, is_over)
        if answers is None:
            return None
        padding = self.tokenizer.pad_token_id
        longest = max(map(len, answers))
        padded = [[*answer, *[padding] * (longest - len(answer))] for answer in answers]
        return torch.cat([context, context.new_tensor(padded)], dim=1)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Return the answer in what the model wrote (lm-eval decodes no other lists), or the text of one token."""
        if isinstance(tokens, list):
            return self.answers.read(tokens)
        return str(super().tok_decode(tokens, skip_special_tokens=skip_special_tokens))
