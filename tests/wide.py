"""Which tests the default run thins out, so that it ends in minutes.

What is left out is marked `wide`: tests that start processes or whole experiments, and all but some
cases of a table that crosses methods with problems. `.ci/run` runs it too, and so does
`python -m pytest -m "not slow"`.
"""

KEPT = {
    # File and test: how many of its cases the default run keeps, spread evenly; 0 for none.
    "experiments/test_augment.py": {
        "test_a_run_tunes_both_networks_and_a_finished_one_is_not_run_again": 0,
    },
    "experiments/test_decay.py": {
        "test_it_runs_and_decays_per_weight_fit_the_validation_images_best": 0,
    },
    "experiments/test_hypernet.py": {
        "test_a_short_run_learns_the_curve_and_is_not_repeated": 0,
    },
    "experiments/test_lstm.py": {
        "test_a_small_run_learns_records_everything_and_is_not_repeated": 0,
    },
    "experiments/test_many.py": {"test_it_runs_and_chooses_one_of_the_strengths": 0},
    "experiments/test_overfit.py": {
        "test_a_decay_per_weight_fits_the_validation_set_and_nothing_runs_twice": 0,
    },
    "experiments/test_solvers.py": {
        "test_every_method_lowers_the_gradient_and_equals_its_twin": 0,
    },
    "experiments/test_sparse_experiment.py": {"test_it_runs_resumes_and_is_drawn": 0},
    "experiments/test_sure_experiment.py": {"test_it_runs_and_denoises": 0},
    "experiments/test_stn_cifar.py": {
        "test_a_run_tunes_every_hyperparameter_and_resumes": 0,
        "test_the_full_network_is_the_papers_and_can_be_traced": 0,
        "test_the_starting_values_are_inside_the_ranges_and_change_nothing_twice": 0,
    },
    "experiments/test_stn_digits.py": {
        "test_every_method_is_recorded_once_and_drawn": 0,
        "test_delta_stn_trains_the_plain_network_of_its_schedule": 0,
    },
    "experiments/test_stn_fashion.py": {
        "test_every_method_is_recorded_once_and_holes_move_through_the_response_alone": 0,
    },
    "experiments/test_stn_ptb.py": {
        "test_a_small_run_moves_what_it_tunes_replays_it_and_is_not_repeated": 0,
    },
    "library/test_adapters.py": {
        "test_linen_with_batch_norm_and_dropout": 0,
        "test_lineax_solvers_solve": 1,
    },
    "library/test_composite.py": {
        "test_cg_agrees_with_differences_of_the_solved_problem": 2,
        "test_every_legal_solver_and_operator": 3,
        "test_mistakes_in_conditions_are_rejected_by_two_cases": 1,
        "test_the_system_is_that_of_the_fixed_point_for_every_step_size": 2,
        "test_trees_half_precision_and_warm_starts": 0,
        "test_with_response_to_second_order_in_both_modes": 0,
    },
    "library/test_conditions.py": {
        "test_fixed_points_of_proximal_and_projected_steps": 3,
        "test_with_response_differentiates_an_equilibrium_to_second_order_in_both_modes": 1,
    },
    "library/test_curvature_layers.py": {
        "test_dual_is_the_jacobian_times_its_transpose": 2,
        "test_ekfac_is_exact_where_the_block_is_a_kronecker_product": 1,
        "test_kfac_needs_a_third_of_the_products": 0,
        "test_low_precision": 0,
        "test_preconditioned_cg_reaches_the_same_solution": 1,
        "test_preconditioners_are_symmetric_and_positive": 0,
        "test_woodbury_through_layers_is_woodbury_through_rows": 2,
    },
    "library/test_custom_rules.py": {
        "test_a_backward_rule_changes_nothing": 3,
        "test_a_backward_rule_inside_the_model": 1,
        "test_siblings_change_nothing_either": 1,
    },
    "library/test_data_derivatives.py": {
        "test_in_hyperparameters_and_data_by_every_solver": 2,
        "test_the_divergence_of_the_lasso_is_the_size_of_its_support": 0,
    },
    "library/test_default_flags.py": {"test_what_only_default_flags_can_show": 0},
    "library/test_docs.py": {"test_python_blocks_run": 3},
    "library/test_face.py": {"test_examples_run": 40},
    "library/test_faults.py": {
        "test_a_killed_process_leaves_its_last_checkpoint_and_no_stale_lock": 0,
    },
    "library/test_finite_difference.py": {
        "test_exact_where_the_hyperparameter_gradient_is_quadratic": 1,
        "test_a_radius_below_rounding_is_marked": 1,
    },
    "library/test_fit.py": {
        "test_a_finished_run_goes_on_when_asked_for_more_steps": 1,
        "test_a_run_killed_three_times_ends_with_the_same_bits": 0,
        "test_a_damaged_newest_checkpoint_is_set_aside_for_the_one_before": 1,
    },
    "library/test_hypergrad.py": {"test_method_equals_its_closed_form": 80},
    "library/test_maid.py": {
        "test_a_penalty_a_weight_keeps_both_guarantees": 1,
        "test_every_accepted_step_decreases_the_true_value_and_the_error_is_below_its_bound": 1,
    },
    "library/test_odd_inputs.py": {"test_a_sample": 0},
    "library/test_optimizer.py": {
        "test_a_gradient_of_exactly_zero_has_the_derivative_of_the_limit": 4,
        "test_a_line_search_is_differentiated_forward_or_refused": 0,
        "test_optimizers_that_ask_for_the_loss": 2,
    },
    "library/test_optimizers.py": {"test_optimizers": 8},
    "library/test_outer_sharding.py": {
        "test_examples_and_columns_stay_where_they_are": 0,
    },
    "library/test_penalty.py": {
        "test_the_bias_of_f2sa_falls_with_the_penalty_to_its_order": 1,
    },
    "library/test_properties.py": {
        "test_any_tree_any_dtype_and_a_batch_of_one": 1,
        "test_jit_changes_rounding_only": 1,
    },
    "library/test_recurrence.py": {"test_derivatives_are_those_of_the_plain_loop": 1},
    "library/test_single_loop.py": {
        "test_frozen_leaves_have_no_adjoint": 2,
        "test_half_precision_keeps_its_types_and_the_adjoint_is_wide": 2,
    },
    "library/test_sparse.py": {
        "test_a_sparse_design_gives_the_same_and_is_never_made_dense": 2,
    },
    "library/test_strengths.py": {
        "test_half_precision_rounds_once_at_the_end": 1,
        "test_traced_strengths_that_are_impossible_give_nan_and_no_plausible_number": 20,
    },
    "library/test_training_step.py": {
        "test_a_lone_key_is_split_by_step_in_every_loop": 2,
        "test_inner_optimizers_get_the_loss_that_they_ask_for": 1,
        "test_outer_optimizers_get_the_value_of_the_outer_loss": 1,
    },
    "library/test_unroll.py": {
        "test_all_modes_agree_on_a_network_with_keyed_noise": 0,
        "test_optimizer_settings_equal_central_differences": 3,
        "test_quadratic_equals_its_closed_form": 4,
    },
    "library/test_unroll_in_jax.py": {"test_batch_norm_equals_central_differences": 1},
    "library/test_with_response.py": {
        "test_derivatives_in_anything_else_are_refused_in_both_modes": 1,
        "test_every_order_and_mode_is_right_with_every_solver": 3,
        "test_second_derivatives_under_vmap_and_scan_with_a_closure_over_tracers": 0,
    },
}


def left_out(names: list[tuple[str, str]]) -> list[bool]:
    """For the file and the function of each test, in their order: is it left out?"""
    cases: dict[tuple[str, str], list[int]] = {}
    for i, (file, function) in enumerate(names):
        if function in KEPT.get(file, {}):
            cases.setdefault((file, function), []).append(i)
    out = [False] * len(names)
    for (file, function), places in cases.items():
        keep, count = min(KEPT[file][function], len(places)), len(places)
        kept = {k * count // keep for k in range(keep)}
        for k, i in enumerate(places):
            out[i] = k not in kept
    return out
