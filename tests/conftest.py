"""Settings for the whole suite.

Closed forms are checked to 1e-8, so float64 is on everywhere; a test of float32 or bfloat16 names
its dtype. Rank promotion raises, so that a missing axis is an error rather than a broadcast. The
persistent compilation cache is off: tests that count compilations must see every one of them.

Small programs spend their time in the compiler, so LLVM's optimisations are off, which halves the
suite. What must be seen under the flags that users have is in `default_flags/`, and runs in a
process of its own.
"""

import os

DEFAULT_FLAGS = bool(os.environ.get("BILEVEL_DEFAULT_FLAGS"))
collect_ignore = [] if DEFAULT_FLAGS else ["default_flags"]

if not DEFAULT_FLAGS:
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

import jax  # noqa: E402  (the flags are read when the back end starts)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)
