"""The completions protocol: the bodies of requests, and the tokens in the answers to them.

Field names were read in the sources of vLLM, SGLang, llama.cpp's server and llama-cpp-python's. They differ in how they
give tokens: as ids, as "token_id:17", as objects with an id, or as strings only.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from cfsd.errors import BadInput
from cfsd.generate.spec import GenerateSpec
from cfsd.machine import Machine
from cfsd.model.distribution import Top

VLLM, SGLANG, LLAMA_CPP, LLAMA_CPP_PYTHON = "vllm", "sglang", "llamacpp", "me"  # `owned_by` in the list of models

# A server fills what is not sent from its command line or the checkpoint's generation_config.
FOR_ALL: dict[str, Any] = {
    "n": 1, "echo": False, "stream": False, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip
FOR_SGLANG: dict[str, Any] = {
    "top_k": -1, "repetition_penalty": 1.0, "skip_special_tokens": False, "return_token_ids": True,
}  # fmt: skip
# With ignore_eos vLLM stops at stop_token_ids alone and lists the one that was sampled; llama.cpp never samples an end.
FOR_VLLM: dict[str, Any] = FOR_SGLANG | {
    "spaces_between_special_tokens": False, "add_special_tokens": False, "return_tokens_as_token_ids": True,
    "ignore_eos": True,
}  # fmt: skip
FOR_LLAMA_CPP: dict[str, Any] = {
    "top_k": 0, "repeat_penalty": 1.0, "typical_p": 1.0, "top_n_sigma": -1.0, "xtc_probability": 0.0,
    "dry_multiplier": 0.0, "dynatemp_range": 0.0, "mirostat": 0, "mirostat_mode": 0, "ignore_eos": False,
    "post_sampling_probs": False,
}  # fmt: skip
EXTRAS: dict[str, dict[str, Any]] = {
    VLLM: FOR_VLLM,
    SGLANG: FOR_SGLANG,
    # its own order scales by temperature last, so that top_p would cut another distribution
    LLAMA_CPP: {**FOR_LLAMA_CPP, "samplers": ["temperature", "top_k", "top_p"]},
    LLAMA_CPP_PYTHON: FOR_LLAMA_CPP,
}
REMAINING_AT_LEAST = 1e-8  # what float32 log-probabilities can leave of 1
ECHO_DIFFERENCE = 0.5  # nats on average; a pass over the row differs from token by token, by 0.01 at 4 bits
TOKEN_ID = re.compile(r"token_id:(\d+)")


class ServerSampling(NamedTuple):
    """Which server samples, by which settings, and the tokens of the model that it should serve."""

    machine: Machine  # of engine server
    spec: GenerateSpec
    eos_ids: Sequence[int]
    tokenizer: PreTrainedTokenizerBase
    stream: str = ""  # rows of the same number in two streams have different seeds


class Served(NamedTuple):
    """What is known of a server: its kind, its model, how it takes prompts and names tokens."""

    kind: str
    model: str
    prompts: Literal["ids", "text"] = "ids"
    ids: Literal["exact", "reconstructed"] = "exact"
    stops: tuple[int, ...] = ()  # where it stops without listing the token; empty: it lists them

    def metadata(self) -> dict[str, str]:
        """Return what the metadata of a corpus says about its server."""
        return {
            "server": "llama-cpp-python" if self.kind == LLAMA_CPP_PYTHON else self.kind,
            "served_model": self.model.rsplit("/", 1)[1] if self.model.startswith("/") else self.model,
            "ids": "exact" if self.ids == "exact" else "approximate: ids reconstructed",
        }


class Answer(NamedTuple):
    """One completion. Lists run over its tokens, with those of the prompt before them if an echo was asked."""

    ids: list[int] | None  # None: only strings came
    pieces: list[str]
    logprobs: list[float | None]
    tops: list[dict[int, float]]  # empty if ids did not come
    text: str
    stopped: bool
    counted: int | None  # completion tokens as the server counts them
    prompt_counted: int | None
    prompt_ids: list[int] | None


def request(
    served: Served, wanted: ServerSampling, prompt: Sequence[int], *, max_tokens: int, seed: int, min_tokens: int = 0
) -> dict[str, Any]:
    """Return the body of a request. Every setting is named, so that no default of the server counts."""
    spec = wanted.spec
    body = {
        **FOR_ALL,
        **EXTRAS.get(served.kind, {**FOR_VLLM, **FOR_LLAMA_CPP}),
        "model": served.model,
        "prompt": text_of(wanted.tokenizer, prompt) if served.prompts == "text" else list(prompt),
        "max_tokens": max_tokens,
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "seed": seed,
        "logprobs": max(spec.top_logprobs, 1),  # llama.cpp takes 0 for none
    }
    if spec.top_k:
        body["top_k"] = spec.top_k
    if served.kind != LLAMA_CPP_PYTHON:
        body |= {"stop_token_ids": list(wanted.eos_ids), "min_tokens": min_tokens}
    return body


def read_answer(body: Any) -> Answer:
    """Return the one completion in a server's answer. Raises BadInput if it is none."""
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        listed = choice.get("logprobs") or {}
        if (content := listed.get("content")) is not None:  # llama.cpp's server: an object for each token
            ids, pieces, logprobs = ([token[name] for token in content] for name in ("id", "token", "logprob"))
            tops = [{top["id"]: top["logprob"] for top in token.get("top_logprobs") or []} for token in content]
        else:
            ids, pieces = choice.get("token_ids"), listed.get("tokens") or []
            if ids is None and pieces and all(TOKEN_ID.fullmatch(piece) for piece in pieces):
                ids = [int(piece.removeprefix("token_id:")) for piece in pieces]
            logprobs = listed.get("token_logprobs") or []
            tops = [
                {int(match[1]): logprob for name, logprob in (top or {}).items() if (match := TOKEN_ID.fullmatch(name))}
                for top in listed.get("top_logprobs") or []
            ]
        return Answer(
            ids,
            pieces,
            logprobs,
            tops,
            text=choice["text"],
            stopped=choice.get("finish_reason") == "stop",
            counted=usage.get("completion_tokens"),
            prompt_counted=usage.get("prompt_tokens"),
            prompt_ids=choice.get("prompt_token_ids"),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(
            f"the server's answer is not one of a completions endpoint ({type(error).__name__}: {error}); "
            "give the base URL of an OpenAI-compatible server, such as http://host:8000/v1"
        ) from error


class Pieces:
    """Which strings are one token of a tokenizer and no other."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Decode every token of the vocabulary behind an ordinary one: some tokenizers drop a leading space."""
        self.tokenizer = tokenizer
        anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
        head = text_of(tokenizer, [anchor])
        decoded = [text_of(tokenizer, [anchor, token]).removeprefix(head) for token in range(len(tokenizer))]
        counts = Counter(decoded)
        self.known = {
            piece: token
            for token, piece in enumerate(decoded)
            if piece and counts[piece] == 1 and "\N{REPLACEMENT CHARACTER}" not in piece
        }
        self.vague = set(range(len(decoded))) - set(self.known.values())

    def ids(self, answer: Answer, prompt: Sequence[int], eos_ids: Sequence[int]) -> list[int] | str:
        """Return the ids behind the strings of `answer`, or why they are not certain."""
        if any(piece not in self.known for piece in answer.pieces):
            return "a piece is not exactly one token"
        ids = [self.known[piece] for piece in answer.pieces]
        shown = ids[:-1] if ids and ids[-1] in eos_ids else ids
        head = text_of(self.tokenizer, prompt)
        spelled = [text_of(self.tokenizer, [*prompt, *part]).removeprefix(head) for part in (ids, shown)]
        if answer.text not in spelled:
            return "the tokens do not spell the text"
        return ids


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return `ids` as text, nothing cleaned or left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of control tokens: at others no server stops by itself."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return added | set(tokenizer.all_special_ids)


def tokens_of(answer: Answer, pieces: Pieces | None, prompt: Sequence[int], eos_ids: Sequence[int]) -> list[int] | str:
    """Return the token ids of the completion, or why the row must be dropped; its end may be counted but not listed."""
    if any(logprob is None for logprob in answer.logprobs):
        return "a log-probability is missing"
    listed = len(answer.logprobs)
    lacking = 0 if answer.counted is None else answer.counted - listed
    if answer.ids is None:
        assert pieces, "the server gave ids when it was asked first"
        return "the server did not list all tokens" if lacking else pieces.ids(answer, prompt, eos_ids)
    ended = answer.stopped and not (answer.ids and answer.ids[-1] in eos_ids)
    if len(answer.ids) != listed or lacking not in (0, int(ended)):  # llama.cpp leaves out halves of a character
        return "the server did not list all tokens"
    return answer.ids


def end_logprob(echo: Answer, answer: Answer, prompt_length: int) -> float | str:
    """Return the log-probability of the token after the `answer` that was echoed back, or why it is not known.

    The echo must repeat the answer's tokens, after those of the prompt, of which the first may be left out.
    """
    count = len(answer.pieces)
    if echo.prompt_counted not in (None, prompt_length + count + 1):
        return "the server reads the text's end as other tokens"
    for first in (prompt_length, prompt_length - 1):
        last = first + count
        if echo.pieces[first:last] != answer.pieces or len(echo.logprobs) <= last:
            continue
        pairs = zip(echo.logprobs[first:last], answer.logprobs, strict=True)
        apart = [abs(again - once) for again, once in pairs if again is not None and once is not None]
        logprob = echo.logprobs[last]
        if logprob is not None and sum(apart) <= ECHO_DIFFERENCE * len(apart):
            return logprob
    return "the server's echo does not repeat the text"


def top_of(prompt_length: int, tops: Sequence[dict[int, float]], k: int) -> Top:
    """Return the `k` likeliest tokens of each position, nan for those of the prompt.

    `rest` is the log of the mass that is left, from the k alone. Raises BadInput if the server gave fewer.
    """
    few = min((len(top) for top in tops), default=k)
    if few < k:
        raise BadInput(
            f"generate.top_logprobs is {k}, but the server gives {few} alternatives with their ids; lower it, or start "
            "the server with a higher limit (vLLM: --max-logprobs), or use the torch engine"
        )
    best = [sorted(top.items(), key=lambda pair: -pair[1])[:k] for top in tops]
    ids = np.zeros((prompt_length + len(best), k), np.int32)
    logprobs = np.full(ids.shape, np.nan, np.float32)
    if best:
        ids[prompt_length:] = [[token for token, _ in row] for row in best]
        logprobs[prompt_length:] = [[logprob for _, logprob in row] for row in best]
    left = 1 - np.exp(logprobs.astype(np.float64)).sum(1)
    none = np.zeros((len(ids), 0))  # a server gives no samples of the rest
    return Top(ids, logprobs, np.log(np.maximum(left, REMAINING_AT_LEAST)).astype(np.float32), none, none)
