"""Recordings of any format become data sets."""

from maeast_jax.ingest.build import PIECE_SECONDS, BuildOptions, build_dataset
from maeast_jax.ingest.layouts import LAYOUTS
from maeast_jax.ingest.sources import ManifestError

__all__ = ["LAYOUTS", "PIECE_SECONDS", "BuildOptions", "ManifestError", "build_dataset"]
