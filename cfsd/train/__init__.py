"""Stage train: fine-tune the base model on a mixture."""

from cfsd.train.spec import RehearsalSpec, TrainRequest, TrainSpec, Watched, WatchSpec

__all__ = ["RehearsalSpec", "TrainRequest", "TrainSpec", "WatchSpec", "Watched"]
