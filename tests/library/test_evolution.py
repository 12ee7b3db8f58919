"""Evolution strategies on O16, where expectation and variance have closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Evolution

DECAY, WINDOWS, PAIRS = 0.9, 50, 200_000


def inner(s, theta, batch):
    """SGD at rate 1 on this makes s <- DECAY s + theta."""
    return jnp.sum(0.5 * (1 - DECAY) * s**2 - theta * s)


def outer(s, theta, batch):
    return jnp.sum(s)


def run(response, calls, key=0, steps=1):
    """Hypergradients of ``calls`` successive windows, in one scan."""
    batch = jnp.zeros((steps, 1))

    def body(carry, key):
        s, state = carry
        sol = bilevel.hypergrad_solve(
            outer, inner, response, s, jnp.asarray(0.3), inner_batch=batch, outer_batch=None,
            state=state, key=key,
        )  # fmt: skip
        return (sol.params, sol.state), sol._replace(state=None, params=sol.params)

    s0 = jnp.zeros(())
    state = bilevel.hypergrad_init(outer, inner, response, s0, jnp.asarray(0.3))
    keys = jax.random.split(jax.random.key(key), calls)
    return jax.jit(lambda c, k: jax.lax.scan(body, c, k)[1])((s0, state), keys)


def closed_form(t, a=DECAY):
    truth = (1 - a**t) / (1 - a)
    return truth, t * (1 - a ** (2 * t)) / (1 - a**2) + truth**2


def test_pes_is_unbiased_where_truncated_es_is_not():
    truth, variance = closed_form(WINDOWS)
    pes = run(Evolution(optax.sgd(1.0), 1, PAIRS, 0.1), WINDOWS)
    standard_error = np.sqrt(variance / PAIRS)
    assert abs(pes.grads[-1] - truth) <= 4 * standard_error
    # the sample variance's own relative spread over 2e5 pairs is about 1 %
    np.testing.assert_allclose(pes.stats["standard_error"][-1], standard_error, rtol=0.05)
    es = run(Evolution(optax.sgd(1.0), 1, PAIRS, 0.1, persistent=False), WINDOWS)
    assert abs(es.grads[-1] - truth) >= 20 * standard_error
    np.testing.assert_allclose(es.grads[-1], 1, atol=4 * np.sqrt(2 / PAIRS))  # Var eps^2 = 2
    np.testing.assert_allclose(pes.params[-1], 0.3 * truth, rtol=1e-12)
    np.testing.assert_allclose(pes.value, pes.params, rtol=0)
    assert np.all(pes.result == bilevel.Status.ok)


def test_es_of_one_whole_window_is_the_whole_derivative():
    truth = closed_form(12)[0]
    es = run(Evolution(optax.sgd(1.0), 12, 20_000, 0.1, persistent=False), 1, steps=12)
    # one pair is truth * z^2, of variance 2 truth^2
    assert abs(es.grads[0] - truth) <= 4 * truth * np.sqrt(2 / 20_000)


def test_staggered_pairs_reset_at_their_horizon():
    """With horizon 4, pairs of phase j have age j + 1: the mean of four closed forms."""
    response = Evolution(optax.sgd(1.0), 1, PAIRS, 0.1, horizon=4)
    state = bilevel.hypergrad_init(outer, inner, response, jnp.zeros(()), jnp.asarray(0.3))
    np.testing.assert_array_equal(np.bincount(state.clock), [PAIRS // 4] * 4)
    sol = run(response, 9)
    moments = [closed_form(t) for t in (1, 2, 3, 4)]
    truth = np.mean([m for m, _ in moments])
    standard_error = np.sqrt(np.mean([v for _, v in moments]) / PAIRS)
    assert abs(sol.grads[-1] - truth) <= 4 * standard_error
    together = run(Evolution(optax.sgd(1.0), 1, PAIRS, 0.1, horizon=4, staggered=False), 9)
    assert abs(together.grads[-1] - 1) <= 4 * np.sqrt(2 / PAIRS)  # the ninth call is a first one


def test_a_reset_forgets_the_perturbations_before_it():
    """They average out, so no mean tells: after a reset the sums are one draw, of sigma^2."""
    response = Evolution(optax.sgd(1.0), 1, PAIRS, 0.1, horizon=4, staggered=False)
    sol = run(response, 5)
    after, before = closed_form(1)[1], closed_form(4)[1]
    # the relative spread of a sample standard deviation over 2e5 pairs is below 1 %
    for call, variance in ((3, before), (4, after)):
        np.testing.assert_allclose(
            sol.stats["standard_error"][call], np.sqrt(variance / PAIRS), rtol=0.05
        )
    assert before > 10 * after


def test_direct_term_rounding_and_model_state():
    """A rounded hyperparameter has no derivative anywhere, and a smoothed one; f is nonlinear."""

    def loss(w, lam, batch, seen):
        return jnp.sum((w - jnp.round(4 * lam["rounded"]) / 4 - batch) ** 2), seen + 1

    def valid(w, lam, batch, seen):
        return jnp.sum(w**2) + 0.5 * lam["scale"] ** 2 + 0.0 * seen, seen

    lam = {"rounded": jnp.asarray(0.55), "scale": jnp.asarray(1.7)}
    sol = bilevel.hypergrad_solve(
        valid, loss, Evolution(optax.sgd(0.5), 1, 100_000, 0.5, persistent=False),
        jnp.zeros(1), lam, inner_batch=jnp.ones((1, 1)), outer_batch=None,
        key=jax.random.key(3), has_state=True, model_state=jnp.asarray(0, jnp.int32),
    )  # fmt: skip
    np.testing.assert_allclose(sol.params, [1.5])  # sgd(0.5) lands on the minimum
    # smoothed at sigma = 0.5 the rounding to quarters is invisible: d (1 + r)^2 / dr = 3.1
    tolerance = 5 * float(sol.stats["standard_error"])
    assert 0 < tolerance < 0.2
    assert abs(sol.grads["rounded"] - 3.1) < tolerance
    assert sol.direct["scale"] == 1.7 and abs(sol.indirect["scale"]) < tolerance
    assert sol.state.model_state == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Evolution(optax.sgd(1.0), 1, 0, 0.1), "particles"),
        (lambda: Evolution(optax.sgd(1.0), 1, 2, 0.0), "sigma"),
        (lambda: Evolution(optax.sgd(1.0), 3, 2, 0.1, horizon=4), "multiple of `steps`=3"),
        (lambda: Evolution(optax.sgd(1.0), 1, 2, 0.1, persistent=False, horizon=4), "persistent"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_calls():
    response = Evolution(optax.sgd(1.0), 2, 2, 0.1)

    def solve(key, lam=0.3, steps=2, inner=inner):
        return bilevel.hypergrad_solve(
            outer, inner, response, jnp.zeros(()), lam,
            inner_batch=jnp.zeros((steps, 1)), outer_batch=None, key=key,
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"Pass `key=jax.random.key"):
        solve(None)
    for steps in (1, 3):
        with pytest.raises(ValueError, match="leading axis of 2:"):
            solve(jax.random.key(0), steps=steps)
    with pytest.raises(ValueError, match=r"No derivative reaches hparams\['unread'\]"):
        solve(
            jax.random.key(0),
            {"read": 0.3, "unread": 0.1},
            inner=lambda s, lam, b: inner(s, lam["read"], b),
        )


def test_a_state_of_numbers_written_by_hand_is_strongly_typed():
    """A weak type in the first state would compile the second call again."""
    response = Evolution(optax.sgd(1.0), 1, 4, 0.1, horizon=None)
    state = bilevel.hypergrad_init(outer, inner, response, jnp.ones(()), 0.3)
    assert not any(x.weak_type for x in jax.tree.leaves(state) if isinstance(x, jax.Array))
