"""Content-addressed folders, and the tables in them."""

from cfsd.store.artifact import Artifact, Draft, Store, key_of

__all__ = ["Artifact", "Draft", "Store", "key_of"]
