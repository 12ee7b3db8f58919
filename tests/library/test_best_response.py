r"""Best responses on ridge regression, where the fitted response has a closed form.

With :math:`h = \frac{1}{2n}|Xw - y|^2 + \frac12 e^\lambda |w|^2`, the response that minimises the
perturbed loss has the slope :math:`\theta_\sigma = -(H_0 + e^\lambda(1+\sigma^2)k I)^{-1}
e^\lambda k\,w^*` with :math:`k = e^{\sigma^2/2}`: the true slope as :math:`\sigma \to 0`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.hypergradient.best_response import (
    BestResponse,
    BestResponseState,
    mean_over_groups,
    perturbed_loss,
)
from bilevel.inner.groups import loop_over_groups
from bilevel.inner.network import StructuredParams, StructuredResponse
from bilevel.regularizers import dropout

KEY = jax.random.key(0)
N, DIM, LAM = 40, 6, -0.5
X = jax.random.normal(jax.random.key(1), (N, DIM))
Y = X @ jax.random.normal(jax.random.key(2), (DIM,)) + jax.random.normal(jax.random.key(3), (N,))
XV = jax.random.normal(jax.random.key(4), (N, DIM))
YV = XV @ jax.random.normal(jax.random.key(2), (DIM,)) + jax.random.normal(jax.random.key(5), (N,))
H0 = X.T @ X / N


def inner(w, lam, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def outer(w, lam, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def minimiser(lam):
    return jnp.linalg.solve(H0 + jnp.exp(lam) * jnp.eye(DIM), X.T @ Y / N)


def fitted_slope(lam, sigma):
    e, k = jnp.exp(lam), jnp.exp(sigma**2 / 2)
    return -jnp.linalg.solve(H0 + e * (1 + sigma**2) * k * jnp.eye(DIM), e * k * minimiser(lam))


def solve(response, *, state=None, key=None, lam=LAM, **kwargs):
    return bilevel.hypergrad_solve(
        outer,
        inner,
        response,
        minimiser(lam),
        jnp.asarray(lam),
        inner_batch=(X, Y),
        outer_batch=(XV, YV),
        state=state,
        key=key,
        **kwargs,
    )


def trained(slope):
    return BestResponseState(StructuredParams({}, {"": slope[None]}), None)


def test_the_true_slope_gives_the_true_hypergradient():
    slope = jax.jit(jax.jacfwd(minimiser))(LAM)
    exact = jax.jit(jax.grad(lambda lam: outer(minimiser(lam), lam, (XV, YV))))(LAM)
    sol = solve(BestResponse(), state=trained(slope))
    np.testing.assert_allclose(sol.grads, exact, rtol=1e-10)
    np.testing.assert_array_equal(sol.params, minimiser(LAM))
    assert int(sol.result) == bilevel.Status.ok
    assert float(sol.stats["stationarity"]) < 1e-10
    implicit = solve(bilevel.Implicit(bilevel.Dense()))
    np.testing.assert_allclose(sol.grads, implicit.grads, rtol=1e-8)
    wrong = solve(BestResponse(), state=trained(-slope))
    assert abs(float(wrong.grads - exact)) > abs(float(exact))


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_training_finds_the_slope_of_its_width(sigma):
    # The slowest mode learns at lr sigma^2 (smallest curvature + e^lam) a step, about 0.009 for
    # sigma = 0.1 at this rate: 1000 steps leave 1e-4 of it. Noise of 512 groups: below 1 %.
    rate = optax.exponential_decay(0.5 / sigma**2, 300, 0.1, transition_begin=300)
    groups = 512
    response = BestResponse(tx=optax.sgd(rate), steps=1000, scale=sigma, groups=groups)
    many = jax.tree.map(lambda a: jnp.broadcast_to(a, (groups, *a.shape)), (X, Y))

    def grouped(w, lam, batch):
        # One data set a group: the batch axis holds copies, so that all groups see all data.
        x, y = batch
        return inner(w, lam, (x[0], y[0]))

    sol = bilevel.hypergrad_solve(
        outer, grouped, response, minimiser(LAM), jnp.asarray(LAM),
        inner_batch=many, outer_batch=(XV, YV), key=KEY,
    )  # fmt: skip
    slope = sol.state.network_params.gains[""][0]
    expected = fitted_slope(LAM, sigma)
    assert float(jnp.linalg.norm(slope - expected) / jnp.linalg.norm(expected)) < 0.02
    g = jax.grad(outer)(minimiser(LAM), LAM, (XV, YV))
    np.testing.assert_allclose(sol.grads, g @ slope, rtol=1e-10)
    if sigma == 0.5:  # and not the slope of another width, nor the true one
        true = jax.jacfwd(minimiser)(LAM)
        assert float(jnp.linalg.norm(slope - true) / jnp.linalg.norm(true)) > 0.02


def _net(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def test_the_linearised_prediction_is_the_tangent_of_the_model_with_the_same_mask():
    params = {"a": jax.random.normal(KEY, (DIM, 5)), "b": jax.random.normal(KEY, (5, 2))}
    batch = (X, KEY)

    def model(w, rate, batch):
        x, key = batch
        return _net(w, dropout(key, x, rate))

    def read_out(outputs, rate, batch):
        return jnp.sum(outputs * coefficients)

    coefficients = jax.random.normal(jax.random.key(7), (N, 2))
    network = StructuredResponse(gain_scale=1.0)
    phi = network.init(KEY, params, jnp.zeros(()))
    gauss_newton = bilevel.GaussNewton(model, read_out)
    problem = bilevel.Problem(outer, gauss_newton.loss)
    d, rate = jnp.array(0.7), jnp.array(0.3)
    value = perturbed_loss(problem, network, phi, params, d, rate, batch, gauss_newton)

    def along(t):
        moved = network.apply(phi, params, t * d)
        return read_out(model(moved, rate, batch), rate, batch)

    # Central differences in float64: error t^2 ~ 1e-10 relative to derivatives of order one.
    t = 1e-5
    slope = (along(t) - along(-t)) / (2 * t)
    np.testing.assert_allclose(value, along(0.0) + slope, rtol=1e-8)
    exact = perturbed_loss(problem, network, phi, params, d, rate, batch)
    np.testing.assert_allclose(exact, along(1.0), rtol=1e-12)
    assert abs(float(exact - value)) > 1e-3


def test_the_penalty_is_taken_at_the_perturbed_weights():
    network = StructuredResponse()
    phi = StructuredParams({}, {"": jnp.ones((1, DIM))})
    gauss_newton = bilevel.GaussNewton(
        lambda w, lam, batch: batch[0] @ w,
        lambda z, lam, batch: 0.5 * jnp.mean((z - batch[1]) ** 2),
        penalty=lambda w, lam: 0.5 * jnp.exp(lam) * jnp.sum(w**2),
    )
    problem = bilevel.Problem(outer, inner)
    args = (problem, network, phi, minimiser(LAM), jnp.array(0.4), jnp.array(LAM + 0.4), (X, Y))
    # A model linear in its weights: linearised and exact losses are the same function.
    np.testing.assert_allclose(
        perturbed_loss(*args, gauss_newton), perturbed_loss(*args), rtol=1e-12
    )


def test_what_the_inner_loss_only_samples_responds_too():
    batch = (X, Y, KEY)

    def sampled(w, rate, batch):
        x, y, key = batch
        return 0.5 * jnp.mean((dropout(key, x, jax.nn.sigmoid(rate)) @ w - y) ** 2)

    def valid(w, rate, batch):
        return outer(w, rate, batch[:2])

    args = (valid, sampled)
    kwargs = {"inner_batch": batch, "outer_batch": (XV, YV)}
    with pytest.raises(ValueError, match="BestResponse"):
        bilevel.hypergrad(*args)(minimiser(LAM), jnp.array(0.0), **kwargs)
    response = BestResponse(tx=optax.sgd(0.5), steps=20, groups=4)
    sol = bilevel.hypergrad_solve(
        *args, response, minimiser(LAM), jnp.array(0.0), **kwargs, key=KEY
    )
    assert np.isfinite(sol.grads) and float(sol.grads) != 0
    assert np.isfinite(sol.stats["response_loss"])


def test_state_in_is_state_out_and_training_goes_on():
    response = BestResponse(tx=optax.adam(1e-2), steps=3)
    run = jax.jit(lambda state, key: solve(response, state=state, key=key))
    first = bilevel.hypergrad_init(outer, inner, response, minimiser(LAM), jnp.asarray(LAM))
    one = run(first, KEY)
    two = run(one.state, jax.random.key(1))
    assert run._cache_size() == 1
    assert int(two.state.opt_state[0].count) == 6
    assert jax.tree.structure(first) == jax.tree.structure(two.state)
    cold = solve(response, key=KEY)
    np.testing.assert_allclose(cold.grads, one.grads, rtol=1e-10)


def test_a_scale_that_is_traced_and_not_positive_has_a_status():
    with pytest.raises(ValueError, match="`scale` must be greater than 0"):
        BestResponse(scale=jnp.array(0.0))

    @jax.jit
    def run(scale):
        response = BestResponse(tx=optax.sgd(0.1), steps=2, scale={"lam": scale})
        return bilevel.hypergrad_solve(
            lambda w, h, b: outer(w, h["lam"], b), lambda w, h, b: inner(w, h["lam"], b),
            response, minimiser(LAM), {"lam": jnp.asarray(LAM)},
            inner_batch=(X, Y), outer_batch=(XV, YV), key=KEY,
        ).result  # fmt: skip

    bad = [0.0, -0.5, np.nan, np.inf]
    assert int(run(0.5)) == bilevel.Status.ok
    assert all(int(run(scale)) >= bilevel.Status.invalid_setting for scale in bad)
    # No step was trained with it, so that it does not matter.
    unused = jax.jit(lambda s: solve(BestResponse(scale=s), state=trained(minimiser(LAM))).result)
    assert int(unused(0.0)) == bilevel.Status.ok


def test_the_zero_of_an_untrained_network_is_no_answer():
    state = bilevel.hypergrad_init(outer, inner, BestResponse(), minimiser(LAM), jnp.asarray(LAM))
    sol = solve(BestResponse(), state=state)
    assert float(sol.indirect) == 0 and int(sol.result) == bilevel.Status.invalid_setting
    with pytest.raises(bilevel.HypergradientError, match="network of a best response is untrained"):
        bilevel.raise_for_status(sol)
    # An outer loss at its minimum has nothing to pass on: zero is then the answer.
    flat = bilevel.hypergrad_solve(
        lambda w, lam, b: 0 * jnp.sum(w), inner, BestResponse(), minimiser(LAM), jnp.asarray(LAM),
        inner_batch=(X, Y), outer_batch=(XV, YV), state=trained(minimiser(LAM)),
    )  # fmt: skip
    assert float(flat.grads) == 0 and int(flat.result) == bilevel.Status.ok


def test_bad_input_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="untrained"):
        solve(BestResponse())
    with pytest.raises(ValueError, match="`tx`"):
        BestResponse(steps=1)
    with pytest.raises(ValueError, match="`key` is missing"):
        solve(BestResponse(tx=optax.sgd(0.1), steps=1))
    with pytest.raises(ValueError, match="self_tuning"):
        BestResponse(StructuredResponse(centred=False), tx=optax.sgd(0.1), steps=1)
    with pytest.raises(ValueError, match="`scale`"):
        BestResponse(scale=0.0)
    with pytest.raises(TypeError, match="BestResponseState"):
        solve(BestResponse(), state=jnp.ones(3))
    with pytest.raises(ValueError, match="shape"):
        solve(BestResponse(), state=trained(jnp.ones(DIM + 1)))


def test_a_learning_rate_is_sent_to_unroll():
    def blind(w, hparams, batch):
        return inner(w, hparams["l2"], batch)

    response = BestResponse(tx=optax.sgd(0.1), steps=1)
    with pytest.raises(ValueError, match=r"hparams\['lr'\].*Unroll") as caught:
        bilevel.hypergrad_solve(
            lambda w, h, b: outer(w, h["l2"], b), blind, response, minimiser(LAM),
            {"l2": jnp.array(0.0), "lr": jnp.array(0.0)},
            inner_batch=(X, Y), outer_batch=(XV, YV), key=KEY,
        )  # fmt: skip
    assert "l2" not in str(caught.value)


def test_the_arithmetic_of_each_training_step_is_bounded():
    # Counted by the compiler, so the same on any machine: 1.01 and 1.26 gradients. A response in
    # weight space adds elementwise work only; linearised outputs add a tangent pass, but no
    # backward pass of the primal, which would cost another half.
    width, batch = 128, (jax.random.normal(KEY, (64, 128)), jax.random.normal(KEY, (64, 128)))
    params = {name: jax.random.normal(KEY, (width, width)) for name in "abc"}

    def model(w, lam, batch):
        return jnp.tanh(jnp.tanh(batch[0] @ w["a"]) @ w["b"]) @ w["c"]

    def error(z, lam, batch):
        return jnp.mean((z - batch[1]) ** 2)

    split = bilevel.GaussNewton(model, error)
    problem = bilevel.Problem(split.loss, split.loss)
    network = StructuredResponse(gain_scale=0.1)
    phi = network.init(KEY, params, jnp.zeros(()))
    d = jnp.array(0.5)

    def flops(loss, at):
        compiled = jax.jit(jax.grad(loss)).lower(at).compile()
        return compiled.cost_analysis()["flops"]

    ordinary = flops(lambda w: split.loss(w, d, batch), params)
    exact, linear = (
        flops(lambda r, s=s: perturbed_loss(problem, network, r, params, d, d, batch, s), phi)
        for s in (None, split)
    )
    assert exact <= 1.05 * ordinary
    assert linear <= 1.4 * ordinary


def test_gradients_of_groups_are_those_of_the_sum_and_can_be_differentiated():
    w = jax.random.normal(jax.random.key(0), (3, 2))
    d = jax.random.normal(jax.random.key(1), (4, 2))
    batches = {
        "x": jax.random.normal(jax.random.key(2), (4, 5, 3), w.dtype),
        "row": jnp.arange(4),
        "key": jax.random.split(jax.random.key(3), 4),
    }

    def loss(w, d, part):  # with an integer and a key, as batches have them
        kept = jax.random.bernoulli(part["key"], 0.7, (5, 3))
        return jnp.sum(jnp.tanh((kept * part["x"]) @ (w * d[None])) ** 2) * (1 + part["row"])

    def looped(w, d, x):
        parts = batches | {"x": x}
        return loop_over_groups(lambda d, part: loss(w, d, part), d, parts) ** 2

    def summed(w, d, x):
        split = batches | {"x": x}
        parts = [jax.tree.map(lambda leaf, g=g: leaf[g], split) for g in range(4)]
        return sum(loss(w, d[g], part) for g, part in enumerate(parts)) ** 2

    x = batches["x"]

    def directional(f):  # forward over reverse
        gradient = jax.grad(f, argnums=(0, 1))
        return jax.jvp(lambda w: gradient(w, d, x), (w,), (jnp.ones_like(w),))[1]

    def reverse(f):  # reverse over reverse
        return jax.grad(lambda w: jnp.sum(jax.grad(f, argnums=1)(w, d, x) ** 2))(w)

    def value_and_gradients(f):
        return jax.value_and_grad(f, argnums=(0, 1, 2))(w, d, x)

    for take in (value_and_gradients, directional, reverse):
        ours, theirs = (jax.jit(take, static_argnums=0)(f) for f in (looped, summed))
        # Rounding of sums in another order.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), ours, theirs)


def test_groups_do_not_wait_for_each_other_with_their_weights():
    size, groups = 200, 8
    network = bilevel.StructuredResponse(gain_scale=0.1)
    params = {"kernel": jnp.ones((size, size))}
    response = network.init(jax.random.key(0), params, jnp.zeros(2))
    noise = jnp.ones((groups, 2))
    x = jnp.ones((groups, 1, size))

    def objective(response, params, noise, x):
        def loss(d, part):
            kernel = network.apply(response, params, d)["kernel"]  # its gradient needs it again
            return jnp.sum(jnp.tanh(part @ kernel) @ kernel) ** 2

        return mean_over_groups(loss, noise, x.reshape(groups, size), groups)

    compiled = jax.jit(jax.grad(objective, (0, 1))).lower(response, params, noise, x).compile()
    if jax.default_backend() == "cpu":
        # One set of weights (1.02 measured); a loop that keeps all eight takes 9.1.
        assert compiled.memory_analysis().temp_size_in_bytes < 5 * params["kernel"].nbytes


def test_every_training_step_draws_its_own_perturbation():
    """What the inner loss reads in each step: as many values as steps, around the same centre."""
    seen = []

    def watched(w, lam, batch):
        jax.debug.callback(lambda x: seen.append(float(x)), lam)
        return jnp.sum((w - batch) ** 2) + jnp.exp(lam) * jnp.sum(w**2)

    def outer(w, lam, batch):
        return jnp.sum(w**2)

    response = BestResponse(tx=optax.sgd(0.1), steps=4, scale=0.5)
    centre = jnp.asarray(0.25)
    jax.block_until_ready(
        bilevel.hypergrad_solve(
            outer, watched, response, jnp.ones(2), centre,
            inner_batch=jnp.ones(2), outer_batch=None, key=KEY,
        ).grads
    )  # fmt: skip
    jax.effects_barrier()
    perturbed = {round(x, 9) for x in seen} - {0.25}  # the stationarity is taken at the centre
    assert len(perturbed) == 4


def test_groups_written_out_are_those_of_the_loop():
    """Convolutions on CPU get one group after the other as straight-line code."""
    x, d = jnp.arange(12.0).reshape(6, 2), jnp.array([1.0, -2.0, 0.5])

    def loss(d, part):
        return jnp.sum(jnp.sin(d * part))

    parts = [loss(d[g], x[g::3]) for g in range(3)]  # group g takes every third example
    for straight in (False, True):
        mean = mean_over_groups(loss, d, x, 3, straight)
        np.testing.assert_allclose(mean, sum(parts) / 3, rtol=1e-14)
