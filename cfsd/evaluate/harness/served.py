"""A benchmark asked of a model behind a server, through lm-eval's own API models, whose logs are kept."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from cfsd.errors import BadInput, CfsdError, Crashed
from cfsd.evaluate.benchmark import WRITTEN, Benchmark
from cfsd.evaluate.benchmark_settings import length_limit
from cfsd.evaluate.harness.checked_task import CheckedTask
from cfsd.evaluate.harness.load import loaded
from cfsd.evaluate.harness.score import own_tokenizer
from cfsd.evaluate.harness.window import Window
from cfsd.evaluate.served import ServedModel
from cfsd.machine import KEY_VARIABLE

MAX_LENGTH = 2048  # lm-eval's, where no server says how many tokens it attends to
MOST_STOPS = 4  # stop sequences that vLLM and OpenAI take; lm-eval's own chat class leaves the others out in silence
COMPLETIONS, CHAT = "local-completions", "local-chat-completions"


def log_scores(
    model: ServedModel, benchmark: Benchmark, folder: Path, *, max_length: int | None, in_flight: int
) -> list[str]:
    """Write lm-eval's logs of `model` on `benchmark` below `folder`; return what is to be said of them.

    `max_length`: tokens of a prompt and what is written after it. `in_flight`: requests at the same time.

    Raises: BadInput as `loaded` and `CheckedTask`; Crashed when the server fails on the way.
    """
    with loaded(benchmark, torch.device("cpu")) as (task, warnings):
        lm = _api_model(model, benchmark, task, max_length, in_flight)
        checked, tracker = CheckedTask(benchmark, task), EvaluationTracker(output_path=str(folder))
        with _server_errors(model, benchmark, warnings):
            results = simple_evaluate(
                lm, {"model": model.name, "base_url": lm.base_url}, [task], limit=benchmark.limit, bootstrap_iters=0,
                apply_chat_template=benchmark.is_chat(), fewshot_as_multiturn=benchmark.is_chat(),
                evaluation_tracker=tracker, task_manager=TaskManager(include_defaults=False),
            )  # fmt: skip
        _save(tracker, results, CHAT if model.tokenizer is None else COMPLETIONS)
        said = [*checked.said(), *(lm.window.said() if isinstance(lm, Completions) else ()), *lm.unanswered.said()]
        return [f"benchmark {benchmark.name}: {line}" for line in said]


class Unanswered:
    """Counts answers without content, as servers give them whose reasoning parser met the limit."""

    def __init__(self) -> None:
        """Begin to count."""
        self.asked = self.empty = self.cut = 0

    def count(self, outputs: Any) -> None:
        """Count the answers of the endpoint's response, or responses."""
        for output in outputs if isinstance(outputs, list) else [outputs]:
            for choice in output.get("choices") or ():
                content = (choice["message"] or {}).get("content") if "message" in choice else choice.get("text")
                self.asked += 1
                self.empty += content is None
                self.cut += content is None and choice.get("finish_reason") == "length"

    def said(self) -> list[str]:
        """Return a line where there were any. Raises BadInput where there were no others."""
        if not self.empty:
            return []
        said = (
            f"{self.empty} of {self.asked} answers came without content, {self.cut} of them cut at the limit, as of a "
            "model that reasons first; raise max_gen_toks, or turn the reasoning off at the server"
        )
        if self.empty == self.asked:
            raise BadInput(said)
        return [f"{said}; they count as empty"]


class AskedAlike(LocalCompletionsAPI):  # type: ignore[misc]
    """Asks a server for what a model in memory would write, and counts answers without content."""

    def __init__(self, **settings: Any) -> None:
        """Take what lm-eval's class takes."""
        super().__init__(**settings)
        self.unanswered = Unanswered()

    def _create_payload(self, *args: Any, gen_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
        asked = normalize_gen_kwargs(gen_kwargs or {}, self._max_gen_toks)
        payload: dict[str, Any] = super()._create_payload(*args, gen_kwargs=asked, **kwargs)
        return payload

    def parse_generations(self, outputs: Any, **kwargs: Any) -> list[str]:
        """Return the answers of a response."""
        self.unanswered.count(outputs)
        return list(super().parse_generations(outputs, **kwargs))


class Chats(AskedAlike, LocalChatCompletion):  # type: ignore[misc]
    """Sends chats to the chat endpoint. Differs from lm-eval's own: answers end at every stop sequence."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer requests to write."""
        return _ended(super().generate_until(requests, disable_tqdm), requests)


def _ended(answers: list[str], requests: list[Any]) -> list[str]:
    """Return the answers up to the first of their stop sequences, of which a server was sent MOST_STOPS."""
    ended = []
    for answer, request in zip(answers, requests, strict=True):
        for stop in handle_stop_sequences(request.args[1].get("until"), None):
            answer = answer.partition(stop)[0] if stop else answer
        ended.append(answer)
    return ended


class Completions(AskedAlike):
    """Sends token ids to the completions endpoint.

    Differs from lm-eval's own: what begins with special tokens, what is cut and what ends an answer are as for a model
    in memory.
    """

    tokenizer: Any

    def prepare(self, benchmark: Benchmark, task: Any) -> None:
        """Get ready for `task`. Raises BadInput for a chat benchmark and a tokenizer without a template."""
        self.tokenizer = own_tokenizer(self.tokenizer, benchmark)
        written = task.OUTPUT_TYPE == WRITTEN
        self.limit = length_limit(task.get_config("generation_kwargs") or {}, self._max_gen_toks) if written else 0
        benchmark.check_room(self.limit, self.max_length)
        self.window = Window(benchmark.name, self.max_length - int(not written))

    def tok_encode(self, string: Any, left_truncate_len: int | None = None, add_special_tokens: bool | None = None,
                   truncation: bool = False, **kwargs: Any) -> Any:  # fmt: skip
        """Return token ids: with special tokens as the tokenizer adds them, none where the text has a BOS already."""
        if not isinstance(string, str):
            return [self.tok_encode(text, add_special_tokens=add_special_tokens) for text in string]
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Answer requests of one text after another."""
        self.window.begin([request.doc_id for request in requests])
        return list(super().loglikelihood(requests, disable_tqdm))

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[Any]:
        if requests and requests[0][0] is not None:  # not the windows of a whole text
            self.window.check_pairs([(len(context), len(continuation)) for _, context, continuation in requests])
        return list(super()._loglikelihood_tokens(requests, **kwargs))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Answer requests of whole texts."""
        self._check_texts(requests)
        return list(super().loglikelihood_rolling(requests, disable_tqdm))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer requests to write."""
        self._check_texts(requests)
        return _ended(super().generate_until(requests, disable_tqdm), requests)

    def _create_payload(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        payload: dict[str, Any] = super()._create_payload(*args, **kwargs)
        return payload | ({"stop": payload["stop"][:MOST_STOPS]} if "stop" in payload else {})

    def _check_texts(self, requests: list[Any]) -> None:
        self.window.begin([request.doc_id for request in requests])
        self.window.check_texts([len(self.tok_encode(request.args[0])) for request in requests], self.limit)


def _api_model(
    model: ServedModel, benchmark: Benchmark, task: Any, max_length: int | None, in_flight: int
) -> Completions | Chats:
    common = {"model": model.name, "num_concurrent": in_flight}
    if model.tokenizer is None:
        return Chats(base_url=f"{model.url}/chat/completions", **common)
    lm = Completions(
        base_url=f"{model.url}/completions", tokenizer=str(model.tokenizer), tokenizer_backend="huggingface",
        add_bos_token=None, max_length=max_length or MAX_LENGTH, **common,
    )  # fmt: skip
    lm.prepare(benchmark, task)
    return lm


@contextmanager
def _server_errors(model: ServedModel, benchmark: Benchmark, warnings: list[str]) -> Iterator[None]:
    """Name server and benchmark in whatever lm-eval raises of an answer that did not come or is none."""
    try:
        yield
    except (CfsdError, MemoryError):
        raise
    except Exception as error:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        answers = [line for line in warnings if line.startswith("API request failed")]  # others have the key's header
        said = " ".join([f"{type(error).__name__}: {error}", *answers[-1:]])
        raise Crashed(
            f"benchmark {benchmark.name}: {model.name} behind {model.url} did not answer as lm-eval asks "
            f"({said.replace(key, '***') if key else said}); see the server's log, and run the same command again"
        ) from error


def _save(tracker: Any, results: dict[str, Any], kind: str) -> None:
    """Write the logs as lm-eval's command line does, with the name of its own model class."""
    results["config"]["model"] = tracker.general_config_tracker.model_source = kind
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, own in samples.items():
        tracker.save_results_samples(task_name=name, samples=own)
