"""Settings for the whole suite.

Closed forms are checked to 1e-8, so float64 is on everywhere; a test of float32 or bfloat16 names
its dtype. Rank promotion raises, so that a missing axis is an error rather than a broadcast. The
persistent compilation cache is off: tests that count compilations must see every one of them.

Small programs spend their time in the compiler, so LLVM's optimisations and the fusion emitters are
off, which more than halves the suite. What must be seen under the flags that users have is in
`default_flags/`, and runs in a process of its own.

Compiled programs are kept until a process holds too much memory, and are then all dropped between
two tests: a program takes about two megabytes, and a worker compiles thousands of them.
"""

import ctypes
import gc
import os
from pathlib import Path

import jax
import pytest
from wide import left_out

DEFAULT_FLAGS = bool(os.environ.get("BILEVEL_DEFAULT_FLAGS"))
collect_ignore = [] if DEFAULT_FLAGS else ["default_flags"]

if not DEFAULT_FLAGS:  # they are read when the back end starts, which is after this
    quick = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_parallel_codegen_split_count=1"
    )
    if jax.__version_info__ < (0, 11):  # a newer XLA ends the process: it has no such flag
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)

# Tracing allocates millions of small objects: by default Python searches them for cycles so often
# that it takes a tenth of the time.
gc.set_threshold(200_000, 20, 50)

MEMORY = Path("/proc/self/statm")  # of Linux; elsewhere memory is not looked after
MOST_MEMORY = 1.9 * 2**30  # bytes, of a process between two tests


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as `wide` what the default run leaves out."""
    here = Path(__file__).parent
    names = [
        (item.path.relative_to(here).as_posix(), getattr(item, "originalname", None) or item.name)
        for item in items
    ]
    for item, out in zip(items, left_out(names), strict=True):
        if out:
            item.add_marker(pytest.mark.wide)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """After a test and its fixtures: drop every compiled program where they fill the memory."""
    if MEMORY.exists() and resident() > MOST_MEMORY:
        jax.clear_caches()
        gc.collect()
        # glibc keeps what was freed, and the next test would again be over the bound.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
