"""Every family of the table does what its row says: exact, exact by a slower path that is named, or refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM

from benchmarks._exactness import corpus, log_law, loss_error, sampling_error
from benchmarks._families import END, FAMILIES, START, VOCABULARY, Family
from benchmarks.architectures import PAGE, line_of, measure
from cfsd.errors import BadInput
from cfsd.generate.sampling import Rows, Turns, sample
from cfsd.generate.spec import GenerateSpec, ProbeSpec, check_context
from cfsd.generate.trial import SLOWER, check_sampling, slower_path
from cfsd.model.architecture import auxiliary_loss, context_of
from cfsd.model.checkpoint import Checkpoint
from cfsd.model.fetching import describe
from cfsd.model.loading import load_tokenization
from cfsd.store.artifact import Artifact
from cfsd.train.adapters import adapt, trained_by
from cfsd.train.loss.objective import Objective, head_of, losses
from cfsd.train.methods import Methods
from cfsd.train.spec import RehearsalSpec
from tests.conftest import save_model

LIVE = RehearsalSpec(loss="kl", reference="base")


def family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_a_familys_row_of_the_table_is_measured_again(name: str) -> None:
    line = line_of(measure(family(name)))
    assert "INEXACT" not in line
    assert line in PAGE.read_text().splitlines(), "python -m benchmarks.architectures writes the page"
