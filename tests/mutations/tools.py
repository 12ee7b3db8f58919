"""Mistakes in the tools for people: diagnosis, checks, drivers, messages."""

from mutations import Mutant

MUTANTS = [
    Mutant(
        "diagnosis_without_margin",
        "diagnose.py",
        "stationary = stationarity <= STATIONARY",
        "stationary = stationarity <= 1e3",
        "every point passes for a minimum",
        ("test_diagnose.py::test_unfit_problems_are_called_so",),
    ),
    Mutant(
        "best_pair_after_the_update",
        "fit.py",
        """\
        before = state.hparams
        state, info = _step(alg, state, batches, key, i)
""",
        """\
        state, info = _step(alg, state, batches, key, i)
        before = state.hparams
""",
        "the best hyperparameters are those after the step that was measured",
        ("test_fit.py::test_fit_is_the_plain_loop_and_keeps_the_pair_that_was_measured",),
    ),
    Mutant(
        "nan_is_the_best",
        "fit.py",
        "    better = value < best.value\n",
        "    better = ~(value >= best.value)\n",
        "a NaN replaces the best point",
        ("test_fit.py::test_nan_is_told_and_never_the_best",),
    ),
    Mutant(
        "fit_same_key_each_step",
        "fit.py",
        "key = None if key is None else jax.random.fold_in(key, i)",
        "key = None if key is None else jax.random.fold_in(key, 0)",
        "every step of a run draws the same numbers",
        ("test_fit.py::test_fit_is_the_plain_loop_and_keeps_the_pair_that_was_measured",),
    ),
    Mutant(
        "patience_one_step_longer",
        "fit.py",
        "                if patience is not None and i - mark >= patience:\n"
        '                    reason = "patience"',
        "                if patience is not None and i - mark > patience:\n"
        '                    reason = "patience"',
        "a run stops a step late",
        ("test_fit.py::test_patience_stops_exactly_and_stays_stopped",),
    ),
    Mutant(
        "status_of_the_best_lane",
        "status.py",
        "status = Status(int(results.max()))",
        "status = Status(int(results.min()))",
        "`raise_for_status` is silent unless every lane of a vmapped solve failed",
        ("test_errors.py::test_raise_for_status_of_many_lanes_tells_of_the_gravest",),
    ),
    Mutant(
        "count_accepts_true",
        "settings.py",
        "if isinstance(value, bool) or not isinstance(value, (int, np.integer)):",
        "if not isinstance(value, (int, np.integer)):",
        "`CG(max_steps=True)` makes one step",
        ("test_errors.py::test_settings_out_of_range",),
    ),
    Mutant(
        "empty_batch_passes",
        "checks.py",
        "        if 0 in jnp.shape(leaf):\n",
        "        if False:\n",
        "the mean over no examples is NaN",
        ("test_errors.py::test_messages_of_a_call",),
    ),
    Mutant(
        "unread_hyperparameter_passes",
        "checks.py",
        "        if not (a or b)\n",
        "        if False\n",
        "a hyperparameter that no derivative reaches gets a silent zero",
        (
            "test_errors.py::"
            "test_unread_hyperparameter_is_named_with_the_response_that_could_see_it",
        ),
    ),
    Mutant(
        "step_of_differences_halved",
        "check.py",
        "NEWTON_STEPS = 50",
        "NEWTON_STEPS = 0",
        "the inner problem is not solved again",
        ("test_diagnose.py::test_right_response_passes_in_float64",),
    ),
    Mutant(
        "linen_keeps_params_in_rest",
        "adapters.py",
        'for name, tree in variables.items() if name != "params"}',
        "for name, tree in variables.items()}",
        "the parameters are also part of the model state",
        ("test_adapters.py",),
    ),
]
