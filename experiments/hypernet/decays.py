r"""The second part: a decay for every weight of a linear classifier.

:math:`h(w, \lambda) =` cross-entropy :math:`+ \tfrac12 \sum_i e^{\lambda_i} w_i^2`. A hypernetwork
of two linear layers with a narrow middle maps all log decays to all weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import batches, budget, data
from experiments.hypernet.config import Decays

CLASSES = 10
FIRST = 0.01
NEWTON, PRODUCTS = 10, 200  # steps to the exact minimum, and products of a linear solve


def images(config: Decays, seed: int) -> Any:
    """``(train, valid, test)``, each with rows of pixels and labels."""
    if config.data == "mnist":
        sets = data.mnist(valid=config.valid, seed=seed)
    else:
        sets = data.digits(valid=config.valid, test=500, seed=seed)

    def part(split: Any, count: int | None = None) -> tuple[jax.Array, jax.Array]:
        y = split.y[:count]
        return jnp.asarray(split.x[:count].reshape(len(y), -1)), jnp.asarray(y)

    return part(sets.train, config.train), part(sets.valid), part(sets.test)


def initial(pixels: int) -> dict[str, jax.Array]:
    """Zeros: the training loss is convex."""
    return {"kernel": jnp.zeros((pixels, CLASSES)), "bias": jnp.zeros(CLASSES)}


def outer(w: Any, lam: Any, batch: Any) -> jax.Array:
    """Cross-entropy."""
    x, y = batch
    logits = x @ w["kernel"] + w["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def inner(w: Any, lam: Any, batch: Any) -> jax.Array:
    """The same with the decay; ``lam`` is a tree like ``w``, or one number for all weights."""
    trees = lam if isinstance(lam, dict) else jax.tree.map(lambda _: lam, w)
    parts = jax.tree.map(lambda w, lam: 0.5 * jnp.sum(jnp.exp(lam) * w**2), w, trees)
    return outer(w, lam, batch) + jnp.sum(jnp.stack(jax.tree.leaves(parts)))


def start(method: str, pixels: int, config: Decays) -> Any:
    """The first log decay, for all weights or for each."""
    first = jnp.float32(config.start)
    if method == "local_shared":
        return first
    return jax.tree.map(lambda w: jnp.full_like(w, first), initial(pixels))


def network(method: str, config: Decays) -> bilevel.Hypernetwork:
    """A straight line, or two linear layers with a narrow middle; inputs are standardized."""
    middle, half = (config.low + config.high) / 2, (config.high - config.low) / 2
    return bilevel.Hypernetwork(
        () if method == "local_shared" else (config.bottleneck,),
        residual=False,
        to_unit=lambda lam: (lam - middle) / half,
        activation=lambda x: x,
        init_scale=FIRST,
    )


def step_cost(config: Decays) -> float:
    """G of a step of local training."""
    return budget.global_response(
        config.draws, budget.weight(config.outer_batch, config.batch)
    ).total


def steps(config: Decays) -> int:
    """As many as the budget pays for."""
    return int(config.budget // step_cost(config))


def algorithm(method: str, config: Decays) -> bilevel.Algorithm:
    """Local training."""
    net = network(method, config)

    def sample(key: jax.Array, lam: Any) -> Any:
        leaves, form = jax.tree.flatten(lam)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(
            form,
            [
                x + config.sigma * jax.random.normal(k, x.shape)
                for k, x in zip(keys, leaves, strict=True)
            ],
        )

    count = steps(config)
    warm = round(config.warm_up * count)
    outer_rate = optax.join_schedules(  # an untrained response gives a wrong direction
        [
            optax.constant_schedule(0.0),
            optax.cosine_decay_schedule(config.outer_rate, count - warm),
        ],
        [warm],
    )
    return bilevel.global_response(
        outer,
        inner,
        net,
        sample,
        optax.adam(optax.cosine_decay_schedule(config.rate, count)),
        optax.adam(outer_rate),
        draws=config.draws,
    )


@functools.cache
def local(method: str, config: Decays) -> Any:
    """``(key, train, valid, test) -> (rows, phi, decays)``: local training and where it ends.

    The rows are the losses in validation and test, and mean and spread of the log decays, at each
    of the ``points``.
    """
    made = algorithm(method, config)

    def whole(key: jax.Array, train: Any, valid: Any, test: Any) -> Any:
        pixels = train[0].shape[1]
        first = initial(pixels)
        state = made.init(first, start(method, pixels, config), key=key)

        def sample(key: jax.Array) -> Any:
            one, two = jax.random.split(key)
            batch = batches.draw(train, one, (config.batch,))
            return jax.tree.map(lambda a: a[None], batch), batches.draw(
                valid, two, (config.outer_batch,)
            )

        def stretch(state: Any, key: jax.Array) -> Any:
            count = steps(config) // config.points
            state = bilevel.scan_run(made, state, sample, count, key=key).state
            w = made.deploy(state)
            flat = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(state.hparams)])
            measured = outer(w, None, valid), outer(w, None, test), flat.mean(), flat.std()
            return state, jnp.stack(measured)

        state, rows = jax.lax.scan(stretch, state, jax.random.split(key, config.points))
        return rows, state.network_params, state.hparams

    return jax.jit(whole)


@functools.cache
def likeness(config: Decays) -> Any:
    """``(phi, decays, train, valid) -> (cosine, stationarity)`` of the network's hypergradient.

    Its cosine with the exact one: that of the minimum of the training loss at these decays, found
    by Newton's method from the predicted weights, with the inverse Hessian by conjugate gradients.
    The stationarity is what is left of the training gradient there, over that at zero weights.
    """
    net = network("local_per_weight", config)

    def whole(phi: Any, lam: Any, train: Any, valid: Any) -> Any:
        first = initial(train[0].shape[1])
        told = jax.grad(lambda lam: outer(net.apply(phi, first, lam), lam, valid))(lam)

        def solve(w: Any, right: Any) -> Any:
            slope = jax.grad(lambda w: inner(w, lam, train))
            product = jax.linearize(slope, w)[1]
            return jax.scipy.sparse.linalg.cg(product, right, tol=1e-6, maxiter=PRODUCTS)[0]

        def newton(w: Any, _: None) -> Any:
            move = solve(w, jax.grad(inner)(w, lam, train))
            return jax.tree.map(jnp.subtract, w, move), None

        w, _ = jax.lax.scan(newton, net.apply(phi, first, lam), None, NEWTON)
        adjoint = solve(w, jax.grad(outer)(w, lam, valid))
        exact = jax.tree.map(lambda q, lam, w: -q * jnp.exp(lam) * w, adjoint, lam, w)
        left, start = (optax.tree.norm(jax.grad(inner)(w, lam, train)) for w in (w, first))
        size = optax.tree.norm(told) * optax.tree.norm(exact)
        return optax.tree_utils.tree_vdot(told, exact) / size, left / start

    return jax.jit(whole)


@functools.cache
def plain(config: Decays) -> Any:
    """``(lam, key, train, valid, test) -> (valid, test)`` of one trial: Adam."""
    count = config.budget // config.trials
    tx = optax.adam(optax.cosine_decay_schedule(10 * config.rate, count))

    def whole(lam: Any, key: jax.Array, train: Any, valid: Any, test: Any) -> Any:
        def loss(w: Any, lam: Any, key: jax.Array) -> jax.Array:
            return inner(w, lam, batches.draw(train, key, (config.batch,)))

        w = initial(train[0].shape[1])
        first, keys = bilevel.InnerState(w, tx.init(w)), jax.random.split(key, count)
        w = bilevel.descend(loss, tx, first, lam, keys, steps=count)[0].params
        return outer(w, None, valid), outer(w, None, test)

    return jax.jit(whole)


def random_decays(config: Decays, pixels: int, rng: np.random.Generator) -> Any:
    """A log decay for every weight, each drawn uniformly."""
    return jax.tree.map(
        lambda w: jnp.asarray(rng.uniform(config.low, config.high, w.shape), jnp.float32),
        initial(pixels),
    )
