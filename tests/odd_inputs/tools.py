"""Tools and doors for people: diagnosis, checks, reports, adapters, solvers of one's own."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as b
from odd_inputs import problem as p
from odd_inputs.calls import leaves
from odd_inputs.case import ANY, REFUSE, Case, Number
from odd_inputs.odd import Thing, counts, objects, reals, things


def _add(door: str, kind: str, where: str, call: Callable[[], Any], *names: str,
         expect: Any = REFUSE, own: bool = False, rtol: float = 1e-4) -> Case:  # fmt: skip
    label = f"{door}({where}={kind})"
    return Case("tools", kind, label, call, names or (where,), expect, rtol, own)


def _diagnose(**changes: Any) -> Number:
    given = dict(inner=p.inner, params=p.W, hparams=p.LAM, inner_batch=p.TRAIN, print=False)
    found = b.diagnose(**(given | changes))
    broken = not np.isfinite(found.loss + found.grad_norm + found.max_curvature)
    return Number(found.max_curvature, int(broken) * int(b.Status.nonfinite_input))


def _check(**changes: Any) -> Number:
    given = dict(outer=p.outer, inner=p.inner, response=b.Implicit(b.Dense()), params=p.W,
                 hparams=p.LAM, inner_batch=p.TRAIN, outer_batch=p.VALID)  # fmt: skip
    found = b.check_hypergrad(**(given | changes))
    return Number(float(found.passed), 0 if found.passed else int(b.Status.not_stationary))


def _report(**changes: Any) -> Number:
    given = dict(outer=p.outer, inner=p.inner, response=b.Implicit(b.Dense()), params=p.W,
                 hparams=p.LAM, inner_batch=p.TRAIN, outer_batch=p.VALID)  # fmt: skip
    given |= changes
    args = [given.pop(n) for n in ("outer", "inner", "response", "params", "hparams")]
    b.memory_report(*args, **given)
    return Number(1.0)


def _exact(w: Any, lam: Any, batch: Any) -> Any:
    x, y = batch
    h = x.T @ x / len(x) + jnp.diag(jnp.exp(lam))
    return jnp.linalg.solve(h, x.T @ y / len(x))


def _with_response(solve: Any = _exact, inner: Any = p.inner, response: Any = None,
                   params: Any = p.W, hparams: Any = p.LAM,
                   batch: Any = p.TRAIN) -> Number:  # fmt: skip
    response = b.Implicit(b.Dense()) if response is None else response
    solved = b.with_response(solve, inner, response)
    solved(params, hparams, batch)  # `jax.grad` has its own words for what it cannot take
    value = jax.grad(lambda lam: p.outer(solved(params, lam, batch), lam, p.VALID))(hparams)
    return Number(value)


# They hand these on to what is tested through another door.
SKIPPED = {("memory_report", "hparams"), ("memory_report", "inner_batch"),
           ("check_hypergrad", "params"), ("check_hypergrad", "inner_batch"),
           ("diagnose", "hparams")}  # fmt: skip
DOORS = {"diagnose": _diagnose, "check_hypergrad": _check, "memory_report": _report}


def _find(**changes: Any) -> Number:
    given = dict(inner=p.inner, params=np.zeros(3), hparams=p.LAM, batch=p.TRAIN, tol=2.0**-30)
    given |= changes
    args = [given.pop(n) for n in ("inner", "params", "hparams", "batch")]
    found = b.minimize(*args, **given)
    return Number(found.params, int(found.result))


def _minimize() -> Iterator[Case]:
    for where in ("params", "hparams", "batch"):
        for kind, change, verdict in leaves():
            good = {"params": p.W, "hparams": p.LAM, "batch": p.X}[where]
            make = lambda c=change, g=good, w=where: (c(g), p.Y) if w == "batch" else c(g)  # noqa: E731
            expect = REFUSE if verdict == "bad" and where != "batch" else ANY
            yield _add("minimize", kind, where, lambda w=where, m=make: _find(**{w: m()}),
                       "params", "hparams", "batch", "inner", expect=expect,
                       own=verdict == "own" or where == "batch")  # fmt: skip
    for kind, make, _ in objects():
        if kind not in ("function", "class"):
            yield _add("minimize", kind, "inner", lambda m=make: _find(inner=m()))
        if kind != "none":
            yield _add("minimize", kind, "prox", lambda m=make: _find(prox=m()), "prox", "inner")
    for kind, make, legal in counts(100):
        yield _add("minimize", kind, "max_steps", lambda m=make: _find(max_steps=m()),
                   expect=p.W if legal else REFUSE)  # fmt: skip
    for kind, make, legal in reals(2.0**-30, optional=True):
        yield _add("minimize", kind, "tol", lambda m=make: _find(tol=m()),
                   expect=p.W if legal else REFUSE)  # fmt: skip


def cases() -> Iterator[Case]:
    for door, function in DOORS.items():
        wheres = ["params", "hparams", "inner_batch"]
        for where in wheres:
            if (door, where) in SKIPPED:
                continue
            for kind, change, verdict in leaves():
                good = {"params": p.W, "hparams": p.LAM, "inner_batch": p.TRAIN}[where]
                expect = REFUSE if verdict == "bad" else ANY
                if where == "inner_batch":
                    make = lambda c=change: (c(p.X), p.Y)  # noqa: E731
                    if kind in ("integers", "booleans", "python int", "python bool", "key",
                                "complex array", "complex"):  # fmt: skip
                        expect = ANY
                else:
                    make = lambda c=change, g=good: c(g)  # noqa: E731
                if door == "memory_report" and kind in ("nan inside", "inf inside"):
                    expect = ANY  # nothing is computed
                yield _add(door, kind, where, lambda f=function, w=where, m=make: f(**{w: m()}),
                           expect=expect, own=verdict == "own" or where == "inner_batch",
                           )  # fmt: skip
        for kind, make, _ in objects():
            if kind not in ("function", "class"):
                yield _add(door, kind, "inner", lambda f=function, m=make: f(inner=m()))
        for where in ("response",) if door != "diagnose" else ("operator",):
            for kind, make, _ in objects(("a class", lambda: b.Implicit), ("a solver", b.CG)):
                legal = where == "operator" and kind == "none"
                yield _add(door, kind, where, lambda f=function, w=where, m=make: f(**{w: m()}),
                           expect=ANY if legal else REFUSE)  # fmt: skip
    for kind, make, legal in counts(5):
        yield _add("diagnose", kind, "num_steps", lambda m=make: _diagnose(num_steps=m()),
                   expect=np.linalg.eigvalsh(p.hessian())[-1] if legal else REFUSE)  # fmt: skip
    for kind, make, legal in counts(2):
        yield _add("check_hypergrad", kind, "directions", lambda m=make: _check(directions=m()),
                   expect=1.0 if legal else REFUSE)  # fmt: skip
    for where, base in (("step", 2.0**-16), ("tolerance", 2.0**-10)):
        for kind, make, legal in reals(base, strict=True, optional=True):
            yield _add("check_hypergrad", kind, where, lambda w=where, m=make: _check(**{w: m()}),
                       expect=1.0 if legal else REFUSE)  # fmt: skip
    yield from _minimize()
    yield from _through()
    yield from _statuses()
    yield from _adapters()


def _through() -> Iterator[Case]:
    """``with_response``: starts, what the solver returns, and higher derivatives."""
    for where, good in (("params", p.W), ("hparams", p.LAM)):
        for kind, change, verdict in leaves():
            # The closed form here does not look at its start.
            blind = where == "params" and kind in ("nan inside", "inf inside")
            expect = REFUSE if verdict == "bad" and not blind else ANY
            yield _add("with_response", kind, where,
                       lambda w=where, c=change, g=good: _with_response(**{w: c(g)}),
                       where, "init", "result of `solve`", expect=expect, own=True)  # fmt: skip
    returned: dict[str, Any] = {
        "none": lambda w, lam, bt: None, "string": lambda w, lam, bt: "w",
        "dict": lambda w, lam, bt: {"a": w}, "pair": lambda w, lam, bt: (w, 0),
        "short": lambda w, lam, bt: w[:2], "integers": lambda w, lam, bt: jnp.ones(3, jnp.int32),
        "complex": lambda w, lam, bt: w + 0j, "nan": lambda w, lam, bt: w * np.nan,
        "no minimum": lambda w, lam, bt: w + 1.0, "zero": lambda w, lam, bt: 0 * w,
        "list": lambda w, lam, bt: [1.0, 2.0, 3.0], "object": lambda w, lam, bt: Thing(),
    }  # fmt: skip
    for kind, solve in returned.items():
        yield _add("with_response", f"returns {kind}", "solve",
                   lambda s=solve: _with_response(solve=s), "solve", "has_aux")  # fmt: skip
    for where in ("solve", "inner", "response"):
        for kind, make, _ in objects(("a solver", b.CG), ("a class", lambda: b.Implicit)):
            if kind in ("function", "class", "none") or (where != "response" and kind == "a class"):
                continue
            yield _add("with_response", kind, where,
                       lambda w=where, m=make: _with_response(**{w: m()}), own=True)  # fmt: skip
    yield from _higher()


def _higher() -> Iterator[Case]:
    """Second derivatives and forward mode through every solver: right, or refused."""

    def value(lam: Any, solve: Any) -> Any:
        return p.outer(solve(p.W, lam, p.TRAIN), lam, p.VALID)

    orders: dict[str, Callable[[Any], Any]] = {
        "grad": lambda f: jax.grad(f)(p.LAM),
        "value and grad": lambda f: jax.value_and_grad(f)(p.LAM)[1],
        "jacrev of grad": lambda f: jax.jacrev(jax.grad(f))(p.LAM),
        "hessian": lambda f: jax.hessian(f)(p.LAM),
        "jvp of grad": lambda f: jax.jvp(jax.grad(f), (p.LAM,), (np.ones(p.N),))[1],
        "grad of grad": lambda f: jax.grad(lambda t: jnp.sum(jax.grad(f)(t)))(p.LAM),
        "jacfwd": lambda f: jax.jacfwd(f)(p.LAM),
        "third": lambda f: jax.jvp(
            lambda t: jax.jvp(jax.grad(f), (t,), (np.ones(p.N),))[1], (p.LAM,), (np.ones(p.N),)
        )[1],
        "vmap": lambda f: jax.vmap(jax.grad(f))(np.stack([p.LAM, p.LAM + 1])),
    }  # fmt: skip
    through = dict(p.responses())
    import lineax

    through["lineax"] = b.Implicit(b.Lineax(lineax.CG(rtol=1e-9, atol=0.0)))
    through["lineax gmres"] = b.Implicit(b.Lineax(lineax.GMRES(rtol=1e-9, atol=0.0)))
    for kind, order in orders.items():
        truth = lambda o=order: o(lambda lam: value(lam, _exact))  # noqa: E731
        for name, response in through.items():
            if name in ("unroll", "unroll_reverse", "unroll_forward", "evolution", "difference",
                        "best_response", "nystrom"):  # fmt: skip
                continue  # other numbers by nature, or draws: `hypergrad_solve` has them

            def call(r: Any = response, o: Any = order) -> Number:
                solve = b.with_response(_exact, p.inner, r)
                return Number(jax.jit(lambda: o(lambda lam: value(lam, solve)))())

            yield Case("tools", f"order: {kind}", f"with_response({kind}, {name})", call,
                       ("with_response", "response", "solver"), truth, rtol=1e-4)  # fmt: skip
    yield from _in_data(through)


def _in_data(through: dict[str, Any]) -> Iterator[Case]:
    """Derivatives in the batch: right, or refused in words."""

    def value(y: Any, solve: Any) -> Any:
        return p.outer(solve(p.W, p.LAM, (p.TRAIN[0], y)), p.LAM, p.VALID)

    orders: dict[str, Callable[[Any], Any]] = {
        "grad": lambda f: jax.grad(f)(p.TRAIN[1]),
        "jvp of grad": lambda f: jax.jvp(
            jax.grad(f), (p.TRAIN[1],), (np.ones_like(p.TRAIN[1]),)
        )[1],
    }  # fmt: skip
    for kind, order in orders.items():
        truth = lambda o=order: o(lambda y: value(y, _exact))  # noqa: E731
        for name, response in through.items():
            if name in ("evolution", "best_response", "nystrom"):
                continue  # other numbers by nature, or draws

            def call(r: Any = response, o: Any = order) -> Number:
                solve = b.with_response(_exact, p.inner, r)
                return Number(jax.jit(lambda: o(lambda y: value(y, solve)))())

            yield Case("tools", f"in data: {kind}", f"with_response(data, {kind}, {name})", call,
                       ("with_response", "inner_batch", "solver", "response"),
                       truth, rtol=1e-4)  # fmt: skip


def _statuses() -> Iterator[Case]:
    solution = lambda: b.hypergrad_solve(  # noqa: E731
        p.outer, p.inner, b.Implicit(b.CG()), p.W, p.LAM,
        inner_batch=p.TRAIN, outer_batch=p.VALID,
    )  # fmt: skip

    def told(make: Any, **thresholds: Any) -> Number:
        b.raise_for_status(make(), **thresholds)
        return Number(1.0)

    for kind, make, _ in objects():
        yield _add("raise_for_status", kind, "solution", lambda m=make: told(m), "solution")
    for where in ("residual", "stationarity"):
        for kind, make, legal in reals(0.5, optional=True):
            yield _add("raise_for_status", kind, where,
                       lambda w=where, m=make: told(solution, **{w: m()}),
                       expect=ANY if legal else REFUSE)  # fmt: skip


def _adapters() -> Iterator[Case]:
    for door, name in (("split_nnx", "model"), ("split_linen", "variables"),
                       ("split_equinox", "model")):  # fmt: skip
        function = getattr(b, door)
        for kind, make, _ in [*((k, m, e) for k, m, e in things()), ("none", lambda: None, False)]:
            # Any pytree can be split for equinox; without floats nothing is left to train.
            expect = ANY if door == "split_equinox" else REFUSE

            def call(f: Any = function, m: Any = make) -> Number:
                f(m())
                return Number(1.0)

            yield _add(door, kind, name, call, expect=expect)
