"""Mistakes in objectives: what the outer problem can be."""

from mutations import Mutant

MUTANTS = [
    Mutant(
        "folds_out_of_order",
        "objectives/cross_validation.py",
        "return jax.tree.map(lambda *xs: jnp.concatenate(xs)[back], *parts)",
        "return jax.tree.map(lambda *xs: jnp.concatenate(xs)[back[::-1]], *parts)",
        "the solutions of folds come back in another order than they went in",
        ("test_cross_validation.py::test_value_is_the_mean_over_the_folds_in_their_order",),
    ),
    Mutant(
        "train_and_test_swapped",
        "objectives/cross_validation.py",
        "return tuple(taken(data, group.test, group.places) for group in self.groups)",
        "return tuple(taken(data, group.train, group.places) for group in self.groups)",
        "the folds are judged on what they were trained on",
        ("test_cross_validation.py::test_value_is_the_mean_over_the_folds_in_their_order",),
    ),
    Mutant(
        "sure_counts_the_trace_once",
        "objectives/sure.py",
        "+ 2 * variance * self._trace(y, push, weight)",
        "+ variance * self._trace(y, push, weight)",
        "degrees of freedom enter Stein's estimate once in place of twice",
        ("test_sure.py::test_closed_form_of_a_ridge_smoother",),
    ),
    Mutant(
        "sensitivity_without_its_own_derivative",
        "objectives/sensitivity.py",
        "return push(w_dot, moved)",
        "return push(jax.lax.stop_gradient(w_dot), moved)",
        "how the degrees of freedom follow the hyperparameters is left out",
        ("test_sure.py::test_closed_form_of_a_ridge_smoother",),
    ),
    Mutant(
        "root_of_degenerate_curvature",
        "objectives/kernel.py",
        "kept = sums > cut",
        "kept = sums > -1",
        "the derivative of the root of a softmax's Hessian divides by zero",
        ("test_evidence.py::test_function_space_is_parameter_space_for_a_network",),
    ),
    Mutant(
        "evidence_without_the_half",
        "objectives/evidence.py",
        "batch) + 0.5 * volume",
        "batch) + volume",
        "the log-determinant counts twice",
        ("test_evidence.py::test_linear_gaussian_evidence_and_its_derivatives",),
    ),
    Mutant(
        "kl_not_weighed_down",
        "objectives/elbo.py",
        "self.kl(params) / (kappa * self.num_examples)",
        "self.kl(params) / self.num_examples",
        "the data are not weighed up",
        ("test_evidence.py::test_linear_gaussian_elbo",),
    ),
    Mutant(
        "prior_in_units_of_the_deviations",
        "objectives/hyper_prior.py",
        "weight = 1 - self._spread(dtype) ** 2",
        "weight = 1 - self._spread(dtype)",
        "the strength of a prior is not in units of the outer loss",
        ("test_hyper_prior.py::test_penalty_is_the_distance_to_the_mean_of_the_group",),
    ),
    Mutant(
        "ties_go_to_the_weaker_prior",
        "objectives/strength.py",
        "order = sorted((float(s) for s in strengths), reverse=True)",
        "order = sorted(float(s) for s in strengths)",
        "among equals the answer does not fall back to sharing",
        ("test_hyper_prior.py::test_the_strength_is_chosen_and_falls_back_to_sharing",),
    ),
]
