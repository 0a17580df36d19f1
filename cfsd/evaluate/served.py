"""Models behind OpenAI-compatible servers: which there are, and whether they can be asked what lm-eval asks."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import Benchmark
from cfsd.generate.server.capabilities import one_model
from cfsd.generate.server.client import Client, Refused, ServerGone
from cfsd.machine import Machine, served_at, server_url
from cfsd.model.folder import has_chat_template
from cfsd.model.loading import load_tokenizer

FORM = "a model behind a server is NAME@http://host:8000/v1"
ATTEMPTS, AWAY = 2, "start it, or correct its URL"
TEXT = "Thirteen lazy dogs, naïve and wet — they ran 1,024 miles.\n\tAnd then?"


class ServedModel(NamedTuple):
    """A model by its name at a server. `context`: tokens that it attends to, None where the server does not say."""

    name: str
    url: str  # ends in /v1
    context: int | None
    tokenizer: Path | None  # None: prompts go to the chat endpoint as they are


def check_benchmarks_served(benchmarks: Sequence[Benchmark], tokenizer: Path | None) -> None:
    """Raise BadInput for benchmarks that no server can be asked, or none without the models' `tokenizer`."""
    if not benchmarks:
        raise BadInput("nothing to measure: name one or several benchmarks (--benchmark instructions)")
    for benchmark in benchmarks:
        benchmark.check()
        if benchmark.thinking_end is not None:
            raise BadInput(
                f"benchmark {benchmark.name}: thinking_end is for a model in memory, whose stop sequences are held "
                "back until the reasoning has ended; leave it out, or measure from the weights"
            )
    if tokenizer is None and (needy := [b.name for b in benchmarks if not _is_plain_chat(b)]):
        raise BadInput(
            f"benchmark {', '.join(needy)}: without the models' tokenizer a server can be asked for chat answers alone "
            "(chat_template, no gen_prefix); give the folder of the tokenizer that both models have: --tokenizer FOLDER"
        )
    if tokenizer is not None and not has_chat_template(tokenizer) and (chats := [b for b in benchmarks if b.is_chat()]):
        raise chats[0].lacks_template()


def _is_plain_chat(benchmark: Benchmark) -> bool:
    return benchmark.is_written() and benchmark.is_chat() and not benchmark.find().config.get("gen_prefix")


def find_served(given: str, benchmarks: Sequence[Benchmark], tokenizer: Path | None) -> ServedModel:
    """Return the model that `given` names, after a question or two that its server must answer.

    Raises BadInput for no URL, a server that is away, a name that it does not serve, another tokenizer, and a server
    without what the benchmarks need: token ids as prompts, log-probabilities of an echoed prompt.
    """
    place = served_at(given)
    if place is None:
        raise BadInput(f"{given} is not behind a server, as the other model is; {FORM}")
    try:
        machine = Machine(engine="server", base_url=server_url(place[1]))
    except ValueError as error:
        raise BadInput(f"{str(error).splitlines()[0]}; {FORM}") from error
    try:
        return asyncio.run(_found(machine, place[0], benchmarks, tokenizer))
    except ServerGone as error:
        raise BadInput(str(error)) from error


async def _found(
    machine: Machine, name: str | None, benchmarks: Sequence[Benchmark], tokenizer: Path | None
) -> ServedModel:
    async with aclosing(Client(machine, ATTEMPTS, AWAY)) as client:
        listed = await one_model(client, name, "NAME in NAME@URL")
        known = listed.get("max_model_len") or (listed.get("meta") or {}).get("n_ctx")
        model = ServedModel(str(listed["id"]), client.base_url, known if isinstance(known, int) else None, tokenizer)
        if model.context is not None:
            for benchmark in benchmarks:
                benchmark.check_context(model.context)
        if tokenizer is None:
            await _check_chat(client, model.name)
        else:
            own = load_tokenizer(tokenizer)
            await _check_tokens(client, model, own)
            if scored := [benchmark.name for benchmark in benchmarks if not benchmark.is_written()]:
                await _check_echo(client, model, own.encode(TEXT, add_special_tokens=False), scored)
        return model


async def _check_chat(client: Client, name: str) -> None:
    """Raise BadInput for a server without a chat endpoint."""
    body = {"model": name, "messages": [{"role": "user", "content": TEXT}], "max_tokens": 1}
    try:
        await client.ask("POST", "/chat/completions", body)
    except Refused as error:
        raise BadInput(f"{error}; without a chat endpoint give the models' tokenizer: --tokenizer FOLDER") from error


async def _check_tokens(client: Client, model: ServedModel, tokenizer: Any) -> None:
    """Raise BadInput unless the server makes as many tokens of a text as the tokenizer does."""
    own = {len(tokenizer.encode(TEXT, add_special_tokens=special)) for special in (False, True)}
    body = {"model": model.name, "prompt": TEXT, "max_tokens": 1, "temperature": 0}
    counted = ((await client.ask("POST", "/completions", body)).get("usage") or {}).get("prompt_tokens")
    if counted not in (None, *own):
        raise BadInput(
            f"{model.name} behind {model.url} makes {counted} tokens of a text, the tokenizer in {model.tokenizer} "
            f"{' or '.join(map(str, sorted(own)))}; give the tokenizer of the served models: --tokenizer FOLDER"
        )


async def _check_echo(client: Client, model: ServedModel, prompt: Sequence[int], scored: Sequence[str]) -> None:
    """Raise BadInput unless the server gives the log-probability of each token of a prompt."""
    body = {"model": model.name, "prompt": [prompt], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    try:
        answer = await client.ask("POST", "/completions", body)
        given = answer["choices"][0]["logprobs"]["token_logprobs"]
        is_whole = len(given) == len(prompt) + 1 and None not in given[1:]
        lacking = "" if is_whole else f"{len(given)} for {len(prompt)} tokens and one that it wrote"
    except (BadInput, ServerGone) as error:  # some servers answer with 500
        lacking = str(error)
    except (LookupError, TypeError):
        lacking = "its answer lists none of the prompt's tokens"
    if lacking:
        raise BadInput(
            f"the server {model.url} gives no log-probabilities of a prompt (echo), by which {', '.join(scored)} is "
            f"scored; serve with vLLM, or name benchmarks with written answers ({lacking})"
        )
