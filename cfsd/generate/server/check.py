"""The start check: does a server serve the recipe's model under the recipe's law? T tokens, V vocabulary."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import JsonValue
from scipy.stats import chisquare
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsd.errors import BadInput
from cfsd.generate.drawing import sampled_probs
from cfsd.generate.server.protocol import Pieces, special_tokens
from cfsd.generate.server.sampler import sample_from_server, served_by
from cfsd.generate.spec import GenerateSpec
from cfsd.machine import Connection
from cfsd.model.distribution import distribution_of
from cfsd.model.sample import Sample

STREAM = "server check"  # rows of no corpus and no probe
FIRST_TOKENS = 512
ROWS, ROW_LENGTH = 8, 32
SIGNIFICANCE = 1e-4  # seeds are fixed, so a false alarm would come back each time
SMALLEST_EXPECTED = 5.0  # counts per bin; rarer tokens are counted together
# Mean |difference| of log-probabilities, nats. A float32 server is 1e-5 away; llama.cpp's 4-bit SmolLM2-135M, which
# rounds activations to 8 bits, 0.07 from the same weights dequantised; other weights or another temperature over 0.3.
TOLERANCE = 0.15
TEMPERATURES = np.round(np.arange(0.1, 2.05, 0.05), 2)


class First(NamedTuple):
    """First tokens: the law they should follow, as counts, and what came; tokens that cannot be told apart last."""

    expected: "np.ndarray[Any, Any]"
    seen: "np.ndarray[Any, Any]"

    def p_value(self) -> float:
        """Return the chi-square p-value, bins of few expected counts pooled."""
        common = self.expected >= SMALLEST_EXPECTED
        expected = np.append(self.expected[common], self.expected[~common].sum())
        seen = np.append(self.seen[common], self.seen[~common].sum())
        if expected[-1] < SMALLEST_EXPECTED:  # too few for a bin of their own
            smallest = int(expected[:-1].argmin())
            expected[smallest] += expected[-1]
            seen[smallest] += seen[-1]
            expected, seen = expected[:-1], seen[:-1]
        return float(chisquare(seen, expected).pvalue) if len(seen) > 1 else 1.0


@torch.inference_mode()
def check_server(
    connection: Connection,
    model: "PreTrainedModel",
    start: int,
    spec: GenerateSpec,
    tokenizer: "PreTrainedTokenizerBase",
    eos_ids: Sequence[int],
    tolerance: float = TOLERANCE,
) -> dict[str, JsonValue]:
    """Return the facts of a check of the server against the recipe's own `model`, which is passed.

    FIRST_TOKENS first tokens against `spec` by chi-square; the log-probabilities of ROWS rows against a fresh forward
    pass, their mean absolute difference at most `tolerance` nats. At temperature 1 the signed mean difference estimates
    KL(server || model) per token. Raises BadInput naming what differs and what to do.
    """
    served = served_by(connection, [start], spec, eos_ids, tokenizer)

    def sampled(rows: range, length: int) -> list[Sample | str]:
        changed = {"length": length, "min_length": min(spec.min_length, length), "rows": len(rows)}
        asked = spec.model_copy(update=changed)
        prompts = [[start]] * len(rows)
        return sample_from_server(connection, prompts, asked, rows, stream=STREAM, eos_ids=eos_ids, tokenizer=tokenizer)

    texts = sampled(range(FIRST_TOKENS, FIRST_TOKENS + 2 * ROWS), min(spec.length, ROW_LENGTH))
    rows = [row for row in texts if isinstance(row, Sample)][:ROWS]
    dropped = [row for row in texts if isinstance(row, str)]
    if len(rows) < ROWS // 2:
        raise BadInput(
            f"of {len(texts)} rows of the server {connection.base_url} only {len(rows)} could be used (the first: "
            f"{dropped[0]}); use a server that gives token ids (vLLM, SGLang, llama-server)"
        )
    apart = _differences(model, rows, connection, tolerance)
    first = sampled(range(FIRST_TOKENS), 1)
    logits_V = model(torch.tensor([[start]], device=model.device)).logits[0, -1].float().cpu()
    vague = sorted(Pieces(tokenizer).vague | special_tokens(tokenizer) | set(eos_ids))
    counts = _first(logits_V, spec, eos_ids, vague, first)
    p = counts.p_value()
    if p < SIGNIFICANCE:
        raise BadInput(_other_spec(logits_V, spec, eos_ids, vague, first, p, connection))
    return {
        **served.metadata(),
        "first_token_p_value": p,
        "logprob_difference_mean": float(np.abs(apart).mean()),
        "logprob_difference_signed": float(apart.mean()),
        "logprob_difference_max": float(np.abs(apart).max()),
        "checked_rows_dropped": len(dropped),
    }


def _differences(
    model: "PreTrainedModel", rows: list[Sample], connection: Connection, tolerance: float
) -> "np.ndarray[Any, Any]":
    """Return reported minus own log-probability of each sampled token. Raises BadInput if they are not the model's."""
    logits = [_own_logits(model, row) for row in rows]
    reported = np.array([value for row in rows for value in row.logprobs if value is not None])
    own = np.concatenate([_chosen(logits_TV, row) for logits_TV, row in zip(logits, rows, strict=True)])
    apart: np.ndarray[Any, Any] = reported - own
    if np.abs(apart).mean() <= tolerance:
        return apart
    problem = (
        f"the log-probabilities that the server {connection.base_url} reports are not those of the recipe's model: "
        f"{np.abs(apart).mean():.3f} nats apart on average over {len(apart)} tokens, {tolerance} is allowed"
    )
    for temperature in TEMPERATURES:
        scaled = [_chosen(logits_TV / temperature, row) for logits_TV, row in zip(logits, rows, strict=True)]
        if np.abs(reported - np.concatenate(scaled)).mean() <= tolerance:
            raise BadInput(
                f"{problem}; they are those after a temperature of {temperature}: start it so that it reports the "
                "model's own (vLLM: --logprobs-mode raw_logprobs, SGLang: SGLANG_RETURN_ORIGINAL_LOGPROB=1)"
            )
    raise BadInput(f"{problem}; serve the model of the recipe's base, without adapters and at least at 4 bits")


def _own_logits(model: "PreTrainedModel", row: Sample) -> Tensor:
    ids = torch.tensor([row.token_ids], device=model.device)
    logits_TV: Tensor = model(ids, use_cache=False).logits[0, :-1].float().cpu()
    return logits_TV


def _chosen(logits_TV: Tensor, row: Sample) -> "np.ndarray[Any, Any]":
    """Return log p of the sampled tokens."""
    logprobs_TV = logits_TV.log_softmax(-1)
    sampled = [t for t, value in enumerate(row.logprobs) if value is not None]
    chosen: np.ndarray[Any, Any] = np.array([logprobs_TV[t - 1, row.token_ids[t]].item() for t in sampled])
    return chosen


def _first(
    logits_V: Tensor, spec: GenerateSpec, eos_ids: Sequence[int], vague: list[int], rows: list[Sample | str]
) -> First:
    barred_B = torch.tensor([spec.min_length > 0])
    probs_V = sampled_probs(distribution_of(logits_V[None]), spec, eos_ids, barred_B)[0].double()
    expected = _merged((probs_V / probs_V.sum()).numpy() * len(rows), vague)
    tokens = [row.token_ids[1] if isinstance(row, Sample) else vague[0] for row in rows]
    return First(expected, _merged(np.bincount(tokens, minlength=len(logits_V)).astype(float), vague))


def _merged(counts: "np.ndarray[Any, Any]", vague: list[int]) -> "np.ndarray[Any, Any]":
    """Return `counts` with those of `vague` tokens in one place: strings do not tell them apart."""
    return np.append(np.delete(counts, vague), counts[vague].sum())


def _other_spec(
    logits_V: Tensor,
    spec: GenerateSpec,
    eos_ids: Sequence[int],
    vague: list[int],
    rows: list[Sample | str],
    p: float,
    connection: Connection,
) -> str:
    """Return the message for first tokens that do not follow `spec`, with the guess that explains them, if one does."""
    tokens = [row.token_ids[1] for row in rows if isinstance(row, Sample)]
    logprobs_V = logits_V.log_softmax(-1)
    likelihoods = [(logits_V / t).log_softmax(-1)[tokens].sum().item() for t in TEMPERATURES]
    temperature = float(TEMPERATURES[int(np.argmax(likelihoods))])
    kept = int(logits_V.argsort(descending=True).argsort()[tokens].max()) + 1
    guesses: dict[str, dict[str, Any]] = {
        f"temperature={temperature}": {"temperature": temperature},
        f"top_k={kept} or another cut of the tail": {"top_k": kept},
    }
    fits = {
        name: _first(logits_V, spec.model_copy(update=change), eos_ids, vague, rows).p_value()
        for name, change in guesses.items()
    }
    best = max(fits, key=lambda name: fits[name])
    mean, wanted = logprobs_V[tokens].mean().item(), (logprobs_V.exp() * logprobs_V).sum().item()
    guess = f"They look like {best}. " if fits[best] > SIGNIFICANCE else ""
    return (
        f"the first tokens of the server {connection.base_url} do not follow the recipe's law (chi-square over "
        f"{len(rows)}: p = {p:.1e}): their mean log-probability under the recipe's model is {mean:.2f} nats, the "
        f"model's own {wanted:.2f}. {guess}Serve the recipe's base unchanged, and start the server without sampling "
        "defaults (vLLM: --generation-config vllm), penalties, biases or grammars"
    )
