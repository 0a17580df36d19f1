"""Rehearsal in TRL: SFTTrainer with rehearsal, and what else a training needs; TRL has to be installed.

Example, where TRAINING is what is passed to SFTTrainer already:

    trainer = RehearsalSFTTrainer(**TRAINING, corpus="data/store/corpus/KEY", weight=1.0)
    trainer.add_callback(DivergenceCallback(trainer, every=50, probe="data/store/corpus/KEY"))
"""

from trl import SFTTrainer

from cfsd.integrations.divergence import DivergenceCallback
from cfsd.integrations.rehearsal import RehearsalTrainer, Rehearsing

__all__ = ["DivergenceCallback", "RehearsalSFTTrainer", "RehearsalTrainer", "Rehearsing"]


class RehearsalSFTTrainer(Rehearsing, SFTTrainer):
    """TRL's SFTTrainer with rehearsal; see `Rehearsing`."""
