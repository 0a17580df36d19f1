"""Rows side by side without padding are computed as rows one by one, and none sees another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cfsd.model.loading import load_model
from cfsd.train.batches.micro_batches import MicroBatch, Row, micro_batches_of
from cfsd.train.loss.objective import Objective, losses
from cfsd.train.loss.packed import ATTENTION, packed_forward, prepare_packed
from cfsd.train.spec import RehearsalSpec
from tests.conftest import save_model

FAMILIES = ["llama", "olmo", "gpt2", "qwen2"]
LENGTHS = (9, 9, 7, 3, 3, 3, 1)


def loaded(folder: Path, family: str) -> Any:
    return load_model(save_model(folder / family, family=family), "cpu").eval()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    longest = max(LENGTHS)
    real_BT = torch.arange(longest)[None] < torch.tensor(LENGTHS)[:, None]
    return torch.randint(2, 20, (len(LENGTHS), longest), generator=generator) * real_BT, real_BT


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_each_row_alone(tmp_path: Path, family: str) -> None:
    model = loaded(tmp_path, family)
    token_ids_BT, real_BT = batch()
    rows = [token_ids_BT[i : i + 1, :length] for i, length in enumerate(LENGTHS)]
    with torch.no_grad():
        alone = torch.cat([model.base_model(input_ids=row).last_hidden_state[0] for row in rows])
        assert prepare_packed(model)
        found = packed_forward(model.base_model, token_ids_BT, real_BT)
    assert torch.allclose(found, alone, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_row_sees_another_to_the_bit(tmp_path: Path, family: str) -> None:
    model = loaded(tmp_path, family)
    assert prepare_packed(model)
    token_ids_BT, real_BT = batch()
    other_BT = batch(seed=1)[0]
    other_BT[2] = token_ids_BT[2]  # all rows but the third are others
    with torch.no_grad():
        first, second = (packed_forward(model.base_model, ids, real_BT) for ids in (token_ids_BT, other_BT))
    place = slice(sum(LENGTHS[:2]), sum(LENGTHS[:3]))
    assert torch.equal(first[place], second[place])
    assert not torch.allclose(first[: place.start], second[: place.start])


def micro_batches(seed: int = 0) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, length in enumerate((12, 5, 9, 9, 2)):
        tokens = torch.randint(2, 20, (length,), generator=generator).tolist()
        supervised = [False] + [t > length // 3 or i > 2 for t in range(1, length)]
        rows.append(Row("target" if i < 3 else "context-free", tokens, supervised, 1.0))
    return micro_batches_of(rows, 200)


def gradients(model: Any, objective: Objective) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    total = 0.0
    for micro_batch in micro_batches():
        found = losses(model, micro_batch, 0.7)
        found.loss.backward()
        total += float(found.loss)
    objective.remove()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_padded_rows(tmp_path: Path, family: str, checkpointing: bool) -> None:
    model = loaded(tmp_path, family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # both ways would draw other numbers
    if checkpointing:
        model.gradient_checkpointing_enable()
    objective = Objective(model, RehearsalSpec())
    assert objective.unpadded
    own = gradients(model, objective)
    padded = Objective(model, RehearsalSpec())
    padded.unpadded = False
    other = gradients(model, padded)
    assert own[0] == pytest.approx(other[0], rel=1e-5)
    for name, gradient in other[1].items():
        assert torch.allclose(own[1][name], gradient, atol=1e-5), name
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in other[1].values())


def test_the_passes_hold_no_padding(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    seen: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    objective = Objective(model, RehearsalSpec())
    seen.clear()  # of what was tried
    gradients(model, objective)
    assert seen == [(1, 12 + 5 + 9 + 9 + 2)]


def test_a_window_over_tokens_keeps_rows_padded(tmp_path: Path) -> None:
    model = loaded(tmp_path, "gemma2")
    before = model.config._attn_implementation
    assert not prepare_packed(model)
    assert model.config._attn_implementation == before


def test_a_model_that_takes_no_notice_of_rows_stays_as_it_was(tmp_path: Path) -> None:
    """Attention of its own, which sees all that is in the pass."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from cfsd.train.loss.packed import _attention

    def own(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **named: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, None, **named)

    model = loaded(tmp_path, "llama")
    AttentionInterface.register(ATTENTION, own)
    try:
        assert not prepare_packed(model)
    finally:
        AttentionInterface.register(ATTENTION, _attention)
    assert model.config._attn_implementation == "sdpa"
    assert prepare_packed(model)


def test_what_is_not_side_by_side_is_computed_as_before(tmp_path: Path) -> None:
    """Scoring and writing answers during training: padding to the left, with a mask."""
    model = loaded(tmp_path, "llama")
    token_ids_BT, real_BT = (part.flip(1) for part in batch())
    given = {"input_ids": token_ids_BT, "attention_mask": real_BT.long()}
    with torch.no_grad():
        before = model(**given).logits
        written = model.generate(**given, max_new_tokens=5, do_sample=False)
        assert prepare_packed(model)
        assert torch.equal(model(**given).logits[real_BT], before[real_BT])
        assert torch.equal(model.generate(**given, max_new_tokens=5, do_sample=False), written)


def test_the_saved_model_names_no_attention_of_ours(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    assert prepare_packed(model)
    model.save_pretrained(tmp_path / "saved")
    assert ATTENTION not in (tmp_path / "saved" / "config.json").read_text()
