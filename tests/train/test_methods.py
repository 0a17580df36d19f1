"""Contract of every method: nothing at the base, a pull elsewhere, the same function adapted and folded."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.osf.layer import OSFLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn
from transformers import (
    AutoConfig,
    GPT2LMHeadModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cfsd.errors import BadInput
from cfsd.merge.stage import merge
from cfsd.model.loading import load_model, load_tokenizer
from cfsd.model.special_tokens import settle_start_token
from cfsd.spec import Spec
from cfsd.train.adapters import KeepDirections, adapt, check_layers, merge_trained, trained_by
from cfsd.train.methods import Methods
from cfsd.train.methods.ewc import FisherSpec
from cfsd.train.methods.fisher import FILE
from cfsd.train.methods.l2 import L2
from cfsd.train.methods.method import Estimate, Method, Pull
from cfsd.train.methods.stm import Stm
from cfsd.train.penalties import Penalty, penalties_of, plain_name
from tests.conftest import save_model

# A method that is added to `Methods` is to be added here, with settings that turn it on.
ON: dict[str, dict[str, Any]] = {
    "l2": {"weight": 0.3}, "ewc": {"weight": 0.7, "rows": 8}, "lora": {"rank": 3}, "osft": {"preserved": 0.5},
    "dft": {"power": 1.0}, "eaft": {"power": 0.5}, "stm": {"threshold": 2.5}, "target_divergence": {"weight": 0.1},
}  # fmt: skip
PULLING = [name for name in ON if Methods.model_validate({name: ON[name]}).pulls()]
ADAPTING = [name for name in ON if Methods.model_validate({name: ON[name]}).adapter()]
FAMILIES = ["llama", "olmo", "gpt2", "qwen2", "gemma2"]
ADAPTED = [(name, family) for name in ADAPTING for family in FAMILIES if (name, family) != ("osft", "gpt2")]
IDS = torch.tensor([[0, 5, 9, 3, 17, 8, 2, 11, 30, 6]])


def on(*names: str) -> Methods:
    return Methods.model_validate({name: ON[name] for name in names})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_model(tmp_path_factory.mktemp(family), family=family) for family in FAMILIES}


@pytest.fixture(scope="module")
def fisher(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some positive number for every weight of the Llama-shaped base."""
    folder, generator = tmp_path_factory.mktemp("fisher"), torch.Generator().manual_seed(3)
    names = load_model(folders["llama"], "cpu").named_parameters()
    save_file({name: torch.rand(p.shape, generator=generator) for name, p in names}, folder / FILE)
    return folder


def moved(model: nn.Module, seed: int = 1, size: float = 0.05) -> nn.Module:
    """Return `model` after a step of everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def one_penalty(name: str, base: Path, fisher: Path | None) -> Penalty:
    (penalty,) = penalties_of(on(name), base, fisher)
    return penalty


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_settings_here_turn_every_method_on() -> None:
    assert set(ON) == set(Methods.model_fields)
    assert all(list(on(name).by_name()) == [name] for name in ON)
    for name, method in ((name, on(name).by_name()[name]) for name in ON):
        assert not Methods.model_validate({name: ON[name] | {method.strength: 0}}).by_name()
    assert Methods().by_name() == {}


def test_without_methods_nothing_happens(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(folders["llama"], "cpu")
    assert adapt(Methods(), model) is model
    assert merge_trained(Methods(), model, tmp_path) is model and not list(tmp_path.iterdir())
    assert penalties_of(Methods(), folders["llama"], None) == []


# Penalties


@pytest.mark.parametrize("name", PULLING)
def test_a_penalty_is_nothing_at_the_base(name: str, folders: dict[str, Path], fisher: Path) -> None:
    model, penalty = load_model(folders["llama"], "cpu"), one_penalty(name, folders["llama"], fisher)
    assert penalty.add(model) == penalty.figure == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_weights_that_no_model_is_loaded_from_pull_nowhere(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(folders["llama"], folder)
    old = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(old, folder / "model_old.safetensors")
    penalty = one_penalty("l2", folder, None)
    assert penalty.add(load_model(folder, "cpu")) == 0


FORMULAS: dict[str, Callable[[float, Tensor, Tensor], Tensor]] = {
    "l2": lambda weight, away, fisher: weight * away.square().sum(),
    "ewc": lambda weight, away, fisher: weight / 2 * (fisher * away.square()).sum(),
}


@pytest.mark.parametrize("name", PULLING)
def test_a_penalty_pulls_back_by_the_gradient_of_its_formula(name: str, folders: dict[str, Path], fisher: Path) -> None:
    penalty = one_penalty(name, folders["llama"], fisher)
    model = moved(load_model(folders["llama"], "cpu").double())
    base, curvature = load_model(folders["llama"], "cpu").double(), load_file(fisher / FILE)
    inner, expected, wanted = 0.0, 0.0, {}
    for key, start in base.named_parameters():
        theta = model.get_parameter(key).detach().clone().requires_grad_()
        term = FORMULAS[name](ON[name]["weight"], theta - start.detach(), curvature[key].double())
        (wanted[key],) = torch.autograd.grad(term, theta)
        expected += term.item()
    value = penalty.add(model)
    found = gradients(model)
    assert value == pytest.approx(expected, rel=1e-12)
    for key, start in base.named_parameters():
        assert torch.allclose(found[key], wanted[key], rtol=1e-12, atol=0)
        inner += float((found[key] * (model.get_parameter(key) - start).detach()).sum())
    assert inner > 0


@pytest.mark.parametrize("name", PULLING)
def test_a_penalty_adds_to_the_gradient_that_is_there(name: str, folders: dict[str, Path], fisher: Path) -> None:
    alone, added = (moved(load_model(folders["llama"], "cpu")) for _ in range(2))
    one_penalty(name, folders["llama"], fisher).add(alone)
    for parameter in added.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    one_penalty(name, folders["llama"], fisher).add(added)
    for key, gradient in gradients(added).items():
        assert torch.allclose(gradient - 2, gradients(alone)[key], atol=1e-6)


def test_frozen_weights_are_left_alone(folders: dict[str, Path], fisher: Path) -> None:
    model = moved(load_model(folders["llama"], "cpu"))
    embedding = model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    whole = one_penalty("l2", folders["llama"], fisher).add(moved(load_model(folders["llama"], "cpu")))
    assert 0 < one_penalty("l2", folders["llama"], fisher).add(model) < whole
    assert embedding.grad is None


def test_figures_are_the_norm_and_half_the_weighted_sum(folders: dict[str, Path], fisher: Path) -> None:
    model, base = moved(load_model(folders["llama"], "cpu")), load_model(folders["llama"], "cpu")
    away = {key: (p - base.get_parameter(key)).detach().double() for key, p in model.named_parameters()}
    l2, ewc = (one_penalty(name, folders["llama"], fisher) for name in ("l2", "ewc"))
    l2.add(model), ewc.add(model)
    curvature = load_file(fisher / FILE)
    assert l2.figure == pytest.approx(float(sum(d.square().sum() for d in away.values())) ** 0.5, rel=1e-6)
    assert ewc.figure == pytest.approx(sum(float((curvature[k] * d**2).sum()) for k, d in away.items()) / 2, rel=1e-6)


def test_two_penalties_add_up_in_any_number_of_calls(folders: dict[str, Path], fisher: Path) -> None:
    both, alone = moved(load_model(folders["llama"], "cpu")), moved(load_model(folders["llama"], "cpu"))
    penalties = penalties_of(on("l2", "ewc"), folders["llama"], fisher)
    assert [penalty.name for penalty in penalties] == ["l2", "ewc"]
    first = [penalty.add(both) for penalty in penalties]
    both.zero_grad()
    assert [penalty.add(both) for penalty in penalties] == first
    for name in PULLING:
        one_penalty(name, folders["llama"], fisher).add(alone)
    assert all(torch.equal(g, gradients(alone)[k]) for k, g in gradients(both).items())


@pytest.mark.parametrize("family", FAMILIES)
def test_anchors_are_the_weights_of_the_folder_for_every_family(family: str, folders: dict[str, Path]) -> None:
    """Tied weights are in the folder once, in the model twice, in the sum once."""
    model: Any = load_model(folders[family], "cpu")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    value = one_penalty("l2", folders[family], None).add(model)
    assert value == pytest.approx(0.3 * 0.25 * model.get_input_embeddings().weight.numel(), rel=1e-5)


def test_anchors_of_a_half_precision_base_are_its_numbers_in_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    load_model(folders["llama"], "cpu", "bfloat16").save_pretrained(tmp_path)
    model = load_model(tmp_path, "cpu", "float32")
    assert one_penalty("l2", tmp_path, None).add(model) == 0
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_a_checkpoint_with_other_names_on_the_disk_has_the_same_anchors(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """GPT-2's own has no `transformer.` before its names; transformers adds it while loading."""
    inner = GPT2LMHeadModel.from_pretrained(folders["gpt2"]).transformer
    inner.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path, "cpu")
    penalty = one_penalty("l2", tmp_path, None)
    assert penalty.add(model) == 0
    assert penalty.add(moved(model)) > 0


def test_wrappers_do_not_change_names(folders: dict[str, Path]) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = moved(load_model(folders["llama"], "cpu"))
    plain = one_penalty("l2", folders["llama"], None).add(model)
    assert one_penalty("l2", folders["llama"], None).add(Wrapper(model)) == plain
    assert plain_name("module._orig_mod.model.layers.0._checkpoint_wrapped_module.w") == "model.layers.0.w"


def test_anchors_stay_the_bases_when_the_model_was_loaded_from_elsewhere(folders: dict[str, Path]) -> None:
    """As after a resume: the model that the penalty first meets is not the base."""
    model, penalty = moved(load_model(folders["llama"], "cpu")), one_penalty("l2", folders["llama"], None)
    far = penalty.add(model)
    model.load_state_dict(load_model(folders["llama"], "cpu").state_dict())
    assert far > 0 == penalty.add(model)


def _on_one_of_two(rank: int, place: str, base: Path, fisher: Path) -> None:
    """Compare the penalties on shards with those on whole weights; a process of its own."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    whole, model = moved(load_model(base, "cpu")), moved(load_model(base, "cpu"))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for one, two in zip(*(penalties_of(on("l2", "ewc"), base, fisher) for _ in range(2)), strict=True):
        assert one.add(whole) == pytest.approx(two.add(model), rel=1e-6)
        assert one.figure == pytest.approx(two.figure, rel=1e-6)
    for name, gradient in gradients(model).items():
        assert isinstance(gradient, DTensor) and gradient.to_local().numel() < gradient.numel()
        assert torch.equal(gradient.full_tensor(), gradients(whole)[name])
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_of_two_processes_are_pulled_as_the_whole_is(
    folders: dict[str, Path], fisher: Path, tmp_path: Path
) -> None:
    spawn(_on_one_of_two, (str(tmp_path / "meet"), folders["llama"], fisher), nprocs=2)


# Adapters


@pytest.mark.parametrize(("name", "family"), ADAPTED)
def test_adapting_is_the_identity_and_trains_only_what_it_adds(
    name: str, family: str, folders: dict[str, Path]
) -> None:
    model = load_model(folders[family], "cpu")
    before, own = logits(model), {id(parameter) for parameter in model.parameters()}
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head]
    adapted = adapt(on(name), model)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    if name == "osft":  # the part of W that is trained is subtracted and added again
        assert torch.allclose(logits(adapted), before, atol=1e-5)
    else:
        assert torch.equal(logits(adapted), before)
        assert all(3 in parameter.shape for parameter in trained)
    assert len(trained) == {"lora": 2, "osft": 3}[name] * len(layers)
    assert not own & {id(parameter) for parameter in trained}


@pytest.mark.parametrize(("name", "family"), ADAPTED)
def test_folding_keeps_the_function_and_the_adapter(
    name: str, family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(folders[family], "cpu")
    kind, keys = type(model), set(model.state_dict())
    before = logits(model)
    adapted = moved(adapt(on(name), model), size=0.05 if name == "lora" else 0.2)
    trained = logits(adapted)
    plain = merge_trained(on(name), adapted, tmp_path)
    assert (trained - before).abs().max() > 1e-2
    assert type(plain) is kind and set(plain.state_dict()) == keys
    assert torch.allclose(logits(plain), trained, atol=1e-5)
    plain.save_pretrained(tmp_path)
    assert torch.allclose(logits(load_model(tmp_path, "cpu")), trained, atol=1e-5)
    beside = PeftModel.from_pretrained(load_model(folders[family], "cpu"), str(tmp_path / "adapter"))
    assert torch.allclose(logits(beside), trained, atol=1e-6)


OPTIONS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True}, "rank-stabilised": {"use_rslora": True, "alpha": 6},
    "both": {"use_dora": True, "use_rslora": True},
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_lora_start_at_the_base_and_are_merged_exactly(
    name: str, family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    methods = Methods.model_validate({"lora": ON["lora"] | OPTIONS[name]})
    model = load_model(folders[family], "cpu")
    before, adapted = logits(model), adapt(methods, model)
    assert torch.allclose(logits(adapted), before, atol=1e-5)
    names = {key for key, p in adapted.named_parameters() if p.requires_grad}
    assert any("lora_magnitude_vector" in key for key in names) == bool(OPTIONS[name].get("use_dora"))
    trained = logits(moved(adapted))
    scaled = next(module for module in adapted.modules() if isinstance(module, LoraLayer))
    assert scaled.scaling["default"] == pytest.approx({"DoRA": 1, "rank-stabilised": 6 / 3**0.5, "both": 3**0.5}[name])
    plain = merge_trained(methods, adapted, tmp_path)
    assert (trained - before).abs().max() > 1e-2
    assert torch.allclose(logits(plain), trained, atol=1e-5)
    beside = PeftModel.from_pretrained(load_model(folders[family], "cpu"), str(tmp_path / "adapter"))
    assert torch.allclose(logits(beside), trained, atol=1e-5)


def mixture_of_experts(seed: int = 0) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4}
    torch.manual_seed(seed)
    made: Any = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=40, num_experts_per_tok=2, initializer_range=0.3, **sizes, **heads)
    )
    return made.eval()


def test_weights_of_experts_get_matrices_on_top_of_the_layers_and_are_merged_exactly(tmp_path: Path) -> None:
    chosen = ["gate_up_proj", "mlp.experts.down_proj"]
    methods = Methods.model_validate({"lora": {"rank": 3, "target_parameters": chosen}})
    model = mixture_of_experts()
    start, before = {name: p.clone() for name, p in model.named_parameters()}, logits(model)
    adapted = adapt(methods, model)
    assert trained_by(model).share > 0.95 and torch.equal(logits(adapted), before)
    trained = logits(moved(adapted))
    plain = merge_trained(methods, adapted, tmp_path)
    changed = {name.rpartition(".")[2] for name, p in plain.named_parameters() if not torch.equal(p, start[name])}
    assert {"gate_up_proj", "down_proj"} <= changed and (trained - before).abs().max() > 1e-2
    assert torch.allclose(logits(plain), trained, atol=1e-5)
    with pytest.raises(BadInput, match=r"lora\.target_parameters up_proj: .* allowed: down_proj, gate_up_proj"):
        adapt(Methods.model_validate({"lora": {"rank": 3, "target_parameters": ["up_proj"]}}), mixture_of_experts())
    with pytest.raises(BadInput, match=r"lora\.targets empty: .*use_dora"):
        adapt(
            Methods.model_validate({"lora": {"rank": 3, "use_dora": True, "target_parameters": chosen}}),
            mixture_of_experts(),
        )


def test_a_base_of_experts_is_not_held_in_4_bits(tmp_path: Path) -> None:
    """Experts are one fused tensor and no linear layer: 111 GB of a 30B model would stay in 32 bits, unsaid."""
    quantised = Methods.model_validate({"lora": {"rank": 3, "quantise": "nf4"}})
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
    AutoConfig.for_model("llama", **small, intermediate_size=64).save_pretrained(tmp_path / "dense")
    check_layers(tmp_path / "dense", quantised)
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    AutoConfig.for_model("qwen3_moe", **small, **experts).save_pretrained(tmp_path / "experts")
    check_layers(tmp_path / "experts", Methods.model_validate({"lora": {"rank": 3}}))
    with pytest.raises(BadInput, match=r"only \d+% of this model's weights are in such layers .* experts are not"):
        check_layers(tmp_path / "experts", quantised)


@pytest.mark.parametrize("put_back", [True, False])
def test_what_osft_adds_is_orthogonal_to_the_directions_that_stay(
    put_back: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """With AdamW too; PEFT alone, which projects gradients, leaves the space."""
    model = load_model(folders["llama"], "cpu")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted: Any = adapt(on("osft"), model)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        if put_back:
            KeepDirections().on_optimizer_step(model=adapted)
    plain, along = merge_trained(on("osft"), adapted, tmp_path), []
    for name, weight in plain.named_parameters():
        change = (weight - start[name]).detach().double()
        if weight.dim() < 2 or "embed" in name or "lm_head" in name:
            assert not change.any()
            continue
        left, _, right = torch.linalg.svd(start[name].double(), full_matrices=False)
        kept = int(min(change.shape) * 0.5)
        assert change.norm() > 1e-3
        along += [float(part.norm() / change.norm()) for part in (left[:, :kept].T @ change, change @ right[:kept].T)]
    assert max(along) < 1e-3 if put_back else min(along) > 1e-2


def gated() -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config)


def test_osft_leaves_a_layer_out_of_which_no_direction_would_stay() -> None:
    adapted: Any = adapt(on("osft"), gated())
    names = {name.rpartition(".")[2] for name, layer in adapted.named_modules() if isinstance(layer, OSFLayer)}
    assert "q_proj" in names and "shared_expert_gate" not in names
    wanted = Methods.model_validate({"osft": {"preserved": 0.5, "targets": ["shared_expert_gate"]}})
    with pytest.raises(BadInput, match=r"shared_expert_gate: the share .* of its directions, 1 in all, is less"):
        adapt(wanted, gated())


def test_osft_is_refused_where_no_layer_is_linear(folders: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="osft is for models of linear layers"):
        adapt(on("osft"), load_model(folders["gpt2"], "cpu"))
    with pytest.raises(
        ValidationError, match=r"lora and osft both train other weights.*lora\.rank=0 or osft\.preserved=0"
    ):
        on("lora", "osft")


def test_an_adapters_files_say_nothing_of_the_machine(folders: dict[str, Path], tmp_path: Path) -> None:
    """They are payload: a path or a version in them would change the model's identity."""
    elsewhere = save_model(tmp_path / "elsewhere")
    written = []
    for folder, place in ((folders["llama"], tmp_path / "one"), (elsewhere, tmp_path / "two")):
        torch.manual_seed(0)
        place.mkdir()
        merge_trained(on("lora"), adapt(on("lora"), load_model(folder, "cpu")), place)
        written.append({file.name: file.read_bytes() for file in (place / "adapter").iterdir()})
    assert written[0] == written[1]
    config = json.loads(written[0]["adapter_config.json"])
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) == 7
    assert config["r"] == config["lora_alpha"] == 3


def test_targets_and_alpha_are_taken_and_unknown_targets_refused(folders: dict[str, Path]) -> None:
    lora: dict[str, Any] = {"rank": 2, "alpha": 8, "targets": ["q_proj", "layers.1.mlp.up_proj"]}
    adapted = adapt(Methods.model_validate({"lora": lora}), load_model(folders["llama"], "cpu"))
    layers = {key.split(".lora_")[0] for key, p in adapted.named_parameters() if p.requires_grad}
    scaled: list[Any] = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) == 3 and sum("q_proj" in layer for layer in layers) == 2
    assert {module.scaling["default"] for module in scaled[1:]} == {4.0}
    with pytest.raises(BadInput, match=r"lora\.targets c_attn.*q_proj"):
        adapt(
            Methods.model_validate({"lora": {"rank": 2, "targets": ["q_proj", "c_attn"]}}),
            load_model(folders["llama"], "cpu"),
        )


def test_a_call_reaches_the_inner_models_own_forward_as_it_is(folders: dict[str, Path]) -> None:
    """The trainer puts the objective in the place of the inner model's forward."""
    model: Any = load_model(folders["llama"], "cpu")
    adapted, seen = adapt(on("lora"), model), []
    model.forward = lambda **given: seen.append(given)
    adapted(micro_batch="rows")
    assert seen == [{"micro_batch": "rows"}]


# Merge


@pytest.mark.parametrize("family", ["llama", "olmo", "gpt2"])
def test_merge_ends_at_base_and_tuned(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tuned = save_model(tmp_path / "tuned", family=family, seed=1)
    settle_start_token(folders[family], load_tokenizer(folders[family]), None)
    for alpha, end in ((0.0, folders[family]), (1.0, tuned)):
        folder = tmp_path / str(alpha)
        folder.mkdir()
        merge(folders[family], tuned, alpha, folder, "cpu")
        found, wanted = (load_file(place / "model.safetensors") for place in (folder, end))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


# Settings


@pytest.mark.parametrize("name", ON)
def test_settings_go_through_json_and_count_in_the_digest(name: str) -> None:
    methods = on(name)
    again = Methods.model_validate_json(methods.model_dump_json())
    assert again == methods and again.digest() == methods.digest()
    assert methods.digest() != Methods().digest()


def test_every_setting_of_a_method_that_is_on_counts() -> None:
    variants = [
        Methods.model_validate(given)
        for given in (
            {}, {"l2": {"weight": 1}}, {"l2": {"weight": 2}}, {"ewc": {"weight": 1}}, {"ewc": {"weight": 1, "rows": 2}},
            {"l2": {"weight": 1}, "ewc": {"weight": 1}}, {"lora": {"rank": 1}}, {"lora": {"rank": 1, "alpha": 2}},
            {"lora": {"rank": 1, "dropout": 0.1}}, {"lora": {"rank": 1, "targets": ["q_proj"]}},
            {"lora": {"rank": 1, "use_dora": True}}, {"lora": {"rank": 1, "use_rslora": True}},
            {"lora": {"rank": 1, "target_parameters": ["q_proj"]}}, {"osft": {"preserved": 0.5}},
            {"osft": {"preserved": 0.5, "targets": ["q_proj"]}},
            {"dft": {"power": 1}}, {"eaft": {"power": 1}}, {"dft": {"power": 1}, "eaft": {"power": 1}},
            {"stm": {"threshold": 2}}, {"stm": {"threshold": 3}}, {"target_divergence": {"weight": 1}},
            {"target_divergence": {"weight": 1, "top_logprobs": 8}},
            {"target_divergence": {"weight": 1, "reference": "base"}},
        )
    ]  # fmt: skip
    assert len({methods.digest() for methods in variants}) == len(variants)


def test_a_training_that_uses_no_method_keeps_the_key_it_had_before_there_were_any() -> None:
    class Old(Spec):
        rate: float = 0.1

    class New(Spec):
        neutral: ClassVar[dict[str, Any]] = {"methods": Methods()}
        rate: float = 0.1
        methods: Methods = Methods()

    New.__name__, old = "Old", Old().digest()
    assert New().digest() == old
    assert (
        New.model_validate({"methods": {"ewc": {"rows": 9, "weight": 0}, "lora": {"alpha": 3, "rank": 0}}}).digest()
        == old
    )
    assert all(New(methods=on(name)).digest() != old for name in ON)


class Added(L2):
    """A method as others would write it: its switch has a name of its own."""

    strength: ClassVar[str] = "force"

    force: float = 0.0
    needs: Estimate | None = None

    def is_on(self) -> bool:
        return self.force > 0

    def pull(self) -> Pull:
        return Pull(self.force, figure=abs, curvature=self.needs)


class WithAdded(Methods):
    added: Added = Added()


def test_what_a_method_declares_is_all_that_is_asked_of_it() -> None:
    methods = WithAdded.model_validate({"added": {"force": 2}, "ewc": ON["ewc"]})
    assert [pull.copies() for pull in methods.pulls().values()] == [2, 1]
    assert methods.estimate() == FisherSpec(rows=8) and on("l2").estimate() is None
    with pytest.raises(ValidationError, match=r"added with lora.*added\.force=0 or lora\.rank=0"):
        WithAdded.model_validate({"added": {"force": 2}, "lora": ON["lora"]})


def test_methods_that_need_different_estimates_are_refused() -> None:
    other = Added(force=1, needs=FisherSpec(rows=9))
    with pytest.raises(ValidationError, match=r"ewc and added need different estimates.*ewc\.weight=0"):
        WithAdded(ewc=on("ewc").ewc, added=other)
    assert WithAdded(ewc=on("ewc").ewc, added=Added(force=1, needs=FisherSpec(rows=8))).estimate()


def test_a_method_that_does_not_say_whether_it_is_on_cannot_be_made() -> None:
    class Silent(Method):
        weight: float = 0.0

    with pytest.raises(TypeError, match="is_on"):
        Silent()  # type: ignore[abstract]


def test_a_method_added_later_leaves_the_keys_of_the_others_alone() -> None:
    class More(Methods):
        extra: L2 = L2()

    before = on("l2").digest()
    More.__name__ = "Methods"
    assert More.model_validate({"l2": ON["l2"]}).digest() == before
    assert More.model_validate({"l2": ON["l2"], "extra": {"weight": 1}}).digest() != before


@pytest.mark.parametrize("others", [["l2"], ["ewc"], ["l2", "ewc"]])
def test_a_pull_on_weights_that_are_not_trained_is_refused(others: list[str]) -> None:
    with pytest.raises(ValidationError, match=rf"methods {' and '.join(others)} with lora.*lora\.rank=0"):
        on("lora", *others)


@pytest.mark.parametrize(
    "given",
    [
        {"l2": {"weight": -1}},
        {"ewc": {"weight": 1, "rows": 0}},
        {"lora": {"rank": 1, "dropout": 1}},
        {"stm": {"threshold": 0.5}},
        {"dft": {"power": -1}},
    ],
)
def test_impossible_settings_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Methods.model_validate(given)


def test_what_is_not_read_is_in_no_digest() -> None:
    held = [{"weight": 1, "reference": "base", "top_logprobs": count} for count in (8, 64)]
    assert len({Methods.model_validate({"target_divergence": given}).digest() for given in held}) == 1


def test_weights_of_tokens_multiply_and_tokens_are_learned_that_every_method_learns() -> None:
    class Tokens:
        probability = torch.tensor([0.5, 0.25])

        def entropy(self, likeliest: int) -> Tensor:
            assert likeliest == 20
            return torch.tensor([3.0, 0.75])

    class Two(Methods):
        other: Stm = Stm()

    factor = on("dft", "eaft").factor()
    assert factor and factor(Tokens()).tolist() == [0.5, 0.125]  # 0.25 x (0.75 / 3)^0.5
    learned = Two(stm=Stm(threshold=9.0), other=Stm(threshold=2.0)).learned()
    assert learned and learned(np.array([0.0, 0.6, 0.8])).tolist() == [True, True, False]
    assert Methods().factor() is None and Methods().learned() is None and on("stm").factor() is None


def test_copies_of_settings_train_alike(folders: dict[str, Path]) -> None:
    """A method holds no state: what it draws depends on torch's seed alone."""
    states = []
    for methods in (on("lora"), copy.deepcopy(on("lora"))):
        torch.manual_seed(7)
        states.append(adapt(methods, load_model(folders["llama"], "cpu")).state_dict())
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
