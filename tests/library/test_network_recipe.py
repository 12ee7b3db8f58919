"""The recipe for networks, on a CNN with batch norm: what it finds, and who leads to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevel
from bilevel import CG, GaussNewton, Implicit, Status

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
    """Parameters after 300 steps of Adam, and dF/dλ by differences of 300 further ones."""
    training, validation = data()
    tx = optax.adam(3e-3)

    @jax.jit
    def step(carry, hparams):
        params, opt_state, rest = carry
        (_, rest), grads = jax.value_and_grad(train, has_aux=True)(params, hparams, training, rest)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, rest

    def run(carry, hparams):
        for _ in range(STEPS):
            carry = step(carry, hparams)
        return carry

    here = run((PARAMS, tx.init(PARAMS), REST), HPARAMS)
    slopes = {}
    for name in HPARAMS:
        above, below = (
            valid(*[(end := run(here, HPARAMS | {name: HPARAMS[name] + s}))[0]], HPARAMS,
                  validation, end[2])[0]
            for s in (0.5, -0.5)
        )  # fmt: skip
        slopes[name] = float(above - below)
    return here[0], here[2], slopes


def solved(response):
    training, validation = data()
    params, rest, _ = trained()
    return jax.jit(
        lambda: bilevel.hypergrad_solve(
            valid, train, response, params, HPARAMS, inner_batch=training,
            outer_batch=validation, has_state=True, model_state=rest,
        )
    )()  # fmt: skip


def test_gauss_newton_with_damping_finds_what_further_training_shows():
    operator = GaussNewton(model, output_loss, damping=0.1, penalty=penalty)
    solution = solved(Implicit(CG(max_steps=10), operator))
    assert Status(int(solution.result)) in (Status.ok, Status.truncated)
    # Ten steps leave about half of the right side here; without curvature there would be no limit.
    assert solution.stats["residual_norm"] < 0.7 * solution.stats["rhs_norm"]
    slopes = trained()[2]
    got = np.array([float(solution.grads[name]) for name in HPARAMS])
    expected = np.array([slopes[name] for name in HPARAMS])
    # The differences are of an unfinished training as well: what agrees is the direction and the
    # size, which damping makes smaller.
    cosine = got @ expected / np.linalg.norm(got) / np.linalg.norm(expected)
    assert cosine > 0.9, (got, expected)
    assert 0.15 < np.linalg.norm(got) / np.linalg.norm(expected) < 1.5, (got, expected)


def test_diagnose_leads_from_the_hessian_of_a_network_to_the_recipe():
    found = bilevel.diagnose(
        train, PARAMS, HPARAMS, inner_batch=data()[0], has_state=True, model_state=REST,
        num_steps=20, print=False,
    )  # fmt: skip
    assert found.min_curvature < 0
    assert any("GaussNewton(model, output_loss, damping=0.1)" in line for line in found.advice)
