"""Engine server: sample rows from an OpenAI-compatible completions endpoint (vLLM, SGLang, llama.cpp's server)."""

import asyncio
import hashlib
import math
import random
from collections.abc import Callable, Sequence
from contextlib import aclosing

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
    return asyncio.run(_sample(wanted, prompts, rows, on_done)) if rows else []


async def _sample(
    wanted: ServerSampling, prompts: Sequence[Sequence[int]], rows: Sequence[int], on_done: Callable[[int], object]
) -> list[Sample | str]:
    served = await _served_by(wanted, prompts[0])
    pieces = Pieces(wanted.tokenizer) if served.ids == "reconstructed" else None
    waiting, samples = iter(zip(prompts, rows, strict=True)), dict[int, Sample | str]()

    async def work() -> None:
        async with aclosing(Client(wanted.machine)) as client:
            sampler = _Sampler(client, served, wanted, pieces)
            for prompt, row in waiting:
                samples[row] = await sampler.sample(prompt, row)
                on_done(len(samples))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(wanted.machine.in_flight, len(rows))):
                group.create_task(work())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # the first one ended the others
    return [samples[row] for row in rows]


def served_by(wanted: ServerSampling, prompt: Sequence[int]) -> Served:
    """Return which server answers and how it works. Raises as `sample_from_server` does."""
    return asyncio.run(_served_by(wanted, prompt))


async def _served_by(wanted: ServerSampling, prompt: Sequence[int]) -> Served:
    async with aclosing(Client(wanted.machine)) as client:
        return await find_out(client, prompt, wanted)


def row_seed(wanted: ServerSampling, number: int, part: object) -> int:
    """Return the seed of a request: of the row with this number, and of a part of it."""
    words = f"{wanted.stream} {seed_of(wanted.spec)} {number} {part}"
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big") >> 1


class _Sampler:
    """Writes one row after the other over one connection."""

    def __init__(self, client: Client, served: Served, wanted: ServerSampling, pieces: Pieces | None) -> None:
        self.client, self.served, self.wanted, self.pieces = client, served, wanted, pieces
        self.spec, self.eos_ids, self.tokenizer = wanted.spec, list(wanted.eos_ids), wanted.tokenizer
        self.special = special_tokens(self.tokenizer)

    async def sample(self, prompt: Sequence[int], number: int) -> Sample | str:
        """Return row `number`, or why it must be dropped."""
        row, tops, part = Sample(list(prompt), [None] * len(prompt), "length"), list[dict[int, float]](), 0
        until = len(prompt) + self.spec.length
        while room := until - len(row.token_ids):
            lacking = max(0, self.spec.min_length - self.spec.length + room)
            seed = row_seed(self.wanted, number, part)
            body = request(self.served, self.wanted, row.token_ids, max_tokens=room, seed=seed, min_tokens=lacking)
            answer = await self.client.complete(body)
            check_prompt(answer, row.token_ids, self.client.base_url)
            tokens = tokens_of(answer, self.pieces, row.token_ids, self.eos_ids)
            if isinstance(tokens, str):
                return tokens
            end = next((place for place, token in enumerate(tokens) if token in self.eos_ids), len(tokens))
            count = min(end + 1, room)
            row.token_ids.extend(tokens[:count])
            row.logprobs.extend(answer.logprobs[:count])
            tops += answer.tops[:count]
            if end < min(len(tokens), room):
                row = row._replace(finish_reason="eos")
                break
            if len(tokens) < room:
                if not answer.stopped:
                    raise BadInput(
                        f"the server {self.client.base_url} cut a row after {len(tokens)} of {room} tokens; start it "
                        "with a context of at least generate.length + the prompt (vLLM: --max-model-len, llama.cpp: "
                        "-c or --n_ctx)"
                    )
                if not (self.served.prompts == "ids" and tokens and tokens[-1] in self.special):
                    return await self._with_end(row, len(prompt), answer, number)
            part += 1  # the server stopped at a token that ends nothing here: go on from it
        k = self.spec.top_logprobs
        return row._replace(top=top_of(len(prompt), tops, k) if k else None)

    async def _with_end(self, row: Sample, prompt_length: int, answer: Answer, number: int) -> Sample | str:
        """Return the row with the end that the server did not list, its log-probability taken from an echo.

        Where the server stops at several tokens, one of them is sampled by their probabilities.
        """
        if not answer.pieces:
            return "the text ends at once, and the server does not list its end"
        if self.spec.top_logprobs:
            raise BadInput("the server does not list the token that ends a text: set generate.top_logprobs to 0")
        logprobs = {}
        for stop in self.served.stops or self.eos_ids:
            logprob = await self._end_logprob(row, prompt_length, answer, stop)
            if isinstance(logprob, str):
                return logprob
            logprobs[stop] = logprob
        best = max(logprobs.values())
        weights = [math.exp((logprob - best) / self.spec.temperature) for logprob in logprobs.values()]
        stop = random.Random(row_seed(self.wanted, number, "end")).choices(list(logprobs), weights)[0]
        if stop not in self.eos_ids:
            return f"the server stopped at {text_of(self.tokenizer, [stop])}, which ends no text of this model"
        return Sample([*row.token_ids, stop], [*row.logprobs, logprobs[stop]], "eos")

    async def _end_logprob(self, row: Sample, prompt_length: int, answer: Answer, stop: int) -> float | str:
        body = request(self.served, self.wanted, [*row.token_ids, stop], max_tokens=1, seed=0) | {"echo": True}
        if self.served.prompts == "text":  # the text as the server wrote it
            before, after = (text_of(self.tokenizer, ids) for ids in (row.token_ids[:prompt_length], [stop]))
            body["prompt"] = before + answer.text + after
        try:
            echo = await self.client.complete(body)
        except Refused as error:
            raise BadInput(
                "the server neither lists the token that ends a text nor echoes a prompt with log-probabilities, so "
                f"the probability of the end is unknown; use vLLM or llama-server ({error})"
            ) from error
        return end_logprob(echo, answer, prompt_length)
