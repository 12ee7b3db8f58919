"""The three problems of `solvers`: losses, batches, and the exact gradient they are judged by."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import data

Loss = Callable[[Any, Any, Any], jax.Array]


class Problem(NamedTuple):
    """A bilevel problem whose data are cut into batches once.

    Attributes:
      inner, outer: losses of a batch, means over its examples.
      params, hparams: where runs start.
      train, valid: batches on a leading axis.
      gradient: the gradient of the value function at any hyperparameters, in float64.
    """

    inner: Loss
    outer: Loss
    params: Any
    hparams: Any
    train: Any
    valid: Any
    gradient: Callable[[Any], np.ndarray]


def build(name: str, batch: int) -> Problem:
    """A problem by its name; its data are the same for every seed."""
    return {"quadratic": _quadratic, "ijcnn1": _ijcnn1, "covtype": _covtype}[name](batch)


def everything(batches: Any) -> Any:
    """All examples as one batch."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)


def _cut(arrays: Any, batch: int) -> Any:
    """Batches of equal size; what is left over is dropped."""

    def leaf(x: Any) -> jax.Array:
        whole = len(x) // batch * batch
        return jnp.asarray(np.asarray(x)[:whole].reshape(-1, batch, *x.shape[1:]), jnp.float32)

    return jax.tree.map(leaf, arrays)


def _quadratic(batch: int, examples: int = 1024, n: int = 20, p: int = 10) -> Problem:
    """h = w'Aw/2 + lam'Cw + a'w and f = w'Fw/2 + lam'G lam/2 + c'w, one of each an example."""
    rng = np.random.default_rng(0)
    values = np.geomspace(0.1, 1.0, n)
    turn = np.linalg.qr(rng.standard_normal((n, n)))[0]
    x = (rng.standard_normal((examples, n)) * np.sqrt(values)) @ turn.T
    z = rng.standard_normal((examples, n)) / np.sqrt(n)
    train = (
        x,
        0.5 * rng.standard_normal((examples, p, n)) + np.eye(p, n),
        rng.standard_normal((examples, n)),
    )
    valid = z, rng.standard_normal((examples, n)), 0.5 + rng.random((examples, p))

    def inner(w: Any, lam: Any, batch: Any) -> jax.Array:
        x, c, a = batch
        return 0.5 * jnp.mean((x @ w) ** 2) + 0.05 * w @ w + lam @ (c.mean(0) @ w) + a.mean(0) @ w

    def outer(w: Any, lam: Any, batch: Any) -> jax.Array:
        z, c, g = batch
        return 0.5 * jnp.mean((z @ w) ** 2) + 0.5 * g.mean(0) @ lam**2 + c.mean(0) @ w

    cut = _cut(train, batch), _cut(valid, batch)
    x, c, a, z, d, g = (
        np.asarray(v, np.float64) for part in cut for v in jax.tree.leaves(everything(part))
    )
    curvature = x.T @ x / len(x) + 0.1 * np.eye(n)
    cross, a, d, g, other = c.mean(0), a.mean(0), d.mean(0), g.mean(0), z.T @ z / len(z)

    def gradient(lam: Any) -> np.ndarray:
        lam = np.asarray(lam, np.float64)
        w = -np.linalg.solve(curvature, cross.T @ lam + a)
        return g * lam - cross @ np.linalg.solve(curvature, other @ w + d)

    return Problem(inner, outer, jnp.zeros(n), jnp.ones(p), *cut, gradient)


def _ijcnn1(batch: int) -> Problem:
    """Logistic regression with a log penalty for each feature."""
    loaded = data.libsvm("ijcnn1", valid=14_990, test=0)
    train, valid = ((x, 2.0 * y - 1.0) for x, y in (loaded.train, loaded.valid))

    def outer(w: Any, lam: Any, batch: Any) -> jax.Array:
        x, y = batch
        return jnp.mean(jax.nn.softplus(-y * (x @ w)))

    def inner(w: Any, lam: Any, batch: Any) -> jax.Array:
        return outer(w, lam, batch) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    def curvature(w: Any, batch: Any) -> jax.Array:
        x, _ = batch
        p = jax.nn.sigmoid(x @ w)
        return x.T @ (x * (p * (1 - p))[:, None]) / len(x)

    features = loaded.train.x.shape[1]
    start = jnp.zeros(features), jnp.full(features, -3.0)
    return _solved(inner, outer, *start, _cut(train, batch), _cut(valid, batch), curvature)


def _covtype(batch: int) -> Problem:
    """Softmax regression with a log penalty for each class, features of unit variance."""
    loaded = data.covtype(valid=3_200, test=4_000)
    shift, scale = loaded.train.x.mean(0), loaded.train.x.std(0)
    scale = np.where(scale > 0, scale, 1)

    def part(split: data.Split) -> Any:
        x = (split.x - shift) / scale
        return np.c_[x, np.ones(len(x))], np.eye(7)[split.y]

    def outer(w: Any, lam: Any, batch: Any) -> jax.Array:
        x, y = batch
        return jnp.mean(optax.softmax_cross_entropy(x @ w, y))

    def inner(w: Any, lam: Any, batch: Any) -> jax.Array:
        return outer(w, lam, batch) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    def curvature(w: Any, batch: Any) -> jax.Array:
        x, _ = batch
        p = jax.nn.softmax(x @ w)

        def block(a: int, b: int) -> jax.Array:
            return x.T @ (x * (p[:, a] * ((a == b) - p[:, b]))[:, None]) / len(x)

        upper = {(a, b): block(a, b) for a in range(7) for b in range(a, 7)}
        rows = [[upper[min(a, b), max(a, b)] for b in range(7)] for a in range(7)]
        # As parameters lie: features, then classes.
        return jnp.asarray(rows).transpose(2, 0, 3, 1).reshape(w.size, w.size)

    start = jnp.zeros((loaded.train.x.shape[1] + 1, 7)), jnp.full(7, -3.0)
    train, valid = part(loaded.train), part(loaded.valid)
    return _solved(inner, outer, *start, _cut(train, batch), _cut(valid, batch), curvature)


def _by_newton(inner: Loss, outer: Loss, curvature: Callable[..., Any]) -> Callable[..., Any]:
    """`(hyperparameters, start, its curvature, train, valid) -> (gradient, solution, curvature)`.

    Newton's method on a convex loss of which `curvature` is the Hessian without the penalty
    `sum(exp(hyperparameters) * params**2) / 2`. A Hessian costs as much as twenty gradients, so
    that one serves as long as each step halves the gradient; only its penalty is that of now.
    Conjugate gradients with the last factor solve for the adjoint.
    """

    def solved(lam: Any, start: Any, known: Any, train: Any, valid: Any) -> Any:
        penalty = jnp.diag(jnp.broadcast_to(jnp.exp(lam), start.shape).ravel())

        def factor(known: Any) -> Any:
            return jax.scipy.linalg.cho_factor(known + penalty, lower=True)[0]

        def solve(lower: Any, x: Any) -> Any:
            return jax.scipy.linalg.cho_solve((lower, True), x.ravel()).reshape(x.shape)

        def at(w: Any) -> Any:
            return jax.value_and_grad(inner)(w, lam, train)

        def step(carry: Any) -> Any:
            w, (value, g), (known, lower), k = carry
            direction, most = solve(lower, g), value * (1 + 1e-14)

            def shorter(tried: Any) -> Any:
                t = tried[0] / 2
                return t, at(w - t * direction)

            def too_long(tried: Any) -> Any:
                return ~(tried[1][0] <= most) & (tried[0] > 1e-6)

            t, new = jax.lax.while_loop(too_long, shorter, (1.0, at(w - direction)))
            w = w - t * direction
            slow = (t < 1) | (jnp.linalg.norm(new[1]) > 0.5 * jnp.linalg.norm(g))

            def fresh() -> Any:
                known = curvature(w, train)
                return known, factor(known)

            return w, new, jax.lax.cond(slow, fresh, lambda: (known, lower)), k + 1

        def going(carry: Any) -> Any:
            return (jnp.linalg.norm(carry[1][1]) > 1e-9) & (carry[3] < 200)

        begin = start, at(start), (known, factor(known)), 0
        w, _, (known, lower), _ = jax.lax.while_loop(going, step, begin)
        slope, direct = jax.grad(outer, (0, 1))(w, lam, valid)

        def product(v: Any) -> Any:
            return jax.jvp(lambda w: jax.grad(inner)(w, lam, train), (w,), (v,))[1]

        adjoint = jax.scipy.sparse.linalg.cg(
            product, slope, tol=1e-10, maxiter=500, M=functools.partial(solve, lower)
        )[0]
        cross = jax.grad(lambda lam: jnp.vdot(jax.grad(inner)(w, lam, train), adjoint))(lam)
        return direct - cross, w, known

    return solved


def _solved(
    inner: Loss, outer: Loss, params: Any, hparams: Any, train: Any, valid: Any,
    curvature: Callable[..., Any],
) -> Problem:  # fmt: skip
    """With the gradient of the value function, in float64, each solution from one before."""
    whole = everything(train), everything(valid)
    solved, of = jax.jit(_by_newton(inner, outer, curvature)), jax.jit(curvature)
    known: list[Any] = []  # the first solution, and the one before

    def gradient(lam: Any) -> np.ndarray:
        at = np.asarray(lam, np.float64)
        with jax.enable_x64(True):
            data, start = wide(whole), wide(params)
            if known:
                near = min(known, key=lambda one: np.linalg.norm(one[0] - at))[1:]
            else:
                near = start, of(start, data[0])
            grads, *found = solved(wide(at), *near, *data)
            if np.isfinite(found[0]).all():
                known[1:] = [(at, *found)]
            return np.asarray(grads)

    return Problem(inner, outer, params, hparams, train, valid, gradient)


def wide(arrays: Any) -> Any:
    """In float64, where that is enabled."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)


cached = functools.cache(build)
