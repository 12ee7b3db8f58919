"""`learning_rate` and `pes`: their optimizers, their budgets, and what is known exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.learning_rate import config as rates_config
from experiments.learning_rate import problem, quadratic, schedules, tune
from experiments.pes import config as pes_config
from experiments.pes import problem as pes_problem
from experiments.pes import scalar
from experiments.pes import tune as pes_tune


def test_a_constant_schedule_is_optax_momentum():
    keys = jax.random.split(jax.random.key(0), 4)
    params = [(jax.random.normal(keys[0], (3, 2)), jnp.ones(2)), (jnp.ones((2, 2)), jnp.zeros(2))]
    ours = schedules.sgd(schedules.start(2, 5, 0.1, 0.8), every=2)
    theirs = optax.sgd(0.1, momentum=0.8)
    states = ours.init(params), theirs.init(params)
    for key in keys:
        grads = jax.tree.map(lambda x, key=key: jax.random.normal(key, x.shape), params)
        mine, first = ours.update(grads, states[0], params)
        yours, second = theirs.update(grads, states[1], params)
        states = first, second
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(yours), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)  # a few roundings of float32


def test_layers_and_windows_have_their_own_rates():
    schedule = schedules.start(2, 2, 0.1, 0.5)
    schedule["log_rate"] = schedule["log_rate"].at[1, 1].set(jnp.log(0.7))
    tx = schedules.sgd(schedule, every=1)
    params = [jnp.zeros(1), jnp.zeros(1)]
    state = tx.init(params)
    grads = [jnp.ones(1), jnp.ones(1)]
    first, state = tx.update(grads, state)
    second, _ = tx.update(grads, state)
    np.testing.assert_allclose(first, [[-0.1], [-0.1]], rtol=1e-6)
    np.testing.assert_allclose(second, [[-0.15], [-1.05]], rtol=1e-6)


def test_the_whole_run_is_differentiated():
    settings = dataclasses.replace(
        rates_config.smoke(), steps=4, windows=2, batch=4, train=20, outer_batch=8
    )
    keys = jax.random.split(jax.random.key(1), 2)
    train = (jax.random.normal(keys[0], (20, 28, 28)), jnp.arange(20) % 10)
    schedule = schedules.start(3, 2, 0.05, 0.5)
    schedule = jax.tree.map(lambda x: x.astype(jnp.float64), schedule)
    step = 1e-5

    def moved(sign):
        log_rate = schedule["log_rate"].at[0, 0].add(sign * step)
        return float(run({**schedule, "log_rate": log_rate}, train, train, keys[1])[0])

    with jax.numpy_rank_promotion("allow"):
        run = jax.jit(tune.hypergradient(settings, "mlp", settings.steps))
        _, grads = run(schedule, train, train, keys[1])
        difference = (moved(1) - moved(-1)) / (2 * step)
    # Central differences in float64 at 1e-5: about 1e-10 of curvature and 1e-11 of rounding.
    assert float(grads["log_rate"][0, 0]) == pytest.approx(difference, rel=1e-6)


def test_greedy_gradients_of_the_quadratic_are_the_closed_form():
    rates = np.array([0.3, 0.2, 0.1, 0.05, 0.02])
    curvature = np.logspace(-3, 0, quadratic.DIMENSION)
    mean, variance, by_hand = np.ones(quadratic.DIMENSION), np.zeros(quadratic.DIMENSION), []
    for rate in rates:
        total = 0.0
        for _ in range(quadratic.STEPS // quadratic.WINDOWS):
            square = mean**2 + variance
            slope = -curvature * (1 - rate * curvature) * square + rate * quadratic.NOISE**2
            total += rate * np.sum(curvature * slope)
            mean = (1 - rate * curvature) * mean
            variance = (1 - rate * curvature) ** 2 * variance + (rate * quadratic.NOISE) ** 2
        by_hand.append(total)
    whole, greedy = quadratic.gradients(jnp.log(jnp.asarray(rates)))
    np.testing.assert_allclose(greedy, by_hand, rtol=1e-4)  # the curvatures are float32
    assert np.all(np.asarray(whole[:-1]) < np.asarray([0.0]))  # all but the last want to be longer


@pytest.mark.parametrize("length", [1, 10])
def test_all_methods_of_learning_rate_spend_the_same(length):
    settings = rates_config.cpu()
    budget = settings.updates * tune.cost(settings, settings.steps)
    one = tune.cost(settings, length)
    assert budget - one < tune.updates(settings, length) * one <= budget


def test_all_methods_of_pes_spend_the_same():
    settings = pes_config.cpu()
    spent = {
        m: pes_tune.updates(m, settings) * pes_tune.cost(m, settings) for m in pes_tune.METHODS
    }
    assert min(spent.values()) > 0.97 * max(spent.values())


def test_the_closed_form_of_the_scalar_system():
    truth, variance = scalar.closed_form()
    assert truth[0] == pytest.approx(1) and variance[0] == pytest.approx(2)  # t = 1: 1 and 1 + 1
    system = [0.0]
    for _ in range(scalar.STEPS):
        system.append(scalar.DECAY * system[-1] + 1.0)
    np.testing.assert_allclose(truth, system[1:], rtol=1e-12)


def test_the_rate_of_pes_runs_between_its_two_ends():
    tx = pes_problem.sgd(jnp.asarray([0.0, -2.0]), steps=4)
    state, seen = tx.init(jnp.zeros(())), []
    for _ in range(5):
        update, state = tx.update(jnp.ones(()), state)
        seen.append(-float(update))
    np.testing.assert_allclose(seen, np.exp([0, -0.5, -1, -1.5, 0]), rtol=1e-6)


def test_images_pass_through_both_networks():
    for model in ("mlp", "cnn"):
        params = problem.initial(model, jax.random.key(0))
        with jax.numpy_rank_promotion("allow"):
            logits = problem.logits(params, jnp.ones((2, 28, 28)))
        assert logits.shape == (2, 10)


def test_a_population_of_any_size_has_a_standard_error():
    # 50 000 squared does not fit the 32-bit integers of the default precision.
    with jax.enable_x64(False):
        means, errors = scalar.estimates(50_000, jax.random.key(0), persistent=True)
    truth, variance = scalar.closed_form()
    exact = np.sqrt(variance / 50_000)
    assert np.max(np.abs(means - truth) / exact) < 5  # fifty correlated estimates
    np.testing.assert_allclose(errors, exact, rtol=0.05)  # 1.2 % of sampling, at the worst of 50


def test_a_searched_shape_rises_to_its_peak_and_falls_to_its_last_rate():
    setting = {"peak": 0.2, "momentum": 0.9, "warm_up": 0.1, "last": 0.05}
    for shape in ("cosine", "linear"):
        rates = np.exp(schedules.shaped(shape, 1000, setting)["log_rate"])
        assert rates.shape == (3, 1000) and rates[0].argmax() in (99, 100)
        np.testing.assert_allclose(rates[0, [49, 100, -1]], [0.099, 0.2, 0.01], rtol=0.02)
    flat = schedules.shaped("constant", 10, {"peak": 0.2, "momentum": 0.9})
    np.testing.assert_allclose(np.exp(flat["log_rate"]), 0.2, rtol=1e-6)
    np.testing.assert_allclose(jax.nn.sigmoid(flat["momentum"]), 0.9, rtol=1e-6)
