"""Engine server: sample rows from an OpenAI-compatible completions endpoint (vLLM, SGLang, llama.cpp's server)."""

import asyncio
import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Sequence
from itertools import accumulate
from typing import Any, TypeVar

from cfsd.errors import BadInput
from cfsd.generate.server.capabilities import check_prompt, find_out
from cfsd.generate.server.client import Client, Refused
from cfsd.generate.server.protocol import (
    Answer,
    Pieces,
    Served,
    ServerSampling,
    end_logprob,
    request,
    special_tokens,
    text_of,
    tokens_of,
    top_of,
)
from cfsd.model.sample import Sample
from cfsd.spec import seed_of

T = TypeVar("T")


def sample_from_server(
    wanted: ServerSampling,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    on_done: Callable[[int], object] = lambda done: None,
) -> list[Sample | str]:
    """Return one sample for each of `rows`, or the reason why it was dropped; `on_done` gets how many are there.

    `prompts[i]` are the tokens that row `rows[i]` begins with. A row's seed is 31 bits of (spec.seed, stream, row);
    a server may ignore it, so rows are equal in distribution, not in bits.

    Raises BadInput when the server cannot sample as `wanted`, ServerGone (worth a retry) when it does not answer.
    """

    async def work(client: Client) -> list[Sample | str]:
        sampler = _Sampler(client, await find_out(client, prompts[0], wanted), wanted)
        places, done = asyncio.Semaphore(wanted.connection.in_flight), 0

        async def one(prompt: Sequence[int], row: int) -> Sample | str:
            nonlocal done
            async with places:
                sampled = await sampler.sample(prompt, row)
            done += 1
            on_done(done)
            return sampled

        return await _all([one(prompt, row) for prompt, row in zip(prompts, rows, strict=True)])

    return _connected(wanted, work) if rows else []


def served_by(wanted: ServerSampling, prompt: Sequence[int]) -> Served:
    """Return which server answers and how it works. Raises as `sample_from_server` does."""
    return _connected(wanted, lambda client: find_out(client, prompt, wanted))


def _connected(wanted: ServerSampling, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
    if wanted.spec.fill:
        raise BadInput("generate.fill goes on after a text's end, which a server cannot do; use the torch engine")

    async def connected() -> T:
        async with Client(wanted.connection) as client:
            return await work(client)

    return asyncio.run(connected())


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
        self.prompt_length = len(prompt)
        self.ids = list(prompt)
        self.logprobs: list[float | None] = [None] * self.prompt_length
        self.tops: list[dict[int, float]] = []

    def add(self, ids: Sequence[int], answer: Answer) -> None:
        self.ids += ids
        self.logprobs += answer.logprobs[: len(ids)]
        self.tops += answer.tops[: len(ids)]

    def sample(self, finish_reason: str, k: int) -> Sample:
        return Sample(self.ids, self.logprobs, finish_reason, top_of(self.prompt_length, self.tops, k) if k else None)


class _Sampler:
    """Writes rows with one server."""

    def __init__(self, client: Client, served: Served, wanted: ServerSampling) -> None:
        self.client, self.served, self.wanted, self.spec = client, served, wanted, wanted.spec
        self.eos_ids, self.tokenizer = list(wanted.eos_ids), wanted.tokenizer
        self.special = special_tokens(self.tokenizer)
        self.pieces = Pieces(self.tokenizer) if served.ids == "reconstructed" else None

    async def sample(self, prompt: Sequence[int], number: int) -> Sample | str:
        """Return row `number`, or why it must go."""
        row, part = _Row(prompt), 0
        while room := self.spec.length - (len(row.ids) - row.prompt_length):
            seed = _number(31, self.wanted.stream, seed_of(self.spec), number, part)
            lacking = max(0, self.spec.min_length - (len(row.ids) - row.prompt_length))
            body = request(self.served, self.wanted, row.ids, max_tokens=room, seed=seed, min_tokens=lacking)
            answer = await self.client.complete(body)
            check_prompt(answer, row.ids, self.client.connection)
            tokens = tokens_of(answer, self.pieces, row.ids, self.eos_ids)
            if isinstance(tokens, str):
                return tokens
            end = next((place for place, token in enumerate(tokens) if token in self.eos_ids), len(tokens))
            row.add(tokens[: min(end + 1, room)], answer)
            if end < min(len(tokens), room):
                return row.sample("eos", self.spec.top_logprobs)
            if len(tokens) < room:
                if not answer.stopped:
                    raise BadInput(self._too_short(len(tokens), room))
                if not (self.served.prompts == "ids" and tokens and tokens[-1] in self.special):
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

        Where the server stops at several tokens, one of them is sampled by their probabilities.
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
        point = _number(53, self.wanted.stream, seed_of(self.spec), number, "end")
        stop = _sampled_key(logprobs, self.spec.temperature, point)
        if stop not in self.eos_ids:
            return f"the server stopped at {text_of(self.tokenizer, [stop])}, which ends no text of this model"
        row.ids.append(stop)
        row.logprobs.append(logprobs[stop])
        return row.sample("eos", 0)

    async def _end_logprob(self, row: _Row, answer: Answer, stop: int) -> float | str:
        body = request(self.served, self.wanted, [*row.ids, stop], max_tokens=1, seed=0) | {"echo": True}
        if self.served.prompts == "text":  # the text as the server wrote it
            before, after = (text_of(self.tokenizer, ids) for ids in (row.ids[: row.prompt_length], [stop]))
            body["prompt"] = before + answer.text + after
        try:
            echo = await self.client.complete(body)
        except Refused as error:
            raise BadInput(
                "the server neither lists the token that ends a text nor echoes a prompt with log-probabilities, so "
                f"the probability of the end is unknown; use vLLM or llama-server ({error})"
            ) from error
        return end_logprob(echo, answer, row.prompt_length)


def _number(bits: int, *words: object) -> int:
    """Return a number of `bits` bits that depends on nothing but `words`."""
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - bits)


def _sampled_key(logprobs: dict[int, float], temperature: float, number: int) -> int:
    """Return a key, sampled with a random number of 53 bits after scaling by `temperature`."""
    best = max(logprobs.values())
    sums = list(accumulate(math.exp((logprob - best) / temperature) for logprob in logprobs.values()))
    return list(logprobs)[bisect_right(sums, number / 2**53 * sums[-1], hi=len(sums) - 1)]
