"""Which tests the default run thins out, so that it ends in minutes.

What is left out is marked `wide`: tests that start processes or whole experiments, and all but some
cases of a table that crosses methods with problems. `.ci/run` runs it too, and so does
`python -m pytest -m "not slow"`.
"""

KEPT = {
    # File and test: how many of its cases the default run keeps, spread evenly; 0 for none.
    "experiments/test_attribution_experiment.py": {
        "test_scores_predict_and_figures_are_drawn": 0,
    },
    "experiments/test_augment.py": {
        "test_a_run_tunes_both_networks_and_a_finished_one_is_not_run_again": 0,
        "test_without_a_last_layer_nothing_changes_and_noise_matters_with_one": 0,
    },
    "experiments/test_bench.py": {
        "test_self_tuning_steps_are_those_written_by_hand": 0,
        "test_tuning_by_dual_cg_is_that_written_by_hand": 0,
    },
    "experiments/test_bo_rep_experiment.py": {
        "test_a_loop_spends_what_it_is_budgeted": 1,
        "test_it_runs_and_resumes_to_the_same_records": 0,
    },
    "experiments/test_cleaning.py": {
        "test_a_step_costs_what_the_loop_counts": 2,
        "test_weights_tell_who_is_wrong_and_a_run_is_not_repeated": 0,
    },
    "experiments/test_costs.py": {
        "test_a_loop_counts_what_is_budgeted_for_its_step": 1,
        "test_distill_counts_its_hypergradients": 0,
        "test_learning_rate_counts_its_windows": 1,
        "test_pes_counts_its_windows": 1,
    },
    "experiments/test_data.py": {
        "test_mnist_and_fashion_mnist_have_their_published_statistics": 0,
        "test_texts_become_tokens_of_the_training_vocabulary": 0,
    },
    "experiments/test_decay.py": {
        "test_it_runs_and_decays_per_weight_fit_the_validation_images_best": 0,
    },
    "experiments/test_digits.py": {
        "test_every_method_spends_the_budget_and_no_more": 2,
    },
    "experiments/test_egn.py": {
        "test_it_runs": 0,
    },
    "experiments/test_elbo_experiment.py": {
        "test_it_runs_and_costs_are_counted": 0,
    },
    "experiments/test_evidence_experiment.py": {
        "test_it_runs": 0,
    },
    "experiments/test_fedhyper.py": {
        "test_a_run_keeps_its_bounds_is_drawn_and_not_repeated": 0,
    },
    "experiments/test_games.py": {
        "test_runs_follow_the_powers_of_the_update": 2,
    },
    "experiments/test_hyperlista.py": {
        "test_it_runs_and_recovers": 0,
    },
    "experiments/test_hypernet.py": {
        "test_a_short_run_learns_the_curve_and_is_not_repeated": 0,
    },
    "experiments/test_inexact_experiments.py": {
        "test_a_denoising_problem_knows_its_constants": 0,
        "test_a_run_of_hoag_keeps_its_budget_and_reads_the_test_part_once": 0,
    },
    "experiments/test_lstm.py": {
        "test_a_small_run_learns_records_everything_and_is_not_repeated": 0,
        "test_many_start_where_few_start_and_reach_every_weight": 0,
    },
    "experiments/test_many.py": {
        "test_fits_are_minima_and_the_derivative_is_that_of_the_refitted": 0,
        "test_it_runs_and_falls_back_to_the_searched_penalty": 0,
        "test_the_picture_and_the_summary_compare_draw_by_draw": 0,
    },
    "experiments/test_mip.py": {
        "test_a_convolutional_network_is_trained_through_a_hypernetwork": 0,
        "test_a_short_run_is_recorded_once_and_mip_is_ahead_of_plain": 0,
        "test_a_weighted_loss_is_the_data_loss_at_zero_and_the_prior_at_one": 0,
        "test_products_with_windows_are_convolutions": 0,
        "test_scaled_heads_predict_the_sizes_of_he": 0,
        "test_sizes_before_training": 1,
    },
    "experiments/test_overfit.py": {
        "test_a_decay_per_weight_fits_the_validation_set_and_nothing_runs_twice": 0,
    },
    "experiments/test_pretrain_experiment.py": {
        "test_it_runs_and_moves_the_weights": 0,
    },
    "experiments/test_protocol.py": {
        "test_other_test_labels_change_what_is_reported_and_nothing_that_is_chosen": 0,
    },
    "experiments/test_schedule_experiment.py": {
        "test_rates_move_towards_a_lower_loss_within_the_budget": 0,
    },
    "experiments/test_schedule_experiments.py": {
        "test_images_pass_through_both_networks": 0,
        "test_the_whole_run_is_differentiated": 0,
    },
    "experiments/test_solvers.py": {
        "test_a_finished_run_is_not_repeated": 0,
        "test_adapters_are_the_loops": 1,
        "test_costs_are_those_that_the_loops_count": 0,
        "test_every_method_lowers_the_gradient_and_equals_its_twin": 0,
        "test_the_gradient_of_the_quadratic_is_that_of_the_library": 0,
    },
    "experiments/test_sparse_experiment.py": {
        "test_it_runs_resumes_and_is_drawn": 0,
        "test_its_hypergradient_is_the_slope_of_the_criterion": 0,
    },
    "experiments/test_stn_cifar.py": {
        "test_a_run_tunes_every_hyperparameter_and_resumes": 0,
        "test_the_full_network_is_the_papers_and_can_be_traced": 0,
        "test_the_starting_values_are_inside_the_ranges_and_change_nothing_twice": 0,
    },
    "experiments/test_stn_digits.py": {
        "test_delta_stn_trains_the_plain_network_of_its_schedule": 0,
        "test_every_method_is_recorded_once_and_drawn": 0,
        "test_rates_move_through_the_response_alone": 0,
    },
    "experiments/test_stn_fashion.py": {
        "test_every_method_is_recorded_once_and_holes_move_through_the_response_alone": 0,
    },
    "experiments/test_stn_ptb.py": {
        "test_a_plain_network_follows_its_schedule": 0,
        "test_a_small_run_moves_what_it_tunes_replays_it_and_is_not_repeated": 0,
        "test_perturbed_sequences_are_the_plain_model_at_their_own_displacement": 0,
    },
    "experiments/test_stn_ridge.py": {
        "test_a_short_run_moves_towards_the_optimum_and_is_not_repeated": 0,
    },
    "experiments/test_sure_experiment.py": {
        "test_it_runs_and_denoises": 0,
    },
    "experiments/test_unem.py": {
        "test_it_runs": 0,
    },
    "library/test_adapters.py": {
        "test_equinox_keeps_static_parts_and_gives_the_pure_twins_number": 0,
        "test_lineax_solvers_solve": 1,
        "test_linen_with_batch_norm_and_dropout": 0,
    },
    "library/test_alternate.py": {
        "test_batch_norm_and_dropout_through_model_state": 0,
        "test_scan_and_vmap_agree_with_calls_one_by_one": 0,
    },
    "library/test_attribution.py": {
        "test_scores_predict_removal": 0,
        "test_untrained_parameters_and_rows_beyond_the_data_are_told": 0,
    },
    "library/test_best_response.py": {
        "test_gradients_of_groups_are_those_of_the_sum_and_can_be_differentiated": 0,
        "test_training_finds_the_slope_of_its_width": 0,
    },
    "library/test_carried.py": {
        "test_a_budget_of_cg_tells_its_residual_without_a_product": 3,
        "test_a_stored_transpose_changes_no_product": 2,
    },
    "library/test_composite.py": {
        "test_a_damped_tangent_is_the_transpose_of_the_damped_adjoint": 0,
        "test_a_lasso_with_two_thousand_weights_takes_the_products_of_its_support": 0,
        "test_cg_agrees_with_differences_of_the_solved_problem": 1,
        "test_curvature_is_judged_on_the_support": 0,
        "test_every_legal_solver_and_operator": 1,
        "test_mistakes_in_conditions_are_rejected_by_two_cases": 0,
        "test_responses_hold_on_conditions_with_their_state": 0,
        "test_stationarity_is_that_of_minimize": 0,
        "test_the_system_is_that_of_the_fixed_point_for_every_step_size": 0,
        "test_trees_half_precision_and_warm_starts": 0,
        "test_truth_of_the_condition_cases_by_differences": 1,
        "test_what_does_not_fit_is_refused": 0,
        "test_with_response_to_second_order_in_both_modes": 0,
    },
    "library/test_conditions.py": {
        "test_check_hypergrad_solves_conditions_anew": 0,
        "test_fixed_points_of_proximal_and_projected_steps": 1,
        "test_with_response_differentiates_an_equilibrium_to_second_order_in_both_modes": 0,
    },
    "library/test_cross_validation.py": {
        "test_a_condition_of_every_fold_lasso": 0,
        "test_other_conditions_and_single_keys": 0,
    },
    "library/test_curvature_layers.py": {
        "test_dual_is_the_jacobian_times_its_transpose": 0,
        "test_ekfac_is_exact_where_the_block_is_a_kronecker_product": 1,
        "test_kfac_is_the_inverse_of_its_formula": 1,
        "test_kfac_needs_a_third_of_the_products": 0,
        "test_low_precision": 0,
        "test_moments_are_the_diagonal_of_gauss_newton_in_any_bases": 0,
        "test_preconditioned_cg_reaches_the_same_solution": 1,
        "test_preconditioners_are_symmetric_and_positive": 0,
        "test_solvers_through_layers_may_be_mapped": 0,
        "test_woodbury_keeps_to_rows_where_examples_may_depend_on_each_other": 0,
        "test_woodbury_refuses_more_equations_than_allowed": 0,
        "test_woodbury_through_layers_is_woodbury_through_rows": 0,
    },
    "library/test_custom_rules.py": {
        "test_a_backward_rule_changes_nothing": 1,
        "test_a_backward_rule_inside_the_model": 1,
        "test_siblings_change_nothing_either": 0,
        "test_solutions_have_their_first_derivative": 0,
    },
    "library/test_data_derivatives.py": {
        "test_a_derivative_in_hyperparameters_has_not_one_operation_more": 0,
        "test_a_loss_with_a_backward_rule_has_its_first_derivative": 0,
        "test_a_residual_is_relative": 0,
        "test_an_auxiliary_output_has_no_derivative_in_the_data": 0,
        "test_data_that_are_constants_are_not_traced_for": 0,
        "test_in_hyperparameters_and_data_by_every_solver": 0,
        "test_of_an_equation_that_is_no_gradient": 0,
        "test_the_divergence_of_the_lasso_is_the_size_of_its_support": 0,
    },
    "library/test_default_flags.py": {
        "test_what_only_default_flags_can_show": 0,
    },
    "library/test_deploy.py": {
        "test_the_value_belongs_to_what_is_deployed_with_the_hparams_before": 1,
    },
    "library/test_descend.py": {
        "test_equals_a_python_loop": 1,
    },
    "library/test_diagnose.py": {
        "test_a_check_reads_model_state_as_the_hypergradient_does": 0,
        "test_network_with_a_minimum": 0,
        "test_user_solver_and_float32": 0,
    },
    "library/test_discrimination.py": {
        "test_every_mistake_is_rejected_by_two_cases": 0,
        "test_wrong_solvers_are_rejected_as_solvers": 3,
    },
    "library/test_docs.py": {
        "test_python_blocks_run": 1,
    },
    "library/test_dual_cg.py": {
        "test_kernel_is_the_jacobian_times_its_transpose": 1,
        "test_what_rounding_hides_is_said": 0,
    },
    "library/test_dynamic_lanczos.py": {
        "test_a_call_without_a_state_is_a_first_one": 0,
        "test_a_full_subspace_begins_anew_at_the_value_it_reached": 0,
        "test_an_outer_loop_finds_the_optimum_with_it": 0,
        "test_trees_dtypes_and_lanes": 0,
    },
    "library/test_evidence.py": {
        "test_a_classifier_that_is_sure_of_its_examples_has_an_evidence": 1,
        "test_blocks_are_ordered_and_unbiased": 0,
        "test_cuts_of_outputs_and_groups_are_ordered": 0,
        "test_elbo_groups_centre_and_samples": 0,
        "test_function_space_is_parameter_space_for_a_network": 0,
    },
    "library/test_evolution.py": {
        "test_pes_is_unbiased_where_truncated_es_is_not": 0,
        "test_staggered_pairs_reset_at_their_horizon": 0,
    },
    "library/test_face.py": {
        "test_examples_run": 8,
    },
    "library/test_faults.py": {
        "test_a_killed_process_leaves_its_last_checkpoint_and_no_stale_lock": 0,
        "test_a_run_that_skips_resumes_to_the_same_bits": 0,
        "test_a_second_process_is_refused_and_told_about_the_first": 0,
        "test_after_three_ends_the_run_has_the_same_bits": 0,
        "test_an_interrupt_while_compiling_ends_cleanly": 0,
        "test_ctrl_c_saves_the_finished_step_and_says_where_to_go_on": 0,
    },
    "library/test_fine_tuned.py": {
        "test_three_levels_compose": 0,
        "test_two_quadratic_stages": 2,
    },
    "library/test_finite_difference.py": {
        "test_a_radius_below_rounding_is_marked": 1,
        "test_a_traced_radius_is_judged_by_lane": 0,
        "test_error_is_quadratic_in_the_radius": 0,
        "test_exact_where_the_hyperparameter_gradient_is_quadratic": 1,
        "test_settings_of_the_optimizer_state_and_zero_outer_gradient": 0,
    },
    "library/test_fit.py": {
        "test_a_damaged_newest_checkpoint_is_set_aside_for_the_one_before": 0,
        "test_a_finished_run_goes_on_when_asked_for_more_steps": 0,
        "test_a_run_killed_three_times_ends_with_the_same_bits": 0,
    },
    "library/test_frozen.py": {
        "test_an_implicit_response_is_that_of_the_trained_leaves": 1,
        "test_networks_of_best_responses_move_the_trained_leaves_only": 0,
    },
    "library/test_functions.py": {
        "test_arguments_of_check_hypergrad": 4,
        "test_draws_of_global_response": 2,
        "test_functions_and_data_of_fit": 3,
        "test_functions_of_scan_run": 1,
        "test_parts_of_a_split_loss": 5,
        "test_settings_that_are_functions": 5,
        "test_what_settings_of_unroll_return": 3,
    },
    "library/test_gauss_newton.py": {
        "test_push_through_gives_the_same_step": 0,
        "test_the_damping_follows_the_prediction": 0,
        "test_the_direction_is_that_of_the_dense_system": 1,
        "test_the_search_reaches_armijo": 0,
    },
    "library/test_group_means.py": {
        "test_it_saves_products": 0,
        "test_the_preconditioner_is_the_inverse_of_its_formula": 1,
    },
    "library/test_hoag.py": {
        "test_the_error_falls_with_the_tolerance": 0,
        "test_the_linear_system_may_be_solved_less_accurately_and_the_estimate_fall_faster": 0,
        "test_the_optimum_of_a_grid_at_half_the_work_of_exact_solves": 1,
    },
    "library/test_hyper_optimizers.py": {
        "test_a_gradient_of_zero_moves_nothing_and_a_nan_is_passed_on": 3,
        "test_bounds_hold_in_every_round": 2,
        "test_spectral_radii_and_distances": 2,
        "test_the_rate_rises_below_the_inverse_curvature_and_falls_above": 2,
        "test_trees_dtypes_jit_scan_and_vmap": 7,
    },
    "library/test_hyper_prior.py": {
        "test_examples_of_objectives_run": 1,
    },
    "library/test_hypergrad.py": {
        "test_central_differences_of_the_resolved_problem": 4,
        "test_method_equals_its_closed_form": 8,
    },
    "library/test_hypernetwork.py": {
        "test_the_weights_are_those_of_the_formula": 2,
    },
    "library/test_knots.py": {
        "test_a_lasso_with_zeros_off_their_threshold_has_no_knots": 0,
        "test_a_weight_at_its_threshold_is_told_from_both_sides_and_counted": 2,
        "test_none_of_the_oracles_is_at_a_knot": 2,
    },
    "library/test_layers.py": {
        "test_layer_mode_equals_weight_mode": 2,
        "test_self_tuning_of_layers_perturbs_every_example": 1,
    },
    "library/test_linear.py": {
        "test_cg_meets_its_tolerance_as_recomputed": 2,
        "test_diagonal_of_a_generic_gauss_newton": 0,
        "test_edges_of_every_solver": 5,
        "test_known_diagonal_counts_every_example_once": 2,
        "test_neumann_error_is_within_the_proven_bound": 2,
        "test_nystrom_is_within_its_bound": 2,
        "test_reports_are_honest": 3,
    },
    "library/test_loops.py": {
        "test_a_loop_keeps_its_contract": 8,
        "test_a_wrong_start_is_rejected": 4,
        "test_a_wrong_step_is_rejected": 6,
    },
    "library/test_maid.py": {
        "test_a_penalty_a_weight_keeps_both_guarantees": 1,
        "test_every_accepted_step_decreases_the_true_value_and_the_error_is_below_its_bound": 1,
        "test_the_accuracy_finds_itself": 0,
        "test_three_starting_accuracies_reach_the_same_value_at_the_same_work": 0,
    },
    "library/test_memory_report.py": {
        "test_memory_of_fifty_steps_on_670k_weights": 0,
        "test_memory_of_segments_grows_like_the_square_root": 0,
        "test_report_of_all_modes": 0,
    },
    "library/test_microbatches.py": {
        "test_parts_give_what_the_full_batch_gives": 0,
    },
    "library/test_minimize.py": {
        "test_a_minimiser_of_optimistix_is_judged_by_the_gradient_where_it_ends": 0,
        "test_the_condition_of_a_proximal_solution": 0,
        "test_what_became_of_it_is_told": 1,
    },
    "library/test_mutants.py": {
        "test_the_runner_tells_a_kill_from_a_survivor": 0,
    },
    "library/test_odd_inputs.py": {
        "test_a_sample": 0,
    },
    "library/test_optimizer.py": {
        "test_a_gradient_of_exactly_zero_has_the_derivative_of_the_limit": 2,
        "test_a_line_search_is_differentiated_forward_or_refused": 0,
        "test_optimizers_that_ask_for_the_loss": 2,
        "test_roots_in_loops_branches_and_calls_are_flat_at_zero_and_else_unchanged": 0,
        "test_the_loss_reaches_one_step_and_evolution": 0,
    },
    "library/test_optimizers.py": {
        "test_optimizers": 3,
    },
    "library/test_outer_sharding.py": {
        "test_examples_and_columns_stay_where_they_are": 0,
    },
    "library/test_penalty.py": {
        "test_a_schedule_is_used_as_it_is": 0,
        "test_no_second_derivative_is_asked_for": 2,
        "test_statuses_say_how_far_to_trust_the_difference": 0,
        "test_the_bias_of_f2sa_falls_with_the_penalty_to_its_order": 1,
        "test_the_penalty_grows_as_the_theory_says": 0,
    },
    "library/test_processes.py": {
        "test_a_killed_process_leaves_a_run_that_resumes": 0,
        "test_one_process_writes_the_log": 0,
        "test_processes_that_disagree_are_refused": 0,
        "test_two_processes_equal_one": 0,
    },
    "library/test_program_costs.py": {
        "test_a_program_costs_no_more_than_committed": 0,
        "test_every_program_is_held": 0,
    },
    "library/test_properties.py": {
        "test_any_tree_any_dtype_and_a_batch_of_one": 1,
        "test_cases_in_narrow_dtypes": 2,
        "test_jit_changes_rounding_only": 0,
        "test_linear_in_the_outer_loss": 2,
    },
    "library/test_prox.py": {
        "test_derivatives_at_a_threshold_are_those_of_one_side": 0,
        "test_jacobians_are_symmetric_with_eigenvalues_from_zero_to_one": 1,
        "test_the_result_minimizes_the_penalty_and_half_the_squared_distance": 3,
    },
    "library/test_reach.py": {
        "test_a_silent_zero_is_an_error_that_names_the_leaf_and_the_response": 16,
        "test_evolution_sees_every_dependence_in_value": 3,
        "test_what_has_a_derivative_passes": 4,
    },
    "library/test_recurrence.py": {
        "test_derivatives_are_those_of_the_plain_loop": 1,
    },
    "library/test_regularizers.py": {
        "test_penalties_of_every_level_equal_one_strength_for_all": 2,
        "test_the_two_right_ways_through_an_l1_penalty_and_the_wrong_one": 0,
        "test_weights_that_must_not_be_negative_by_a_projected_step": 0,
    },
    "library/test_self_tuning.py": {
        "test_a_scanned_run_equals_a_loop_and_keeps_the_best_state_whole": 0,
        "test_cycles_with_noise_equal_the_updates_written_out": 1,
        "test_ridge_optimum_is_found_within_two_percent_from_both_sides": 0,
    },
    "library/test_series.py": {
        "test_the_value_is_the_series_with_the_step_told": 2,
    },
    "library/test_sharding.py": {
        "test_a_product_moves_what_a_gradient_moves": 0,
        "test_divided_hyperparameters_and_micro_batches": 0,
        "test_divided_parameters_equal_replicated_ones": 0,
        "test_populations_equal_those_of_one_device": 0,
        "test_sharded_equals_replicated": 0,
    },
    "library/test_single_loop.py": {
        "test_a_number_outside_its_table_is_told_and_spoils_the_step": 2,
        "test_frozen_leaves_have_no_adjoint": 2,
        "test_half_precision_keeps_its_types_and_the_adjoint_is_wide": 2,
        "test_soba_stalls_with_constant_steps_and_reduced_variance_does_not": 0,
        "test_what_is_wrong_is_said": 10,
    },
    "library/test_sparse.py": {
        "test_a_sparse_design_gives_the_same_and_is_never_made_dense": 1,
        "test_tools_read_sparse_designs": 0,
    },
    "library/test_strengths.py": {
        "test_half_precision_rounds_once_at_the_end": 1,
        "test_keys_of_every_kind": 4,
        "test_one_strength_per_example_acts_on_its_example_alone": 5,
        "test_traced_strengths_that_are_impossible_give_nan_and_no_plausible_number": 1,
    },
    "library/test_sure.py": {
        "test_functions_of_the_observations_implicit_explicit_unrolled": 0,
    },
    "library/test_training_step.py": {
        "test_a_lone_key_is_split_by_step_in_every_loop": 2,
        "test_inner_optimizers_get_the_loss_that_they_ask_for": 0,
        "test_outer_optimizers_get_the_value_of_the_outer_loss": 1,
    },
    "library/test_transforms.py": {
        "test_sharded_equals_replicated_on_eight_devices": 0,
        "test_state_out_has_the_type_of_state_in": 3,
        "test_with_response_accepts_a_solver_in_plain_python": 0,
        "test_with_response_is_differentiable_everywhere": 0,
        "test_with_response_refuses_derivatives_it_does_not_have": 0,
    },
    "library/test_trust.py": {
        "test_a_spent_budget_is_not_convergence": 2,
        "test_arrays_are_checked_like_numbers": 6,
        "test_directions_that_the_batch_does_not_see_do_not_respond": 1,
        "test_far_from_a_minimum_is_a_status": 4,
        "test_half_precision_on_a_convex_ridge_is_not_called_indefinite": 1,
        "test_traced_settings_out_of_range_are_a_status": 5,
        "test_weakly_damped_unseen_rows_are_never_worse_than_zero": 2,
    },
    "library/test_tutorials.py": {
        "test_every_block_runs": 0,
    },
    "library/test_unroll.py": {
        "test_all_modes_agree_on_a_network_with_keyed_noise": 0,
        "test_optimizer_settings_equal_central_differences": 1,
        "test_quadratic_equals_its_closed_form": 2,
        "test_truncation_at_a_stationary_point_is_neumann": 1,
    },
    "library/test_unroll_in_jax.py": {
        "test_a_derivative_of_the_hypergradient_through_a_closed_over_value": 0,
        "test_batch_norm_equals_central_differences": 1,
        "test_jit_scan_vmap_donation_and_closures": 0,
        "test_learned_initialisation": 0,
        "test_low_precision_parameters_and_wide_hyperparameters": 0,
        "test_no_step_is_paid_twice": 0,
        "test_real_time_forward_carries_the_derivative": 0,
        "test_too_many_steps_in_half_precision_are_marked_and_float32_masters_are_right": 0,
    },
    "library/test_unroll_map.py": {
        "test_a_start_that_depends_on_data_and_hyperparameters": 0,
        "test_equals_the_recursion_by_hand": 3,
    },
    "library/test_unroll_setting.py": {
        "test_written_out_or_not": 3,
    },
    "library/test_whole_runs.py": {
        "test_every_state_is_there_when_it_is_needed": 2,
        "test_loops_and_straight_lines_agree": 0,
        "test_memory_of_a_run_with_adam": 0,
        "test_metagradient_is_the_unrolled_one": 1,
        "test_runs_compose": 0,
        "test_second_derivatives_of_a_loop_that_is_run_again": 1,
        "test_steps_made_again_change_nothing": 1,
    },
    "library/test_with_response.py": {
        "test_a_leaf_that_does_not_respond_is_no_flat_direction": 1,
        "test_a_whole_hessian_over_three_decays": 0,
        "test_an_eager_call_far_from_a_minimum_warns": 0,
        "test_derivatives_in_anything_else_are_refused_in_both_modes": 1,
        "test_every_order_and_mode_is_right_with_every_solver": 1,
        "test_flat_directions_are_nan_only_where_they_matter": 1,
        "test_forward_mode_of_the_solution_and_one_leaf_alone": 0,
        "test_logistic_regression_against_differences_of_its_first_derivative": 0,
        "test_mixed_derivatives_in_what_only_the_outer_loss_reads": 0,
        "test_numpy_float64_from_a_library_is_accepted_in_float32": 0,
        "test_second_derivatives_under_vmap_and_scan_with_a_closure_over_tracers": 0,
        "test_status_is_an_array_without_derivative_under_every_transformation": 0,
        "test_the_reported_second_derivative": 0,
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
