"""The corpus page: what is in each corpus."""
