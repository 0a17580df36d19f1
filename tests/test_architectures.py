"""Every family of the table does what its row says: exact, exact by a slower path that is named, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks._exactness import batches, corpus, defined, loss_error, ours, sampling_error
from benchmarks._families import END, FAMILIES, START, Family
from benchmarks.architectures import PAGE, line_of, measure
from cfsd.errors import BadInput
from cfsd.generate.sampling import Rows, Turns, sample
from cfsd.generate.shard_job import ShardJob
from cfsd.generate.shard_sampling import check_engine
from cfsd.generate.spec import GenerateSpec, ProbeSpec, check_context
from cfsd.generate.trial import SLOWER, check_sampling, slower_path
from cfsd.machine import Machine
from cfsd.model.architecture import auxiliary_loss, context_of
from cfsd.model.checkpoint import Checkpoint
from cfsd.model.head import head_of
from cfsd.select.embed import _means
from cfsd.store.artifact import Store
from cfsd.train.adapters import adapt, check_layers, trained_by
from cfsd.train.dropout import check_layers_drop
from cfsd.train.loss.objective import Objective, losses
from cfsd.train.methods import Methods
from cfsd.train.spec import RehearsalSpec, TrainSpec
from tests.conftest import fetched, save_model

LIVE = RehearsalSpec(loss="kl", reference="base")


def family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_a_familys_row_of_the_table_is_measured_again(name: str) -> None:
    line = line_of(measure(family(name)))
    assert "INEXACT" not in line
    assert line in PAGE.read_text().splitlines(), "python -m benchmarks.architectures writes the page"


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_a_familys_rows_have_a_vector_each(name: str) -> None:
    """Selection reads them from the part before the output layer, which not every class names alike."""
    model = family(name).model()
    width = model.get_output_embeddings().weight.shape[1]
    vectors = _means(model, [[START, 5, 6], [START, 7]], width, 64)
    assert vectors.shape == (2, width) and bool((vectors[0] != vectors[1]).any())


PHI = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("config", "tokens", "says"),
    [
        ({"model_type": "llama", "max_position_embeddings": 4096}, 4096, None),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024, None),
        ({"model_type": "mpt", "max_seq_len": 2048}, 2048, None),
        ({"model_type": "bloom", "hidden_size": 64}, None, None),
        ({"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_parameters": PHI},
         4096, "longrope"),
        ({"max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
          "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}}, 4096, "su"),
        ({"max_position_embeddings": 131072, "rope_parameters": PHI | {"original_max_position_embeddings": 8192}},
         8192, "longrope"),
        ({"max_position_embeddings": 32768, "original_max_position_embeddings": 32768, "rope_scaling": PHI},
         32768, None),
        ({"text_config": {
            "max_position_embeddings": 99, "original_max_position_embeddings": 9, "rope_parameters": PHI}},
         9, "longrope"),
        ({"max_position_embeddings": 64, "rope_parameters": {
            "sliding_attention": {"rope_type": "default"},
            "full_attention": PHI | {"original_max_position_embeddings": 16}}}, 16, "longrope"),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4096, None),
        ({"max_position_embeddings": 8192, "rope_parameters": {
            "rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048}}, 2048, "dynamic"),
        ({"max_position_embeddings": 131072, "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 131072, None),
        ({"max_position_embeddings": 163840, "index_topk": 2048}, 2048, "sparse attention"),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 32768, None),
    ],
)  # fmt: skip
def test_the_longest_row_ends_where_frequencies_would_switch(
    config: dict[str, Any], tokens: int | None, says: str | None
) -> None:
    context = context_of(config)
    assert context.tokens == tokens
    assert (says or "") in (context.why or "") and (context.why is None) == (says is None)


@pytest.mark.parametrize("name", ["Phi-3, Phi-4 with long rope", "DeepSeek-V3.2"])
def test_a_row_across_the_switch_would_not_be_of_the_models_distribution(name: str) -> None:
    """What the limit is for, and that it is not below what is exact."""
    model = family(name).model()
    differences = {}
    for length in (31, 40):  # the start token and 31 more end at the switch
        rows = sample(model, Rows(range(2), [[START]] * 2, ()), GenerateSpec(length=length, seed=1, top_logprobs=8))
        differences[length] = sampling_error(model, rows)
    assert differences[31] < 1e-5 and differences[40] > 1e-2


def test_lengths_across_the_switch_are_refused_with_the_allowed_one(store: Store, tmp_path: Path) -> None:
    base = fetched(store, saved("Phi-3, Phi-4 with long rope", tmp_path / "model"))
    check_context(base, GenerateSpec(length=31), "generate")
    with pytest.raises(
        BadInput, match=r"length 32 .* 32 tokens \(above that its longrope .*generate\.length to at most 31"
    ):
        check_context(base, GenerateSpec(length=32), "generate")
    with pytest.raises(BadInput, match=r"probe\.length to at most 31"):
        check_context(base, ProbeSpec(length=128), "probe")


def test_a_family_that_cannot_be_sampled_is_refused_from_its_folder(tmp_path: Path) -> None:
    save_model(tmp_path)
    family("RWKV").config().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"type 'rwkv': generate does not hand its state.*such as Llama"):
        Checkpoint(kind="folder", path=str(tmp_path)).check()


def test_a_model_whose_samples_are_not_its_own_is_refused_before_the_first_row() -> None:
    check_sampling(family("Llama").model())
    with pytest.raises(BadInput, match=r"RwkvForCausalLM gives sampled tokens .* differ by .* nats"):
        check_sampling(family("RWKV").model())


class Unsampled(LlamaForCausalLM):
    """A model that takes no cache."""

    def forward(self, *args: Any, **named: Any) -> Any:
        """Fail like code that was written for one pass."""
        if named.get("past_key_values") is not None:
            raise TypeError("unexpected past_key_values")
        return super().forward(*args, **named)


def test_a_model_that_fails_in_the_trial_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"Unsampled cannot be sampled here: unexpected past_key_values; the table"):
        check_sampling(Unsampled(family("Llama").config()).eval())


@pytest.mark.parametrize(("name", "slower"), [("Llama", None), ("Gemma 2", None), ("Mamba", SLOWER), ("LFM2", SLOWER)])
def test_the_slower_path_is_known_without_weights(tmp_path: Path, name: str, slower: str | None) -> None:
    family(name).config().save_pretrained(tmp_path)
    assert slower_path(tmp_path) == slower


def test_a_model_with_a_state_writes_one_text_after_another() -> None:
    """As `generate.fill` asks: what is inserted after an end passes through the state like any other token."""
    model = family("Mamba").model()
    ends, prompts = [END, *range(60, 100)], [[START], [START, 5, 6]]
    spec = GenerateSpec(length=24, seed=2, top_logprobs=8)
    rows = sample(model, Rows(range(2), prompts, ends, "", Turns(more=3, between=[END, START])), spec)
    assert sampling_error(model, rows) < 5e-5
    inserted = [
        row.token_ids[t]
        for row, prompt in zip(rows, prompts, strict=True)
        for t in range(len(prompt), len(row.token_ids))
        if row.logprobs[t] is None
    ]
    assert inserted and set(inserted) == {END, START}


class OddHead(LlamaForCausalLM):
    """A model whose output is one linear layer after the first few tokens of the vocabulary only."""

    def forward(self, input_ids: Any = None, **named: Any) -> Any:
        """Flatten the distributions after all other tokens."""
        output = super().forward(input_ids=input_ids, **named)
        output.logits = torch.where((input_ids < 10)[..., None], output.logits, 0.9 * output.logits)
        return output


def test_the_head_is_tried_on_tokens_of_the_whole_vocabulary() -> None:
    plain, odd = LlamaForCausalLM(family("Llama").config()), OddHead(family("Llama").config())
    assert head_of(plain)(plain) is not None
    assert head_of(odd)(odd) is None


def rehearsed(model: Any, base: Any) -> tuple[float, float]:
    """Return the target's loss and the divergence from `base`, in training, over all micro-batches."""
    objective = Objective(model.train(), LIVE, base)
    parts = [losses(model, micro_batch) for micro_batch in batches(corpus(base))]
    objective.remove()
    return sum(float(p.target_nll.detach()) for p in parts), sum(abs(float(p.rehearsal.detach())) for p in parts)


@pytest.mark.parametrize("name", ["GPT-2", "OPT", "GPT-Neo", "Llama with lora.dropout"])
def test_rehearsal_rows_pass_without_dropout_and_the_targets_with_it(name: str) -> None:
    """At the base's own weights the divergence is 0 to rounding; GPT-2's dropout alone would make it 0.67 nats."""
    wanted = family(name.split(" with")[0])
    settings = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "dropout": 0.1, "embed_dropout": 0.1, "attention_dropout": 0.1}
    wanted = wanted._replace(settings=dict(wanted.settings) | (settings if "lora" not in name else {}))
    base, model = wanted.model(0), wanted.model(0)
    if "lora" in name:
        adapt(Methods.model_validate({"lora": {"rank": 2, "dropout": 0.5}}), model)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.fill_(0.1)
        alone = rehearsed(model, base)[1]
        assert alone > 1e-2 and alone == rehearsed(model, base)[1]
    else:
        assert rehearsed(model, base)[1] < 1e-6
    assert rehearsed(model, base)[0] != rehearsed(model, base)[0]
    assert any("without its dropout" in note for note in Objective(model, LIVE, base).notes)


def test_a_loss_of_the_models_own_is_named_where_it_is_left_out() -> None:
    on = family("Mixtral")
    assert "output_router_logits" in str(auxiliary_loss(on.config().to_dict()))
    assert Objective(on.model(), RehearsalSpec()).notes == [auxiliary_loss(on.config().to_dict())]
    off = on._replace(settings=dict(on.settings) | {"output_router_logits": False})
    assert Objective(off.model(), RehearsalSpec()).notes == []


def lora(**settings: Any) -> Methods:
    return Methods.model_validate({"lora": {"rank": 2} | settings})


def test_experts_are_trained_where_they_are_named_and_named_where_they_are_not() -> None:
    model = family("Qwen3-MoE").model()
    adapt(lora(), model)
    assert "lora stands beside 25% of the layers' weights, not beside experts.down_proj" in str(
        trained_by(model).note()
    )
    named = family("Qwen3-MoE").model()
    adapted = adapt(lora(targets=["q_proj", "experts.gate_up_proj", "down_proj"]), named)
    assert trained_by(named).share > 0.7
    layers = {key.split(".lora_")[0] for key, p in adapted.named_parameters() if p.requires_grad}
    assert sum("experts" in layer for layer in layers) == 4 and sum("q_proj" in layer for layer in layers) == 2
    with pytest.raises(BadInput, match=r"lora\.targets up_proj: .* or of the experts down_proj, gate_up_proj"):
        adapt(lora(targets=["up_proj"]), family("Qwen3-MoE").model())
    with pytest.raises(BadInput, match=r"lora\.targets gate_up_proj: .*dropout"):
        adapt(lora(targets=["gate_up_proj"], dropout=0.1), family("Qwen3-MoE").model())


@pytest.mark.parametrize(
    ("name", "methods", "message"),
    [
        ("Qwen3-MoE", lora(targets=["up_prj"]), r"lora\.targets up_prj: .* or of the experts down_proj, gate_up_proj"),
        ("Llama", lora(target_parameters=["experts.up"]), r"lora\.target_parameters experts\.up: .* allowed: none"),
        ("GPT-2", Methods.model_validate({"osft": {"preserved": 0.5}}), "osft is for models of linear layers"),
    ],
)
def test_names_of_layers_are_checked_by_the_configuration_alone(
    name: str, methods: Methods, message: str, tmp_path: Path
) -> None:
    family(name).model().config.save_pretrained(tmp_path)
    check_layers(tmp_path, lora(targets=["c_attn"] if name == "GPT-2" else ["q_proj"]))
    with pytest.raises(BadInput, match=message):
        check_layers(tmp_path, methods)


def test_dropout_in_the_way_is_found_by_the_configuration_alone(tmp_path: Path) -> None:
    for name in ("GPT-2", "Llama"):
        family(name).model().config.save_pretrained(tmp_path / name)
    held = TrainSpec.model_validate({"methods": {"target_divergence": {"weight": 1, "reference": "base"}}})
    check_layers_drop(tmp_path / "Llama", held, sharded=True)
    check_layers_drop(tmp_path / "GPT-2", held.model_copy(update={"dropout": 0.0}), sharded=True)
    check_layers_drop(tmp_path / "GPT-2", TrainSpec(), sharded=False)
    with pytest.raises(BadInput, match="which pass with dropout"):
        check_layers_drop(tmp_path / "GPT-2", held, sharded=False)
    with pytest.raises(BadInput, match="sharding is shard, but the base has dropout"):
        check_layers_drop(tmp_path / "GPT-2", TrainSpec(), sharded=True)


def test_what_peft_stands_beside_nowhere_is_refused_where_it_is_named() -> None:
    with pytest.raises(BadInput, match=r"lora\.targets out_proj: .*incompatible with Mamba"):
        adapt(lora(targets=["out_proj"]), family("Mamba").model())
    with pytest.raises(BadInput, match=r"lora\.targets dt_proj: this model has no such"):
        adapt(lora(targets=["dt_proj"]), family("Mamba").model())


def test_the_measures_of_the_table_see_a_difference() -> None:
    """Planted: another model's samples, and logits that are divided by one percent more than in training."""
    one, other = family("Granite").model(0), family("Granite").model(1)
    samples = corpus(one)
    assert sampling_error(other, samples) > 0.1
    assert loss_error(other, one, "nll", samples)[1] < 1e-12
    total, slope = ours(other, one, "nll", samples)
    other.config.logits_scaling *= 1.01
    wanted, wanted_slope = defined(other, one, "nll", samples)
    assert abs(total - wanted) > 1e-3 and float((slope - wanted_slope).norm() / wanted_slope.norm()) > 1e-3


def saved(name: str, folder: Path) -> Path:
    """Write a family's model with a tokenizer."""
    save_model(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    family(name).model().float().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "metadata"), [("Llama", {}), ("Mamba", {"said": [SLOWER]})])
def test_a_corpus_says_that_it_was_sampled_by_a_slower_path(
    store: Store, tmp_path: Path, name: str, metadata: dict[str, Any]
) -> None:
    base = fetched(store, saved(name, tmp_path / "model"))
    job = ShardJob(
        home=store.home, folder=tmp_path, base=base, target=None, spec=GenerateSpec(rows=2), machine=Machine()
    )
    assert check_engine(job) == metadata
