"""Recordings of any format become data sets."""

from maeast_jax.ingest.examples import SHORTEST_TAIL_SECONDS, Cut, clips_of
from maeast_jax.ingest.report import Tally, next_steps
from maeast_jax.ingest.sources import (
    AudioFile,
    Listing,
    ManifestError,
    assign_splits,
    list_folder,
    read_manifest,
)

__all__ = [
    "SHORTEST_TAIL_SECONDS",
    "AudioFile",
    "Cut",
    "Listing",
    "ManifestError",
    "Tally",
    "assign_splits",
    "clips_of",
    "list_folder",
    "next_steps",
    "read_manifest",
]
