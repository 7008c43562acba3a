"""Scores, probes and pictures."""
