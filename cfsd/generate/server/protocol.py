"""The completions protocol: the bodies of requests, and the tokens in the answers to them.

Field names were read in the sources of vLLM, SGLang and llama.cpp's server. They give token ids as a list, as
"token_id:17", or in objects.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from cfsd.errors import BadInput
from cfsd.generate.sampling import Turns
from cfsd.generate.spec import GenerateSpec
from cfsd.machine import Machine
from cfsd.model.distribution import Top

VLLM, SGLANG, LLAMA_CPP = "vllm", "sglang", "llamacpp"  # `owned_by` in the list of models

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
}
REMAINING_AT_LEAST = 1e-8  # what float32 log-probabilities can leave of 1
TOKEN_ID = re.compile(r"token_id:(\d+)")


class ServerSampling(NamedTuple):
    """Which server samples, by which settings, and the tokens of the model that it should serve."""

    machine: Machine  # of engine server
    spec: GenerateSpec
    eos_ids: Sequence[int]
    tokenizer: PreTrainedTokenizerBase
    stream: str = ""  # rows of the same number in two streams have different seeds
    turns: Turns = Turns()  # what follows the end of a text


class Served(NamedTuple):
    """What is known of a server: its kind and its model."""

    kind: str
    model: str

    def metadata(self) -> dict[str, str]:
        """Return what the metadata of a corpus says about its server."""
        model = self.model.rsplit("/", 1)[1] if self.model.startswith("/") else self.model
        return {"server": self.kind, "served_model": model, "ids": "exact"}


class Answer(NamedTuple):
    """One completion. Lists run over its tokens."""

    ids: list[int] | None  # None: only strings came
    logprobs: list[float | None]
    tops: list[dict[int, float]]
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
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "seed": seed,
        "logprobs": max(spec.top_logprobs, 1),  # llama.cpp takes 0 for none
        "stop_token_ids": list(wanted.eos_ids),
        "min_tokens": min_tokens,
    }
    return body | ({"top_k": spec.top_k} if spec.top_k else {})


def read_answer(body: Any) -> Answer:
    """Return the one completion in a server's answer. Raises BadInput if it is none."""
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        listed = choice.get("logprobs") or {}
        if (content := listed.get("content")) is not None:  # llama.cpp's server: an object for each token
            ids, logprobs = ([token[name] for token in content] for name in ("id", "logprob"))
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
            logprobs,
            tops,
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


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return `ids` as text, nothing cleaned or left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of control tokens: at others no server stops by itself."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return added | set(tokenizer.all_special_ids)


def tokens_of(answer: Answer) -> list[int] | str:
    """Return the token ids of the completion, or why the row must be dropped."""
    if any(logprob is None for logprob in answer.logprobs):
        return "a log-probability is missing"
    if answer.ids is None or len(answer.ids) != len(answer.logprobs) or answer.counted not in (None, len(answer.ids)):
        return "the server did not list all tokens"  # llama.cpp leaves out halves of a character
    return answer.ids


def top_of(tops: Sequence[dict[int, float] | None], k: int) -> Top:
    """Return the `k` likeliest tokens of each position, nan where None says that the token was given.

    `rest` is the log of the mass that is left, from the k alone. Raises BadInput if the server gave fewer.
    """
    sampled = {place: top for place, top in enumerate(tops) if top is not None}
    few = min(map(len, sampled.values()), default=k)
    if few < k:
        raise BadInput(
            f"generate.top_logprobs is {k}, but the server gives {few} alternatives with their ids; lower it, or start "
            "the server with a higher limit (vLLM: --max-logprobs), or use the torch engine"
        )
    ids = np.zeros((len(tops), k), np.int32)
    logprobs = np.full(ids.shape, np.nan, np.float32)
    for place, top in sampled.items() if k else ():
        best = sorted(top.items(), key=lambda pair: -pair[1])[:k]
        ids[place], logprobs[place] = zip(*best, strict=True)
    left = 1 - np.exp(logprobs.astype(np.float64)).sum(1)
    none = np.zeros((len(ids), 0))  # a server gives no samples of the rest
    return Top(ids, logprobs, np.log(np.maximum(left, REMAINING_AT_LEAST)).astype(np.float32), none, none)
