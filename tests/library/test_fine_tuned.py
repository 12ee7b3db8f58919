"""Two stages: the closed form of quadratic pre-training and fine-tuning (O19), and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Dense, Identity, Implicit
from bilevel.objectives import FineTuned

D, P, RATE = 4, 3, 0.2
RNG = np.random.default_rng(4)


def positive():
    a = RNG.normal(size=(D, D))
    return a @ a.T / D + 0.5 * np.eye(D)


A_PRE, A_FINE, B = positive(), positive(), RNG.normal(size=(D, P))
TARGET, LAM = RNG.normal(size=D), RNG.normal(size=P)


def pre(w, lam, batch):
    return 0.5 * w @ A_PRE @ w + w @ B @ lam


def fine(w, lam, batch):
    return 0.5 * (w - batch) @ A_FINE @ (w - batch)


def valid(w, lam, batch):
    return 0.5 * jnp.sum((w - batch) ** 2)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("response", [Implicit(Dense()), Implicit(Identity(1.0))], ids=str)
def test_two_quadratic_stages(steps, response):
    objective = FineTuned(valid, fine, optax.sgd(RATE), steps)
    w = -np.linalg.solve(A_PRE, B @ LAM)
    shrink = np.linalg.matrix_power(np.eye(D) - RATE * A_FINE, steps)
    tuned = TARGET + shrink @ (w - TARGET)
    inverse = np.eye(D) if isinstance(response.solver, Identity) else np.linalg.inv(A_PRE)
    expected = -B.T @ inverse @ shrink @ (tuned - TARGET)
    batch = (np.broadcast_to(TARGET, (steps, D)), TARGET)
    solution = jax.jit(
        lambda lam: bilevel.hypergrad_solve(
            objective.outer, pre, response, jnp.asarray(w), lam,
            inner_batch=None, outer_batch=batch if steps else (None, TARGET),
        )
    )(LAM)  # fmt: skip
    np.testing.assert_allclose(solution.value, 0.5 * np.sum((tuned - TARGET) ** 2), rtol=1e-12)
    np.testing.assert_allclose(solution.grads, expected, rtol=1e-9)


def test_three_levels_compose():
    """Pre-training, K steps of fine-tuning, and a fit that is held near what was fine-tuned."""
    a_last, steps = positive(), 3

    def last(w, anchor, batch):
        return 0.5 * (w - batch) @ a_last @ (w - batch) + 0.5 * jnp.sum((w - anchor) ** 2)

    def solve(w, anchor, batch):
        return jnp.linalg.solve(a_last + jnp.eye(D), a_last @ batch + anchor)

    fit = bilevel.with_response(solve, last, Implicit(Dense()))
    objective = FineTuned(
        lambda w, lam, batch: valid(fit(w, w, batch), lam, batch), fine, optax.sgd(RATE), steps
    )
    w = -np.linalg.solve(A_PRE, B @ LAM)
    shrink = np.linalg.matrix_power(np.eye(D) - RATE * A_FINE, steps)
    tuned = TARGET + shrink @ (w - TARGET)
    both = a_last + np.eye(D)
    error = np.linalg.solve(both, a_last @ TARGET + tuned) - TARGET
    expected = -B.T @ np.linalg.solve(A_PRE, shrink @ np.linalg.solve(both, error))
    solution = jax.jit(
        lambda lam: bilevel.hypergrad_solve(
            objective.outer, pre, Implicit(Dense()), jnp.asarray(w), lam,
            inner_batch=None, outer_batch=(np.broadcast_to(TARGET, (steps, D)), TARGET),
        )
    )(LAM)  # fmt: skip
    np.testing.assert_allclose(solution.grads, expected, rtol=1e-9)


def test_a_fresh_head_takes_the_place_of_the_old_one():
    def error(w, lam, batch):
        return jnp.sum((w["body"] * w["head"] - batch) ** 2)

    fresh = lambda w, batch: {"body": w["body"], "head": jnp.ones(())}  # noqa: E731
    objective = FineTuned(error, error, optax.sgd(0.1), 1, fresh)
    grads = jax.jit(jax.grad(objective.outer))(
        {"body": jnp.asarray(2.0), "head": jnp.asarray(7.0)}, (), (jnp.ones(1), jnp.asarray(1.0))
    )
    assert grads["head"] == 0 != grads["body"]


PAIR = (jnp.stack([TARGET, TARGET]), TARGET)


@pytest.mark.parametrize(
    "settings, batch, error, words",
    [
        ({"copied": 3}, None, TypeError, "`copied` must be a function"),
        ({"steps": -1}, None, ValueError, "`steps` must be at least 0"),
        ({"tx": 3}, None, TypeError, "`tx` must be an optax"),
        ({}, TARGET, ValueError, "its batch must be a pair"),
        ({}, (TARGET[None], TARGET), ValueError, "expected a leading axis of 2"),
        (
            {"outer_loss": lambda w, h, b: None},
            PAIR,
            TypeError,
            "`outer_loss` must return a scalar",
        ),
        ({"outer_loss": lambda w, h, b: w}, PAIR, TypeError, "`outer_loss` must return a scalar"),
    ],
)
def test_bad_settings_are_refused_in_words(settings, batch, error, words):
    given = {"outer_loss": valid, "fine_loss": fine, "tx": optax.sgd(0.1), "steps": 2}
    with pytest.raises(error, match=words):
        jax.eval_shape(FineTuned(**given | settings).outer, jnp.zeros(D), LAM, batch)
