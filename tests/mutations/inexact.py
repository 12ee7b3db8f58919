"""Mistakes in the loops whose solves become more accurate with the progress."""

from mutations import Mutant

MUTANTS = [
    Mutant(
        "hoag_steps_twice",
        "outer/inexact/hoag.py",
        "self.mover.move(kept, tree.scale(1 / lipschitz, kept_grads), value=value)",
        "self.mover.move(kept, tree.scale(2 / lipschitz, kept_grads), value=value)",
        "the step is applied twice, as in the published code",
        ("test_hoag.py::test_the_lipschitz_estimate_falls_by_a_twentieth_after_a_good_step",),
    ),
    Mutant(
        "hoag_leaves_from_what_it_turned_down",
        "outer/inexact/hoag.py",
        "kept = tree.where(rejected, state.kept, state.outer)",
        "kept = state.outer",
        "hyperparameters that were turned down are kept all the same",
        ("test_hoag.py::test_a_step_that_is_too_long_is_turned_down_and_halved",),
    ),
    Mutant(
        "hoag_tolerance_stands_still",
        "outer/inexact/hoag.py",
        "tol = at_step(self.schedule, state.step, state.factor)",
        "tol = at_step(self.schedule, 0, state.factor)",
        "the tolerance does not follow the steps",
        ("test_hoag.py::test_the_error_is_below_the_bound_of_the_tolerance_in_every_step",),
    ),
    Mutant(
        "hoag_solves_the_linear_system_as_tightly",
        "outer/inexact/hoag.py",
        "jnp.minimum(self.linear_factor * tol, jnp.maximum(tol, LOOSEST))",
        "tol",
        "the factor of the linear system is not read",
        (
            "test_hoag.py::test_the_linear_system_may_be_solved_less_accurately_and_the_estimate_fall_faster",
        ),
    ),
    Mutant(
        "hoag_starts_cold",
        "outer/inexact/hoag.py",
        "new._replace(params=minimum.params, response=solution.state, scale=scale)",
        "new._replace(scale=scale)",
        "both solves start from where the run began",
        ("test_hoag.py::test_warm_starts_and_falling_tolerances_save_work",),
    ),
    Mutant(
        "bound_without_the_linear_solve",
        "outer/inexact/certificate.py",
        "return b * residual / mu + distance * linear + distance**2 * quadratic",
        "return distance * linear + distance**2 * quadratic",
        "the residual of the linear system is left out of the bound",
        (
            "test_maid.py::test_every_accepted_step_decreases_the_true_value_and_the_error_is_below_its_bound",
        ),
    ),
    Mutant(
        "bound_without_the_outer_curvature",
        "outer/inexact/certificate.py",
        "b * c.outer_smoothness / mu\n",
        "0 * c.outer_smoothness / mu\n",
        "the outer curvature is left out of the bound, as in the published code",
        (
            "test_maid.py::test_every_accepted_step_decreases_the_true_value_and_the_error_is_below_its_bound",
        ),
    ),
    Mutant(
        "maid_compares_computed_values",
        "outer/inexact/certified.py",
        "change = value - found.solution.value + slack + found.slack",
        "change = value - found.solution.value",
        "the decrease of the computed loss is taken for that of the true one",
        (
            "test_maid.py::test_every_accepted_step_decreases_the_true_value_and_the_error_is_below_its_bound",
        ),
    ),
    Mutant(
        "maid_forgets_the_change_of_variables",
        "outer/inexact/certified.py",
        "bound = bound * self._stretch(state.outer)",
        "bound = bound * 1",
        "the bound is of the hypergradient in what the losses read, not in what moves",
        ("test_maid.py::test_a_simplex_stretches_by_half_at_most",),
    ),
    Mutant(
        "bo_rep_does_not_normalize",
        "outer/inexact/bo_rep.py",
        "return tree.scale(1 / jnp.where(length == 0, 1, length), updates), state",
        "return updates, state",
        "a step is as long as the hypergradient",
        ("test_bo_rep.py::test_on_a_quartic_it_walks_where_gradient_descent_diverges",),
    ),
    Mutant(
        "bo_rep_trains_in_every_step",
        "outer/inexact/bo_rep.py",
        "trains = warming | ((state.step - self.warm_up) % self.every == 0)",
        "trains = warming | (state.step >= 0)",
        "the parameters are trained in steps where they should stand still",
        ("test_bo_rep.py::test_every_step_is_as_long_as_the_rate_and_the_warm_up_only_trains",),
    ),
]
