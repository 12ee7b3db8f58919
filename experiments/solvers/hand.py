"""The same methods in plain JAX, as one would write them for one project: the yardstick.

No trees of optimizers, no statuses, no checks; every method is its equations. `q` solves
`H q = grad_w f`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.solvers.config import Config
from experiments.solvers.problem import Loss, Problem
from experiments.solvers.steps import momentum, outer_size, period, size, sizes


def add(a: Any, x: Any, y: Any) -> Any:
    """a x + y."""
    return jax.tree.map(lambda x, y: a * x + y, x, y)


def dot(x: Any, y: Any) -> Any:
    """x'y."""
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), x, y)))


def at(batches: Any, k: Any) -> Any:
    """Batch k of a stack."""
    return jax.tree.map(lambda x: x[k], batches)


def oracles(inner: Loss, outer: Loss, point: Any, i: Any, j: Any) -> Any:
    """grad_w h, Hq, B'q, grad_w f, d_lam f."""
    w, q, lam = point
    (g, _), (hq, bq) = jax.jvp(lambda w: jax.grad(inner, (0, 1))(w, lam, i), (w,), (q,))
    return g, hq, bq, *jax.grad(outer, (0, 1))(w, lam, j)


def directions(five: Any) -> Any:
    """Of the parameters, the adjoint and the hyperparameters."""
    g, hq, bq, gw, gl = five
    return g, add(-1, gw, hq), add(-1, bq, gl)


@dataclasses.dataclass(frozen=True)
class Hand:
    """A method on a problem; its steps are ``(state, inner, outer, key) -> state``."""

    method: str
    config: Config
    problem: Problem
    rates: tuple[Any, Any]

    def init(self, w: Any, lam: Any) -> Any:
        """The first state; the point comes first, and in it the hyperparameters last."""
        point, t = (w, jax.tree.map(jnp.zeros_like, w), lam), jnp.zeros((), jnp.int32)
        if self.method in ("fsla", "srba", "spaba"):
            return point, t, point, jax.tree.map(jnp.zeros_like, point)
        if self.method in ("f2sa", "pbgd"):
            return (w, w, lam), t
        if self.method == "bome":
            return (w, lam), t
        if self.method == "mrbo":
            return (w, lam), t, (w, lam), jax.tree.map(jnp.zeros_like, (w, lam))
        if self.method in ("saba", "saba_momentum"):
            mean = jax.tree.map(jnp.zeros_like, (w, w, lam, w, lam))
            table = tuple(
                jax.tree.map(lambda x, k=k: jnp.zeros((k, *x.shape), x.dtype), part)
                for part, k in zip(mean, self._lengths(), strict=True)
            )
            heavy = (jax.tree.map(jnp.zeros_like, (w, w)),) * (self.method == "saba_momentum")
            return point, t, table, mean, *heavy
        return point, t

    def step(self, state: Any, inner: Any, outer: Any, key: Any) -> Any:
        """One step of the method."""
        return getattr(self, self.method)(state, inner, outer, key)

    def hparams(self, state: Any) -> Any:
        """Those of a state."""
        return state[0][-1]

    def soba(self, state: Any, i: Any, j: Any, key: Any) -> Any:
        point, t = state
        return self._moved(point, self._directions(point, at(i, 0), j), t), t + 1

    def saba(self, state: Any, i: Any, j: Any, key: Any) -> Any:
        point, t, table, mean = state
        d, table, mean = self._from_table(point, table, mean, i, j)
        return self._moved(point, d, t), t + 1, table, mean

    def saba_momentum(self, state: Any, i: Any, j: Any, key: Any) -> Any:
        point, t, table, mean, heavy = state
        d, table, mean = self._from_table(point, table, mean, i, j)
        heavy = add(self.config.decay, heavy, d[:2])
        return self._moved(point, (*heavy, d[2]), t), t + 1, table, mean, heavy

    def fsla(self, state: Any, i: Any, j: Any, key: Any) -> Any:
        point, t, past, before = state
        new, old = (self._directions(x, at(i, 0), j) for x in (point, past))
        d = (*new[:2], add(self._keep(t), add(-1, old[2], before[2]), new[2]))
        return self._moved(point, d, t), t + 1, point, d

    def srba(self, state: Any, i: Any, j: Any, key: Any) -> Any:
        return self._anchored(state, i, j, state[1] % period(self.config, self.problem) == 0)

    def spaba(self, state: Any, i: Any, j: Any, key: Any) -> Any:
        drawn = jax.random.bernoulli(key, 1 / period(self.config, self.problem))
        return self._anchored(state, i, j, (state[1] == 0) | drawn)

    def mrbo(self, state: Any, i: Any, j: Any, key: Any) -> Any:
        point, t, past, before = state

        def both(point: Any) -> Any:
            w, lam = point
            return jax.grad(self.problem.inner)(w, lam, at(i, 0)), self._series(w, lam, i, j, 1)

        d = add(self._keep(t), add(-1, both(past), before), both(point))
        moves = (size("mrbo", rate, t) for rate in self.rates)
        new = tuple(add(-a, x, y) for a, x, y in zip(moves, d, point, strict=True))
        return new, t + 1, point, d

    def stocbio(self, state: Any, i: Any, j: Any, key: Any) -> Any:
        (w, q, lam), t = state
        w = self._trained(w, lam, i)
        d = self._series(w, lam, i, j, self.config.inner_steps)
        return (w, q, add(-self.rates[1], d, lam)), t + 1

    def amigo(self, state: Any, i: Any, j: Any, key: Any) -> Any:
        (w, q, lam), t = state
        w = self._trained(w, lam, i)
        g, direct = jax.grad(self.problem.outer, (0, 1))(w, lam, j)
        begin, count = self.config.inner_steps, self.config.products

        def body(k: Any, q: Any) -> Any:
            return add(-self.rates[0], add(-1, g, self._hvp(w, lam, at(i, begin + k), q)), q)

        q = jax.lax.fori_loop(0, count, body, q)
        d = add(-1, self._cross(w, lam, at(i, begin + count), q), direct)
        return (w, q, add(-self.rates[1], d, lam)), t + 1

    def f2sa(self, state: Any, i: Any, j: Any, key: Any) -> Any:
        (y, z, lam), t = state
        inner, outer = self.problem.inner, self.problem.outer
        sigma, count = self.config.penalty * (1.0 + t) ** (1 / 7), self.config.inner_steps

        def body(k: Any, carry: Any) -> Any:
            y, z = carry
            batch = at(i, k)
            slope = add(1 / sigma, jax.grad(outer)(y, lam, j), jax.grad(inner)(y, lam, batch))
            z = add(-self.rates[0], jax.grad(inner)(z, lam, batch), z)
            return add(-self.rates[0], slope, y), z

        y, z = jax.lax.fori_loop(0, count, body, (y, z))
        high, low = (jax.grad(inner, 1)(w, lam, at(i, count - 1)) for w in (y, z))
        d = add(sigma, add(-1, low, high), jax.grad(outer, 1)(y, lam, j))
        return (y, z, add(-self.rates[1], d, lam)), t + 1

    def pbgd(self, state: Any, i: Any, j: Any, key: Any) -> Any:
        (y, z, lam), t = state
        sigma, a = self.config.penalty, self.rates[0]
        z = add(-a, jax.grad(self.problem.inner)(z, lam, at(i, 0)), z)
        low = jax.grad(self.problem.inner, 1)(z, lam, at(i, 0))
        high = jax.grad(self.problem.inner, (0, 1))(y, lam, at(i, 0))
        g = jax.grad(self.problem.outer, (0, 1))(y, lam, j)
        d = add(sigma, add(-1, low, high[1]), g[1])
        y = add(-a, add(1 / sigma, g[0], high[0]), y)
        return (y, z, add(-self.rates[1], d, lam)), t + 1

    def bome(self, state: Any, i: Any, j: Any, key: Any) -> Any:
        (y, lam), t = state
        last, z = at(i, self.config.inner_steps - 1), self._trained(y, lam, i)
        g = jax.grad(self.problem.outer, (0, 1))(y, lam, j)
        high = jax.grad(self.problem.inner, (0, 1))(y, lam, last)
        low = jax.grad(self.problem.inner, 1)(z, lam, last)
        q = high[0], add(-1, low, high[1])
        square = dot(q, q)
        sigma = jnp.maximum(0.5 * square - dot(g, q), 0) / jnp.where(square == 0, 1, square)
        d, (a, b) = add(sigma, q, g), self.rates
        return (add(-a, d[0], y), add(-b, d[1], lam)), t + 1

    def _from_table(self, point: Any, table: Any, mean: Any, i: Any, j: Any) -> Any:
        """SAGA's directions; the table and its mean with the rows of this step."""
        new = oracles(self.problem.inner, self.problem.outer, point, at(i[0], 0), j[0])
        rows = (i[1][0],) * 3 + (j[1],) * 2
        old = tuple(at(a, row) for a, row in zip(table, rows, strict=True))
        change = add(-1, old, new)
        table = tuple(
            jax.tree.map(lambda x, y, row=row: x.at[row].set(y), a, b)
            for a, b, row in zip(table, new, rows, strict=True)
        )
        parts = zip(self._lengths(), change, mean, strict=True)
        means = tuple(add(1 / k, c, a) for k, c, a in parts)
        return directions(add(1, change, mean)), table, means

    def _lengths(self) -> tuple[int, ...]:
        n, m = sizes(self.problem)
        return n, n, n, m, m

    def _directions(self, point: Any, i: Any, j: Any) -> Any:
        return directions(oracles(self.problem.inner, self.problem.outer, point, i, j))

    def _moved(self, point: Any, d: Any, t: Any) -> Any:
        a = size(self.method, self.rates[0], t)
        b = outer_size(self.method, self.config.horizon, self.rates[1], t)
        w, q, lam = point
        return add(-a, d[0], w), add(-a, d[1], q), add(-b, d[2], lam)

    def _keep(self, t: Any) -> Any:
        return jnp.where(t == 0, 0.0, 1 - momentum(self.method)(t))

    def _anchored(self, state: Any, i: Any, j: Any, restart: Any) -> Any:
        point, t, past, before = state

        def difference() -> Any:
            new, old = (self._directions(x, at(i[0], 0), j[0]) for x in (point, past))
            return add(1, add(-1, old, before), new)

        d = jax.lax.cond(restart, lambda: self._directions(point, i[1], j[1]), difference)
        return self._moved(point, d, t), t + 1, point, d

    def _hvp(self, w: Any, lam: Any, batch: Any, v: Any) -> Any:
        return jax.jvp(lambda w: jax.grad(self.problem.inner)(w, lam, batch), (w,), (v,))[1]

    def _cross(self, w: Any, lam: Any, batch: Any, v: Any) -> Any:
        return jax.jvp(lambda w: jax.grad(self.problem.inner, 1)(w, lam, batch), (w,), (v,))[1]

    def _series(self, w: Any, lam: Any, batches: Any, j: Any, begin: int) -> Any:
        """The hypergradient by a Neumann series that reads the batches from `begin` on."""
        g, direct = jax.grad(self.problem.outer, (0, 1))(w, lam, j)
        term = jax.tree.map(lambda x: self.rates[0] * x, g)

        def body(k: Any, carry: Any) -> Any:
            term, q = carry
            term = add(-self.rates[0], self._hvp(w, lam, at(batches, begin + k), term), term)
            return term, add(1, term, q)

        _, q = jax.lax.fori_loop(0, self.config.products, body, (term, term))
        return add(-1, self._cross(w, lam, at(batches, begin + self.config.products), q), direct)

    def _trained(self, w: Any, lam: Any, i: Any) -> Any:
        def body(k: Any, w: Any) -> Any:
            return add(-self.rates[0], jax.grad(self.problem.inner)(w, lam, at(i, k)), w)

        return jax.lax.fori_loop(0, self.config.inner_steps, body, w)
