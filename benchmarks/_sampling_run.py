"""One contender of the sampling benchmark, in a process of its own so that its peak memory is its own.

python -m benchmarks._sampling_run ROLE MODEL_FOLDER       jobs in, answers out: one JSON a line
python -m benchmarks._sampling_run fetch DATA_FOLDER [MODEL_FOLDER]      prints where the model is

ROLE is ours, generate, generate-static or bound.
"""

import functools
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from benchmarks._bound import attention_flops, flops_per_token, limit, skeleton
from cfsd.data.corpus_table import corpus_table
from cfsd.generate import grouped_attention, key_value_cache, sampling
from cfsd.generate.sampling import Rows, sample
from cfsd.generate.spec import GenerateSpec
from cfsd.machine import peak_memory
from cfsd.model.checkpoint import Checkpoint
from cfsd.model.fetching import fetch
from cfsd.model.loading import load_model, load_tokenizer, read_start_token
from cfsd.model.sample import Sample
from cfsd.store.tables import corpus_schema, shard_path, write_shard

TEXT = Path(__file__).parents[1] / "README.md"  # any real text will do: it is what the windows' caches are filled from
Answer = dict[str, Any]
OnStep = Callable[[int], None]


def main() -> None:
    """Do the jobs that come on standard input."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    role, folder = sys.argv[1], Path(sys.argv[2])
    if role == "fetch":
        print(_fetch(folder, sys.argv[3:]))
        return
    contender = Bound(folder) if role == "bound" else Contender(role, folder)
    for line in sys.stdin:
        job = json.loads(line)
        answer = getattr(contender, job.pop("do"))(**job)
        answer["peak_mb"] = peak_memory() / 2**20
        print(json.dumps(answer), flush=True)


def _fetch(data: Path, given: Sequence[str]) -> Path:
    from cfsd.store.artifact import Store

    checkpoint = Checkpoint(kind="folder", path=given[0]) if given else Checkpoint(kind="smollm2")
    store = Store(data)
    return store.path(store.make("model", "base", lambda draft: fetch(checkpoint, draft))[0])


class Bound:
    """The machine's rate of matrix products, at the model's own shapes and at squares."""

    def __init__(self, folder: Path) -> None:
        """Look at the model in `folder`, without its weights."""
        self.model = skeleton(folder)

    def rate(self, rows: int) -> Answer:
        """Measure what a forward pass over `rows` tokens cannot exceed."""
        return limit(self.model, rows, fixed=True)._asdict()

    def price(self, positions: list[int]) -> Answer:
        """Return the floating-point operations of one token, and what attention adds at `positions`."""
        attention = {position: attention_flops(self.model, position) for position in positions}
        return {"flops_per_token": flops_per_token(self.model), "attention_flops": attention}


class Contender:
    """Our sampler, or transformers' generate with its default or its static cache."""

    def __init__(self, role: str, folder: Path) -> None:
        """Load the model in `folder`."""
        self.role, self.folder = role, folder
        self.model = load_model(folder, "cpu", "float32").eval().requires_grad_(False)
        self.start = read_start_token(folder)

    def whole(self, rows: int, length: int, seed: int = 0, top: int = 0) -> Answer:
        """Sample `rows` rows of `length` tokens behind the start token."""
        prompts = [[self.start]] * rows
        started = time.perf_counter()
        if self.role == "ours":
            tokens = sum(len(s.token_ids) - 1 for s in self._sample(rows, length, seed, top))
        else:
            torch.manual_seed(seed)
            tokens = self._generate(prompts, length)
        return {"seconds": time.perf_counter() - started, "tokens": tokens}

    def stored(self, rows: int, length: int, top: int) -> Answer:
        """Return the bytes of a token on disk, text included."""
        samples = self._sample(rows, length, 0, top)
        with tempfile.TemporaryDirectory() as folder:
            table = corpus_table(
                dict(enumerate(samples)), load_tokenizer(self.folder), corpus_schema(top, self.model.config.vocab_size),
                source="context-free", shard=0, seed=0,
            )  # fmt: skip
            write_shard(Path(folder), "corpus", 0, table)
            size = shard_path(Path(folder), "corpus", 0).stat().st_size
        return {"bytes": size / sum(len(s.token_ids) - 1 for s in samples)}

    def _sample(self, rows: int, length: int, seed: int, top: int) -> list[Sample]:
        return sample(self.model, Rows(range(rows), [[self.start]] * rows, (), "bench"), _law(rows, length, top, seed))

    def window(self, rows: int, after: int, steps: int, room: int, top: int = 0) -> Answer:
        """Return seconds per step of `steps` after a prompt of `after` tokens, in a run that has room for `room`.

        The first two are not timed: one is the prompt's, one may lay out memory.
        """
        clock = Clock(steps)
        with PromptOnce(self.model):
            self._until(clock, [self._text(after)] * rows, room, top)
        return {"step_seconds": (clock.times[-1] - clock.times[1]) / (steps - 2)}

    def profile(self, rows: int, after: int, steps: int, room: int) -> Answer:
        """Return seconds per step by section, of ours; once per process."""
        sections = Sections()
        sections.watch_functions(self.model)
        with PromptOnce(self.model):
            clock = Clock(steps, lambda: sections.watch_products(self.model))
            self._until(clock, [self._text(after)] * rows, room)
        total = (clock.times[-1] - clock.times[0]) / (steps - 1)
        known = {name: seconds / (steps - 1) for name, seconds in sections.seconds.items()}
        return {"total": total, "sections": known | {"the loop": total - sum(known.values())}}

    def _until(self, clock: "Clock", prompts: list[list[int]], room: int, top: int = 0) -> None:
        try:
            if self.role == "ours":
                rows = Rows(range(len(prompts)), prompts, (), "bench")
                sample(self.model, rows, _law(len(prompts), room, top, 0), on_step=clock)
            else:
                self._generate(prompts, room, clock)
        except Enough:
            return
        raise AssertionError(f"{self.role} gave {len(clock.times)} of {clock.steps} steps")

    def _generate(self, prompts: list[list[int]], length: int, on_step: OnStep | None = None) -> int:
        """Return how many tokens were sampled."""
        given_BP = torch.tensor(prompts)
        law = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=length, use_cache=True,
            eos_token_id=None, pad_token_id=0,
            cache_implementation="static" if self.role == "generate-static" else None,
        )  # fmt: skip
        self.model.generation_config = law  # generate takes from there what `law` leaves open
        criteria = StoppingCriteriaList([StepReport(on_step)] if on_step else [])
        out_BT = self.model.generate(
            given_BP, attention_mask=torch.ones_like(given_BP), generation_config=law, stopping_criteria=criteria
        )
        return int(cast(torch.Tensor, out_BT)[:, given_BP.shape[1] :].numel())

    @functools.cache  # noqa: B019 - one contender to a process
    def _text(self, count: int) -> list[int]:
        ids = load_tokenizer(self.folder).encode(TEXT.read_text(), add_special_tokens=False)
        assert len(ids) >= count, f"{TEXT.name} has only {len(ids)} tokens"
        return [self.start, *ids][:count]


def _law(rows: int, length: int, top: int, seed: int) -> GenerateSpec:
    """Return what ours samples: as vLLM lists the likeliest, without samples of the tail."""
    return GenerateSpec(rows=rows, length=length, seed=seed, top_logprobs=top, tail_samples=0)


class Enough(Exception):
    """A window has its steps."""


class Clock:
    """Note when each step was done, and stop after `steps` of them, the prompt's included."""

    def __init__(self, steps: int, on_first: Callable[[], None] = lambda: None) -> None:
        """Call `on_first` when the prompt is done."""
        self.steps, self.on_first = steps, on_first
        self.times: list[float] = []

    def __call__(self, step: int) -> None:
        if not self.times:
            self.on_first()
        self.times.append(time.perf_counter())
        if len(self.times) == self.steps:
            raise Enough


class StepReport(StoppingCriteria):
    """Never stops; reports each step of generate, at the same point as our `on_step`."""

    def __init__(self, on_step: OnStep) -> None:
        """Keep what is called at each step."""
        self.on_step = on_step

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.on_step(0)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class PromptOnce:
    """The prompt's forward pass is made for one row, whose keys and values all rows get: their prompts are equal.

    It is not timed, and for 64 rows of 500 tokens it would take longer than all that is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Take over `model.forward` while entered."""
        self.model, self.forward = model, model.forward

    def __enter__(self) -> None:
        @functools.wraps(self.forward)  # generate reads the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            given_BP, past = kwargs["input_ids"], kwargs["past_key_values"]
            if given_BP.shape[1] == 1:
                return self.forward(*args, **kwargs)
            own: Any = DynamicCache(config=self.model.config)
            logits = self.forward(input_ids=given_BP[:1], past_key_values=own, use_cache=True, logits_to_keep=1).logits
            for index, layer in enumerate(own.layers):
                rows = (len(given_BP), -1, -1, -1)
                past.update(layer.keys.expand(rows), layer.values.expand(rows), index)
            return CausalLMOutputWithPast(logits=logits.expand(len(given_BP), -1, -1), past_key_values=past)

        self.model.forward = forward

    def __exit__(self, *_: object) -> None:
        self.model.forward = self.forward


class Sections:
    """Seconds by section; what a section calls in another one counts there."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside: list[float] = []

    def watch_functions(self, model: PreTrainedModel) -> None:
        """Time the parts of our sampler; lasts as long as the process."""
        self._time(grouped_attention, "attend", "layers: attention")
        self._time(model, "forward", "layers: norms, rotation and the rest")
        self._time(key_value_cache.PreallocatedLayer, "update", "cache")
        self._time(key_value_cache.PreallocatedLayer, "batch_select_indices", "cache")
        self._time(sampling, "distribution_of", "choosing: softmax")
        self._time(sampling, "sampled_probs", "choosing: the token")
        self._time(sampling, "sample_token", "choosing: the token")
        self._time(sampling, "likeliest", "top log-probabilities")
        self._time(sampling.Batch, "take", "bookkeeping")

    def watch_products(self, model: PreTrainedModel) -> None:
        """Time the layers that multiply as they are by now, with packed weights, and forget what was counted so far."""
        head = model.get_output_embeddings()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                self._time(module, "forward", "head" if module is head else "layers: matrix products")
        self.seconds.clear()

    def _time(self, owner: Any, name: str, section: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inside.append(0.0)
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                self.seconds[section] += took - self.inside.pop()
                if self.inside:
                    self.inside[-1] += took

        setattr(owner, name, timed)


if __name__ == "__main__":
    main()
