"""Adapters to other people's evaluation suites."""
