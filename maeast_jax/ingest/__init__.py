"""Recordings of any format become data sets."""
