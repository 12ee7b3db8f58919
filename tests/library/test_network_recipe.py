"""The recipe for networks, on a CNN with batch norm: what it finds, and who leads to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevel
from bilevel import CG, EKFAC, GaussNewton, Implicit, Status

pytest.importorskip("sklearn", reason="needs bilevel[experiments]")
pytestmark = pytest.mark.slow

STEPS = 300


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.readout = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return self.readout(nnx.relu(self.second(x)).mean((1, 2)))


PARAMS, REST, MERGE = bilevel.split_nnx(Net(nnx.Rngs(0)))
HPARAMS = {name: jnp.float32(-7.0) for name in ("first", "second", "readout")}


def model(params, hparams, batch, rest):
    return MERGE(params, rest)(batch[0])


def output_loss(logits, hparams, batch):
    return jnp.mean(optax.softmax_cross_entropy(logits, 0.9 * batch[1] + 0.01))


def penalty(params, hparams):
    return sum(jnp.exp(hparams[k]) * jnp.sum(params[k]["kernel"] ** 2) for k in hparams)


def train(params, hparams, batch, rest):
    net = MERGE(params, rest)
    loss = output_loss(net(batch[0]), hparams, batch) + penalty(params, hparams)
    return loss, MERGE.rest(net)


def valid(params, hparams, batch, rest):
    net = MERGE(params, rest)
    net.eval()
    logits = net(batch[0])
    return jnp.mean(optax.softmax_cross_entropy(logits, batch[1])), rest


def data():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1), np.eye(10, dtype=np.float32)
    pick = np.random.default_rng(0).permutation(len(x))[:600]
    return [(jnp.array(x[i]), jnp.array(y[labels[i]])) for i in (pick[:300], pick[300:])]


@functools.cache
def trained():
    """Parameters after 300 steps of Adam, and dF/dλ by differences of 300 further ones.

    The rate falls to zero over the further steps: where it stays, runs from nearly equal points end
    so far apart that their differences do not even agree in sign.
    """
    training, validation = data()
    tx = optax.scale_by_adam()

    @jax.jit
    def step(carry, hparams, rate):
        params, opt_state, rest = carry
        (_, rest), grads = jax.value_and_grad(train, has_aux=True)(params, hparams, training, rest)
        updates, opt_state = tx.update(grads, opt_state)
        params = jax.tree.map(lambda w, u: w - rate * u, params, updates)
        return params, opt_state, rest

    def run(carry, hparams, rates):
        for rate in rates:
            carry = step(carry, hparams, np.float32(rate))
        return carry

    falling = 1.5e-3 * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS))
    here = run((PARAMS, tx.init(PARAMS), REST), HPARAMS, [3e-3] * STEPS)
    slopes = {}
    for name in HPARAMS:
        above, below = (
            valid(*[(end := run(here, HPARAMS | {name: HPARAMS[name] + s}, falling))[0]], HPARAMS,
                  validation, end[2])[0]
            for s in (1.0, -1.0)
        )  # fmt: skip
        slopes[name] = float(above - below) / 2
    return here[0], here[2], slopes


def solved(response):
    training, validation = data()
    params, rest, _ = trained()
    return jax.jit(
        lambda: bilevel.hypergrad_solve(
            valid, train, response, params, HPARAMS, inner_batch=training,
            outer_batch=validation, has_state=True, model_state=rest, key=jax.random.key(0),
        )
    )()  # fmt: skip


def compared(solution):
    """The hypergradient, and what it is relative to the differences (second kernel, readout)."""
    got, slopes = solution.grads, trained()[2]
    return got, [float(got[name]) / slopes[name] for name in ("second", "readout")]


def test_the_recipe_finds_signs_and_sizes_within_a_factor():
    operator = GaussNewton(model, output_loss, damping=0.1, penalty=penalty)
    solution = solved(Implicit(CG(max_steps=10), operator))
    assert Status(int(solution.result)) in (Status.ok, Status.truncated)
    assert solution.stats["residual_norm"] < 0.8 * solution.stats["rhs_norm"]
    got, ratios = compared(solution)
    assert all(0.15 < r < 1.2 for r in ratios), ratios
    # Batch norm takes away what a decay of the first kernel does to the outputs.
    assert abs(trained()[2]["first"]) < 0.2 * trained()[2]["second"] and got["first"] > 0


def test_a_diagonal_in_the_eigenbases_of_the_layers_comes_nearer_without_products():
    operator = GaussNewton(model, output_loss, damping=0.03, penalty=penalty)
    solution = solved(Implicit(EKFAC(num_samples=1), operator))
    got, ratios = compared(solution)
    assert all(0.5 < r < 2.0 for r in ratios), ratios
    assert abs(got["first"]) < 0.3 * got["second"]
    assert Status(int(solution.result)) == Status.worse_than_zero  # as the page says


def test_diagnose_leads_from_the_hessian_of_a_network_to_the_recipe():
    found = bilevel.diagnose(
        train, PARAMS, HPARAMS, inner_batch=data()[0], has_state=True, model_state=REST,
        num_steps=20, print=False,
    )  # fmt: skip
    assert found.min_curvature < 0
    assert any("GaussNewton(model, output_loss, damping=0.1)" in line for line in found.advice)
