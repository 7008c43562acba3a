"""Several processes that a test starts as one run."""

import socket


def free_port() -> int:
    """Returns a port of this machine that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ends(started, timeout=300):
    """Waits for processes; returns the exit code, the output and the errors of each."""
    outputs = [process.communicate(timeout=timeout) for process in started]
    return [(p.returncode, *output) for p, output in zip(started, outputs, strict=True)]
