"""python -m benchmarks.meshes [--config=configs/pretrain_small.py] [--steps=20]: one run, any mesh.

Runs the same training on 1, 2, 4 and 8 CPU devices, and with the state and the heads divided among
devices. Prints a table in Markdown: the loss after so many steps on synthetic clips, the bytes that
a device sends per step (from the compiled HLO, as rings send them), and the memory that XLA plans
per device. --steps=0 compiles only.
"""

import argparse
import runpy

import jax

from benchmarks import exchanged
from maeast_jax.runtime import memory
from maeast_jax.training import PretrainConfig, Pretraining

MESHES = ((1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2))


def measure(config_file: str, mesh: tuple[int, int, int], steps: int) -> list[str]:
    """Returns the cells of a mesh's row."""
    config = runpy.run_path(config_file)["get_config"]()
    config.data.source = "synthetic"
    config.total_steps = max(steps, config.optimizer.warmup_steps + 1)
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    training = Pretraining(PretrainConfig.of(config))
    step = training.compile_step()
    loss = ""
    if steps:
        state = training.initial_state()
        for _, batch in zip(range(steps), training.train_batches(), strict=False):
            state, metrics = step(state, batch)
        total, count = jax.device_get(metrics["loss"])
        loss = f"{total / count:.6f}"
    sent = exchanged.bytes_by_kind(step.as_text())
    plan = step.memory_analysis()
    return [
        " x ".join(map(str, mesh)), loss,
        *(f"{sent.get(kind, 0) / 1e6:.1f}" for kind in ("all-reduce", "all-gather")),
        f"{sum(v for k, v in sent.items() if k not in ('all-reduce', 'all-gather')) / 1e6:.1f}",
        f"{plan.argument_size_in_bytes / 1e6:.0f}", f"{memory.planned_bytes(step) / 1e6:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/pretrain_small.py")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(d * f * t for d, f, t in MESHES))
    print(
        f"| data x fsdp x tensor | loss after {options.steps} steps | all-reduce, MB sent per step "
        "| all-gather, MB | other, MB | state and batch, MB per device | planned in all, MB per "
        "device |"
    )
    print("|---|---|---|---|---|---|---|")
    for mesh in MESHES:
        print(f"| {' | '.join(measure(options.config, mesh, options.steps))} |", flush=True)


if __name__ == "__main__":
    main()
