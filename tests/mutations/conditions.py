"""Mistakes in inner problems that are no smooth loss, and in solving an inner problem."""

from mutations import Mutant

MUTANTS = [
    Mutant(
        "fixed_point_system_not_transposed",
        "problem/operators/jacobian.py",
        "residual, LinearMap(adjoint, self.damping, unroll, transpose=forward)",
        "residual, LinearMap(forward, self.damping, unroll, transpose=adjoint)",
        "the system of a condition is solved with its matrix in place of the transpose",
        ("test_conditions.py::test_fixed_points_of_proximal_and_projected_steps[simplex]",),
    ),
    Mutant(
        "tangent_solved_with_the_adjoint",
        "hypergradient/attach.py",
        "mv = mv if adjoint else mv.transposed()",
        "mv = mv",
        "forward derivatives of an equilibrium solve the transposed system",
        (
            "test_conditions.py::test_with_response_differentiates_an_equilibrium_to_second_order_in_both_modes",
        ),
    ),
    Mutant(
        "condition_without_the_identity",
        "problem/two_losses.py",
        "return jax.tree.map(jnp.subtract, params, step)",
        "return jax.tree.map(jnp.negative, step)",
        "the equation of a fixed point is T(w) = 0",
        ("test_conditions.py::test_fixed_points_of_proximal_and_projected_steps",),
    ),
    Mutant(
        "cg_takes_any_matrix",
        "linear/cg.py",
        'require_symmetric(amap, "CG")',
        "pass",
        "CG on a matrix that is not symmetric gives a wrong number",
        ("test_conditions.py::test_methods_for_symmetric_matrices_refuse_conditions[CG]",),
    ),
    Mutant(
        "series_of_a_map_finds_a_step",
        "linear/neumann.py",
        "            step = 1.0\n",
        "            step = 0.5\n",
        "the series of a map that contracts converges to another number of terms",
        ("test_conditions.py::test_the_series_of_a_map_has_one_term_more_than_products",),
    ),
    Mutant(
        "solve_that_failed_passes",
        "hypergradient/attach.py",
        "return jax.tree.map(lambda x: jnp.where(condition, jnp.nan, x), vector)",
        "return vector",
        "a derivative at a saddle is a number",
        ("test_with_response.py::test_a_derivative_at_no_minimum_is_nan",),
    ),
    Mutant(
        "minimize_stops_early",
        "inner/minimize.py",
        "(search.size > bound) & ~search.stuck",
        "(search.size > 10 * bound) & ~search.stuck",
        "the tolerance is met ten times too loosely",
        ("test_minimize.py::test_the_tolerance_bounds_the_gradient_and_with_it_the_error",),
    ),
    Mutant(
        "proximal_step_too_long",
        "inner/minimize.py",
        "return ~(loss(w) <= model)",
        "return ~(loss(w) <= 4 * jnp.abs(model) + 1)",
        "proximal steps are longer than the curvature allows",
        ("test_minimize.py::test_lasso_satisfies_its_optimality_conditions",),
    ),
    Mutant(
        "rule_of_custom_vjp_hidden",
        "problem/two_losses.py",
        'if "custom_vjp" not in str(error):',
        "if True:",
        "losses with a backward rule of their own die with JAX's words",
        ("test_custom_rules.py::test_a_backward_rule_changes_nothing",),
    ),
]
