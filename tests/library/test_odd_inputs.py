"""Bad and odd inputs over the whole public face: every number right, refused or marked.

A sample in the default suite, all of them in the slow tier; ``python tests/odd_inputs`` shows the
table and each failure.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from odd_inputs.case import ANY, REFUSE, Case, Number, judge
from odd_inputs.known import KNOWN
from odd_inputs.run import AREAS, Row, all_cases, run, sample, share_of_clear_errors, table

import bilevel

SIZE = 200
CLEAR = 0.97  # of all errors, those that name the argument and say what to do


@functools.cache
def cases() -> list[Case]:
    return all_cases()


def check(rows: list[Row]) -> None:
    """None silently wrong, none a hang; the unclear ones few, and no more than are known."""
    bad = [r for r in rows if r.verdict.what in ("silent", "hang") and not r.known]
    assert not bad, "\n".join(f"{r.case.label}: {r.verdict}" for r in bad) + "\n" + table(rows)
    counted = [r for r in rows if not r.known]
    share = share_of_clear_errors(counted)
    unclear = [r for r in counted if r.verdict.what in ("raw", "unclear")]
    assert share >= CLEAR, "\n".join(f"{r.case.label}: {r.verdict}" for r in unclear)


def test_there_are_enough_of_every_area():
    assert len(cases()) >= 2000
    assert {c.area for c in cases()} == set(AREAS)
    assert len({c.label for c in cases()}) == len(cases())
    kinds = {(c.area, c.kind) for c in cases()}
    assert len(kinds) >= 200


def test_a_sample():
    check(run(sample(cases(), SIZE)))


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_all(area: str):
    rows = run(all_cases([area]))
    check(rows)
    failing = {row.case.label for row in rows if row.known}
    stale = [label for label, (a, _) in KNOWN.items() if a == area and label not in failing]
    assert not stale, f"these no longer fail, take them off the list: {stale}"


def verdict(call, expect=REFUSE, names=("x",), own=False) -> str:
    return judge(Case("a", "k", "label", call, names, expect, own=own)).what


def test_the_judge_tells_the_outcomes_apart():
    """Each verdict from a call made for it; the good ones are not given away."""
    assert verdict(lambda: Number(1.0), 1.0) == "right"
    assert verdict(lambda: Number(1.0), 1.1) == "silent"
    assert verdict(lambda: Number(np.ones(2)), 1.0) == "silent"
    assert verdict(lambda: Number(1.0)) == "silent"
    assert verdict(lambda: Number(1.0), ANY) == "right"
    assert verdict(lambda: Number(np.nan), 1.0) == "marked"
    assert verdict(lambda: Number(2.0, int(bilevel.Status.diverged)), 1.0) == "marked"
    assert verdict(lambda: Number(jnp.ones(()) + "1")) == "raw"
    assert verdict(lambda: bilevel.CG(0), names=("max_steps",)) == "refused"
    assert verdict(lambda: bilevel.CG(0), names=("steps",)) == "unclear"

    def loss(*_):
        raise ValueError("`x` must be something")

    assert verdict(lambda: bilevel.scan_run(loss, None, None, 0, key=None), names=("steps",)) == (
        "refused"
    )

    def mismatched(*_):
        return jnp.zeros(2) @ jnp.zeros(3)

    one = jnp.ones(1)
    diagnosed = lambda: bilevel.diagnose(mismatched, one, one, inner_batch=None)  # noqa: E731
    assert verdict(diagnosed) == "raw"  # deep in somebody else's code
    assert verdict(lambda: loss()) == "raw"  # not the library's
