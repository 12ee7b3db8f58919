"""Products that conjugate gradients need with and without Kronecker factors, counted on real data.

`python -m experiments.bench.products` prints a table of this README: the MLP of W2 on MNIST (pixels
in [0, 1] as there, and standardized) and the CNN of W4 on CIFAR-10 (standardized) after 100 SGD
steps, a held-out gradient as right side, solved to a residual of 0.1. Behind the plus sign stand
the backward passes of the preconditioner; 400 is where it stops.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.bench import w2, w4
from experiments.common import data

STEPS, RATE, TOLERANCE, MOST, HELD_OUT = 100, 0.05, 0.1, 400, 1000
DAMPINGS = (1e-3, 1e-4)
METHODS = {
    "plain": None,
    "KFAC": bilevel.KFAC(),
    "KFAC, exact, x 10": bilevel.KFAC(None, damping_multiple=10.0),
    "EKFAC": bilevel.EKFAC(),
    "EKFAC, rank 20": bilevel.EKFAC(rank=20),
}
SETTINGS = {
    "mlp": (w2, 256, (256, 1024)),
    "mlp_standardized": (w2, 256, (1024,)),
    "cnn": (w4, 64, (64,)),
}


def loss(z: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(z, batch[1]).mean()


def examples(network: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and labels to train on, and to take the right side from."""
    flat = network != "cnn"
    sets = data.mnist() if flat else data.cifar10(lossless=True, valid=HELD_OUT)
    parts = []
    for split in (sets.train, sets.valid):
        x = np.asarray(split.x, np.float32)
        parts += [x.reshape(len(x), -1) if flat else x, np.asarray(split.y)]
    mean, scale = (0.0, 1.0) if network == "mlp" else (parts[0].mean(), parts[0].std())
    return (parts[0] - mean) / scale, parts[1], (parts[2] - mean) / scale, parts[3]


def trained(model: Callable, params: Any, x: np.ndarray, y: np.ndarray, size: int) -> Any:
    """The parameters after SGD on batches of `size`."""

    @jax.jit
    def step(params: Any, batch: Any) -> Any:
        slope = jax.grad(lambda p: loss(model(p, None, batch), None, batch))(params)
        return jax.tree.map(lambda p, g: p - RATE * g, params, slope)

    draws = np.random.default_rng(0)
    for _ in range(STEPS):
        chosen = draws.integers(0, len(x), size)
        params = step(params, (x[chosen], y[chosen]))
    return params


def iterations(apply: Callable, inverse: Callable, g: Any) -> int:
    """Steps of preconditioned CG, driven from the host: convolutions in a loop are slow on CPU."""
    dot = jax.jit(optax.tree.vdot)
    r, z = g, inverse(g)
    p, rz, first = z, dot(g, z), float(dot(g, g))
    for count in range(MOST):
        if float(dot(r, r)) <= TOLERANCE**2 * first:
            return count
        image = apply(p)
        r = optax.tree.add_scale(r, -rz / dot(p, image), image)
        z = inverse(r)
        rz, before = dot(r, z), rz
        p = optax.tree.add_scale(z, rz / before, p)
    return MOST


def rows(network: str) -> Iterator[tuple[str, ...]]:
    """One row per batch and damping."""
    workload, size, batches = SETTINGS[network]
    x, y, x_held, y_held = examples(network)
    params = trained(workload.model, workload.arguments(False, 0)[0][0], x, y, size)
    held = (jnp.asarray(x_held[:HELD_OUT]), jnp.asarray(y_held[:HELD_OUT]))
    g = jax.jit(jax.grad(lambda p, b: loss(workload.model(p, None, b), None, b)))(params, held)
    for count in batches:
        batch = (jnp.asarray(x[:count]), jnp.asarray(y[:count]))
        for damping in DAMPINGS:
            operator = bilevel.GaussNewton(workload.model, loss, damping)

            def bound(params: Any, batch: Any, operator: Any = operator) -> Any:
                problem = bilevel.Problem(operator.loss, operator.loss)
                return operator.bind(problem, params, None, batch, fresh=False).mv

            product = jax.jit(lambda v, p, b, bound=bound: bound(p, b)(v))
            cells = []
            for method in METHODS.values():
                inverse, extra = (lambda r: r), 0
                if method is not None:
                    prepared = method.prepare(bound(params, batch), g, jax.random.key(1))
                    inverse, extra = jax.jit(prepared.apply), int(prepared.num_products)
                spent = iterations(lambda v: product(v, params, batch), inverse, g)  # noqa: B023
                cells.append(f"{spent}" + (f" + {extra}" if extra else ""))
            yield (network, str(count), f"{damping:g}", *cells)


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(SETTINGS), help=", ".join(SETTINGS))
    header = ("network", "batch", "damping", *METHODS)
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for network in parser.parse_args().networks:
        for row in rows(network):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
