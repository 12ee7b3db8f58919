"""Mistakes in the regularizers."""

from mutations import Mutant

MUTANTS = [
    Mutant(
        "dropout_not_rescaled",
        "regularizers/dropout.py",
        "return jnp.where(dropped, 0, 1 / keep).astype(dtype)",
        "return jnp.where(dropped, 0, jnp.ones_like(keep)).astype(dtype)",
        "dropout changes the mean",
        ("test_regularizers.py::test_dropout_keeps_the_mean_at_every_rate_of_a_batch",),
    ),
    Mutant(
        "dropout_rate_differentiable",
        "regularizers/dropout.py",
        "keep = 1 - jax.lax.stop_gradient(rates(",
        "keep = 1 - (rates(",
        "a biased part of the derivative in the rate passes for the whole",
        ("test_regularizers.py::test_no_derivative_reaches_a_rate",),
    ),
    Mutant(
        "mixup_targets_not_mixed",
        "regularizers/mixup.py",
        "return jax.tree.map(mix, x), jax.tree.map(mix, targets)",
        "return jax.tree.map(mix, x), targets",
        "targets do not belong to the mixed inputs",
        ("test_regularizers.py::test_mixup_mixes_inputs_and_targets_alike",),
    ),
    Mutant(
        "smoothing_over_the_batch",
        "regularizers/mixup.py",
        "amount / targets.shape[-1]",
        "amount / targets.shape[0]",
        "smoothed labels do not sum to one",
        ("test_regularizers.py::test_label_smoothing_formula",),
    ),
    Mutant(
        "l2_without_half",
        "regularizers/penalties.py",
        "return 0.5 * _penalty(params, log_strength, leaves, jnp.square)",
        "return _penalty(params, log_strength, leaves, jnp.square)",
        "the decay is twice its strength",
        ("test_regularizers.py::test_penalties_of_every_level_equal_one_strength_for_all",),
    ),
    Mutant(
        "cutout_one_hole_more",
        "regularizers/cutout.py",
        "used = jnp.arange(max_holes)[None, :] < holes",
        "used = jnp.arange(max_holes)[None, :] <= holes",
        "an image gets a hole too many",
        ("test_regularizers.py::test_cutout_equals_a_loop_over_pixels",),
    ),
    Mutant(
        "noise_of_one_example",
        "regularizers/noise.py",
        "jax.random.normal(key, x.shape, wide.dtype)",
        "jax.random.normal(key, x.shape[1:], wide.dtype)",
        "all examples get the same noise",
        ("test_regularizers.py::test_noise_and_scaling_follow_their_strengths",),
    ),
    Mutant(
        "hue_in_half_turns",
        "regularizers/color.py",
        "angle = 2 * jnp.pi * strengths(",
        "angle = jnp.pi * strengths(",
        "hue turns by half of what is asked",
        ("test_regularizers.py::test_hue_is_in_turns",),
    ),
    Mutant(
        "tar_on_levels",
        "regularizers/activations.py",
        "steps = jnp.diff(h, axis=axis)",
        "steps = h",
        "the temporal penalty penalizes the activations themselves",
        ("test_regularizers.py::test_activation_penalties_formula",),
    ),
]
