"""Scores of lm-eval's tasks, document by document."""
