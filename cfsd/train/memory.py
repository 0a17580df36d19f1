"""What training a model of given shapes needs in memory, per process.

Measured on a CPU (tests/test_estimate.py): within a factor of 1.35 for small Llamas, and up to 1.5 times as much in
bfloat16 on processors that compute in it, whose library lays tensors out anew. On GPUs it is arithmetic alone.
"""

from typing import Any, NamedTuple, Self

from cfsd.machine import Machine
from cfsd.train.methods.method import TrainedAdapter
from cfsd.train.spec import TrainSpec

CHUNK = 256  # tokens whose logits exist at once on a CPU: 50 MB at SmolLM2's vocabulary
CUDA_CHUNK = 1024  # fewer, larger products keep a GPU busy; not measured

FLOAT, HALF = 4, 2  # bytes
QUANTISED = 0.52  # bytes of a weight in 4 bits, with its share of the scales
STATES = {"adamw": 2, "lion": 1, "ademamix": 3, "sgd": 0, "adafactor": 0}  # tensors of the weights' size
LOGIT_BUFFERS = 4  # logits and distribution of a chunk, and of the one before, which is freed when the next is there
BASE_BUFFERS = 2  # the live base's logits and distribution
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # how configs name their number
EMBEDDING_TIED_BY_DEFAULT = ("gemma", "gpt2")


class Shapes(NamedTuple):
    """A decoder's sizes."""

    width: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    gated: bool = True
    head_size: int | None = None
    experts: int = 0  # of each block, in one fused tensor and no linear layer; 0: a dense MLP
    chosen: int = 0  # of the experts, for each token
    expert_width: int = 0
    shared_width: int = 0  # of the MLP that every token passes beside its experts

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> Self | None:
        """Return the sizes that a config.json of transformers names; None where it names them in another way."""
        width = config.get("hidden_size", config.get("n_embd"))
        heads = config.get("num_attention_heads", config.get("n_head"))
        layers, vocabulary = config.get("num_hidden_layers", config.get("n_layer")), config.get("vocab_size")
        if not (width and heads and layers and vocabulary):
            return None
        kind = str(config.get("model_type"))
        return cls(
            width, layers, config.get("intermediate_size") or config.get("n_inner") or 4 * width,
            heads, config.get("num_key_value_heads") or heads, vocabulary,
            tied=config.get("tie_word_embeddings", kind.startswith(EMBEDDING_TIED_BY_DEFAULT)),
            gated=kind != "gpt2", head_size=config.get("head_dim"), **_experts(config),
        )  # fmt: skip

    def attention_widths(self) -> tuple[int, int]:
        """Return the width of a token's queries, and of its keys or values, over all heads."""
        size = self.head_size or self.width // self.heads
        return self.heads * size, self.kv_heads * size

    def matrices(self) -> list[tuple[int, int]]:
        """Return inputs and outputs of each linear layer of a block."""
        d, (q, kv) = self.width, self.attention_widths()
        i = self.shared_width if self.experts else self.intermediate
        return [(d, q), (d, kv), (d, kv), (q, d), *([*[(d, i)] * (2 if self.gated else 1), (i, d)] if i else [])]

    def block_parameters(self) -> int:
        """Return the weights of one block."""
        return sum(a * b for a, b in self.matrices()) + 2 * self.width + self.expert_parameters(self.experts)

    def expert_parameters(self, count: int) -> int:
        """Return the weights of `count` experts of a block, and of what chooses among all of them."""
        return count * 3 * self.width * self.expert_width + self.experts * self.width

    def mlp_width(self) -> int:
        """Return the width of what a token passes in the MLP of a block."""
        return self.chosen * self.expert_width + self.shared_width if self.experts else self.intermediate

    def passed(self) -> int:
        """Return the weights that a token passes: of experts, those that are chosen for it."""
        return self.parameters() - self.layers * 3 * (self.experts - self.chosen) * self.width * self.expert_width

    def embedding(self) -> int:
        """Return the weights of the token embedding, or of the output layer."""
        return self.vocabulary * self.width

    def parameters(self) -> int:
        """Return all weights."""
        return self.layers * self.block_parameters() + self.embedding() * (1 if self.tied else 2) + self.width


def _experts(config: dict[str, Any]) -> dict[str, int]:
    """Return the sizes of a mixture of experts, as families name them; as if every block had one."""
    count = next((config[name] for name in EXPERTS if config.get(name)), 0)
    if not count:
        return {}
    width = config.get("moe_intermediate_size") or config.get("intermediate_size") or 0
    shared = config.get("shared_expert_intermediate_size") or width * (config.get("n_shared_experts") or 0)
    chosen = config.get("num_experts_per_tok") or 1
    return {"experts": count, "chosen": chosen, "expert_width": width, "shared_width": shared}


class Load(NamedTuple):
    """What else decides how much memory a training takes."""

    micro_batch_tokens: int = 1024
    processes: int = 1
    sharded: bool = False
    checkpointing: bool = False
    bfloat16: bool = False
    adapter: TrainedAdapter | None = None
    optimizer: str = "adamw"
    anchor_copies: int = 0  # L2: 1; EWC: 2, with the Fisher matrix
    live_base: bool = False
    chunk: int = CHUNK  # tokens whose logits exist at once


def load_of(spec: TrainSpec, machine: Machine) -> Load:
    """Return what a training of `spec` on `machine` asks for."""
    cuda = machine.resolved_device() == "cuda"
    return Load(
        machine.micro_batch_tokens,
        machine.resolved_training_processes(),
        sharded=machine.resolved_sharding() == "shard",
        checkpointing=machine.gradient_checkpointing and not spec.methods.lora.dropout,  # rehearsal passes without
        bfloat16=spec.in_bfloat16(machine),
        adapter=spec.methods.adapter(),
        optimizer=spec.optimizer,
        anchor_copies=sum(pull.copies() for pull in spec.methods.pulls().values()),
        live_base=spec.needs_base(),
        chunk=CUDA_CHUNK if cuda else CHUNK,
    )


class Memory(NamedTuple):
    """Bytes per process."""

    weights: float
    gradients: float
    moments: float
    anchors: float
    live_base: float
    activations: float
    logits: float

    def total(self) -> float:
        """Return the sum: what is held after the forward pass of any micro-batch but the first."""
        return float(sum(self))


def training_memory(shapes: Shapes, load: Load) -> Memory:
    """Return the bytes that each of `load.processes` needs to train a model of `shapes` in float32."""
    shards = load.processes if load.sharded else 1
    all_weights = shapes.parameters()
    added = shapes.layers * sum(_rank(load, a, b) * (a + b) for a, b in shapes.matrices())
    trained = added or all_weights
    beside = added + shapes.layers * _kept_directions(shapes, load)
    exchanged = trained if load.processes > 1 and not load.sharded else 0  # DDP's buckets are a second copy
    return Memory(
        weights=(FLOAT * (all_weights + beside) - _saved_by_rounding(shapes, load)) / shards,
        gradients=FLOAT * (trained / shards + exchanged),
        moments=_state_bytes(load.optimizer) * trained / shards,
        anchors=FLOAT * load.anchor_copies * trained / shards,
        live_base=_live_base(shapes, load),
        activations=_activations(shapes, load),
        logits=_logits(shapes, load),
    )


def _state_bytes(optimizer: str) -> float:
    """Return the bytes that an optimizer keeps per trained weight, as if none were paged out."""
    kind = optimizer.removeprefix("paged_").split("_")[0]
    return STATES[kind] * (1 if optimizer.endswith("8bit") else FLOAT)


def _saved_by_rounding(shapes: Shapes, load: Load) -> float:
    """Return what the linear layers beside an adapter take less than in float32."""
    layers = shapes.layers * sum(a * b for a, b in shapes.matrices())
    if load.adapter is None:
        return 0.0
    if load.adapter.quantise:
        return (FLOAT - QUANTISED) * layers
    return float((FLOAT - HALF) * layers) if load.adapter.halves(load.bfloat16) else 0.0


def _rank(load: Load, *sides: int) -> int:
    return load.adapter.rank_at(min(sides)) if load.adapter else 0


def _kept_directions(shapes: Shapes, load: Load) -> int:
    """Return what OSFT holds beside what it trains: its start, and the kept directions of the longer side."""
    if load.adapter is None or load.adapter.kind != "osf":
        return 0
    sides = [(min(pair), max(pair)) for pair in shapes.matrices()]
    kept = sum((less - _rank(load, less)) * more for less, more in sides if less != more)
    return kept + sum(_rank(load, less) * (less + more) for less, more in sides)


def _live_base(shapes: Shapes, load: Load) -> float:
    """Return the base's weights: under autocast its layers are held in half the bytes, its embedding is not."""
    if not load.live_base or (load.adapter and load.adapter.keeps_the_base()):
        return 0
    embedding = FLOAT * shapes.embedding() if load.bfloat16 and not load.sharded else 0
    wide = HALF if load.bfloat16 else FLOAT
    return wide * (shapes.parameters() - (shapes.embedding() if embedding else 0)) + embedding


def _activations(shapes: Shapes, load: Load) -> float:
    """Return what the backward pass needs of a micro-batch, and what it makes."""
    block = _block_bytes(shapes, load) * load.micro_batch_tokens
    stream = FLOAT * shapes.width * load.micro_batch_tokens
    saved = shapes.layers * stream + block if load.checkpointing else shapes.layers * block
    linear = HALF if load.bfloat16 else FLOAT
    slopes = linear * load.micro_batch_tokens * (2 * shapes.mlp_width() + 2 * shapes.width)
    around = 5 * stream  # embedding, last norm, the picked hidden states and their gradients
    return saved + slopes + around + _casts(shapes, load)


def _block_bytes(shapes: Shapes, load: Load) -> int:
    """Return what one block keeps per token: norms in float32, the rest in the precision of the linear layers.

    Two norms keep their input, the normalised values and their product with the weight, which is what the linear
    layers keep too unless it is cast for them; attention keeps queries, keys, values and its output; the MLP keeps what
    goes into the activation function, what comes out, the other factor, and the product.
    """
    linear = HALF if load.bfloat16 else FLOAT
    norms = 2 * 3 * FLOAT * shapes.width + (2 * HALF * shapes.width if load.bfloat16 else 0)
    attention = 2 * sum(shapes.attention_widths())
    mlp = (4 if shapes.gated else 3) * shapes.mlp_width()
    adapters = sum(_rank(load, *pair) for pair in shapes.matrices())
    return norms + linear * (attention + mlp + adapters)


def _casts(shapes: Shapes, load: Load) -> float:
    """Return the weights that exist a second time: cast by autocast, or gathered from their shards block by block."""
    wide = HALF if load.bfloat16 else FLOAT
    if load.sharded:  # two blocks, the next one being gathered; embedding and output layer stay gathered
        ends = shapes.embedding() * (1 if shapes.tied else 2)
        return wide * (2 * shapes.block_parameters() + ends) + FLOAT * (0 if load.adapter else ends)
    if load.adapter and load.adapter.quantise:  # a block's at a time: bitsandbytes keeps the 4 bits for the way back
        return wide * shapes.block_parameters()
    held = load.adapter is not None and load.adapter.halves(load.bfloat16)
    return HALF * shapes.layers * shapes.block_parameters() if load.bfloat16 and not held else 0


def _logits(shapes: Shapes, load: Load) -> float:
    """Return the chunk's logits and the gradients of output layer and embedding, which add up with those before."""
    buffers = LOGIT_BUFFERS + (BASE_BUFFERS if load.live_base else 0) + (1 if load.bfloat16 else 0)
    head = 0 if load.adapter else 2 * FLOAT * shapes.embedding()
    cast = HALF * shapes.embedding() * (1 if load.adapter else 2) if load.bfloat16 else 0
    return FLOAT * buffers * load.chunk * shapes.vocabulary + head + cast
