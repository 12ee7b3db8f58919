"""Attribution on ridge regression, where the outcome of every weighting is known."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

import bilevel
from bilevel import CG, Dense, Implicit, Unroll
from bilevel.tools import attribution
from bilevel.tools.datamodels import spearman

N, D, Q, DECAY = 24, 3, 4, 0.1
KEYS = jax.random.split(jax.random.key(0), 4)
X, XQ = jax.random.normal(KEYS[0], (N, D)), jax.random.normal(KEYS[1], (Q, D))
Y, YQ = X @ jnp.arange(1.0, D + 1) + 0.3 * jax.random.normal(KEYS[2], (N,)), XQ @ jnp.ones(D)
DATA, QUERIES, W0 = (X, Y), (XQ, YQ), jnp.zeros(D)
RUN = Unroll(optax.sgd(0.5), 60)


def losses(w, batch):
    return 0.5 * (batch[0] @ w - batch[1]) ** 2


def penalty(w):
    return 0.5 * DECAY * jnp.sum(w**2)


def trained(weights):
    hessian = X.T @ (weights[:, None] * X) / N + DECAY * jnp.eye(D)
    return jnp.linalg.solve(hessian, X.T @ (weights * Y) / N)


@jax.jit
def truth():
    """(q, n): the derivative of each query's loss in each weight, through the dense solve."""
    return jax.jacrev(lambda weights: losses(trained(weights), QUERIES))(jnp.ones(N))


@jax.jit
def found_by():
    call = dict(penalty=penalty, data=DATA, queries=QUERIES)
    w = trained(jnp.ones(N))
    return {
        "mean": bilevel.influence(losses, Implicit(CG(rtol=1e-12)), w, **call),
        "each": bilevel.influence(losses, Implicit(Dense()), w, per_query=True, at_once=3, **call),
        "run": bilevel.influence(losses, RUN, W0, per_query=True, **call),
    }


def test_influence_is_the_derivative_of_the_trained_model():
    found, want = found_by(), truth()
    np.testing.assert_allclose(found["mean"].scores, want.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["each"].scores, want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["run"].scores, want, rtol=1e-6, atol=1e-8)  # 60 steps
    for name in found:
        np.testing.assert_allclose(
            np.mean(found[name].value), losses(trained(jnp.ones(N)), QUERIES).mean(), rtol=1e-6
        )
        assert int(found[name].result) == 0


def test_scores_predict_removal():
    """What training without some examples gives, from scores alone; flipped ones predict not."""
    found = found_by()["run"]
    train = bilevel.retraining(losses, RUN, W0, DATA, penalty=penalty)
    np.testing.assert_allclose(
        train(jnp.ones(N).at[3].set(0.0)), trained(jnp.ones(N).at[3].set(0.0)), rtol=1e-6
    )
    score = bilevel.datamodel_score(
        found, train, losses, QUERIES, subsets=20, key=KEYS[3], at_once=8
    )
    assert score.score >= 0.9 and score.per_query.shape == (Q,)
    assert (score.kept.sum(1) == N - 2).all() and len(np.unique(score.kept, axis=0)) > 15
    mean = found_by()["mean"]
    again = functools.partial(bilevel.datamodel_score, subsets=20, key=KEYS[3])
    assert again(mean, train, losses, QUERIES).score > 0.9
    wrong = mean._replace(scores=-mean.scores)
    assert again(wrong, train, losses, QUERIES).score < -0.9


def test_batches_of_a_run_are_indices():
    """A run on half of the examples: those that no step reads have score zero."""
    batches = jnp.arange(N // 2).reshape(-1, 4)
    run = Unroll(optax.adam(0.1), len(batches))
    call = (losses, run, W0, DATA)
    found = jax.jit(lambda: bilevel.influence(*call, QUERIES, batches=batches).scores)()
    assert (found[N // 2 :] == 0).all() and (found[: N // 2] != 0).all()
    train = bilevel.retraining(*call, batches=batches)
    value = jax.jit(lambda weights: losses(train(weights), QUERIES).mean())
    h = 1e-5 * jnp.zeros(N).at[5].set(1.0)
    slope = (value(1 + h) - value(1 - h)) / 2e-5
    np.testing.assert_allclose(found[5], slope, rtol=1e-6, atol=1e-9)


def test_data_are_arguments_of_a_compiled_run():
    train = bilevel.retraining(losses, RUN, W0, DATA)
    traced = jax.make_jaxpr(lambda train, weights: train(weights))(train, jnp.ones(N))
    assert sum(np.size(x) for x in traced.consts) < N <= sum(x.size for x in jax.tree.leaves(train))


@pytest.mark.parametrize("response", [Implicit(CG(5)), RUN], ids=["implicit", "run"])
def test_influence_compiles_once_and_data_are_its_arguments(response):
    def call(data, queries):
        return bilevel.influence(losses, response, W0, data, queries, per_query=True).scores

    (of_call,) = [e for e in jax.make_jaxpr(call)(DATA, QUERIES).eqns if e.primitive.name == "jit"]
    run = jax.jit(core.jaxpr_as_fun(of_call.params["jaxpr"]))
    text = run.lower(*(jnp.zeros(x.aval.shape, x.aval.dtype) for x in of_call.invars)).compile()
    assert largest_constant(text.as_text()) < N
    closed = jax.jit(lambda: call(DATA, QUERIES)).lower().compile()
    assert largest_constant(closed.as_text()) >= N  # what a constant looks like
    before = attribution._cached_scores.cache_info().misses
    other = (X + 1, Y), QUERIES
    assert (call(DATA, QUERIES) != call(*other)).any()
    assert attribution._cached_scores.cache_info().misses == before


def largest_constant(text):
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* constant\(", text)
    return max(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [10, 20, 25, 70]) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [4, 3, 3, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert np.isnan(spearman([1, 1], [1, 2]))


def test_metasmoothness_weighs_signs_by_size():
    def outcome(z):
        return {"smooth": 3 * z["a"], "rough": jnp.abs(z["a"] - 1.3)}

    found = bilevel.metasmoothness(
        outcome, {"a": jnp.float64(1.0)}, {"a": jnp.float64(1.0)}, step=0.3
    )
    # The steps of `smooth` are 0.9 and 0.9, of `rough` -0.3 and 0.3.
    np.testing.assert_allclose(found.score, (0.9 - 0.3) / 1.2, rtol=1e-12)
    np.testing.assert_allclose(found.first, np.hypot(3, 1), rtol=1e-12)
    train = bilevel.retraining(losses, RUN, W0, DATA)
    assert bilevel.metasmoothness(train, jnp.ones(N), key=KEYS[0]).score > 0.9


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: bilevel.influence(lambda w, b: losses(w, b).mean(), RUN, W0, DATA, QUERIES),
         r"`losses` must return one real loss per example, \(24,\)"),
        (lambda: bilevel.influence(losses, RUN, W0, (X, Y[1:]), QUERIES),
         "`data` must have one leading axis"),
        (lambda: bilevel.influence(losses, RUN, W0, DATA, QUERIES, batches=jnp.zeros((3, 2), int)),
         "`batches` has 3 rows, expected one for each of the 60"),
        (lambda: bilevel.influence(losses, RUN, W0, DATA, QUERIES, batches=jnp.zeros((60, 2))),
         "`batches` must hold integers"),
        (lambda: bilevel.influence(losses, RUN, W0, DATA, QUERIES, batches=jnp.full((60, 2), N)),
         "`batches` has the rows 24 to 24, expected 0 to 23"),
        (lambda: bilevel.influence(losses, RUN, W0, DATA, QUERIES, batches=jnp.full((60, 2), -1)),
         "`batches` has the rows -1 to -1"),
        (lambda: bilevel.influence(
            losses, Implicit(), W0, DATA, QUERIES, batches=jnp.zeros((60, 2), int)),
         "only `Unroll` makes steps"),
        (lambda: bilevel.retraining(losses, Implicit(), W0, DATA),
         "`run` must be `Unroll"),
        (lambda: bilevel.datamodel_score(
            found_by()["mean"], trained, losses, QUERIES, removed=0.01, key=KEYS[0]),
         "`removed` must be a share of the 24 examples"),
        (lambda: bilevel.datamodel_score(jnp.ones(N), trained, losses, QUERIES, key=KEYS[0]),
         "`found` must be what `bilevel.influence` returned"),
    ],
)  # fmt: skip
def test_what_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_untrained_parameters_and_rows_beyond_the_data_are_told():
    """An implicit influence away from the minimum, each query by itself; a traced index."""
    for per_query in (False, True):
        call = dict(penalty=penalty, per_query=per_query)
        right = bilevel.influence(losses, Implicit(Dense()), trained(jnp.ones(N)), DATA, QUERIES,
                                  **call)  # fmt: skip
        off = bilevel.influence(losses, Implicit(Dense()), 20 + W0, DATA, QUERIES, **call)
        told = [bilevel.Status(int(found.result)) for found in (right, off)]
        assert told == [bilevel.Status.ok, bilevel.Status.not_stationary]
    beyond = jax.jit(lambda rows: bilevel.influence(
        losses, RUN, W0, DATA, QUERIES, batches=rows).result)(jnp.full((60, 2), N))  # fmt: skip
    assert bilevel.Status(int(beyond)) == bilevel.Status.nonfinite_input
