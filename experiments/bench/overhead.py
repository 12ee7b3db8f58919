"""What the package adds to a program: `import bilevel`, and `fit` to each outer step.

`python -m experiments.bench.overhead` prints both, for this README. The import is timed in fresh
interpreters beside `import jax, optax`, in turns. `fit` drives `alternate` with `CG(3)` on a
network 784-128-10, and beside it a loop written by hand makes the same steps from the same start
and reads nothing: other steps would not do, because CG stops sooner in the first of them.
"""

import argparse
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel

IMPORTS = ("import jax, optax", "import bilevel", "import bilevel; bilevel.hypergrad, bilevel.fit")
ROWS = 1400  # a step of about 20 ms on two CPU cores
STEPS, ROUNDS = 40, 15


def seconds_of(program: str) -> float:
    """Seconds a fresh interpreter takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - start


def model_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
    """Mean squared error of a network with one hidden layer."""
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params[0]) @ params[1] - y) ** 2)


def train_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
    """The same with a decay."""
    decay = jnp.exp(lam) * sum(jnp.sum(v**2) for v in params)
    return model_loss(params, lam, batch) + decay


def loops(rows: int) -> tuple[Any, Any]:
    """Two functions that make the same steps and return the seconds of one: by hand, by `fit`."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = jax.random.normal(keys[0], (rows, 784)), jax.random.normal(keys[1], (rows, 10))
    params = (
        0.05 * jax.random.normal(keys[2], (784, 128)),
        0.05 * jax.random.normal(keys[3], (128, 10)),
    )
    stack, batch = (x[None], y[None]), (x, y)
    response = bilevel.Implicit(bilevel.CG(max_steps=3))
    alg = bilevel.alternate(
        model_loss, train_loss, response, optax.adam(1e-3), optax.adam(1e-3), inner_steps=1
    )
    step = jax.jit(alg.step, donate_argnums=0)

    def start() -> Any:
        return alg.init(jax.tree.map(jnp.copy, params), jnp.float32(-5.0))

    def by_hand() -> float:
        state = start()
        state, _ = step(state, inner_batches=stack, outer_batch=batch)
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(STEPS):
            state, _ = step(state, inner_batches=stack, outer_batch=batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / STEPS

    def by_fit() -> float:
        times = []

        def inner_data(i: int) -> Any:
            times.append(time.perf_counter())  # `fit` compiles at the first
            return stack

        bilevel.fit(alg, start(), inner_data, batch, steps=STEPS + 2, progress=False)
        return (times[-1] - times[1]) / STEPS

    return by_hand, by_fit


def quartiles(values: Any) -> str:
    """The median, and the first and third quartile."""
    low, middle, high = np.quantile(np.asarray(values), [0.25, 0.5, 0.75])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--rows", type=int, default=ROWS)
    args = parser.parse_args()
    for program in IMPORTS:
        seconds_of(program)
    imports = np.asarray([[seconds_of(p) for p in IMPORTS] for _ in range(args.rounds)])
    for program, column in zip(IMPORTS, imports.T, strict=True):
        ratio = quartiles(column / imports[:, 0])
        print(f"{program}: {np.median(column):.3f} s, {ratio} of the first")
    by_hand, by_fit = loops(args.rows)
    by_hand()
    by_fit()
    rounds = []
    for _ in range(args.rounds):
        before, fitted, after = by_hand(), by_fit(), by_hand()
        rounds.append((fitted, (before + after) / 2))
    fitted, hand = np.asarray(rounds).T
    print(f"a step by hand: {1e3 * np.median(hand):.2f} ms")
    print(f"by fit: {quartiles(fitted / hand)} of it, {1e3 * np.median(fitted - hand):.2f} ms more")


if __name__ == "__main__":
    main()
