"""Scoring on lm-eval tasks, document by document. Only these modules import lm-eval; start reading at `score`."""
