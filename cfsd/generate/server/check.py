"""The start check: does a server sample from the recipe's model as the recipe says? T tokens, V vocabulary."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.errors import BadInput
from cfsd.generate.server.capabilities import WITH_IDS
from cfsd.generate.server.protocol import ServerSampling, text_of
from cfsd.generate.server.sampler import sample_from_server, served_by
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.token_choice import sampled_probs
from cfsd.model.distribution import distribution_of
from cfsd.model.sample import Sample
from cfsd.statistics.sample_tests import counts_p

HALF = "\N{REPLACEMENT CHARACTER}"  # in the text of a token that is a part of a character
STREAM = "server check"  # rows of no corpus and no probe
FIRST_TOKENS = 512
ROWS, ROW_LENGTH = 8, 32
SIGNIFICANCE = 1e-4  # seeds are fixed, so a false alarm would come back each time
# Mean |difference| of log-probabilities, nats. A float32 server is 1e-5 away; llama.cpp's 4-bit SmolLM2-135M, which
# rounds activations to 8 bits, 0.07 from the same weights dequantised; other weights or another temperature over 0.3.
TOLERANCE = 0.15
TEMPERATURES = [round(0.05 * step, 2) for step in range(2, 41)]


@torch.inference_mode()
def check_server(wanted: ServerSampling, model: PreTrainedModel, start: int) -> dict[str, JsonValue]:
    """Return the metadata of a check of the server against the recipe's own `model`.

    FIRST_TOKENS first tokens against `wanted.spec` by chi-square; the log-probabilities of ROWS rows against a fresh
    forward pass, their mean absolute difference at most TOLERANCE nats. At temperature 1 the signed mean difference
    estimates KL(server || model) per token. Raises BadInput naming what differs and what to do.
    """
    served, spec = served_by(wanted, [start]), wanted.spec

    def sampled(rows: range, length: int) -> list[Sample | str]:
        changed = {"length": length, "min_length": min(spec.min_length, length), "rows": len(rows)}
        part = wanted._replace(spec=spec.model_copy(update=changed), stream=STREAM)
        return sample_from_server(part, [[start]] * len(rows), rows)

    texts = sampled(range(FIRST_TOKENS, FIRST_TOKENS + 2 * ROWS), min(spec.length, ROW_LENGTH))
    rows = [row for row in texts if isinstance(row, Sample)][:ROWS]
    dropped = [row for row in texts if isinstance(row, str)]
    if len(rows) < ROWS // 2:
        raise BadInput(
            f"of {len(texts)} rows of the server {wanted.machine.base_url} only {len(rows)} could be used (the first: "
            f"{dropped[0]}); {WITH_IDS}"
        )
    differences = _differences(model, rows, wanted)
    first = _FirstTokens(
        model(torch.tensor([[start]], device=model.device)).logits[0, -1].float().cpu(),
        sampled(range(FIRST_TOKENS), 1),
        [token for token in range(len(wanted.tokenizer)) if HALF in text_of(wanted.tokenizer, [token])],
    )
    if (p := first.p_value(spec, wanted.eos_ids)) < SIGNIFICANCE:
        raise BadInput(_other_distribution(first, wanted, p))
    return {
        **served.metadata(),
        "first_token_p_value": p,
        "logprob_difference_mean": float(np.abs(differences).mean()),
        "logprob_difference_signed": float(differences.mean()),
        "logprob_difference_max": float(np.abs(differences).max()),
        "checked_rows_dropped": len(dropped),
    }


class _FirstTokens(NamedTuple):
    """The first tokens of rows, and the logits by which they should be sampled."""

    logits_V: Tensor
    rows: list[Sample | str]
    halves: list[int]  # parts of a character, which llama.cpp lists not alone: dropped rows count as one of them

    def p_value(self, spec: GenerateSpec, eos_ids: Sequence[int]) -> float:
        """Return the p-value of the tokens under `spec`."""
        barred_B = torch.tensor([spec.min_length > 0])
        probs_V = sampled_probs(distribution_of(self.logits_V[None]), spec, eos_ids, barred_B)[0].double().numpy()
        tokens = [row.token_ids[1] for row in self.rows if isinstance(row, Sample)]
        seen_V = np.bincount(tokens, minlength=len(probs_V)).astype(float)
        expected_V = probs_V / probs_V.sum() * len(self.rows)
        return counts_p(self._merged(seen_V, len(self.rows) - len(tokens)), self._merged(expected_V))

    def _merged(self, counts_V: NDArray[Any], dropped: int = 0) -> NDArray[Any]:
        return np.append(np.delete(counts_V, self.halves), counts_V[self.halves].sum() + dropped)


def _differences(model: PreTrainedModel, rows: list[Sample], wanted: ServerSampling) -> NDArray[Any]:
    """Return reported minus own log-probability of each sampled token. Raises BadInput if they are not the model's."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    if (largest := max(token for row in rows for token in row.token_ids)) >= vocabulary:
        raise BadInput(
            f"the server {wanted.machine.base_url} sampled token {largest}, but the recipe's model has {vocabulary} "
            "tokens: it serves another model; serve the one of the recipe's base"
        )
    batches = [torch.tensor([row.token_ids], device=model.device) for row in rows]
    logits_NV = torch.cat([model(ids_1T, use_cache=False).logits[0, :-1].float().cpu() for ids_1T in batches])
    sampled_N1 = torch.tensor([token for row in rows for token in row.token_ids[1:]])[:, None]
    reported = np.array([logprob for row in rows for logprob in row.logprobs[1:]])

    def difference(temperature: float) -> Any:
        own_N1 = (logits_NV / temperature).log_softmax(-1).gather(1, sampled_N1)
        return reported - own_N1[:, 0].double().numpy()

    differences: NDArray[Any] = difference(1.0)
    if (mean := np.abs(differences).mean()) <= TOLERANCE:
        return differences
    problem = (
        f"the log-probabilities that the server {wanted.machine.base_url} reports are not those of the recipe's model: "
        f"{mean:.3f} nats apart on average over {len(reported)} tokens, {TOLERANCE} is allowed"
    )
    for temperature in TEMPERATURES:
        if np.abs(difference(temperature)).mean() <= TOLERANCE:
            raise BadInput(
                f"{problem}; they are those after a temperature of {temperature}: start it so that it reports the "
                "model's own (vLLM: --logprobs-mode raw_logprobs, SGLang: SGLANG_RETURN_ORIGINAL_LOGPROB=1)"
            )
    raise BadInput(f"{problem}; serve the model of the recipe's base, without adapters and at least at 4 bits")


def _other_distribution(first: _FirstTokens, wanted: ServerSampling, p: float) -> str:
    """Return the message for first tokens that do not follow the spec, with a guess why if one explains them."""
    logits_V, logprobs_V = first.logits_V, first.logits_V.log_softmax(-1)
    tokens = [row.token_ids[1] for row in first.rows if isinstance(row, Sample)]
    largest_rank = int(logits_V.argsort(descending=True).argsort()[tokens].max()) + 1
    guesses: dict[str, dict[str, Any]] = {f"temperature={t}": {"temperature": t} for t in TEMPERATURES}
    guesses[f"top_k={largest_rank} or another cut of the tail"] = {"top_k": largest_rank}
    fits = {
        name: first.p_value(wanted.spec.model_copy(update=change), wanted.eos_ids) for name, change in guesses.items()
    }
    best = max(fits, key=lambda name: fits[name])
    mean, own = logprobs_V[tokens].mean().item(), (logprobs_V.exp() * logprobs_V).sum().item()
    guess = f"They look like {best}. " if fits[best] > SIGNIFICANCE else ""
    return (
        f"the first tokens of the server {wanted.machine.base_url} do not follow the recipe's distribution "
        f"(chi-square over {len(first.rows)}: p = {p:.1e}): their mean log-probability under the recipe's model is "
        f"{mean:.2f} nats, the model's own {own:.2f}. {guess}Serve the recipe's base unchanged, and start the server "
        "without sampling defaults (vLLM: --generation-config vllm), penalties, biases or grammars"
    )
