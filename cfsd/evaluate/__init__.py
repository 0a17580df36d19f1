"""Stage evaluate: what a model scores, and how far it is from its base."""

from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.evaluate.text import Text

__all__ = ["Benchmark", "EvaluateSpec", "Text"]
