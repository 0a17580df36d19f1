"""How the answers to benchmarks ended, and what else may make a score other than it looks."""

from collections.abc import Iterator, Mapping
from typing import Any

from cfsd.store.artifact import Artifact

ENDINGS = ("max_gen_toks", "at_limit", "unfinished", "left_out")  # in the metadata of scores
WORTH_SAYING = 0.05  # share of answers
MAX_SAID = 3  # of lm-eval's own warnings


def answers_of(before: Mapping[str, Artifact], after: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return the fields `answers` and `evaluation_warnings` of a summary, from the scores of both models."""
    answers, said = {}, []
    for name, base in before.items():
        scores = {"base": base.metadata, "tuned": after[name].metadata}
        if endings := {role: ends for role, metadata in scores.items() if (ends := _endings(metadata))}:
            answers[name] = endings
        said += [f"{name}: {warning}" for role, metadata in scores.items() for warning in _warnings(role, metadata)]
    return {"answers": answers, "evaluation_warnings": list(dict.fromkeys(said))}


def _endings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metadata[name] for name in ENDINGS if name in metadata}


def _warnings(role: str, metadata: Mapping[str, Any]) -> Iterator[str]:
    if (share := metadata.get("at_limit", 0)) > WORTH_SAYING:
        yield (
            f"{share:.0%} of the {role} model's answers were cut off at {metadata['max_gen_toks']} tokens "
            "(raise the benchmark's max_gen_toks)"
        )
    if (share := metadata.get("unfinished", 0)) > WORTH_SAYING:
        yield f"{share:.0%} of the {role} model's answers never came out of their reasoning and count as empty"
    if left_out := metadata.get("left_out"):
        yield f"the metric does not apply to {left_out} documents, which are left out"
    yield from (f"lm-eval: {said}" for said in list(metadata.get("warnings", ()))[:MAX_SAID])
