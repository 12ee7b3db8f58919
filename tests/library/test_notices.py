"""What `fit` and `diagnose` notice of common slips, on a small ridge; and when they are silent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.ground.tree import named_leaves
from bilevel.run import NonfiniteError
from bilevel.run.data import Data
from bilevel.run.trust import jumps, trust_of

RNG = np.random.default_rng(0)
X = RNG.normal(size=(130, 20))
Y = X[:, 0] + RNG.normal(size=130)
LARGE, SMALL = (X[:100], Y[:100]), (X[100:], Y[100:])


def train(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + jnp.exp(lam) * jnp.sum(w**2)


def valid(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def stack(batch):
    return jax.tree.map(lambda a: np.broadcast_to(a, (5, *a.shape)), batch)


@optax.inject_hyperparams
def outer_tx(learning_rate):
    return optax.adam(learning_rate)


LOOP = bilevel.alternate(
    valid, train, bilevel.Implicit(bilevel.CG(20, unroll=False)), optax.sgd(0.05), outer_tx(0.1),
    inner_steps=5,
)  # fmt: skip


def run(rate, start):
    state = LOOP.init(jnp.zeros(20), jnp.float32(start))
    rates = state.outer.opt_state.hyperparams
    rates["learning_rate"] = jnp.full_like(rates["learning_rate"], rate)
    return bilevel.fit(LOOP, state, stack(LARGE), SMALL, steps=12, progress=False)


def test_a_healthy_run_says_nothing():
    assert run(0.1, -4.0).trust.notices == ()


def test_an_outer_rate_of_ten_thousand_is_told_once():
    said = run(1e4, 2.0).trust.notices  # exp(-9998) is zero: no loss is affected any more
    assert len(said) == 2
    assert "(step 0) moved `hparams` from 2 to -1e+04" in said[0] and "learning rate" in said[0]
    assert "`hypergrad_norm` ended at exactly zero" in said[1]


def test_an_outer_rate_that_ends_in_infinity_is_named_by_the_error():
    with pytest.raises(NonfiniteError, match=r"Before it, one update \(step 0\) moved `hparams`"):
        run(-1e4, 2.0)  # uphill, to an infinite penalty


def test_swapped_data_are_noticed_where_sizes_tell():
    def notices(inner, outer):
        return Data(inner, outer).notices()

    assert "30 examples, the outer loss 100" in notices(stack(SMALL), LARGE)[0]
    for inner, outer in (
        (stack(LARGE), SMALL),
        (stack(SMALL), SMALL),
        (lambda step: stack(SMALL), LARGE),  # may read others at another step
        ((), LARGE),
        (stack(SMALL), ()),
        # Twenty batches of ten are as many as a hundred.
        (jax.tree.map(lambda a: a.reshape(20, 5, *a.shape[1:]), LARGE), LARGE),
        ((stack(LARGE)[0], np.float64(1.0)), (SMALL[0], np.float64(1.0))),
    ):
        assert notices(inner, outer) == []


def test_jumps_are_measured_by_the_size_of_a_hyperparameter():
    def course(*values):
        return [{"step": i, "hparams": {"decay": v}} for i, v in enumerate(values)]

    assert jumps(course(-4.0, -20.0, 3.0)) == [] and jumps(course(1e3, 9e3)) == []
    assert jumps(course([0.0, 5.0], [0.1, float("nan")])) == jumps(course([])) == []
    assert "(step 1) moved `decay` from 5 to -60" in jumps(course([0, 5], [0, 5], [11, -60]))[0]
    assert jumps([course(1.0)[0], {"step": 1}, {"step": 2, "hparams": {"rate": 99.0}}]) == []
    # The norm of a thousand numbers may grow so; that of one may not.
    large = [{"step": i, "hparams": {"w/norm": v, "w/max": 0.1}} for i, v in enumerate((0, 99))]
    assert trust_of(large).notices == ()


def test_diagnose_tells_batches_that_were_swapped_in_the_call():
    x, y = LARGE[0][:25], LARGE[1][:25]
    w = jnp.asarray(np.linalg.solve(x.T @ x / 25 + np.exp(-4.0) * np.eye(20), x.T @ y / 25))
    call = dict(outer=valid, num_steps=3, print=False)
    right = bilevel.diagnose(train, w, -4.0, inner_batch=(x, y), outer_batch=SMALL, **call)
    wrong = bilevel.diagnose(train, w, -4.0, inner_batch=SMALL, outer_batch=(x, y), **call)
    other = bilevel.diagnose(train, w, -4.0, inner_batch=SMALL, outer_batch=[x, y], **call)
    swapped = [[line for line in d.advice if "swapped" in line] for d in (right, wrong, other)]
    assert [len(lines) for lines in swapped] == [0, 1, 0] and right.stationary
    assert any("is it the training data?" in line for line in wrong.advice)


def test_leaves_have_readable_names_in_the_log():
    decays = {"['dense']['kernel']": 1, "[0].weight": 2, "c1.kernel": 3, "plain": {"x": [4, 5]}}
    names = named_leaves({"decay": decays}, "")
    assert names == {
        "decay/dense/kernel": 1, "decay/0/weight": 2, "decay/c1.kernel": 3,
        "decay/plain/x/0": 4, "decay/plain/x/1": 5,
    }  # fmt: skip
    assert named_leaves(7, "hparams") == {"hparams": 7}
