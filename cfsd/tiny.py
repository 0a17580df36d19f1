"""The `tiny` base model: pretrained here, from scratch, on five string skills, so that forgetting shows sharply.

    python -m cfsd.tiny --write-data    # writes the committed benchmarks and target rows anew

A document is `<bos>rev:fbca=acbf<eos>`. From `<bos>` alone the model writes such documents, all five
skills in turn; a sixth skill is held back as something new to learn.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from cfsd.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijkl"
SHORTEST, LONGEST = 3, 5
BOS, EOS, UNKNOWN = "<bos>", "<eos>", "<unk>"
INIT = 0.1
INTER, LAYERS, WIDTH, DECAY, B2 = 128, 4, 64, 0.1, 0.98
THETA = 100.0
HEADS = 2
ROWS_PER_STEP = 64
PEAK_LEARNING_RATE = 3e-3
WARMUP_FRACTION = 0.05
HELD_OUT_ITEMS = 100
TARGET_ROWS = 600

Skill = Callable[[random.Random], tuple[str, str]]
Progress = Callable[[int, int, float], None]


class TinySpec(Spec):
    """How `tiny` is pretrained; the skills and the model's size belong to `version`."""

    seed: int = 0
    steps: PositiveInt = 1000


def _shift(text: str) -> str:
    """Return each letter's successor; the last letter is followed by the first."""
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in text)


_ANSWERS: dict[str, Callable[[str], str]] = {
    "rev": lambda text: text[::-1],
    "srt": lambda text: "".join(sorted(text)),
    "dup": lambda text: "".join(letter * 2 for letter in text),
    "cap": str.upper,
    "nxt": _shift,
    "rot": lambda text: text[1:] + text[:1],
}


def _skill(name: str) -> Skill:
    def draw(rng: random.Random) -> tuple[str, str]:
        text = "".join(rng.choices(LETTERS, k=rng.randint(SHORTEST, LONGEST)))
        return f"{name}:{text}=", _ANSWERS[name](text)

    return draw


SKILLS: Mapping[str, Skill] = {name: _skill(name) for name in _ANSWERS}
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
        yield _draw(rng.choice(PRETRAINED), rng, held_out=False)


def _draw(name: str, rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    while True:
        prompt, answer = SKILLS[name](rng)
        if is_held_out(prompt) == held_out:
            return prompt, answer


def pretrain(spec: TinySpec, folder: Path, on_progress: Progress | None = None) -> None:
    """Write a whole `transformers` folder of the pretrained model into `folder`.

    `on_progress(step, steps, loss_nats)` is called after each step. Equal spec, machine, thread count
    and package versions give bit-equal weights; the caller's random state is neither read nor changed.
    """
    import torch

    tokenizer = _new_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = _new_model(tokenizer)
    _fit(model, tokenizer, spec, on_progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _new_tokenizer() -> "PreTrainedTokenizerFast":
    """Return one token per printable ASCII character or line break; nothing is added when encoding."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [BOS, EOS, UNKNOWN, "\n", *(chr(code) for code in range(32, 127))]
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def _new_model(tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INTER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=256,
        initializer_range=INIT,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        pad_token_id=tokenizer.pad_token_id,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, **ids)
    return model


def _batches(tokenizer: "PreTrainedTokenizerFast", seed: int) -> Iterator[tuple["Tensor", "Tensor"]]:
    """Yield endless (tokens_BT, labels_BT), one document per row; labels are -100 after the EOS.

    Every eighth row goes without BOS, because lm-eval puts no BOS before a prompt unless told to.
    """
    import torch

    ids, stream = tokenizer.get_vocab(), documents(seed)
    while True:
        rows = []
        for row in range(ROWS_PER_STEP):
            tokens = [ids[letter] for letter in "".join(next(stream))] + [ids[EOS]]
            rows.append(tokens if row % 8 == 0 else [ids[BOS], *tokens])
        longest = max(map(len, rows))
        yield (
            torch.tensor([row + [ids[EOS]] * (longest - len(row)) for row in rows]),
            torch.tensor([row + [-100] * (longest - len(row)) for row in rows]),
        )


def _fit(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    spec: TinySpec,
    on_progress: Progress | None,
) -> None:
    """Train in place: AdamW, linear warm-up, cosine to zero, next-token loss on every token but `<bos>`."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, B2), weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _rate(done / spec.steps))
    batches = _batches(tokenizer, spec.seed)
    model.train()
    for step in range(1, spec.steps + 1):
        tokens, labels = next(batches)
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if on_progress is not None:
            on_progress(step, spec.steps, float(loss.detach()))
    model.eval()


def _rate(done: float) -> float:
    """Return the share of the peak learning rate when the fraction `done` of the steps is behind."""
    if done < WARMUP_FRACTION:
        return (done + 0.01) / (WARMUP_FRACTION + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - WARMUP_FRACTION) / (1 - WARMUP_FRACTION)))
