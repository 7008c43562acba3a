"""The device mesh, and which part of each array lies on which of its devices.

Axes of the mesh: `data` shares a batch; `fsdp` shares a batch and, between uses, the parameters
and the optimiser's moments; `tensor` shares heads and the MLP's inner width. Programs are written
as for one device, their inputs and results are placed, and XLA (GSPMD) adds the communication.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Mesh axes along the last axes of a parameter, by the first pattern that ends the parameter's path.
# Axes before them, such as that of stacked layers, are not shared. The path of an optimiser's
# moment ends with the path of its parameter. Parameters outside the layers are not shared: they are
# less than a hundredth of the paper's model.
_RULES = (
    (r"attention/qkv_kernel", ("fsdp", None, "tensor", None)),
    (r"attention/qkv_bias", (None, "tensor", None)),
    (r"attention/out_kernel", ("tensor", None, "fsdp")),
    (r"attention/out_bias", ()),
    (r"mlp/up/kernel", ("fsdp", "tensor")),
    (r"mlp/up/bias", ("tensor",)),
    (r"mlp/down/kernel", ("tensor", "fsdp")),
    (r"mlp/down/bias", ()),
    (r"(\w+_)?norm/(scale|bias)", ()),
    (r"(token|decoder)_projection/(kernel|bias)", ()),
    (r"(reconstruction|classification)_head/(kernel|bias)", ()),
    (r"mask_token", ()),
    (r"head/\w+(/\w+)?", ()),  # of fine-tuning
    # Running statistics, and counters of steps.
    (r"input_norm/\w+", ()),
    (r"count|step|chosen_(value|count)", ()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Returns a mesh of data x fsdp x tensor devices; one size may be -1: what the others leave.

    Raises ValueError for sizes that do not fit the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    devices = jax.devices()
    known = [size for size in sizes.values() if size != -1]
    if min(known, default=0) < 1 or len(known) < len(sizes) - 1:
        raise ValueError(f"{text}: each must be 1 or more, and one at most -1 (what is left)")
    needed = math.prod(known)
    if needed > len(devices):
        raise ValueError(f"{text} needs {needed} devices, but there are {len(devices)}")
    left = len(devices) // needed
    shape = tuple(left if size == -1 else size for size in sizes.values())
    count = math.prod(shape)
    if count < len(devices) and (-1 in sizes.values() or jax.process_count() > 1):
        raise ValueError(
            f"{text} leaves out {len(devices) - count} of {len(devices)} devices; with -1, or with "
            "several processes, the sizes must use all of them"
        )
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices[:count])


def batch_shares(mesh: Mesh) -> int:
    """Returns the number of equal parts into which the mesh cuts a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(mesh: Mesh, batch_size: int, accumulation_steps: int) -> None:
    """Raises ValueError where devices and accumulation steps do not divide a batch evenly."""
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps={accumulation_steps} must be at least 1")
    shares = batch_shares(mesh)
    if batch_size < 1 or batch_size % (shares * accumulation_steps):
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of {shares * accumulation_steps}, "
            f"mesh.data x mesh.fsdp ({shares}) times accumulation_steps ({accumulation_steps})"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its leading axis lies over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def by_rules(mesh: Mesh, tree: Any) -> Any:
    """Returns the sharding of each leaf of a tree of parameters, moments or statistics.

    Raises ValueError for a leaf without a rule, and for an axis that the mesh does not divide.
    """

    def place(path, leaf) -> NamedSharding:
        axes = _axes(path, leaf.shape)
        for number, axis in enumerate(axes):
            if axis and leaf.shape[number] % mesh.shape[axis]:
                raise ValueError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide {leaf.shape[number]}, axis "
                    f"{number} of {_name(path)} {list(leaf.shape)}; choose a mesh.{axis} that does"
                )
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(shapes: Any, shardings: Any) -> Any:
    """Returns a tree of shapes and types with the sharding of each leaf, for restoring a state."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )


def traced_on(mesh: Mesh, function: Callable) -> Callable:
    """Returns `function` for jit: while it is traced, `over_batch` and `gathered` use `mesh`."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def over_batch(x: jax.Array) -> jax.Array:
    """Returns `x` with its leading axis over the batch's axes; outside `traced_on`, `x` itself."""
    if not _is_in_view():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def gathered(layer: Any) -> Any:
    """Returns a layer's parameters as they are used: whole along `fsdp`, shared over `tensor`.

    Without this constraint XLA may gather the batch instead, which is far larger. Outside of
    `traced_on` the parameters come back unchanged.
    """
    if not _is_in_view():
        return layer

    def gather(path, leaf: jax.Array) -> jax.Array:
        axes = (None if axis == "fsdp" else axis for axis in _axes(path, leaf.shape))
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(gather, layer)


def _is_in_view() -> bool:
    """Whether `traced_on` is active; the mesh of a caller of the model has other axes."""
    return set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names)


def _axes(path, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    name = _name(path)
    for pattern, axes in _RULES:
        if re.search(rf"(^|/)({pattern})$", name):
            return (None,) * (len(shape) - len(axes)) + axes if axes else ()
    raise ValueError(f"no rule says how {name} {list(shape)} is sharded; add one to sharding.py")


def _name(path) -> str:
    names = (str(getattr(key, "key", getattr(key, "name", key))) for key in path)
    return "/".join(name for name in names if name != "value")  # an nnx variable's own


@functools.cache
def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of the global batch that this process' devices hold, ascending."""
    slices = by_example(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Returns global arrays [batch_size, ...] from this process' rows (`process_rows`) of each."""
    sharding = by_example(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }
