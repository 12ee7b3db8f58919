"""Hyperparameters that no derivative reaches: a zero would look like an answer."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel as b
from bilevel import regularizers
from odd_inputs import problem as p
from odd_inputs.case import ANY, REFUSE, Case, Number

Way = Callable[[Any, Any, Any], Any]


UNROLLED = ("unroll", "unroll_reverse", "unroll_forward", "difference")


def ways() -> dict[str, tuple[Way, bool]]:
    """``(w, t, batch) -> term`` of the inner loss that reads t; and whether t moves w at all."""
    return {
        "stop_gradient": (lambda w, t, b: jax.lax.stop_gradient(t) * jnp.sum(w**2), True),
        "round": (lambda w, t, b: jnp.round(8 * t) * jnp.sum(w**2), True),
        "floor": (lambda w, t, b: jnp.floor(8 * t) * jnp.sum(w**2), True),
        "comparison": (lambda w, t, b: jnp.where(t > 0, 1.0, 2.0) * jnp.sum(w**2), True),
        "integer cast": (lambda w, t, b: (8 * t).astype(int) * jnp.sum(w**2), True),
        "sign of it": (lambda w, t, b: (1 + jnp.sign(t)) * jnp.sum(w**2), True),
        "cond": (
            lambda w, t, b: jax.lax.cond(
                t > 0, lambda w: jnp.sum(w**2), lambda w: 2 * jnp.sum(w**2), w
            ),
            True,
        ),
        "dropout rate": (
            lambda w, t, b: jnp.sum(regularizers.dropout(p.KEY, w, jax.nn.sigmoid(t)) ** 2),
            True,
        ),
        "additive": (lambda w, t, b: jnp.exp(t), False),
        "additive with data": (lambda w, t, b: t * jnp.mean(b[1]), False),
        "unread": (lambda w, t, b: 0.0, False),
        "times zero": (lambda w, t, b: 0.0 * t * jnp.sum(w), True),
        "argmax": (lambda w, t, b: jnp.argmax(jnp.stack([t, 0.0 * t])) * jnp.sum(w**2), True),
        "python loop on its shape": (lambda w, t, b: jnp.ndim(t) * jnp.sum(w**2), False),
        "cut weights": (lambda w, t, b: t * jnp.sum(jax.lax.stop_gradient(w) ** 2), False),
    }


def cases() -> Iterator[Case]:
    """Alone and beside a hyperparameter that is read, eagerly wrapped and inside a scan."""
    for name, response in p.responses().items():
        if name in ("nystrom", "woodbury"):
            continue  # they refuse the penalty before anything else
        for kind, (term, moves) in ways().items():
            for wrap in ("", " in scan", " in jit", " in remat", " in while"):
                if wrap and name not in ("cg", "unroll", "unroll_forward", "difference"):
                    continue

                def inner(w: Any, lam: Any, batch: Any, term: Way = term, wrap: str = wrap) -> Any:
                    return p.inner(w, lam["decay"], batch) + _wrapped(term, wrap)(
                        w, lam["odd"], batch
                    )

                def outer(w: Any, lam: Any, batch: Any) -> Any:
                    return p.outer(w, lam["decay"], batch)

                def call(response: Any = response, inner: Any = inner) -> Number:
                    hparams = {"decay": p.LAM, "odd": jnp.asarray(0.3)}
                    found = p.solve(response, inner=inner, outer=outer, hparams=hparams,
                                    params=p.W + 0.5)  # fmt: skip
                    return _of_odd(found)

                # Samplers see every way in which a value moves w; only the derivative is missing.
                samples = name in ("evolution", "best_response") and moves
                if kind == "times zero" or (kind == "sign of it" and name in UNROLLED):
                    samples = True  # the derivative is truly zero, by the user's own operation
                expect = ANY if samples else REFUSE
                label = f"{name}: {kind}{wrap}"
                yield Case("losses", kind, label, call, ("hparams['odd']", "odd"), expect)
    yield from _optimizers()


def _of_odd(found: Number) -> Number:
    """The odd one's part, whatever the solve says (nothing, where it was only traced)."""
    return Number(found.value["odd"] if found.value else (), 0)


def _wrapped(term: Way, wrap: str) -> Way:
    if wrap == " in jit":
        return jax.jit(term)
    if wrap == " in remat":
        return jax.checkpoint(term)
    if wrap == " in scan":

        def scanned(w: Any, t: Any, batch: Any) -> Any:
            def body(total: Any, _: Any) -> Any:
                return total + term(w, t, batch), None

            return jax.lax.scan(body, jnp.zeros(()), length=1)[0]

        return scanned
    if wrap == " in while":

        def looped(w: Any, t: Any, batch: Any) -> Any:
            return jax.lax.fori_loop(0, 1, lambda i, c: c + term(w, t, batch), jnp.zeros(()))

        return looped
    return term


def _optimizers() -> Iterator[Case]:
    """Learning rates that do not arrive, in every response that trains."""
    txs: dict[str, Any] = {
        "fixed transformation": optax.sgd(0.1),
        "rate left out": lambda lam: optax.sgd(0.1),
        "rate cut": lambda lam: optax.sgd(jax.lax.stop_gradient(lam["odd"])),
        "rate rounded": lambda lam: optax.sgd(jnp.round(lam["odd"] * 8) / 8),
        "rate compared": lambda lam: optax.sgd(jnp.where(lam["odd"] > 0, 0.1, 0.2)),
    }
    makers = {
        "unroll": lambda tx: b.Unroll(tx, 3),
        "unroll_reverse": lambda tx: b.Unroll(tx, 3, mode="reverse"),
        "unroll_forward": lambda tx: b.Unroll(tx, 3, mode="forward"),
        "truncated": lambda tx: b.Unroll(tx, 3, truncate=2),
        "difference": b.FiniteDifference,
    }

    def inner(w: Any, lam: Any, batch: Any) -> Any:
        return p.inner(w, lam["decay"], batch)

    def outer(w: Any, lam: Any, batch: Any) -> Any:
        return p.outer(w, lam["decay"], batch)

    for name, make in makers.items():
        for kind, tx in txs.items():

            def call(make: Any = make, tx: Any = tx) -> Number:
                hparams = {"decay": p.LAM, "odd": jnp.asarray(0.125)}
                found = p.solve(make(tx), inner=inner, outer=outer, hparams=hparams,
                                params=p.W + 0.5)  # fmt: skip
                return _of_odd(found)

            yield Case("losses", kind, f"{name}: {kind}", call, ("hparams['odd']", "odd"))
