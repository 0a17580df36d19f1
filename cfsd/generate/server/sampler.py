"""Engine server: sample rows from an OpenAI-compatible completions endpoint (vLLM, SGLang, llama.cpp's server)."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from contextlib import aclosing
from itertools import count

from cfsd.errors import BadInput
from cfsd.generate.server.capabilities import WITH_IDS, check_prompt, find_out
from cfsd.generate.server.client import Client
from cfsd.generate.server.protocol import Answer, Served, ServerSampling, request, special_tokens, tokens_of, top_of
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
    waiting, samples = iter(zip(prompts, rows, strict=True)), dict[int, Sample | str]()

    async def work() -> None:
        async with aclosing(Client(wanted.machine)) as client:
            sampler = _Sampler(client, served, wanted)
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


class _Row:
    """A row as far as it is written: tokens that were given, and those that the server sampled."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float | None] = []
        self.tops: list[dict[int, float] | None] = []

    def give(self, tokens: Sequence[int]) -> None:
        self.token_ids += tokens
        self.logprobs += [None] * len(tokens)
        self.tops += [None] * len(tokens)

    def add(self, tokens: Sequence[int], answer: Answer, most: int) -> None:
        self.token_ids += tokens[:most]
        self.logprobs += answer.logprobs[:most]
        self.tops += answer.tops[:most]

    def sample(self, finish_reason: str, k: int) -> Sample:
        return Sample(self.token_ids, self.logprobs, finish_reason, top_of(self.tops, k) if k else None)


class _Sampler:
    """Writes one row after the other over one connection."""

    def __init__(self, client: Client, served: Served, wanted: ServerSampling) -> None:
        self.client, self.served, self.wanted = client, served, wanted
        self.spec, self.eos_ids = wanted.spec, list(wanted.eos_ids)
        self.last_ends = list(wanted.turns.last_ends) or self.eos_ids
        self.ends = special_tokens(wanted.tokenizer) | set(wanted.eos_ids)  # at others no server stops by itself

    async def sample(self, prompt: Sequence[int], number: int) -> Sample | str:
        """Return row `number`, or why it must be dropped."""
        row, turns, until = _Row(), self.wanted.turns.more, len(prompt) + self.spec.length
        row.give(prompt)
        # a part is another turn, or goes on from a token at which the server stopped and which ends nothing here
        for part in count():
            if not (room := until - len(row.token_ids)):
                break
            answer = await self._answer(row.token_ids, room, row_seed(self.wanted, number, part))
            tokens = tokens_of(answer)
            if isinstance(tokens, str):
                return tokens
            ends = self.eos_ids if turns else self.last_ends
            end = next((place for place, token in enumerate(tokens[:room]) if token in ends), None)
            row.add(tokens, answer, room if end is None else end + 1)
            if end is not None and not turns:
                return row.sample("eos", self.spec.top_logprobs)
            if end is not None:
                turns -= 1
                row.give(self.wanted.turns.inserted(tokens[end])[: until - len(row.token_ids)])
            elif len(tokens) < room and not answer.stopped:
                raise self._cut_short(len(tokens), room)
        return row.sample("length", self.spec.top_logprobs)

    async def _answer(self, token_ids: Sequence[int], room: int, seed: int) -> Answer:
        lacking = max(0, self.spec.min_length - self.spec.length + room)
        body = request(self.served, self.wanted, token_ids, max_tokens=room, seed=seed, min_tokens=lacking)
        answer = await self.client.complete(body)
        check_prompt(answer, token_ids, self.client.base_url)
        self._check_end(answer)
        return answer

    def _cut_short(self, tokens: int, room: int) -> BadInput:
        return BadInput(
            f"the server {self.client.base_url} cut a row after {tokens} of {room} tokens; start it with a context of "
            "at least generate.length + the prompt (vLLM: --max-model-len, llama.cpp: -c or --n_ctx)"
        )

    def _check_end(self, answer: Answer) -> None:
        """Raise BadInput for a text that stopped at a token which is not listed, whose probability is unknown."""
        ids = answer.ids or []
        lacking = 0 if answer.counted is None else answer.counted - len(ids)  # more than one: parts of a character
        if answer.stopped and lacking <= 1 and not (ids and ids[-1] in self.ends):
            raise BadInput(
                f"the server {self.client.base_url} does not list the token that ends a text, so its probability is "
                f"unknown; {WITH_IDS}"
            )
