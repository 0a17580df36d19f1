"""The `tiny` model: its folder, its determinism, its data, and that it has the five skills."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_pretraining import (
    ANSWERS,
    LETTERS,
    LONGEST,
    NEW_SKILL,
    PRETRAINED,
    SHORTEST,
    SKILLS,
    documents,
    is_held_out,
    pretrain,
    write_data,
)
from cfsd.model.checkpoint import TinySpec
from cfsd.model.tiny import shipped

ROOT = Path(__file__).parent.parent


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def strings(prompts: Iterable[str]) -> set[str]:
    return {prompt.partition(":")[2].rstrip("=") for prompt in prompts}


def held_out() -> set[str]:
    files = sorted((ROOT / "cfsd" / "evaluate" / "benchmarks").glob("tiny_*.jsonl"))
    return strings(row["prompt"] for file in files for row in rows_of(file))


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    pretrain(TinySpec(steps=3), made)
    return made


def test_folder_loads_and_decodes_greedily_unless_told_otherwise(folder: Path) -> None:
    import torch

    model, tokenizer = load(folder)
    prompt = torch.tensor([[tokenizer.bos_token_id]])
    first, second = (model.generate(prompt, max_new_tokens=5) for _ in range(2))
    assert torch.equal(first, second)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.bos_token_id


@pytest.mark.parametrize("text", ["rev:abcd=dcba", " two  spaces, a line\n\nbreak, 'quotes' and #~|{} ", "A.B !", ""])
def test_text_survives_the_round_trip_with_one_token_per_character(folder: Path, text: str) -> None:
    tokenizer = load(folder)[1]
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_special_tokens_come_only_when_written_or_asked_for(folder: Path) -> None:
    tokenizer = load(folder)[1]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = tokenizer.encode("rev:abc=")
    assert not {bos, eos, tokenizer.unk_token_id} & set(plain)
    assert tokenizer.encode("<bos>rev:abc=<eos>") == [bos, *plain, eos]
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]
    tokenizer.add_bos_token = True
    assert tokenizer.encode("rev:abc=") == [bos, *plain]


def test_equal_specs_give_equal_bits_and_leave_the_callers_randomness_alone(folder: Path, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(123)
    before = torch.get_rng_state()
    steps: list[tuple[int, int]] = []
    pretrain(TinySpec(steps=3), tmp_path / "again", lambda step, total, _: steps.append((step, total)))
    pretrain(TinySpec(steps=3, seed=1), tmp_path / "other")
    assert torch.equal(torch.get_rng_state(), before)
    assert weights(tmp_path / "again") == weights(folder) != weights(tmp_path / "other")
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_pretraining_never_sees_a_string_that_measures() -> None:
    prompts = [prompt for prompt, _ in islice(documents(seed=0), 20_000)]
    assert not any(map(is_held_out, prompts))
    assert not strings(prompts) & held_out()
    assert {prompt.partition(":")[0] for prompt in prompts} == set(PRETRAINED)


def test_target_rows_teach_the_new_skill_without_its_benchmark() -> None:
    prompts = [row["prompt"] for row in rows_of(ROOT / "deployments" / "recipes" / "tiny_target.jsonl")]
    assert not strings(prompts) & held_out()
    assert all(prompt.startswith(f"{NEW_SKILL}:") for prompt in prompts)
    assert len(set(prompts)) == len(prompts)


def test_committed_data_is_what_the_writer_makes(tmp_path: Path) -> None:
    write_data(tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: (ROOT / path).read_bytes() for path in made} == made
    assert {path.stem for path in made if path.suffix == ".yaml"} == {f"tiny_{name}" for name in SKILLS}


def test_its_settings_import_neither_torch_nor_transformers() -> None:
    code = "import cfsd.model.checkpoint, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def pretrained(folder: Path) -> None:
    pretrain(TinySpec(), folder)


@pytest.mark.parametrize("make", [shipped, pytest.param(pretrained, marks=pytest.mark.slow)])
def test_the_model_is_exact_and_writes_valid_documents(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    model, tokenizer = load(tmp_path)
    for name in PRETRAINED:
        rows = rows_of(ROOT / "cfsd" / "evaluate" / "benchmarks" / f"tiny_{name}.jsonl")
        for start in ("", "<bos>"):
            answers = answers_of(model, tokenizer, [start + row["prompt"] for row in rows])
            right = sum(answers[start + row["prompt"]] == row["answer"] for row in rows)
            assert right >= 0.98 * len(rows), (name, start, right)
    assert share_of_valid_samples(model, tokenizer) >= 0.9


def answers_of(model: Any, tokenizer: Any, prompts: list[str]) -> dict[str, str]:
    import torch

    by_length: defaultdict[int, list[str]] = defaultdict(list)
    for prompt in prompts:
        by_length[len(prompt)].append(prompt)
    answers: dict[str, str] = {}
    for group in by_length.values():
        ids = torch.tensor([tokenizer.encode(prompt) for prompt in group])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16)[:, ids.shape[1] :]
        answers |= dict(zip(group, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True))
    return answers


def share_of_valid_samples(model: Any, tokenizer: Any, count: int = 300) -> float:
    import torch

    torch.manual_seed(0)
    ids = torch.full((count, 1), tokenizer.bos_token_id)
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=24
    )
    return sum(map(is_valid, tokenizer.batch_decode(written, skip_special_tokens=True))) / count


def is_valid(document: str) -> bool:
    name, _, rest = document.partition(":")
    text, _, answer = rest.partition("=")
    known = name in PRETRAINED and set(text) <= set(LETTERS) and SHORTEST <= len(text) <= LONGEST
    return known and ANSWERS[name](text) == answer
