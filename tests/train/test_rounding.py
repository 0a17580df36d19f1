"""A base in 16 bits: what is trained is kept in float32 beside what is saved, and what rounding takes back is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cfsd.evaluate.divergence import score_probe
from cfsd.merge.stage import merge
from cfsd.model.loading import load_model
from cfsd.model.loading import save_model as save_model_of
from cfsd.model.rounding import EXACT, rounding_of
from cfsd.store.artifact import Artifact, Store
from tests.conftest import save_model, write_rows
from tests.model.folders import write_weights
from tests.train.test_train import MACHINE, World, diverged, signals_given_back, spec_with, trained, weights, world_in

pytestmark = pytest.mark.processes
__all__ = ["signals_given_back"]
TINY, PLENTY = 2e-5, 3e-3  # learning rates: below and far above the spacing of bfloat16 at weights of about 0.3


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = save_model(tmp_path_factory.mktemp("half"))
    load_model(folder, "cpu", "bfloat16").save_pretrained(folder)
    there = tmp_path_factory.mktemp("world")
    return world_in(Store(there / "data"), folder, write_rows(there / "rows.jsonl", count=48))


def tuned_at(half: World, rate: float, **given: Any) -> Artifact:
    return trained(half, f"{rate} {len(given)}", half.mixture, spec_with(learning_rate=rate, **given))


def exact_world(half: World, model: Artifact) -> Any:
    return load_file(half.store.path(model) / EXACT / "model.safetensors")


@pytest.mark.parametrize("rate", [TINY, PLENTY])
def test_the_model_is_saved_as_the_base_is_and_kept_as_it_was_trained(half: World, rate: float) -> None:
    model = tuned_at(half, rate)
    saved, exact, start = weights(half, model), exact_world(half, model), weights(half, half.base)
    assert saved.keys() == exact.keys() == start.keys()
    for name, tensor in exact.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.bfloat16(), saved[name])
    change, left = (
        torch.cat([(side[name].double() - start[name].double()).flatten() for name in sorted(start)])
        for side in (exact, saved)
    )
    undone = 1 - float(left @ change) / float(change @ change)
    assert model.metadata["rounding_undid"] == pytest.approx(undone, abs=1e-6)
    assert undone > 0.5 if rate == TINY else undone < 0.01


def test_each_tensor_is_saved_in_the_format_that_it_has_in_the_base(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "base")
    load_model(folder, "cpu", "bfloat16").save_pretrained(folder)
    write_weights(folder, lambda tensors: {n: t.float() + 1e-4 if "norm" in n else t for n, t in tensors.items()})
    config = json.loads((folder / "config.json").read_text())
    formats = {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}
    assert {*formats.values()} == {torch.float32, torch.bfloat16}
    save_model_of(load_model(folder, "cpu", "float32"), folder, tmp_path / "saved")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "saved"))
    assert {name: tensor.dtype for name, tensor in after.items()} == formats
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == config["dtype"] == "bfloat16"


def test_a_training_that_rounding_takes_back_is_told_with_the_remedy(half: World) -> None:
    (line,) = tuned_at(half, TINY).metadata["said"]  # type: ignore[misc]
    assert "saving in bfloat16, the base's number format, takes back" in str(line)
    assert "raise train.learning_rate, or convert the base to float32" in str(line)
    assert "said" not in tuned_at(half, PLENTY).metadata


def test_what_is_measured_is_what_is_saved(half: World) -> None:
    model = tuned_at(half, TINY)

    def score(draft: Any) -> None:
        score_probe(half.base, model, half.sample, draft, MACHINE)

    found = float(half.store.make("scores", "tiny", score)[0].metadata["probe_kl"])  # type: ignore[arg-type]
    assert found == pytest.approx(diverged(half, model), rel=1e-4)
    exact = load_model(half.store.path(model) / EXACT, "cpu", "float32").eval()
    start = load_model(half.store.path(half.base), "cpu", "float32").eval()
    ids = torch.randint(2, 30, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        laws = [net(ids).logits.log_softmax(-1) for net in (start, exact)]
    assert float((laws[0].exp() * (laws[0] - laws[1])).sum(-1).mean()) > 2 * found  # as trained it had moved further


def test_merging_starts_from_the_weights_before_rounding(half: World, tmp_path: Path) -> None:
    model, alpha = tuned_at(half, PLENTY), 0.3
    found = merge(half.store.path(half.base), half.store.path(model), alpha, tmp_path, "cpu")
    merged, exact, start = load_file(tmp_path / "model.safetensors"), exact_world(half, model), weights(half, half.base)
    twice = 0
    for name, tensor in exact.items():
        own = tensor.lerp(start[name].float(), 1 - alpha)
        assert torch.equal(merged[name], own.bfloat16())  # rounded once, at the end
        twice += int((merged[name] != tensor.bfloat16().float().lerp(start[name].float(), 1 - alpha).bfloat16()).sum())
    assert twice > 100  # from the rounded weights other numbers would have come out
    assert abs(float(found["rounding_undid"])) < 0.05  # type: ignore[arg-type]


def test_lora_is_merged_in_float32_and_rounded_once(half: World) -> None:
    model = tuned_at(half, PLENTY, methods={"lora": {"rank": 4}})
    folder, start = half.store.path(model), weights(half, half.base)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    exact, saved = exact_world(half, model), weights(half, model)
    pairs = {name.split(".lora_A")[0] for name in adapter if ".lora_A" in name}
    assert len(pairs) == 14
    for name in pairs:
        own = name.removeprefix("base_model.model.") + ".weight"
        added = adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]  # alpha = rank
        assert torch.allclose(exact[own], start[own].float() + added, atol=1e-7)
        assert torch.equal(saved[own], exact[own].bfloat16())


@pytest.mark.parametrize(("shift", "undone"), [(2.0**-11, 1.0), (2.0**-7, 0.0)])
def test_the_share_that_rounding_takes_back_of_a_known_change(half: World, shift: float, undone: float) -> None:
    """At 1 the spacing of bfloat16 is 2^-7: an eighth of half of it falls back, a whole step stays."""
    layer = torch.nn.Linear(3, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1 + shift)
    base = half.store.path(half.base)
    found = rounding_of(layer, lambda _, parameter: torch.ones_like(parameter), base)
    assert (found.by, found.to) == ("saving", "bfloat16")
    assert found.undone == pytest.approx(undone, abs=1e-9)


def test_a_base_in_float32_is_neither_rounded_nor_kept_twice(tmp_path: Path) -> None:
    world = world_in(Store(tmp_path / "data"), save_model(tmp_path / "whole"), write_rows(tmp_path / "r.jsonl"))
    model = trained(world, "whole", world.plain, spec_with(learning_rate=TINY))
    assert "rounding_undid" not in model.metadata and not (world.store.path(model) / EXACT).exists()
    layer = torch.nn.Linear(3, 3)
    anchors = dict(layer.named_parameters())
    on_cpu, on_cuda = (
        rounding_of(layer, lambda name, _: anchors[name] - 1e-6, world.store.path(world.base), device)
        for device in ("cpu", "cuda")
    )
    assert on_cpu.note() is None and "measuring in bfloat16, as on CUDA, takes back" in str(on_cuda.note())
