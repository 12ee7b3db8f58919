"""Mistakes in the outer loops, their bounds and their records."""

from mutations import Mutant

MUTANTS = [
    Mutant(
        "response_around_old_parameters",
        "outer/cycle.py",
        """\
                params = optax.apply_updates(params, updates)
                # The response learns around the weights as they are after their own step.
                loss, response_grads = jax.value_and_grad(perturbed)(
                    response, params, model_state, noise, other
                )
""",
        """\
                loss, response_grads = jax.value_and_grad(perturbed)(
                    response, params, model_state, noise, other
                )
                params = optax.apply_updates(params, updates)
""",
        "the response is trained around the weights before their step",
        ("test_self_tuning.py::test_a_cycle_of_one_step_equals_the_updates_written_out",),
    ),
    Mutant(
        "stn_noise_reused",
        "outer/cycle.py",
        "noise = self._noise(jax.random.fold_in(key, k), state.raw, batch)",
        "noise = self._noise(jax.random.fold_in(key, 0), state.raw, batch)",
        "every training step of a cycle draws the same perturbation",
        ("test_self_tuning.py",),
    ),
    Mutant(
        "stn_validation_noise_is_training_noise",
        "outer/cycle.py",
        "noise = self._noise(jax.random.fold_in(key, self.inner_steps + j), moved.raw, batch)",
        "noise = self._noise(jax.random.fold_in(key, j), moved.raw, batch)",
        "the validation step sees the perturbation that the response was trained on",
        ("test_self_tuning.py",),
    ),
    Mutant(
        "entropy_sign",
        "outer/cycle.py",
        "return value - self.entropy * entropy_of(scales).astype(value.dtype), value",
        "return value + self.entropy * entropy_of(scales).astype(value.dtype), value",
        "scales shrink to nothing",
        ("test_self_tuning.py::test_scales_are_tuned_and_the_entropy_holds_them_up",),
    ),
    Mutant(
        "warm_up_one_cycle_longer",
        "outer/cycle.py",
        "jax.lax.cond(state.step < self.warm_up, wait, tune, start)",
        "jax.lax.cond(state.step <= self.warm_up, wait, tune, start)",
        "tuning starts a cycle late",
        ("test_self_tuning.py::test_warm_up_trains_and_does_not_tune",),
    ),
    Mutant(
        "validation_batch_0_only",
        "outer/cycle.py",
        "            batch = slice_batch(outer_batch, j) if self.outer_steps > 1 else outer_batch\n"
        "            noise",
        "            batch = slice_batch(outer_batch, 0) if self.outer_steps > 1 else outer_batch\n"
        "            noise",
        "every validation step reads the first batch",
        ("test_self_tuning.py::test_several_validation_steps_read_a_batch_each",),
    ),
    Mutant(
        "integer_round_without_clip",
        "outer/constrain.py",
        "return jnp.clip(jnp.round(value), self.lo, self.hi)",
        "return jnp.round(value)",
        "`Integer(lo, hi).round` may leave its range by one",
        ("test_constrain.py::test_integer_rounds_to_its_range",),
    ),
    Mutant(
        "interval_check_closed",
        "outer/constrain.py",
        "inside = (value > self.lo) & (value < self.hi)",
        "inside = (value >= self.lo) & (value <= self.hi)",
        "a start at an end of the interval passes, and its raw value is infinite",
        ("test_constrain.py::test_values_outside_their_bounds_are_refused",),
    ),
    Mutant(
        "schedule_off_by_one",
        "outer/schedule.py",
        'index = jnp.searchsorted(self.steps, step, side="right") - 1',
        'index = jnp.searchsorted(self.steps, step, side="left") - 1',
        "an entry comes in force a step late",
        (
            "test_self_tuning.py::test_a_schedule_is_saved_and_read_back",
            "test_face.py::test_examples_run[HyperSchedule]",
        ),
    ),
    Mutant(
        "bounds_not_in_the_chain_rule",
        "outer/alternate.py",
        "            grads = jax.vjp(constrain.constrain, state.raw)[1](grads)[0]\n",
        "            pass\n",
        "the raw variable moves along the gradient of the bounded one",
        ("test_alternate.py::test_a_step_is_the_loop_written_by_hand",),
    ),
    Mutant(
        "scan_run_keeps_the_worst",
        "outer/whole_run.py",
        "better = value < best_score",
        "better = value > best_score",
        "`scan_run` never keeps a state",
        ("test_self_tuning.py::test_a_scanned_run_equals_a_loop_and_keeps_the_best_state_whole",),
    ),
    Mutant(
        "scan_run_same_numbers_each_step",
        "outer/whole_run.py",
        "jax.random.split(jax.random.fold_in(key, state.step))",
        "jax.random.split(jax.random.fold_in(key, 0))",
        "every step of a scanned run reads the same batch",
        ("test_self_tuning.py::test_a_scanned_run_equals_a_loop_and_keeps_the_best_state_whole",),
    ),
    Mutant(
        "groups_see_one_part",
        "hypergradient/best_response.py",
        "values = [loss(*jax.tree.map(lambda x, g=g: x[g], stack)) for g in range(groups)]",
        "values = [loss(*jax.tree.map(lambda x, g=g: x[0], stack)) for g in range(groups)]",
        "written out for convolutions, every group sees the first part of the batch",
        ("test_self_tuning.py", "test_best_response.py"),
    ),
]
