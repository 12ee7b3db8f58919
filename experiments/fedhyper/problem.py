"""Federated training of a small network: clients with classes of their own, mapped side by side."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import data
from experiments.fedhyper.config import Config

CLASSES = 10
METHODS = ("fedavg", "global", "momentum", "server", "client", "full")


class Parts(NamedTuple):
    """Images and labels; `rows[i, :sizes[i]]` are the training rows of client i."""

    train: tuple[jax.Array, jax.Array]
    valid: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    rows: jax.Array
    sizes: jax.Array


def load(config: Config, seed: int) -> Parts:
    """The parts of one seed, and the split of the training images among clients."""
    sets = getattr(data, config.name)(valid=config.valid, seed=seed)
    x, y = (np.asarray(a)[: config.train] for a in sets.train)
    rows, sizes = split(y, config, np.random.default_rng(seed))

    def part(x: Any, y: Any) -> tuple[jax.Array, jax.Array]:
        x = np.asarray(x, np.float32)
        if x.shape[-1] == 28:
            x = x.reshape(len(x), 14, 2, 14, 2).mean((2, 4))
        return jnp.asarray(x.reshape(len(x), -1)), jnp.asarray(y, jnp.int32)

    return Parts(part(x, y), part(*sets.valid), part(*sets.test), rows, sizes)


def split(labels: np.ndarray, config: Config, rng: np.random.Generator) -> tuple[Any, Any]:
    """Every image to one client, class by class in Dirichlet proportions; none gets nothing."""
    owned: list[list[int]] = [[] for _ in range(config.clients)]
    for c in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(labels == c))
        shares = rng.dirichlet(np.full(config.clients, config.concentration))
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for client, piece in zip(owned, np.split(rows, cuts), strict=True):
            client.extend(piece.tolist())
    for client in owned:
        if not client:  # the largest gives one away
            client.append(max(owned, key=len).pop())
    sizes = np.array([len(client) for client in owned])
    padded = np.zeros((config.clients, sizes.max()), np.int32)
    for i, client in enumerate(owned):
        padded[i, : len(client)] = client
    return jnp.asarray(padded), jnp.asarray(sizes, jnp.int32)


def start(config: Config, size: int, key: jax.Array) -> Any:
    """Weights of a network of one hidden layer."""
    first, second = jax.random.split(key)

    def layer(key: jax.Array, a: int, b: int) -> Any:
        w = jax.random.normal(key, (a, b), jnp.float32) * np.sqrt(2 / a)
        return {"w": w, "b": jnp.zeros(b, jnp.float32)}

    return [layer(first, size, config.hidden), layer(second, config.hidden, CLASSES)]


def logits(params: Any, x: jax.Array) -> jax.Array:
    """What the network says of images."""
    one, two = params
    return jax.nn.relu(x @ one["w"] + one["b"][None]) @ two["w"] + two["b"][None]


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y))


def accuracy(params: Any, part: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The share of a part that is classified rightly."""
    return jnp.mean(jnp.argmax(logits(params, part[0]), -1) == part[1])


def optimizers(method: str, config: Config, rate: Any) -> tuple[Any, Any]:
    """The optimizer of the server, and a function of the rate sent that makes the clients'."""
    server = {
        "global": lambda: bilevel.fedhyper_global(
            config.global_hyper, normalized=config.normalized
        ),
        "momentum": lambda: bilevel.fedhyper_global(
            config.global_hyper, momentum=0.9, min_rate=config.momentum_rates[0],
            max_rate=config.momentum_rates[1], normalized=config.normalized,
        ),
        "server": lambda: bilevel.fedhyper_server(
            rate, config.server_hyper, min_rate=config.server_rates[0],
            max_rate=config.server_rates[1],
        ),
    }  # fmt: skip
    server["full"] = server["momentum"]

    def client(sent: Any) -> Any:
        if method in ("client", "full"):
            return bilevel.fedhyper_client(sent, config.client_hyper, clients=config.selected)
        return optax.with_extra_args_support(optax.sgd(sent))

    return server.get(method, lambda: optax.sgd(1.0))(), client


def whole_run(method: str, config: Config, parts: Parts, rate: Any, key: jax.Array) -> Any:
    """All rounds; accuracies on validation images after each, the factors, the best weights."""
    server, client = optimizers(method, config, rate)
    start_key, key = jax.random.split(key)
    params = start(config, parts.train[0].shape[1], start_key)

    def local(params: Any, moved: Any, sent: Any, owner: Any, key: jax.Array) -> Any:
        tx = client(sent)
        positions = jax.random.randint(
            key, (config.local_steps, config.batch), 0, parts.sizes[owner]
        )

        def step(carry: Any, position: Any) -> Any:
            w, state = carry
            rows = parts.rows[owner][position]
            grads = jax.grad(loss)(w, parts.train[0][rows], parts.train[1][rows])
            updates, state = tx.update(grads, state, w, global_update=moved)
            return (optax.apply_updates(w, updates), state), None

        (w, state), _ = jax.lax.scan(step, (params, tx.init(params)), positions)
        return jax.tree.map(jnp.subtract, w, params), getattr(state, "factor", jnp.ones(()))

    def one_round(carry: Any, key: jax.Array) -> Any:
        params, state, moved, best = carry
        choose, train = jax.random.split(key)
        owners = jax.random.permutation(choose, config.clients)[: config.selected]
        keys = jax.random.split(train, config.selected)
        sent = state.rate if method == "server" else rate
        changes, factors = jax.vmap(lambda o, k: local(params, moved, sent, o, k))(owners, keys)
        shares = parts.sizes[owners] / jnp.sum(parts.sizes[owners])
        mean = jax.tree.map(lambda d: jnp.tensordot(shares.astype(d.dtype), d, axes=1), changes)
        grads = jax.tree.map(jnp.negative, mean)
        updates, state = server.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        reached = accuracy(params, parts.valid)
        better = reached > best[0]
        kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), params, best[1])
        best = (jnp.where(better, reached, best[0]), kept)
        factor = state.rate if method in ("global", "momentum", "full") else jnp.ones(())
        sent = sent * jnp.mean(factors)
        return (params, state, updates, best), (reached, factor, sent)

    zero = jax.tree.map(jnp.zeros_like, params)
    first = (params, server.init(params), zero, (jnp.asarray(-1.0, jnp.float32), params))
    carry, seen = jax.lax.scan(one_round, first, jax.random.split(key, config.rounds))
    return carry[3][1], seen
