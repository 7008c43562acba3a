"""The device mesh and what lies where on it: batches over `data`, parameters everywhere."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def make_mesh(data: int = -1) -> Mesh:
    """A mesh of `data` devices, -1 for all of them.

    Raises ValueError where there are fewer devices than asked for.
    """
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if not 1 <= count <= len(devices):
        raise ValueError(
            f"mesh.data={data} must be -1 (all) or from 1 to {len(devices)}, the devices there are"
        )
    return jax.make_mesh((count,), (DATA_AXIS,), (AxisType.Auto,), devices=devices[:count])


def check_batch(mesh: Mesh, batch_size: int, accumulation_steps: int) -> None:
    """Raises ValueError where devices and accumulation do not share a batch evenly."""
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps={accumulation_steps} must be at least 1")
    share = mesh.size * accumulation_steps
    if batch_size < 1 or batch_size % share:
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of {share}, devices ({mesh.size}) times "
            f"accumulation_steps ({accumulation_steps}); set another batch_size or mesh.data"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The leading axis over `data`."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch to its devices, as one global array a field."""
    sharding = by_example(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
