"""W2: an MLP 784-512-512-10 on a batch of 256, one decay for each of its 668 672 weights.

Two dense layers wide enough to be bound by their products: Neumann series, CG on Gauss–Newton,
and two direct inverses.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import bilevel
from experiments.bench import inputs, peers, plain
from experiments.bench.config import Config
from experiments.bench.measure import Row

TERMS = 20
STEP = 0.05
CG_STEPS = 20
RANK = 20
DAMPING = 0.1
# Woodbury stores one Jacobian row for each output of each example: 32 examples are 320 rows.
FEW = 32
NO_PRODUCT = "no Gauss–Newton product"
NO_SERIES = "no Neumann series"
NO_INVERSE = "not offered"


def model(params: Any, hparams: Any, batch: Any) -> jax.Array:
    z = batch[0]
    for kernel, bias in params[:-1]:
        z = jax.nn.relu(z @ kernel + jnp.broadcast_to(bias, (z.shape[0], bias.size)))
    kernel, bias = params[-1]
    return z @ kernel + jnp.broadcast_to(bias, (z.shape[0], bias.size))


def cross_entropy(z: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(z, batch[1]).mean()


def penalty(params: Any, hparams: Any) -> Any:
    """Half the weighted squares of the kernels; biases are free."""
    pairs = zip(params, hparams, strict=True)
    return 0.5 * sum(jnp.sum(jnp.exp(lam) * kernel**2) for (kernel, _), lam in pairs)


def inner(params: Any, hparams: Any, batch: Any) -> jax.Array:
    return cross_entropy(model(params, hparams, batch), hparams, batch) + penalty(params, hparams)


def outer(params: Any, hparams: Any, batch: Any) -> jax.Array:
    return cross_entropy(model(params, hparams, batch), hparams, batch)


@functools.lru_cache(maxsize=1)
def arguments(tiny: bool, seed: int) -> tuple[Any, str]:
    """Weights after 100 SGD steps on the one batch, and everything else a row needs."""
    count, sizes = (16, (12, 8, 8, 10)) if tiny else (256, (784, 512, 512, 10))
    x, y, source = inputs.images(2 * count, sizes[0], seed)
    train = (jnp.asarray(x[:count]), jnp.asarray(y[:count]))
    held_out = (jnp.asarray(x[count:]), jnp.asarray(y[count:]))
    keys = jax.random.split(jax.random.key(seed), 2 * len(sizes))
    params = [
        (
            jnp.sqrt(2.0 / m) * jax.random.normal(keys[i], (m, n), jnp.float32),
            jnp.zeros((n,), jnp.float32),
        )
        for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    ]
    lam = [
        inputs.log_decay(key, kernel, 1e-3)
        for key, (kernel, _) in zip(keys[len(sizes) :], params, strict=False)
    ]

    @jax.jit
    def train_once(params: Any, lam: Any, batch: Any) -> Any:
        return plain.axpy(-0.05, jax.grad(inner)(params, lam, batch), params)

    for _ in range(100):
        params = train_once(params, lam, train)
    return (params, lam, train, held_out, keys[-1]), source


def _row(name: str, title: str, config: Config, seed: int, *, few: bool = False, **fields) -> Row:
    args, source = arguments(config.tiny, seed)
    if few:
        params, lam, train, held_out, key = args
        args = (params, lam, jax.tree.map(lambda x: x[:FEW], train), held_out, key)
    return Row(name, "W2 " + title, source, args, inner, **fields)


def _bilevel(solver: Any, operator: Any) -> Any:
    gradient = bilevel.hypergrad(outer, inner, bilevel.Implicit(solver, operator, warm_start=False))

    def function(params: Any, lam: Any, train: Any, held_out: Any, key: Any) -> Any:
        return gradient(params, lam, inner_batch=train, outer_batch=held_out, key=key)

    return function


def _hessian(params: Any, lam: Any, batch: Any) -> Any:
    return jax.linearize(lambda v: jax.grad(inner)(v, lam, batch), params)[1]


def _decay(params: Any, lam: Any, damping: float) -> Any:
    """The diagonal of penalty and damping, shaped like the parameters."""
    return [
        (jnp.exp(a) + damping, jnp.full_like(bias, damping))
        for a, (_, bias) in zip(lam, params, strict=True)
    ]


def _gauss_newton(params: Any, lam: Any, batch: Any, damping: float = 0.0) -> Any:
    curvature = plain.gauss_newton(
        lambda v: model(v, lam, batch), lambda z: cross_entropy(z, lam, batch), params
    )

    decay = _decay(params, lam, damping)  # once, not in every product
    return lambda v: jax.tree.map(lambda image, d, x: image + d * x, curvature(v), decay, v)


def _operator(damping: float = 0.0, independent: bool = False) -> bilevel.GaussNewton:
    return bilevel.GaussNewton(model, cross_entropy, damping, penalty, independent)


def _neumann_by_hand(bind: Any) -> Any:
    def solve(g: Any, params: Any, lam: Any, batch: Any, key: Any) -> Any:
        return plain.neumann(bind(params, lam, batch), g, TERMS, STEP)

    return plain.hypergradient(outer, inner, solve)


def _neumann() -> bilevel.Neumann:
    return bilevel.Neumann(num_matvecs=TERMS, step_size=STEP)


def neumann(config: Config, seed: int) -> Row:
    """Twenty Neumann products of the Hessian."""

    def users_own(matvec: Any, b: Any) -> Any:
        return plain.neumann(matvec, b, TERMS, STEP)

    columns = {
        "jax": _neumann_by_hand(_hessian),
        "bilevel": _bilevel(_neumann(), bilevel.Hessian()),
        "lineax": NO_SERIES,
        "optimistix": NO_SERIES,
        "jaxopt": peers.jaxopt_root(outer, inner, users_own),
    }
    return _row("w2_neumann", f"Neumann, {TERMS} products", config, seed, columns=columns)


def neumann_gn(config: Config, seed: int) -> Row:
    """Twenty Neumann products of Gauss–Newton, beside those of the Hessian."""
    columns = {
        "jax": _neumann_by_hand(_gauss_newton),
        "bilevel": _bilevel(_neumann(), _operator()),
        "lineax": NO_SERIES,
        "optimistix": NO_SERIES,
        "jaxopt": NO_PRODUCT,
    }
    extras = {"hessian": _bilevel(_neumann(), bilevel.Hessian())}
    title = f"Neumann on Gauss–Newton, {TERMS} products"
    return _row("w2_neumann_gn", title, config, seed, columns=columns, extras=extras)


def cg_gn(config: Config, seed: int) -> Row:
    """Twenty CG steps on damped Gauss–Newton."""

    def bind(params: Any, lam: Any, batch: Any) -> Any:
        return _gauss_newton(params, lam, batch, DAMPING)

    def solve(g: Any, params: Any, lam: Any, batch: Any, key: Any) -> Any:
        return plain.cg(bind(params, lam, batch), g, CG_STEPS)

    columns = {
        "jax": plain.hypergradient(outer, inner, solve),
        "bilevel": _bilevel(bilevel.CG(max_steps=CG_STEPS), _operator(DAMPING)),
        "lineax": peers.lineax_cg(outer, inner, bind, CG_STEPS, None),
        "optimistix": NO_PRODUCT,
        "jaxopt": NO_PRODUCT,
    }
    title = f"CG on damped Gauss–Newton, {CG_STEPS} steps"
    return _row("w2_cg_gn", title, config, seed, columns=columns)


def _only_bilevel(by_hand: Any, ours: Any) -> dict[str, Any]:
    peers_say = dict.fromkeys(("lineax", "optimistix", "jaxopt"), NO_INVERSE)
    return {"jax": by_hand, "bilevel": ours, **peers_say}


def woodbury(config: Config, seed: int) -> Row:
    """The exact inverse of damped Gauss–Newton with a penalty per weight, 32 examples."""

    def solve(g: Any, params: Any, lam: Any, batch: Any, key: Any) -> Any:
        x, y = batch

        def one(v: Any, example: jax.Array) -> jax.Array:
            return model(v, lam, (example[None],))[0]

        # Row by row: the outputs of an example depend on that example alone.
        rows = jax.vmap(lambda example: jax.jacrev(one)(params, example))(x)
        rows = jax.tree.map(lambda j: j.reshape(-1, *j.shape[2:]), rows)
        root = jax.tree.map(jax.lax.rsqrt, _decay(params, lam, DAMPING))
        half = jax.tree.map(lambda j, d: j * d, rows, root)
        small = jax.tree.map(jnp.multiply, g, root)
        flat = [h.reshape(h.shape[0], -1) for h in jax.tree.leaves(half)]
        kernel = sum(h @ h.T for h in flat)
        p = jax.nn.softmax(model(params, lam, batch))
        blocks = (jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]) / len(y)

        def weigh(u: Any) -> jax.Array:
            u = u.reshape(*p.shape, -1)
            return jnp.einsum("ncd,ndk->nck", blocks, u).reshape(p.size, -1)

        projected = sum(
            h @ s.reshape(-1) for h, s in zip(flat, jax.tree.leaves(small), strict=True)
        )
        system = jnp.eye(p.size, dtype=p.dtype) + weigh(kernel)
        inner_part = jnp.linalg.solve(system, weigh(projected)[:, 0])
        return jax.tree.map(
            lambda s, h, d: d * (s - jnp.tensordot(inner_part, h, 1)), small, half, root
        )

    columns = _only_bilevel(
        plain.hypergradient(outer, inner, solve),
        _bilevel(bilevel.Woodbury(), _operator(DAMPING, True)),
    )
    return _row("w2_woodbury", f"Woodbury, {FEW} examples", config, seed, few=True, columns=columns)


def nystrom(config: Config, seed: int) -> Row:
    """Rank twenty of random coordinates of Gauss–Newton."""

    def solve(g: Any, params: Any, lam: Any, batch: Any, key: Any) -> Any:
        mv = _gauss_newton(params, lam, batch)
        flat, unravel = ravel_pytree(g)
        # In float32 whatever the precision around it, so that the twin draws the same.
        uniform = jax.random.uniform(key, flat.shape, jnp.float32)
        chosen = jax.lax.top_k(uniform, RANK)[1]

        def column(i: jax.Array) -> jax.Array:
            unit = jnp.zeros_like(flat).at[i].set(1)
            return ravel_pytree(mv(unravel(unit)))[0]

        columns = jax.lax.map(column, chosen)
        # Through eigenvalues: a plain solve is singular where coordinates are dead.
        core = columns[:, chosen]
        eigenvalues, basis = jnp.linalg.eigh((core + core.T) / 2)
        kept = eigenvalues > RANK * jnp.finfo(core.dtype).eps * eigenvalues[-1]
        root = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, eigenvalues, 1)), 0)
        low_rank = (basis * root[None, :]).T @ columns
        system = DAMPING * jnp.eye(RANK, dtype=core.dtype) + low_rank @ low_rank.T
        inner_part = jnp.linalg.solve(system, low_rank @ flat)
        return unravel((flat - inner_part @ low_rank) / DAMPING)

    solver = bilevel.Nystrom(rank=RANK)
    columns = _only_bilevel(
        plain.hypergradient(outer, inner, solve), _bilevel(solver, _operator(DAMPING))
    )
    return _row("w2_nystrom", f"Nyström, rank {RANK}", config, seed, columns=columns)


ROWS = {
    "w2_neumann": neumann,
    "w2_neumann_gn": neumann_gn,
    "w2_cg_gn": cg_gn,
    "w2_woodbury": woodbury,
    "w2_nystrom": nystrom,
}
