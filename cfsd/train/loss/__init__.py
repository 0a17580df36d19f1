"""The loss of target and rehearsal."""
