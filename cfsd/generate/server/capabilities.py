"""What a completions server can do: its models, whether it reads and gives token ids and log-probabilities."""

from collections.abc import Sequence
from typing import Any

from cfsd.errors import BadInput
from cfsd.generate.server.client import Client, Refused
from cfsd.generate.server.protocol import SGLANG, VLLM, Answer, Served, ServerSampling, request, top_of

FIRST_ANSWERS = 8  # llama.cpp lists no half of a character, which a first token may be
WITH_IDS = "use a server that takes and gives token ids: vLLM, SGLang or llama.cpp's own (llama-server)"


async def find_out(client: Client, prompt: Sequence[int], wanted: ServerSampling) -> Served:
    """Return which server answers and how it works, after asking for its models and for a token or two after `prompt`.

    Raises BadInput when it cannot sample as `wanted`; the message says what could.
    """
    spec = wanted.spec
    listed = await one_model(client, wanted.machine.served_model, "machine.served_model")
    served = Served(kind=str(listed.get("owned_by", "unknown")), model=str(listed["id"]))
    if spec.min_length and served.kind not in (VLLM, SGLANG):
        raise BadInput(
            f"generate.min_length is {spec.min_length}, but only vLLM and SGLang keep a text from ending early, and "
            f"this server calls itself {served.kind}; leave it at 0 or use the torch engine"
        )
    answer = await _first_answer(client, served, prompt, wanted)
    if not answer.logprobs or answer.logprobs[0] is None:
        raise BadInput(
            f"the server {client.base_url} gives no log-probabilities, and every row of a corpus has them; start it so "
            "that it does"
        )
    if answer.ids is None:
        raise BadInput(
            f"the server {client.base_url} names tokens by their text, which several may share, and gives no ids; "
            f"{WITH_IDS}"
        )
    top_of(answer.tops, spec.top_logprobs)
    return served


async def one_model(client: Client, name: str | None, setting: str) -> dict[str, Any]:
    """Return what the server lists of the model `name`, or of its only one.

    Raises BadInput with the names that there are, one of which `setting` should be.
    """
    listed = await client.ask("GET", "/models")
    models = [model for model in listed.get("data") or [] if "id" in model] if isinstance(listed, dict) else []
    fitting = [model for model in models if name in (None, model["id"])]
    if len(fitting) != 1:
        names = ", ".join(str(model["id"]) for model in models) or "none"
        problem = f"does not serve {name!r}" if name else f"serves {len(models)} models"
        raise BadInput(f"{client.base_url} {problem}; set {setting} to one of: {names}")
    return dict(fitting[0])


async def _first_answer(client: Client, served: Served, prompt: Sequence[int], wanted: ServerSampling) -> Answer:
    """Return an answer that has a token, unless all of FIRST_ANSWERS are empty."""
    for seed in range(FIRST_ANSWERS):
        try:
            answer = await client.complete(request(served, wanted, prompt, max_tokens=1, seed=seed))
        except Refused as error:
            if wanted.spec.top_logprobs and "logprobs" in str(error):
                remedy = "lower generate.top_logprobs or raise its limit (vLLM: --max-logprobs)"
            elif "prompt" in str(error):
                remedy = WITH_IDS
            else:
                raise
            raise Refused(f"{error}; {remedy}") from error
        check_prompt(answer, prompt, client.base_url)
        if answer.logprobs:
            break
    return answer


def check_prompt(answer: Answer, prompt: Sequence[int], base_url: str) -> None:
    """Raise BadInput if the server read another prompt than the one that it was sent."""
    if answer.prompt_ids is not None and answer.prompt_ids != list(prompt):
        read = f"the tokens {answer.prompt_ids[:8]}"
    elif answer.prompt_counted not in (None, len(prompt)):
        read = f"{answer.prompt_counted} tokens"
    else:
        return
    raise BadInput(
        f"the server {base_url} read {read} where {list(prompt)[:8]} was sent ({len(prompt)} in all): its texts would "
        f"not begin as the recipe's do; {WITH_IDS}"
    )
