"""Settings for the whole suite.

Closed forms are checked to 1e-8, so float64 is on everywhere; a test of float32 or bfloat16 names
its dtype. Rank promotion raises, so that a missing axis is an error rather than a broadcast. The
persistent compilation cache is off: tests that count compilations must see every one of them.
"""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)
