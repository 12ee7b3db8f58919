"""`many` in miniature: it runs, and an infinite strength shares one penalty."""

import jax
import numpy as np
import pytest

from experiments.common import record
from experiments.many import config, figure, problem, run

pytest.importorskip("sklearn", reason="needs bilevel[experiments]")

SETTINGS = config.smoke()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("many")
    with jax.numpy_rank_promotion("allow"):
        run.run(SETTINGS, 0, out, resume=False)
    return out


def test_it_runs_and_chooses_one_of_the_strengths(out):
    last = record.final(record.read(out))
    chosen = last["breast_cancer_chosen", 0].metrics
    assert chosen["strength"] in {run.name_of(s) for s in SETTINGS.strengths}
    same = last[f"breast_cancer_{chosen['strength']}", 0].metrics
    assert chosen["test_loss"] == same["test_loss"]
    assert last["breast_cancer_shared", 0].metrics["spread"] < 1e-12
    assert last["breast_cancer_prior_1em2", 0].metrics["spread"] > 1e-3
    assert all(path.exists() for path in figure.figures(out))


def test_rows_are_standardized_by_what_is_fitted():
    fitted, test = problem.rows("digits_3_8", SETTINGS, 0)
    np.testing.assert_allclose(fitted.x.mean(0), 0, atol=1e-12)
    assert len(fitted.y) == SETTINGS.rows and fitted.x.shape[1] == test.x.shape[1]
