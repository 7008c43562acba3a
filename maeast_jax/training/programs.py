"""The programs of a pretraining run, jitted for its mesh: what lies where, in and out."""

from collections.abc import Callable

import jax

from maeast_jax.data import pipeline
from maeast_jax.runtime import distributed, sharding
from maeast_jax.training import pretraining
from maeast_jax.training.pretraining import Run
from maeast_jax.training.steps import (
    TrainState,
    init_state,
    make_calibrate,
    make_eval_step,
    make_reconstruct,
    make_train_step,
)


class Programs:
    """Functions of a run's state and batches, placed on its mesh.

    Attributes:
      shardings: of the state, by the rules of sharding.py.
      abstract_state: shapes, types and shardings of the state.

    Raises ValueError where the mesh does not divide the model.
    """

    def __init__(self, checked: Run):
        self._run = checked
        config = checked.config
        self._common = {"seed": config.seed, "num_frames": config.num_frames}
        self._whole = sharding.replicated(checked.mesh)
        self._init = lambda: init_state(checked.model, checked.optimizer, config.seed)
        shapes = jax.eval_shape(self._init)
        self.shardings = sharding.by_rules(checked.mesh, shapes)
        self.abstract_state: TrainState = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            self.shardings,
        )

    def initial_state(self) -> TrainState:
        return jax.jit(self._init, out_shardings=self.shardings)()

    def step(self) -> jax.stages.Compiled:
        """The training step, compiled ahead, so that the first step is as fast as the others."""
        checked = self._run
        step = make_train_step(
            checked.model,
            checked.loss,
            checked.optimizer,
            checked.learning_rate,
            accumulation_steps=checked.config.accumulation_steps,
            **self._common,
        )
        jitted = self._jit(step, (self.shardings, self._whole), donate_argnums=0)
        return jitted.lower(self.abstract_state, pretraining.abstract_batch(checked)).compile()

    def eval_step(self) -> Callable:
        step = make_eval_step(self._run.model, self._run.loss, **self._common)
        return self._jit(step, self._whole)

    def reconstruct(self) -> Callable | None:
        """None where no pictures are asked for, or there is nothing to draw."""
        checked = self._run
        if not checked.has_eval:
            return None
        held_out = pipeline.eval_count(checked.eval_clips, checked.config.eval.max_clips)
        count = min(checked.config.eval.pictures, held_out, checked.config.batch_size)
        if not count:
            return None
        draw = make_reconstruct(checked.model, count=count, **self._common)
        return self._jit(draw, self._whole)

    def calibrate(self) -> Callable:
        calibrate = make_calibrate(self._run.model, num_frames=self._run.config.num_frames)
        return self._jit(calibrate, self.shardings, donate_argnums=0)

    def knn(self) -> Callable[[TrainState], dict[str, float]] | None:
        """What neighbours tell of a state, in the first process; the others get {}."""
        checked = self._run
        if checked.knn is None:
            return None
        gather = jax.jit(lambda weights: weights, out_shardings=self._whole)

        def tell(state: TrainState) -> dict[str, float]:
            weights = gather((state.params, state.statistics))
            if not distributed.is_first():
                return {}
            params, statistics = jax.tree.map(lambda leaf: leaf.addressable_data(0), weights)
            return checked.knn(checked.model, params, statistics, checked.config.num_frames)

        return tell

    def _jit(self, function: Callable, out_shardings, **options) -> Callable:
        traced = sharding.traced_on(self._run.mesh, function)
        return jax.jit(traced, out_shardings=out_shardings, **options)
