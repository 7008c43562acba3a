"""The network, from log-mel energies to predictions."""
