"""What a completions server can do: its model, how it takes prompts, how it names tokens, where it stops."""

from collections.abc import Sequence

from cfsd.errors import BadInput
from cfsd.generate.server.client import Client, Refused
from cfsd.generate.server.protocol import (
    LLAMA_CPP_PYTHON,
    SGLANG,
    VLLM,
    Answer,
    Served,
    ServerSampling,
    request,
    special_tokens,
    text_of,
    top_of,
)

SURE = 100.0  # logit bias that leaves one token to sample
MAX_TRIED = 32  # control tokens at which the server may stop
FIRST_ANSWERS = 8  # a text that ends at once shows no token
_stops: dict[tuple[str, str, tuple[int, ...]], tuple[int, ...]] = {}  # by base URL, model and eos ids


async def find_out(client: Client, prompt: Sequence[int], wanted: ServerSampling) -> Served:
    """Return which server answers and how it works, after asking for its models and for a token or two after `prompt`.

    Raises BadInput when it cannot sample as `wanted`; the message says what could.
    """
    spec = wanted.spec
    if spec.fill:
        raise BadInput("generate.fill goes on after a text's end, which a server cannot do; use the torch engine")
    served = await _listed(client, wanted.machine.served_model)
    if spec.min_length and served.kind not in (VLLM, SGLANG):
        raise BadInput(
            f"generate.min_length is {spec.min_length}, but only vLLM and SGLang keep a text from ending early, and "
            f"this server calls itself {served.kind}; leave it at 0 or use the torch engine"
        )
    served, answer = await _first_answer(client, served, prompt, wanted)
    if not answer.logprobs or answer.logprobs[0] is None:
        raise BadInput(
            f"the server {client.base_url} gives no log-probabilities, and every row of a corpus has them; "
            "start it so that it does (llama-cpp-python: --logits_all true)"
        )
    if answer.ids is not None:
        top_of(0, answer.tops, spec.top_logprobs)
        return served
    if spec.top_logprobs:
        raise BadInput(
            f"generate.top_logprobs is {spec.top_logprobs}, but this server names tokens by their text, which several "
            "may share; set it to 0, or use vLLM or the torch engine"
        )
    return served._replace(ids="reconstructed", stops=await _stops_of(client, served, prompt, wanted))


async def _listed(client: Client, wanted: str | None) -> Served:
    models = (await client.ask("GET", "/models")).get("data") or []
    fitting = [model for model in models if wanted in (None, model.get("id"))]
    if len(fitting) != 1:
        names = ", ".join(str(model.get("id")) for model in models) or "none"
        problem = f"does not serve {wanted!r}" if wanted else f"serves {len(models)} models"
        raise BadInput(f"{client.base_url} {problem}; set machine.served_model to one of: {names}")
    return Served(kind=str(fitting[0].get("owned_by", "unknown")), model=str(fitting[0]["id"]))


async def _first_answer(
    client: Client, served: Served, prompt: Sequence[int], wanted: ServerSampling
) -> tuple[Served, Answer]:
    """Return how the server takes prompts, and an answer that has a token unless all of FIRST_ANSWERS are empty."""
    if served.kind == LLAMA_CPP_PYTHON:
        served = served._replace(prompts="text")
    for seed in range(FIRST_ANSWERS):
        try:
            answer = await client.complete(request(served, wanted, prompt, max_tokens=1, seed=seed))
        except Refused as error:
            if wanted.spec.top_logprobs and "logprobs" in str(error):
                raise Refused(
                    f"{error}; lower generate.top_logprobs or raise its limit (vLLM: --max-logprobs)"
                ) from error
            if served.prompts == "text" or "prompt" not in str(error):
                raise
            served = served._replace(prompts="text")
            continue
        check_prompt(answer, prompt, client.base_url)
        if answer.logprobs:
            break
    return served, answer


def check_prompt(answer: Answer, prompt: Sequence[int], base_url: str) -> None:
    """Raise BadInput if the server read another prompt than the one that it was sent."""
    if answer.prompt_ids is not None and answer.prompt_ids != list(prompt):
        read = f"the tokens {answer.prompt_ids[:8]}"
    elif answer.prompt_counted not in (None, len(prompt)):
        read = f"{answer.prompt_counted} tokens"
    else:
        return
    raise BadInput(
        f"the server {base_url} read {read} where {list(prompt)[:8]} was sent ({len(prompt)} in all): its "
        "texts would not begin as the recipe's do; use a server that takes token ids (vLLM, SGLang, llama-server)"
    )


async def _stops_of(client: Client, served: Served, prompt: Sequence[int], wanted: ServerSampling) -> tuple[int, ...]:
    """Return at which control tokens the server stops: it is made to sample each of them.

    llama.cpp stops at every token whose name it knows as an end, whatever the model's own end is.
    """
    eos_ids, tokenizer = wanted.eos_ids, wanted.tokenizer
    key = (client.base_url, served.model, tuple(eos_ids))
    if key not in _stops:
        others = sorted(special_tokens(tokenizer) - set(eos_ids))[:MAX_TRIED]
        body = request(served, wanted, prompt, max_tokens=2, seed=0)
        del body["logprobs"]
        try:
            tried = [
                (token, await client.complete(body | {"logit_bias": {str(token): SURE}}))
                for token in [*eos_ids, *others]
            ]
        except Refused:
            return tuple(eos_ids)
        _stops[key] = tuple(token for token, answer in tried if answer.stopped)
    if deaf := [text_of(tokenizer, [token]) for token in eos_ids if token not in _stops[key]]:
        raise BadInput(
            f"the server {client.base_url} does not stop at {', '.join(deaf)}, which ends a text of the "
            "recipe's model; serve the recipe's own model with its generation_config"
        )
    return _stops[key]
