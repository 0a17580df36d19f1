"""Greedy answers equal those of transformers' generate, token for token, in float32."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cfsd.errors import NotFinite
from cfsd.evaluate.harness import language_model
from cfsd.evaluate.harness.greedy import is_greedy, stop_check, write
from tests.conftest import save_model
from tests.evaluate.test_score import WRITE, scores_of
from tests.evaluate.test_score import model as model
from tests.evaluate.test_score import tokenizer as tokenizer
from tests.evaluate.test_score import write as write_benchmark

SAME = [5, 6, 7, 8, 9]
PROMPTS = [[*SAME, 10, 11], [*SAME, 12], [*SAME, *range(2, 22)], [*SAME, 10, 11, 3], [*SAME, 4, 4], [*SAME, 30]]
LIMIT = 24


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "qwen2"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[list[int]]]:
    """A random model of each family, and what transformers writes without an end."""
    folder = save_model(tmp_path_factory.mktemp(request.param), family=request.param, seed=3)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return loaded, generated(loaded, PROMPTS, eos=None)


def generated(model: Any, prompts: list[list[int]], eos: int | None) -> list[list[int]]:
    """Return what `generate` writes, up to the end token."""
    longest = max(map(len, prompts))
    token_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id = eos
    out = model.generate(token_ids, attention_mask=mask, do_sample=False, max_new_tokens=LIMIT, pad_token_id=0)
    rows = out[:, longest:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def test_answers_equal_generate(written: Any) -> None:
    model, unended = written
    assert write(model, PROMPTS, LIMIT, []) == unended
    assert [write(model, [prompt], LIMIT, []) for prompt in PROMPTS] == [[row] for row in unended]


def test_rows_end_at_their_own_lengths(written: Any) -> None:
    model, unended = written
    for eos in {unended[0][2], unended[1][-1], unended[2][7]}:
        wanted = generated(model, PROMPTS, eos)
        assert write(model, PROMPTS, LIMIT, [eos]) == wanted
    lengths = list(map(len, generated(model, PROMPTS, unended[0][2])))
    assert lengths[0] <= 3 and max(lengths) > min(lengths)


def test_prompts_that_begin_alike_are_read_once(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, unended = written
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    assert write(model, PROMPTS, LIMIT, []) == unended
    hook.remove()
    assert shapes[:3] == [(1, len(SAME)), (len(PROMPTS), 1), (len(PROMPTS), 1)]
    assert write(model, [SAME, SAME], LIMIT, []) == 2 * write(model, [SAME], LIMIT, [])


def test_a_stop_sequence_ends_its_row_only(written: Any) -> None:
    model, unended = written
    stop = unended[0][4:6]  # two tokens, as a text of two letters
    ended = write(model, PROMPTS, LIMIT, [], stop_check(lambda tokens: "".join(map(chr, tokens)), ["", *_texts(stop)]))
    wanted = []
    for row in unended:
        ends = [i + 2 for i in range(LIMIT - 1) if row[i : i + 2] == stop]
        wanted.append(row[: ends[0]] if ends else row)
    assert ended == wanted and len(ended[0]) <= 6 and stop_check(str, [""]) is None


def _texts(tokens: list[int]) -> list[str]:
    return ["".join(map(chr, tokens))]


def test_only_plain_greedy_decoding_is_ours(model: Any) -> None:
    assert is_greedy(model, {"do_sample": False}) and is_greedy(model, {"temperature": 0.0})
    for other in ({"do_sample": True}, {"temperature": 0.5}, {"num_beams": 2}, {"repetition_penalty": 1.1}):
        assert not is_greedy(model, other)
    penalised = copy.deepcopy(model)
    penalised.generation_config.repetition_penalty = 1.1  # some checkpoints bring it, and `generate` obeys
    assert not is_greedy(penalised, {"do_sample": False})


@pytest.mark.parametrize("limit", [1, 4, 20])
@pytest.mark.parametrize("until", [["\n"], ["a", "de"], []], ids=["newline", "letters", "none"])
def test_scores_equal_those_by_generate(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: list[str], limit: int
) -> None:
    write_benchmark(tmp_path, WRITE, generation_kwargs={"until": until, "max_gen_toks": limit})
    ours = scores_of(model, tokenizer, tmp_path, "write")
    monkeypatch.setattr(language_model, "is_greedy", lambda *_: False)
    theirs = scores_of(model, tokenizer, tmp_path, "write")
    assert ours.rows.equals(theirs.rows) and ours.metadata == theirs.metadata


def test_a_model_that_gives_nan_is_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write_benchmark(tmp_path, WRITE)
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(NotFinite, match="logits are not finite"):
        scores_of(broken, tokenizer, tmp_path, "write")
