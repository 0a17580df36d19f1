"""Engine server: sample rows from an OpenAI-compatible completions endpoint (vLLM, SGLang, llama.cpp's server)."""

import asyncio
import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Sequence
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from cfsd.errors import BadInput
from cfsd.generate.server.capabilities import check_prompt, find_out
from cfsd.generate.server.client import Client, Refused, ServerGone
from cfsd.generate.server.protocol import (
    Answer,
    Pieces,
    Served,
    end_logprob,
    prompt_of,
    request,
    special_tokens,
    text_of,
    tokens_of,
    top_of,
)
from cfsd.generate.spec import GenerateSpec
from cfsd.machine import Connection
from cfsd.model.sample import Sample
from cfsd.spec import seed_of

__all__ = ["Connection", "Refused", "Served", "ServerGone", "sample_from_server", "served_by"]


def sample_from_server(
    connection: Connection,
    prompts: Sequence[Sequence[int]],
    spec: GenerateSpec,
    rows: Sequence[int],
    *,
    stream: str,
    eos_ids: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Sample | str]:
    """Return one sample for each of `rows`, or the reason why it was dropped; `on_done` gets how many are there.

    `prompts[i]` are the tokens that row `rows[i]` begins with. A row's seed is 31 bits of (law.seed, stream, row);
    whether the server honours it is the server's business, so rows are equal in law, not in bits.

    Raises BadInput when the server cannot serve `spec`, ServerGone (worth a retry) when it does not answer.
    """
    _check_spec(spec)

    async def work() -> list[Sample | str]:
        async with Client(connection) as client:
            served = await find_out(client, prompts[0], spec, eos_ids, tokenizer)
            sampler = _Sampler(client, served, spec, eos_ids, tokenizer, stream)
            places, done = asyncio.Semaphore(connection.in_flight), 0

            async def one(prompt: Sequence[int], row: int) -> Sample | str:
                nonlocal done
                async with places:
                    found = await sampler.sample(prompt, row)
                done += 1
                on_done(done)
                return found

            return await _all([one(prompt, row) for prompt, row in zip(prompts, rows, strict=True)])

    return asyncio.run(work()) if rows else []


def served_by(
    connection: Connection,
    prompt: Sequence[int],
    spec: GenerateSpec,
    eos_ids: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
) -> Served:
    """Return what the server says and shows of itself. Raises as `sample_from_server` does."""
    _check_spec(spec)

    async def work() -> Served:
        async with Client(connection) as client:
            return await find_out(client, prompt, spec, eos_ids, tokenizer)

    return asyncio.run(work())


def _check_spec(spec: GenerateSpec) -> None:
    if spec.fill:
        raise BadInput("generate.fill goes on after a text's end, which a server cannot do; use the torch engine")


async def _all(jobs: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Return all results; the first failure ends the others."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Row:
    """A row that is being written."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.given = len(prompt)
        self.ids = list(prompt)
        self.logprobs: list[float | None] = [None] * self.given
        self.tops: list[dict[int, float]] = []

    def add(self, ids: Sequence[int], answer: Answer) -> None:
        self.ids += ids
        self.logprobs += answer.logprobs[: len(ids)]
        self.tops += answer.tops[: len(ids)]

    def sample(self, finish_reason: str, k: int) -> Sample:
        return Sample(self.ids, self.logprobs, finish_reason, top_of(self.given, self.tops, k) if k else None)


class _Sampler:
    """Writes rows with one server under one law."""

    def __init__(
        self,
        client: Client,
        served: Served,
        spec: GenerateSpec,
        eos_ids: Sequence[int],
        tokenizer: "PreTrainedTokenizerBase",
        stream: str,
    ) -> None:
        self.client, self.served, self.spec, self.eos_ids = client, served, spec, list(eos_ids)
        self.tokenizer, self.stream = tokenizer, stream
        self.special = special_tokens(tokenizer)
        self.pieces = Pieces(tokenizer) if served.ids == "reconstructed" else None

    async def sample(self, prompt: Sequence[int], number: int) -> Sample | str:
        """Return row `number`, or why it must go."""
        row, part = _Row(prompt), 0
        while room := self.spec.length - (len(row.ids) - row.given):
            seed = _number(31, self.stream, seed_of(self.spec), number, part)
            lacking = max(0, self.spec.min_length - (len(row.ids) - row.given))
            body = request(self.served, self.spec, self.eos_ids, max_tokens=room, seed=seed, min_tokens=lacking)
            answer = await self.client.complete(body | {"prompt": prompt_of(self.served, row.ids, self.tokenizer)})
            check_prompt(answer, row.ids, self.client.connection)
            found = tokens_of(answer, self.pieces, row.ids, self.eos_ids)
            if isinstance(found, str):
                return found
            end = next((place for place, token in enumerate(found) if token in self.eos_ids), len(found))
            row.add(found[: min(end + 1, room)], answer)
            if end < min(len(found), room):
                return row.sample("eos", self.spec.top_logprobs)
            if len(found) < room:
                if not answer.stopped:
                    raise BadInput(self._too_short(len(found), room))
                if not (self.served.prompts == "ids" and found and found[-1] in self.special):
                    return await self._with_end(row, answer, number)
            part += 1  # the server stopped at a token that ends nothing here: go on from it
        return row.sample("length", self.spec.top_logprobs)

    def _too_short(self, got: int, room: int) -> str:
        return (
            f"the server {self.client.connection.base_url} cut a row after {got} of {room} tokens; start it with a "
            f"context of at least generate.length + the prompt (vLLM: --max-model-len, llama.cpp: -c or --n_ctx)"
        )

    async def _with_end(self, row: _Row, answer: Answer, number: int) -> Sample | str:
        """Return the row with the end that the server did not list, its log-probability taken from an echo.

        Where the server stops at several tokens, the one is drawn by their probabilities.
        """
        if not answer.pieces:
            return "the text ends at once, and the server does not list its end"
        if self.spec.top_logprobs:
            raise BadInput("the server does not list the token that ends a text: set generate.top_logprobs to 0")
        logprobs = {}
        for stop in self.served.stops or self.eos_ids:
            logprob = await self._end_logprob(row, answer, stop)
            if isinstance(logprob, str):
                return logprob
            logprobs[stop] = logprob
        stop = _drawn(logprobs, self.spec.temperature, _number(53, self.stream, seed_of(self.spec), number, "end"))
        if stop not in self.eos_ids:
            return f"the server stopped at {text_of(self.tokenizer, [stop])}, which ends no text of this model"
        row.ids.append(stop)
        row.logprobs.append(logprobs[stop])
        return row.sample("eos", 0)

    async def _end_logprob(self, row: _Row, answer: Answer, stop: int) -> float | str:
        prompt: list[int] | str = [*row.ids, stop]
        if self.served.prompts == "text":
            prompt = text_of(self.tokenizer, row.ids[: row.given]) + answer.text + text_of(self.tokenizer, [stop])
        body = request(self.served, self.spec, self.eos_ids, max_tokens=1, seed=0) | {"prompt": prompt, "echo": True}
        try:
            echo = await self.client.complete(body)
        except Refused as error:
            raise BadInput(
                "the server neither lists the token that ends a text nor echoes a prompt with log-probabilities, so "
                f"nobody knows how likely the end was; use vLLM or llama-server ({error})"
            ) from error
        return end_logprob(echo, answer, row.given)


def _number(bits: int, *words: object) -> int:
    """Return a number of `bits` bits that depends on nothing but `words`."""
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - bits)


def _drawn(logprobs: dict[int, float], temperature: float, number: int) -> int:
    """Return the key that a number of 53 bits picks by the weights."""
    best = max(logprobs.values())
    sums = list(accumulate(math.exp((logprob - best) / temperature) for logprob in logprobs.values()))
    return list(logprobs)[bisect_right(sums, number / 2**53 * sums[-1], hi=len(sums) - 1)]
