"""The page of several targets in turn."""
