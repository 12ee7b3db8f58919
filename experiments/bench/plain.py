"""Conjugate gradients, the Neumann series and Gauss–Newton products as one writes them by hand.

These are the hand-written column: plain JAX, as fast as we know how, no statuses and no checks.
Nothing here, nor in any function named `by_hand` of the workloads, uses the library.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def dot(a: Any, b: Any) -> jax.Array:
    """Inner product of two trees."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def axpy(s: Any, a: Any, b: Any) -> Any:
    """`s a + b` on trees."""
    return jax.tree.map(lambda x, y: s * x + y, a, b)


def _cg(mv: Callable, b: Any, inverse: Any) -> tuple[tuple, Callable]:
    """`(step, x, r, p, r'z, r'r)` at zero, and a step of CG on it."""

    def precondition(r: Any) -> Any:
        return r if inverse is None else jax.tree.map(jnp.multiply, inverse, r)

    def advance(carry: tuple) -> tuple:
        k, x, r, p, rz, _ = carry
        image = mv(p)
        alpha = rz / dot(p, image)
        x, r = axpy(alpha, p, x), axpy(-alpha, image, r)
        z = precondition(r)
        rr = dot(r, r)
        following = rr if inverse is None else dot(r, z)
        return k + 1, x, r, axpy(following / rz, p, z), following, rr

    z = precondition(b)
    return (0, jax.tree.map(jnp.zeros_like, b), b, z, dot(b, z), dot(b, b)), advance


def cg(mv: Callable, b: Any, steps: int, rtol: float | None = None, inverse: Any = None) -> Any:
    """`steps` of CG from zero, or fewer when the residual falls below `rtol |b|`."""
    start, advance = _cg(mv, b, inverse)
    if rtol is None:
        return jax.lax.fori_loop(0, steps, lambda _, carry: advance(carry), start)[1]
    limit = rtol**2 * start[5]
    return jax.lax.while_loop(lambda c: (c[0] < steps) & (c[5] > limit), advance, start)[1]


def cg_no_worse(mv: Callable, b: Any, steps: int, inverse: Any) -> Any:
    """The same, or where that is worse than zero the mean of all iterates of least residual.

    Keeps every iterate.
    """
    start, advance = _cg(mv, b, inverse)

    def body(carry: tuple, _: Any) -> tuple[tuple, tuple]:
        carry = advance(carry)
        return carry, (carry[1], carry[4])

    last, (iterates, sizes) = jax.lax.scan(body, start, length=steps)
    total = 1 / start[4] + jnp.sum(1 / sizes)
    mean = jax.tree.map(lambda x: jnp.tensordot(1 / sizes, x, 1) / total, iterates)
    return jax.tree.map(lambda m, x: jnp.where(last[4] > start[4], m, x), mean, last[1])


def neumann(mv: Callable, b: Any, steps: int, step_size: Any, unroll: bool = False) -> Any:
    """`step_size` times the sum of `(I - step_size A)^j b` for j up to `steps`."""

    def body(_: Any, carry: tuple) -> tuple:
        term, total = carry
        term = axpy(-step_size, mv(term), term)
        return term, axpy(1.0, term, total)

    carry = (b, b)
    if unroll:
        for i in range(steps):
            carry = body(i, carry)
    else:
        carry = jax.lax.fori_loop(0, steps, body, carry)
    return jax.tree.map(lambda x: step_size * x, carry[1])


def series(mv: Callable, b: Any, steps: int) -> Any:
    """The same with the largest step under which no term grows, found from the same products.

    Lanczos from `b`, whose vectors hold all terms: A V = W T with T tridiagonal, W one longer.
    """
    size = jnp.sqrt(dot(b, b))
    basis, t = [jax.tree.map(lambda x: x / size, b)], jnp.zeros((steps + 1, steps), size.dtype)
    for j in range(steps):
        image = mv(basis[j])
        for i in range(max(j - 1, 0), j + 1):
            t = t.at[i, j].set(dot(basis[i], image))
            image = axpy(-t[i, j], basis[i], image)
        t = t.at[j + 1, j].set(jnp.sqrt(dot(image, image)))
        basis.append(jax.tree.map(lambda x, s=t[j + 1, j]: x / s, image))
    corner = t[-1, -1] ** 2 * jnp.linalg.inv(t[:-1])[-1, -1]
    square = jnp.zeros((steps + 1, steps + 1), t.dtype).at[:, :-1].set(t)
    square = square.at[-2, -1].set(t[-1, -1]).at[-1, -1].set(corner)
    step = 1 / jnp.linalg.eigvalsh(square)[-1]
    total = c = jnp.zeros(steps + 1, t.dtype).at[0].set(size)
    for _ in range(steps):
        c = c - step * (t @ c[:-1])
        total = total + c
    return jax.tree.map(lambda *v: step * sum(s * x for s, x in zip(total, v, strict=True)), *basis)


def gauss_newton(model: Callable, output_loss: Callable, params: Any) -> Callable:
    """`v -> J'QJ v` for `output_loss(model(params))`, linearized once."""
    z, push = jax.linearize(model, params)
    pull = jax.linear_transpose(push, params)
    weigh = jax.linearize(jax.grad(output_loss), z)[1]
    return lambda v: pull(weigh(push(v)))[0]


def hypergradient(outer: Callable, inner: Callable, solve: Callable) -> Callable:
    """`-B' solve(grad f)` by one JVP of the inner gradient; `solve(g, *arguments)`.

    The outer loss of every workload reads no hyperparameter, so there is no direct term.
    """

    def function(params: Any, hparams: Any, inner_batch: Any, outer_batch: Any, key: Any) -> Any:
        g = jax.grad(outer)(params, hparams, outer_batch)
        q = solve(g, params, hparams, inner_batch, key)
        mixed = jax.grad(inner, argnums=1)
        along = jax.jvp(lambda w: mixed(w, hparams, inner_batch), (params,), (q,))[1]
        return jax.tree.map(jnp.negative, along)

    return function


def pick(batches: Any, index: Any) -> Any:
    """Batch `index` of a stack."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batches)


def gradient(inner: Callable) -> Callable:
    """The inner gradient at one batch of a stack, left to automatic differentiation."""
    return lambda w, lam, batches, i: jax.grad(inner)(w, lam, pick(batches, i))


def mixed_gradient(inner: Callable) -> Callable:
    """The same as a primitive: its backward rule is one JVP of the gradient in both variables."""
    evaluate = gradient(inner)
    primitive = jax.custom_vjp(evaluate)

    def backward(saved: Any, v: Any) -> Any:
        w, lam, batches, i = saved
        both = jax.grad(inner, (0, 1))
        along = jax.jvp(lambda u: both(u, lam, pick(batches, i)), (w,), (v,))[1]
        return *along, None, None

    primitive.defvjp(lambda *args: (evaluate(*args), args), backward)
    return primitive


def unrolled(
    outer: Callable,
    inner: Callable,
    steps: int,
    rate: float,
    inner_gradient: Callable,
    unroll: bool = False,
    segment: int | None = None,
) -> Callable:
    """The gradient of the outer loss after `steps` SGD steps, one batch of a stack each.

    With `segment`, a divisor of `steps`, only every `segment`-th point is kept.
    """

    def function(params: Any, hparams: Any, batches: Any, outer_batch: Any, key: Any) -> Any:
        def loss(lam: Any) -> Any:
            def step(w: Any, i: Any) -> Any:
                return axpy(-rate, inner_gradient(w, lam, batches, i), w), None

            def several(w: Any, indices: Any) -> Any:
                # Not `unroll=True`: a scan of length one would stay a loop.
                return jax.lax.scan(step, w, indices, unroll=0 if unroll else 1)

            indices = jnp.arange(steps)
            if segment is None:
                end = several(params, indices)[0]
            else:
                body = jax.checkpoint(several, prevent_cse=False)
                end = jax.lax.scan(body, params, indices.reshape(-1, segment))[0]
            return outer(end, lam, outer_batch)

        return jax.grad(loss)(hparams)

    return function
