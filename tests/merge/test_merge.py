"""Between base and tuned: the ends are theirs bit for bit, the middle is halfway, tied weights stay tied."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cfsd.merge.stage import merge
from cfsd.model.loading import load_model, load_tokenizer
from cfsd.model.special_tokens import settle_start_token
from tests.conftest import save_model


@pytest.fixture
def ends(model_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    base = Path(shutil.copytree(model_folder, tmp_path / "base"))
    settle_start_token(base, load_tokenizer(base), None)
    return base, save_model(tmp_path / "tuned", seed=1)


def merged(ends: tuple[Path, Path], alpha: float) -> Path:
    folder = ends[0].with_name(f"merged {alpha}")
    folder.mkdir()
    merge(*ends, alpha, folder, "cpu")
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("alpha", "end"), [(0.0, 0), (1.0, 1)])
def test_the_ends_are_base_and_tuned_bit_for_bit(ends: tuple[Path, Path], alpha: float, end: int) -> None:
    found, wanted = weights(merged(ends, alpha)), weights(ends[end])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_way_between_is_straight(ends: tuple[Path, Path]) -> None:
    base, tuned = map(weights, ends)
    found = weights(merged(ends, 0.25))
    for name, tensor in found.items():
        assert torch.allclose(tensor, 0.75 * base[name] + 0.25 * tuned[name], atol=1e-7)
    assert not all(torch.equal(tensor, base[name]) for name, tensor in found.items())


def test_tied_weights_stay_tied(ends: tuple[Path, Path]) -> None:
    folder = merged(ends, 0.5)
    assert "lm_head.weight" not in weights(folder)
    model = load_model(folder, "cpu")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head is not None and head.weight is embedding.weight


def test_what_surrounds_the_weights_comes_along(ends: tuple[Path, Path]) -> None:
    folder = merged(ends, 0.5)
    for name in ("tokenizer.json", "start_token.json"):
        assert (folder / name).read_bytes() == (ends[0] / name).read_bytes()


def test_the_number_format_is_that_of_the_base(ends: tuple[Path, Path]) -> None:
    model = load_model(ends[0], "cpu", "bfloat16")
    model.save_pretrained(ends[0])
    folder = merged(ends, 0.5)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}


def test_a_merge_needs_no_memory_of_a_gpu(ends: tuple[Path, Path], tmp_path: Path) -> None:
    """Two models in float32 are 8 bytes a weight: the device only says in which format the result is measured."""
    base, tuned = ends
    merged = [tmp_path / device for device in ("cpu", "cuda")]
    found = [merge(base, tuned, 0.5, folder, folder.name) for folder in merged]  # torch finds no GPU here
    assert weights(merged[0]).keys() == weights(merged[1]).keys()
    assert all(torch.equal(one, weights(merged[1])[name]) for name, one in weights(merged[0]).items())
    assert found[1] != found[0] == {}  # on a GPU it is measured in bfloat16
