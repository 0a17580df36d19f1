"""What each family of models can do here: measured on tiny random models, and written as a page of the documentation.

python -m benchmarks.architectures [FAMILY ...]    all take about a minute; without names the page is written
"""

import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.utils import logging

from benchmarks._exactness import LOSSES, corpus, loss_error, measuring_error, merging_error, sampling_error
from benchmarks._families import FAMILIES, Family
from cfsd.generate.key_value_cache import preallocated
from cfsd.model.architecture import auxiliary_loss, context_of, refusal
from cfsd.train.loss.objective import Objective
from cfsd.train.methods import Methods

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "architectures.md"
EXACT = {torch.float64: 2e-6, torch.float32: 5e-5}  # nats, and relatively for gradients; weights of the tiny models
LORA = Methods.model_validate({"lora": {"rank": 2}})
HEAD = (
    "| family | sampling | training loss | rows of a pass | live and stored KL | LoRA trains | note |\n|" + "---|" * 7
)


class Result(NamedTuple):
    """What was found for one family: differences from the definitions, and which paths were taken."""

    family: Family
    why_refused: str | None = None
    sampling: float = 0.0
    measuring: float = 0.0
    losses: dict[str, tuple[float, float]] = {}
    merging: float = 0.0
    lora_share: float = 0.0
    idle: int = 0  # matrices of LoRA without an effect
    is_cached: bool = True
    is_chunked: bool = True
    is_packed: bool = False
    note: str = ""

    def cells(self) -> list[str]:
        """Return the family's row of the table."""
        if self.why_refused:
            return [self.family.name, *["refused"] * 5, self.why_refused]
        sampling = self._word(max(self.sampling, self.measuring)) + ("" if self.is_cached else ", slower: generate")
        loss = self._word(max(self.losses["nll"])) + ("" if self.is_chunked else ", slower: all logits at once")
        divergence = self._word(max(max(self.losses[kind]) for kind in ("live", "sampled", "bucket")))
        lora = f"{self.lora_share:.0%}" if self.merging < EXACT[self.family.dtype] else "INEXACT"
        rows = "packed" if self.is_packed else "padded"
        return [self.family.name, sampling, loss, rows, divergence, lora, self.note]

    def _word(self, difference: float) -> str:
        return "exact" if difference < EXACT[self.family.dtype] else "INEXACT"


def measure(family: Family) -> Result:
    """Measure one family."""
    config = family.config().to_dict()
    if why := refusal(config):
        return Result(family, why)
    base, model, lora = (family.model(seed) for seed in (0, 1, 1))
    samples = corpus(base)
    objective = Objective(family.model(1), LOSSES["nll"])
    merging, trained, idle = merging_error(lora, LORA)
    context = context_of(config)
    limit = f"rows of at most {context.tokens} of {config['max_position_embeddings']} tokens" if context.why else None
    without = f"{idle} of LoRA's matrices have no gradient" if idle else None
    left_out = f"LoRA not beside {', '.join(trained.left_out)}" if trained.left_out else None
    return Result(
        family,
        None,
        sampling_error(base, samples),
        measuring_error(base, samples),
        {kind: loss_error(model, base, kind, samples) for kind in LOSSES},
        merging,
        trained.share,
        idle,
        preallocated(base, 1) is not None,
        objective.head_of(objective.model) is not None,
        objective.unpadded,
        "; ".join(line for line in (limit, auxiliary_loss(config), left_out, without) if line),
    )


def line_of(result: Result) -> str:
    """Return the row of the table as Markdown."""
    return f"| {' | '.join(result.cells())} |"


def page_of(results: list[Result]) -> str:
    """Return the whole page."""
    worst = {
        dtype: [r for r in results if r.family.dtype == dtype and not r.why_refused]
        for dtype in (torch.float64, torch.float32)
    }
    reached = "; ".join(
        f"{str(dtype).removeprefix('torch.')} ({len(found)} families): sampling and measuring "
        f"{max(max(r.sampling, r.measuring) for r in found):.0e} nats, losses "
        f"{max(pair[0] for r in found for pair in r.losses.values()):.0e} nats, gradients "
        f"{max(pair[1] for r in found for pair in r.losses.values()):.0e}, merged LoRA "
        f"{max(r.merging for r in found):.0e}"
        for dtype, found in worst.items()
    )
    return INTRODUCTION.format(reached=reached) + "\n".join([HEAD, *map(line_of, results)]) + "\n" + READING


INTRODUCTION = """# Architectures

Which models are sampled and trained exactly, family by family. Made by `python -m benchmarks.architectures`; a test
measures every row again.

Each family is a random model of two layers (four for Gemma 3n) with a vocabulary of 151. *Exact* means: the
log-probabilities recorded by the sampling loop (with its cache, prompts of unequal length, rows that leave the batch)
and those of texts that exist are those of one forward pass over each row alone; and the loss and its whole gradient,
over micro-batches of several rows, are those of the definition, with all logits of each row alone. That no row sees
another follows from it. Largest differences when this page was written: {reached}. Sampled log-probabilities are kept
in float32; mixtures of experts and Mamba compute in float32 at most. On a CPU; on GPUs no family was compared yet.

"""
READING = """
*Slower: generate*: the model keeps a state of its own kind, so rows go through transformers' `generate`, and none
leaves the batch before all have ended. *Slower: all logits at once*: the output is more than one linear layer, and the
logits of a whole micro-batch are held. Both are said in the run, and kept as `said` in the metadata.
*Padded*: rows of a micro-batch are padded to the longest; *packed*: on CPUs they are not.

*LoRA trains*: the share of the layers' weights (embeddings and output layer apart) that have matrices beside them when
`lora.targets` is empty; in these tiny models, so experts' shares differ in yours. In transformers 5 experts are one
parameter for all of them: name it to train it, as in `lora.targets: [q_proj, gate_up_proj, down_proj]`. Where
experts stand beside plain MLPs (DeepSeek-V3, Qwen3-Next), PEFT takes `gate_proj`, `up_proj` and `down_proj` to mean
the experts. What is left out is said in the run. Layers whose weights are read without being called (Mamba's time
step) get none.

Families that are not in the table are tried as well: before the first row is sampled, a dozen tokens are compared with
a forward pass, and a model that fails is refused by its name; the output layer and packed rows are compared with the
model's own logits and states before training, and take the slower path where they differ. What these trials cannot
show is a difference that begins after more tokens than they have.

## Lengths

Long rope (Phi-3, Phi-4) and dynamic rope rotate all tokens of a pass by other frequencies once its longest row is above
`original_max_position_embeddings`. Up to there a row has one distribution; longer samples are refused, and longer
target rows are dropped and counted, as rows above `target.max_length` are. The same holds for sparse attention
(DeepSeek-V3.2, GLM-MoE-DSA) above `index_topk` tokens: up to there it sees all of them.

## Routers

With `output_router_logits` a model adds a loss that balances its experts to the loss it computes itself. Training
here computes its own loss and leaves that one out, which the run says: it would pull the routers away from the base for
a reason that is neither the target nor the rehearsal.

## Dropout

A base is sampled and measured without dropout. In training the target's rows are computed with the dropout that the
base's configuration sets (0.1 in GPT-2 and OPT) or with `lora.dropout`, and rehearsal rows without it, in a pass of
their own, without gradient checkpointing: the divergence is one between two functions, and with dropout it would not be
0 at the base itself.
"""


def main(names: list[str]) -> None:
    """Measure the families whose name contains one of `names`, or all of them, and then write the page."""
    logging.set_verbosity_error()
    results = []
    for family in FAMILIES:
        if names and not any(name.lower() in family.name.lower() for name in names):
            continue
        started = time.perf_counter()
        results.append(measure(family))
        print(line_of(results[-1]), f"{time.perf_counter() - started:.1f} s", flush=True)
    if not names:
        PAGE.write_text(page_of(results))
        print(f"written: {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
