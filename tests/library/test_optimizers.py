"""`Unroll` through every optimizer of optax: equal to differences, marked, or refused in words."""

from pathlib import Path

import jax
import numpy as np
import pytest
from optimizers_table import MODES, OPTIMIZERS, PARTS, differences, offered, page, solve, start

from bilevel import Status

ROWS = {**OPTIMIZERS, **PARTS}


def test_every_optimizer_of_optax_has_a_row():
    """A new one of a new release: add it to `OPTIMIZERS` or `PARTS`."""
    listed = {name.split(",")[0].split(" without")[0] for name in ROWS}
    assert listed == offered()
    assert not set(OPTIMIZERS) & set(PARTS)


def test_the_page_has_the_table():
    docs = Path(__file__).parents[2] / "docs" / "unrolled.md"
    assert page() in docs.read_text(), "run `python tests/optimizers_table.py`"


@pytest.fixture(autouse=True)
def as_readers_have_it():
    """Some of optax promotes ranks, and some of it warns that it is deprecated."""
    with jax.numpy_rank_promotion("allow"):
        yield


def check(name, mode):
    row = ROWS[name]
    pattern = row.refused.get(mode)
    if pattern is not None:
        with pytest.raises((TypeError, ValueError), match=pattern):
            solve(row, start(row), mode)
        return
    sol, value, slopes = differences(row, mode)
    np.testing.assert_allclose(sol.value, value, rtol=1e-10)
    status = row.marked.get(mode, Status.ok)
    assert int(sol.result) == status
    if status != Status.ok:
        return
    for k, slope in slopes.items():
        if k in row.flat:
            assert abs(sol.grads[k]) < 1e-12 and abs(slope) < 1e-9  # rounding, over the step
        else:
            # rounding of the value over the step: a slope that is no more says nothing
            assert abs(slope) > 1e-16 / row.step / row.rtol
            np.testing.assert_allclose(sol.grads[k], slope, rtol=row.rtol, err_msg=k)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    check(name, "mixed")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_in_other_modes(name, mode):
    check(name, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PARTS)
def test_parts_and_wrappers(name, mode):
    check(name, mode)
