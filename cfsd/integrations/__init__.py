"""Rehearsal in trainings that are not ours, and corpora in the forms that other trainers read."""
