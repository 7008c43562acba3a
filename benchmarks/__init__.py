"""Comparisons with other people's programs; the package itself imports nothing of this."""
