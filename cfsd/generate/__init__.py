"""Stage generate: text sampled from the base model, and the probe."""

from cfsd.generate.spec import GenerateSpec, ProbeSpec

__all__ = ["GenerateSpec", "ProbeSpec"]
