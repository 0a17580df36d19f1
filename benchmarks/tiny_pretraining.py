"""Pretrains the `tiny` base model, and writes the committed files that are made from its skills.

A document is `<bos>rev:fbca=acbf<eos>`. From `<bos>` alone the model writes such documents, all five skills in turn;
a sixth skill is held back as something new to learn, so that forgetting is sharp.

python -m benchmarks.tiny_pretraining --write-data       # writes the committed benchmarks and target rows anew
python -m benchmarks.tiny_pretraining --write-weights    # pretrains the committed weights anew, in a minute
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cfsd.model.checkpoint import TinySpec
from cfsd.model.tiny import BOS, EOS, WEIGHTS, new_model, new_tokenizer

ROWS_PER_STEP = 64
PEAK_LEARNING_RATE = 3e-3
WARMUP_FRACTION = 0.05
HELD_OUT_ITEMS = 100
TARGET_ROWS = 600
LETTERS = "abcdefghijkl"
SHORTEST, LONGEST = 3, 5

Progress = Callable[[int, int, float], None]
Skill = Callable[[random.Random], tuple[str, str]]


def _shift(text: str) -> str:
    """Return each letter's successor; the last letter is followed by the first."""
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in text)


ANSWERS: dict[str, Callable[[str], str]] = {
    "rev": lambda text: text[::-1],
    "srt": lambda text: "".join(sorted(text)),
    "dup": lambda text: "".join(letter * 2 for letter in text),
    "cap": str.upper,
    "nxt": _shift,
    "rot": lambda text: text[1:] + text[:1],
}


def _skill(name: str) -> Skill:
    def sample(rng: random.Random) -> tuple[str, str]:
        text = "".join(rng.choices(LETTERS, k=rng.randint(SHORTEST, LONGEST)))
        return f"{name}:{text}=", ANSWERS[name](text)

    return sample


SKILLS: Mapping[str, Skill] = {name: _skill(name) for name in ANSWERS}
NEW_SKILL = "rot"
PRETRAINED = tuple(name for name in SKILLS if name != NEW_SKILL)


def is_held_out(prompt: str) -> bool:
    """Say whether the prompt's string belongs to the tenth kept for measuring, whatever the skill."""
    text = prompt.partition(":")[2].rstrip("=")
    return hashlib.sha256(text.encode()).digest()[0] < 26


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """Yield the endless (prompt, answer) stream of pretraining; no string of it is held out."""
    rng = random.Random(seed)
    while True:
        yield sample_row(rng.choice(PRETRAINED), rng, held_out=False)


def sample_row(name: str, rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    """Return a (prompt, answer) of the skill `name`, for measuring or for training."""
    while True:
        prompt, answer = SKILLS[name](rng)
        if is_held_out(prompt) == held_out:
            return prompt, answer


def pretrain(spec: TinySpec, folder: Path, on_progress: Progress | None = None) -> None:
    """Write a whole `transformers` folder of the pretrained model into `folder`.

    `on_progress(step, steps, loss_nats)` is called after each step. Equal spec, machine, thread count
    and package versions give bit-equal weights; the caller's random state is neither read nor changed.
    """
    tokenizer = new_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = new_model(tokenizer)
    _fit(model.train(), _batches(tokenizer, spec.seed), spec.steps, on_progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless (tokens_BT, labels_BT), one document per row; labels are -100 after the EOS.

    Every eighth row goes without BOS, because lm-eval and target prompts have none unless asked for.
    """
    ids, stream = tokenizer.get_vocab(), documents(seed)
    while True:
        rows = []
        for row in range(ROWS_PER_STEP):
            tokens = [ids[letter] for letter in "".join(next(stream))] + [ids[EOS]]
            rows.append(tokens if row % 8 == 0 else [ids[BOS], *tokens])
        longest = max(map(len, rows))
        tokens_BT = torch.tensor([row + [ids[EOS]] * (longest - len(row)) for row in rows])
        labels_BT = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
        yield tokens_BT, labels_BT


def _fit(
    model: LlamaForCausalLM,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    on_progress: Progress | None,
) -> None:
    """Train in place: AdamW, warm-up, cosine to zero, next-token loss on every token but the first."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.98),
        weight_decay=0.1,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _rate((done + 0.5) / steps))
    for step in range(1, steps + 1):
        tokens_BT, labels_BT = next(batches)
        loss = model(input_ids=tokens_BT, labels=labels_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if on_progress is not None:
            on_progress(step, steps, float(loss.detach()))


def _rate(done: float) -> float:
    """Return the share of the peak learning rate when the fraction `done` of the steps is behind."""
    return min(1.0, done / WARMUP_FRACTION) * 0.5 * (1 + math.cos(math.pi * done))


# The command was `python -m cfsd.tiny` when these files were made; their bytes are in keys.
_BENCHMARK = """\
# String skill: is the answer exact, as in `{example}`? Written by `python -m cfsd.tiny --write-data`.
task: tiny_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: tiny_{name}.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
num_fewshot: 0
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 16
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: false
    ignore_punctuation: false
metadata:
  version: 1
  chance: 0
"""


def data_files() -> dict[str, str]:
    """Return the committed files that are made from the skills, text by path relative to the clone."""
    files = {}
    for name in SKILLS:
        rows = _distinct(name, HELD_OUT_ITEMS, held_out=True)
        files[f"cfsd/evaluate/benchmarks/tiny_{name}.yaml"] = _BENCHMARK.format(name=name, example="".join(rows[0]))
        files[f"cfsd/evaluate/benchmarks/tiny_{name}.jsonl"] = _lines(("prompt", "answer"), rows)
    rows = _distinct(NEW_SKILL, TARGET_ROWS, held_out=False)
    files["deployments/recipes/tiny_target.jsonl"] = _lines(("prompt", "response"), rows)
    return files


def _distinct(name: str, count: int, *, held_out: bool) -> list[tuple[str, str]]:
    """Return `count` different rows; those for measuring have strings that no training row has."""
    rng, rows = random.Random(f"{name} {held_out}"), dict[str, str]()
    while len(rows) < count:
        rows.update([sample_row(name, rng, held_out=held_out)])
    return list(rows.items())


def _lines(columns: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)


def write_data(clone: Path) -> None:
    """Write `data_files` under the folder `clone`."""
    for name, text in data_files().items():
        path = clone / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_weights() -> None:
    """Pretrain the model and write the weights that are committed."""
    with tempfile.TemporaryDirectory() as folder:
        pretrain(TinySpec(), Path(folder), lambda step, steps, loss: print(f"{step}/{steps} {loss:.3f}", end="\r"))
        shutil.copy(Path(folder) / "model.safetensors", WEIGHTS)


def main() -> None:
    """Read the command line and write what is committed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny_pretraining", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write-data", action="store_true", help="benchmarks, target rows")
    what.add_argument("--write-weights", action="store_true", help="the base model, pretrained anew")
    if parser.parse_args().write_weights:
        write_weights()
    else:
        write_data(Path(__file__).parents[1])


if __name__ == "__main__":
    main()
