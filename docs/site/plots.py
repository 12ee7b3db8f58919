"""Draws the pictures of docs/plots.md into docs/figures: `python docs/site/plots.py`.

Takes a minute. Needs the extras `plot` and `experiments` (the 8 x 8 digits of scikit-learn).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevel

FIGURES = Path(__file__).parents[1] / "figures"


def digits(seed=0):
    """Training images with a third of their labels wrong, validation and test images."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    x, y = (images[order] / 16).astype(np.float32), labels[order]
    wrong = rng.random(300) < 1 / 3
    given = y[:300].copy()
    given[wrong] = rng.integers(0, 10, wrong.sum())
    return {"train": (x[:300], given), "valid": (x[300:600], y[300:600]),
            "test": (x[600:], y[600:]), "wrong": given != y[:300]}  # fmt: skip


def cross_entropy(w, x, y):
    logits = x @ w["kernel"] + w["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def start():
    return {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}


def valid(w, hparams, batch):
    return jnp.mean(cross_entropy(w, *batch))


def scalar_decays(w, hparams, batch):
    penalty = sum(jnp.exp(hparams[name]) * jnp.sum(w[name] ** 2) for name in w)
    return jnp.mean(cross_entropy(w, *batch)) + penalty


def pixel_decays(w, hparams, batch):
    penalty = jnp.sum(jnp.exp(hparams["pixel"])[:, None] * w["kernel"] ** 2)
    return jnp.mean(cross_entropy(w, *batch)) + penalty


def weighted(w, hparams, batch):
    x, y, i = batch
    weights = jax.nn.sigmoid(hparams["example"][i])
    return jnp.mean(weights * cross_entropy(w, x, y)) + 1e-3 * jnp.sum(w["kernel"] ** 2)


def tune(inner, hparams, data, batch=None, steps=60, rate=0.15, cg=20, response=None, rate_w=0.5):
    """A run of `fit`, with the test loss as `evaluate`."""
    response = response or bilevel.Implicit(bilevel.CG(max_steps=cg))
    alg = bilevel.alternate(
        valid, inner, response, optax.sgd(rate_w, momentum=0.9), optax.adam(rate), inner_steps=20
    )
    batch = data["train"] if batch is None else batch
    many = jax.tree.map(lambda a: jnp.broadcast_to(a, (20, *a.shape)), batch)
    test = jax.jit(lambda w: valid(w, None, data["test"]))
    return bilevel.fit(
        alg, alg.init(start(), hparams), many, data["valid"], steps=steps, progress=False,
        evaluate=lambda point: test(point.params),
    )  # fmt: skip


def main():
    data = digits()
    starts = {
        f"start {i}": {"kernel": jnp.float32(k), "bias": jnp.float32(b)}
        for i, (k, b) in enumerate(((-8, -8), (-2, -6), (-6, -2)))
    }
    runs = {name: tune(scalar_decays, hparams, data, steps=80) for name, hparams in starts.items()}
    show = {"kernel": "log decay of the kernel", "bias": "log decay of the bias"}
    pictures = {"trajectories": bilevel.plot.trajectories(runs, labels=show)}

    curious = tune(scalar_decays, starts["start 0"], data, cg=3)
    pictures["trust_strip"] = bilevel.plot.trust_strip(curious)

    few = jax.tree.map(jnp.float32, {"pixel": np.full(64, -5.0)})
    by_seed = {
        "two decays": [tune(scalar_decays, starts["start 1"], digits(s)) for s in range(3)],
        "one decay per pixel": [tune(pixel_decays, few, digits(s)) for s in range(3)],
    }
    pictures["cost_curves"] = bilevel.plot.cost_curves(by_seed)
    pixels = by_seed["one decay per pixel"][0]
    pictures["pixel_map"] = bilevel.plot.pixel_map(pixels.state.hparams["pixel"], (8, 8))

    keys = iter(jax.random.split(jax.random.key(0), 8))
    net = {  # what a run of a network with one decay per unit leaves
        "conv1": {"kernel": -4 + jax.random.normal(next(keys), (16,))},
        "conv2": {"kernel": -5 + 0.5 * jax.random.normal(next(keys), (32,))},
        "dense": {"kernel": -2 + 0.8 * jax.random.normal(next(keys), (64,)), "bias": -8.0},
    }
    pictures["layer_map"] = bilevel.plot.layer_map(net)

    batch = (*data["train"], np.arange(300))
    cleaned = tune(weighted, {"example": jnp.zeros(300)}, data, batch, steps=40, rate=0.3)
    pictures["example_weights"] = bilevel.plot.example_weights(
        jax.nn.sigmoid(cleaned.state.hparams["example"]),
        data["train"][0].reshape(-1, 8, 8), labels=data["train"][1], marked=data["wrong"],
    )  # fmt: skip

    def response(kernel, bias):
        hparams = {"kernel": kernel, "bias": bias}
        w = bilevel.minimize(scalar_decays, start(), hparams, data["train"], max_steps=200).params
        return valid(w, None, data["valid"])

    x, y = np.linspace(-9, 0, 13), np.linspace(-9, 0, 13)
    values = jax.jit(jax.vmap(lambda b: jax.lax.map(lambda k: response(k, b), jnp.float32(x))))(
        jnp.float32(y)
    )
    path = [
        [record["hparams"][name] for name in ("kernel", "bias")]
        for record in runs["start 1"].history
    ]
    pictures["response_surface"] = bilevel.plot.response_surface(
        values, x, y, path=path, names=("log decay of the kernel", "log decay of the bias")
    )

    unrolled = bilevel.Unroll(optax.sgd(0.5), steps=20)
    many = jax.tree.map(lambda a: jnp.broadcast_to(a, (20, *a.shape)), data["train"])
    report = bilevel.memory_report(
        valid, scalar_decays, unrolled, start(), starts["start 0"], inner_batch=many,
        outer_batch=data["valid"],
    )  # fmt: skip
    pictures["resource_bars"] = bilevel.plot.resource_bars(report)

    for name, figure in pictures.items():
        figure.savefig(FIGURES / f"plot_{name}.png", dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
