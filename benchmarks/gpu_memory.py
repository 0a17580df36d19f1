"""Which ways to train a model fit on GPUs that are not here, from its config.json: the arithmetic of a training's plan.

python -m benchmarks.gpu_memory CONFIG.json --gpus 8 --gigabytes 80
"""

import argparse
import json
from pathlib import Path

from cfsd.train.memory import CUDA_CHUNK, Load, Memory, Shapes, training_memory
from cfsd.train.methods.lora import Lora

USABLE = 0.9  # of a GPU: the rest is the driver's, and pieces too small to be used


def ways_to_train(shapes: Shapes, gpus: int) -> dict[str, Memory]:
    """Return what every way to train a model of `shapes` on `gpus` GPUs in bfloat16 needs, by name."""
    spread = "one GPU" if gpus == 1 else "replicate"
    load = Load(processes=gpus, bfloat16=True, chunk=CUDA_CHUNK)
    ways = {f"all weights, {spread}": load}
    if gpus > 1:
        ways["all weights, shard"] = load._replace(sharded=True)
    ways[f"LoRA 16, {spread}"] = load._replace(adapter=Lora(rank=16).adapter())  # LoRA's weights are not sharded
    ways |= {f"{name}, checkpointing": way._replace(checkpointing=True) for name, way in ways.items()}
    return {name: training_memory(shapes, way) for name, way in ways.items()}


def main() -> None:
    """Print a line per way to train."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_memory")
    parser.add_argument("config", type=Path, help="a model's config.json")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, default=80, help="memory of each")
    asked = parser.parse_args()
    shapes = Shapes.of_config(json.loads(asked.config.read_text()))
    if shapes is None:
        parser.error(f"{asked.config} does not name a decoder's sizes: hidden_size, num_hidden_layers, vocab_size, …")
    print(f"{shapes.parameters() / 1e9:.2f} billion weights, {asked.gpus} x {asked.gigabytes:.0f} GB")
    for name, memory in ways_to_train(shapes, asked.gpus).items():
        verdict = "fits" if memory.total() <= USABLE * asked.gigabytes * 1e9 else "does not fit"
        print(f"{name:<40} {memory.total() / 1e9:6.1f} GB  {verdict}")


if __name__ == "__main__":
    main()
