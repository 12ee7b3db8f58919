"""W2's MLP at its whole batch of 256: the exact inverse of damped Gauss–Newton from its layers.

2560 rows of the Jacobian would take 6.8 GB; the inputs of the layers and the gradients at their
outputs take 10 MB. The operator is that of the loss alone, with one damping for all weights.
"""

from typing import Any

import jax
import jax.numpy as jnp

import bilevel
from experiments.bench import plain, w2
from experiments.bench.config import Config
from experiments.bench.measure import Row

DAMPING = w2.DAMPING


def _dual(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lower half of `R' J J' R`, (NC, NC), and R, (N, C, C), for the mean cross-entropy."""
    inputs, slopes, z = [], [], x
    for kernel, bias in params[:-1]:
        inputs.append(z)
        z = z @ kernel + jnp.broadcast_to(bias, (z.shape[0], bias.size))
        slopes.append((z > 0).astype(z.dtype))
        z = jax.nn.relu(z)
    inputs.append(z)
    kernel, bias = params[-1]
    z = z @ kernel + jnp.broadcast_to(bias, (z.shape[0], bias.size))
    p, (n, c) = jax.nn.softmax(z), z.shape
    # diag(p) - pp' = LL' with L = diag(sqrt p) (I - sqrt p sqrt p'), as sqrt p has length one.
    half = jnp.sqrt(p)
    root = half[:, :, None] * (jnp.eye(c, dtype=z.dtype)[None] - half[:, :, None] * half[:, None])
    root = root / jnp.sqrt(jnp.asarray(n, z.dtype))
    delta = jnp.swapaxes(root, 1, 2)  # (N, C, units)
    pairs = []
    for i in reversed(range(len(params))):
        pairs.append((inputs[i] @ inputs[i].T + 1.0, delta))
        if i > 0:
            delta = (delta @ params[i][0].T) * slopes[i - 1][:, None, :]
    # Cholesky reads the lower half: four blocks of rows up to the diagonal, 5/8 of the products.
    blocks = []
    for k in range(4):
        first, last = n * k // 4, n * (k + 1) // 4
        block = jnp.zeros((last - first, c, last, c), z.dtype)
        for gram, d in pairs:
            product = d[first:last].reshape(-1, d.shape[-1]) @ d[:last].reshape(last * c, -1).T
            block = block + gram[first:last, None, :last, None] * product.reshape(block.shape)
        blocks.append(jnp.pad(block.reshape(-1, last * c), ((0, 0), (0, (n - last) * c))))
    return jnp.concatenate(blocks), root


def woodbury(config: Config, seed: int) -> Row:
    """The exact inverse of damped Gauss–Newton, 256 examples with 10 outputs each."""

    def solve(g: Any, params: Any, lam: Any, batch: Any, key: Any) -> Any:
        kernel, root = _dual(params, batch[0])
        z, push = jax.linearize(lambda v: w2.model(v, lam, batch), params)
        pull = jax.linear_transpose(push, params)
        projected = jnp.einsum("nij,ni->nj", root, push(g)).reshape(-1)
        system = kernel + DAMPING * jnp.eye(z.size, dtype=z.dtype)
        factor = jnp.linalg.cholesky(system, symmetrize_input=False)
        u = jax.scipy.linalg.cho_solve((factor, True), projected).reshape(z.shape)
        (back,) = pull(jnp.einsum("nij,nj->ni", root, u))
        return jax.tree.map(lambda a, b: (a - b) / DAMPING, g, back)

    operator = bilevel.GaussNewton(w2.model, w2.cross_entropy, DAMPING, None, True)
    response = bilevel.Implicit(bilevel.Woodbury(), operator, warm_start=False)
    gradient = bilevel.hypergrad(w2.outer, w2.inner, response)

    def ours(params: Any, lam: Any, train: Any, held_out: Any, key: Any) -> Any:
        return gradient(params, lam, inner_batch=train, outer_batch=held_out, key=key)

    args, source = w2.arguments(config.tiny, seed)
    columns = {
        "jax": plain.hypergradient(w2.outer, w2.inner, solve),
        "bilevel": ours,
        **dict.fromkeys(("lineax", "optimistix", "jaxopt"), w2.NO_INVERSE),
    }
    title = f"W2 Woodbury through layers, {len(args[2][1])} examples"
    return Row("w2_woodbury_layers", title, source, args, w2.inner, columns=columns)


ROWS = {"w2_woodbury_layers": woodbury}
