"""Every setting of every solver, operator and response, with every odd value in its place."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

import bilevel as b
from odd_inputs import problem as p
from odd_inputs.case import ANY, REFUSE, Case, Number
from odd_inputs.odd import Odd, choices, counts, flags, objects, reals


class Setting(NamedTuple):
    """One field: how to make a response with ``value`` in it, and the usual value."""

    owner: str
    field: str
    make: Callable[[Any], Any]
    usual: Any
    odd: Callable[[], Iterator[Odd]]
    expect: Any = None  # for legal oddities; None: what the usual value gives


def _implicit(solver: Any, damping: float = 0.0) -> Any:
    return b.Implicit(solver, b.Hessian(damping))


def _unroll(**settings: Any) -> Any:
    given = dict(inner_tx=optax.sgd(p.RATE), steps=p.STEPS) | settings
    return b.Unroll(**given)


def _descent(w: Any, lam: Any, batch: Any, t: Any) -> Any:
    return w - p.RATE * jax.grad(p.inner)(w, lam, batch)


def _map(**settings: Any) -> Any:
    return b.UnrollMap(**(dict(step=_descent, steps=p.STEPS) | settings))


def _evolution(**settings: Any) -> Any:
    given = dict(inner_tx=optax.sgd(p.RATE), steps=2, particles=2, sigma=0.125) | settings
    return b.Evolution(**given)


def _gauss_newton(**settings: Any) -> Any:
    given = dict(model=p.model, output_loss=p.output_loss, damping=0.5, penalty=p.penalty)
    return b.Implicit(b.Dense(), b.GaussNewton(**(given | settings)))


def _best(**settings: Any) -> Any:
    return b.BestResponse(**(dict(tx=optax.sgd(0.1), steps=2) | settings))


TX = functools.partial(
    objects,
    ("optax factory", lambda: optax.sgd),
    ("optimizer's update alone", lambda: optax.sgd(0.1).update),
    ("learning rate", lambda: 0.1),
)
SOLVER = functools.partial(
    objects,
    ("a class", lambda: b.CG),
    ("a response", lambda: b.Implicit()),
    ("an operator", lambda: b.Hessian()),
)
FUNCTION = functools.partial(objects)


def _tx() -> Iterator[Odd]:
    # A function is legal for an inner optimizer, but must return one.
    return TX()


def settings() -> list[Setting]:
    """All fields of all dataclasses that a hypergradient is computed with."""
    cg = b.CG
    count, real = counts, reals
    return [
        Setting("CG", "max_steps", lambda v: _implicit(cg(v)), 10, lambda: count(10)),
        Setting("CG", "rtol", lambda v: _implicit(cg(rtol=v)), 2.0**-20,
                lambda: real(2.0**-20, optional=True), p.exact),
        Setting("CG", "atol", lambda v: _implicit(cg(atol=v)), 2.0**-20,
                lambda: real(2.0**-20, optional=True), p.exact),
        Setting("CG", "preconditioner", lambda v: _implicit(cg(preconditioner=v)), None,
                lambda: SOLVER(("its class", lambda: b.Diagonal), ("a solver", b.CG))),
        Setting("CG", "unroll", lambda v: _implicit(cg(4, unroll=v)), None, flags),
        Setting("Neumann", "num_matvecs", lambda v: _implicit(b.Neumann(v, 0.25)), 4,
                lambda: count(4, low=0)),
        Setting("Neumann", "step_size", lambda v: _implicit(b.Neumann(200, v)), 0.25,
                lambda: real(0.25, strict=True, optional=True), p.exact),
        Setting("Neumann", "unroll", lambda v: _implicit(b.Neumann(4, 0.25, v)), None, flags),
        Setting("Stochastic", "tx", lambda v: _implicit(b.Stochastic(v, 4)), optax.sgd(0.25), TX),
        Setting("Stochastic", "steps",
                lambda v: _implicit(b.Stochastic(optax.sgd(0.25), v)), 4, lambda: count(4)),
        Setting("Nystrom", "rank", lambda v: _implicit(b.Nystrom(v), 0.5), 3, lambda: count(3)),
        Setting("Nystrom", "gaussian", lambda v: _implicit(b.Nystrom(3, v), 0.5), False, flags),
        Setting("Nystrom", "refresh_every",
                lambda v: _implicit(b.Nystrom(3, refresh_every=v), 0.5), 2, lambda: count(2)),
        Setting("Woodbury", "max_outputs",
                lambda v: b.Implicit(b.Woodbury(v), _gauss_newton().operator), 64,
                lambda: count(64)),
        Setting("Woodbury", "structured",
                lambda v: b.Implicit(b.Woodbury(64, v), _gauss_newton().operator), False, flags),
        Setting("DualCG", "max_steps",
                lambda v: b.Implicit(b.DualCG(v), _gauss_newton().operator), 4, lambda: count(4)),
        # In float32 no tolerance that it meets is as good as the exact solution.
        Setting("DualCG", "rtol",
                lambda v: b.Implicit(b.DualCG(rtol=v), _gauss_newton().operator), 2.0**-10,
                lambda: real(2.0**-10, optional=True)),
        Setting("DualCG", "atol",
                lambda v: b.Implicit(b.DualCG(atol=v), _gauss_newton().operator), 2.0**-10,
                lambda: real(2.0**-10, optional=True)),
        Setting("DualCG", "unroll",
                lambda v: b.Implicit(b.DualCG(4, unroll=v), _gauss_newton().operator), None,
                flags),
        Setting("KFAC", "num_samples",
                lambda v: b.Implicit(cg(10, preconditioner=b.KFAC(v)), _gauss_newton().operator),
                3, lambda: count(3, optional=True)),
        Setting("KFAC", "damping_multiple",
                lambda v: b.Implicit(
                    cg(10, preconditioner=b.KFAC(3, v)), _gauss_newton().operator
                ),
                4.0, lambda: real(4.0, strict=True)),
        Setting("EKFAC", "num_samples",
                lambda v: b.Implicit(b.EKFAC(v), _gauss_newton().operator),
                3, lambda: count(3, optional=True)),
        Setting("EKFAC", "damping_multiple",
                lambda v: b.Implicit(
                    cg(10, preconditioner=b.EKFAC(3, v)), _gauss_newton().operator
                ),
                4.0, lambda: real(4.0, strict=True)),
        Setting("EKFAC", "rank",
                lambda v: b.Implicit(
                    cg(10, preconditioner=b.EKFAC(rank=v)), _gauss_newton().operator
                ),
                2, lambda: count(2, low=0)),
        Setting("Dense", "max_size", lambda v: _implicit(b.Dense(v)), 64, lambda: count(64)),
        Setting("Identity", "scale", lambda v: _implicit(b.Identity(v)), 0.5,
                lambda: real(0.5, strict=True)),
        Setting("Diagonal", "num_probes",
                lambda v: _implicit(cg(10, preconditioner=b.Diagonal(v))), 4, lambda: count(4)),
        Setting("Diagonal", "floor",
                lambda v: _implicit(cg(10, preconditioner=b.Diagonal(4, v))), 0.125,
                lambda: real(0.125, strict=True)),
        Setting("Diagonal", "refresh_every",
                lambda v: _implicit(cg(10, preconditioner=b.Diagonal(4, refresh_every=v))), 2,
                lambda: count(2)),
        Setting("Lineax", "solver", lambda v: _implicit(b.Lineax(v)), _lineax(),
                lambda: SOLVER(("our CG", b.CG))),
        Setting("Hessian", "damping", lambda v: _implicit(b.Dense(), v), 0.5, lambda: real(0.5),
                lambda: p.exact(0.5)),
        Setting("GaussNewton", "model", lambda v: _gauss_newton(model=v), p.model, FUNCTION),
        Setting("GaussNewton", "output_loss", lambda v: _gauss_newton(output_loss=v),
                p.output_loss, FUNCTION),
        Setting("GaussNewton", "damping", lambda v: _gauss_newton(damping=v), 0.5,
                lambda: real(0.5), lambda: p.exact(0.5)),
        Setting("GaussNewton", "penalty", lambda v: _gauss_newton(penalty=v), p.penalty, FUNCTION),
        Setting("GaussNewton", "independent_examples",
                lambda v: _gauss_newton(independent_examples=v), False, flags),
        Setting("Implicit", "solver", lambda v: b.Implicit(v), b.Dense(), SOLVER),
        Setting("Implicit", "operator", lambda v: b.Implicit(b.Dense(), v), b.Hessian(),
                lambda: objects(("class of one", lambda: b.Hessian), ("a solver", b.CG))),
        Setting("Implicit", "warm_start", lambda v: b.Implicit(b.CG(10), warm_start=v), True,
                flags),
        Setting("Implicit", "certify", lambda v: b.Implicit(b.CG(10), certify=v), True, flags),
        Setting("Unroll", "inner_tx", lambda v: _unroll(inner_tx=v), optax.sgd(p.RATE), _tx),
        Setting("Unroll", "steps", lambda v: _unroll(steps=v), 3, lambda: count(3)),
        Setting("Unroll", "truncate", lambda v: _unroll(truncate=v), 2,
                lambda: count(2, optional=True), None),
        Setting("Unroll", "mode", lambda v: _unroll(mode=v), "mixed",
                lambda: choices("Mixed", "backward", "fwd", "")),
        Setting("Unroll", "remat", lambda v: _unroll(remat=v), "none",
                lambda: choices("None", "full", "sqrt ", "steps")),
        Setting("Unroll", "max_hparams", lambda v: _unroll(max_hparams=v, mode="forward"), 8,
                lambda: count(8)),
        Setting("Unroll", "real_time", lambda v: _unroll(real_time=v, mode="forward"), False,
                flags),
        Setting("Unroll", "initial", lambda v: _unroll(initial=v), None,
                lambda: objects(("params", lambda: p.W))),
        Setting("Unroll", "unroll", lambda v: _unroll(unroll=v), None, flags),
        Setting("UnrollMap", "step", lambda v: _map(step=v), _descent, FUNCTION),
        Setting("UnrollMap", "steps", lambda v: _map(steps=v), 3, lambda: count(3)),
        Setting("UnrollMap", "initial", lambda v: _map(initial=v), None,
                lambda: objects(("params", lambda: p.W))),
        Setting("UnrollMap", "truncate", lambda v: _map(truncate=v), 2,
                lambda: count(2, optional=True), None),
        Setting("UnrollMap", "mode", lambda v: _map(mode=v), "reverse",
                lambda: choices("mixed", "backward", "")),
        Setting("UnrollMap", "remat", lambda v: _map(remat=v), "none",
                lambda: choices("None", "full", "steps")),
        Setting("UnrollMap", "max_hparams", lambda v: _map(max_hparams=v, mode="forward"), 8,
                lambda: count(8)),
        Setting("Evolution", "inner_tx", lambda v: _evolution(inner_tx=v), optax.sgd(p.RATE), _tx),
        Setting("Evolution", "steps", lambda v: _evolution(steps=v), 2, lambda: count(2)),
        Setting("Evolution", "particles", lambda v: _evolution(particles=v), 2, lambda: count(2)),
        Setting("Evolution", "sigma", lambda v: _evolution(sigma=v), 0.125,
                lambda: real(0.125, strict=True)),
        Setting("Evolution", "persistent", lambda v: _evolution(persistent=v), True, flags),
        Setting("Evolution", "horizon", lambda v: _evolution(horizon=v), 4,
                lambda: count(4, optional=True), ANY),
        Setting("Evolution", "staggered", lambda v: _evolution(horizon=4, staggered=v), True,
                flags, ANY),
        Setting("Evolution", "unroll", lambda v: _evolution(unroll=v), None, flags),
        Setting("FiniteDifference", "inner_tx", b.FiniteDifference, optax.sgd(p.RATE), _tx),
        Setting("FiniteDifference", "radius",
                lambda v: b.FiniteDifference(optax.sgd(p.RATE), v), 0.125,
                lambda: real(0.125, strict=True)),
        Setting("FiniteDifference", "lookahead",
                lambda v: b.FiniteDifference(optax.sgd(p.RATE), 0.125, v), True, flags),
        Setting("BestResponse", "network", lambda v: _best(network=v), b.StructuredResponse(),
                lambda: objects(("class of one", lambda: b.StructuredResponse))),
        Setting("BestResponse", "tx", lambda v: _best(tx=v), optax.sgd(0.1), TX),
        Setting("BestResponse", "steps", lambda v: _best(steps=v), 2, lambda: count(2, low=0)),
        Setting("BestResponse", "groups", lambda v: _best(groups=v), 2, lambda: count(2)),
        Setting("BestResponse", "scale", lambda v: _best(scale=v), 0.5,
                lambda: real(0.5, strict=True)),
        Setting("BestResponse", "linearize", lambda v: _best(linearize=v), None,
                lambda: objects(("an operator", b.Hessian))),
        Setting("BestResponse", "unroll", lambda v: _best(unroll=v), None, flags),
        Setting("BestResponse", "seed", lambda v: _best(seed=v), 1, lambda: count(1, low=0)),
    ]  # fmt: skip


# A function of hyperparameters that takes any is one; any integer is a seed; None is the usual.
LEGAL = {
    ("Unroll", "inner_tx", "optax factory"),
    ("Evolution", "inner_tx", "optax factory"),
    ("FiniteDifference", "inner_tx", "optax factory"),
    ("BestResponse", "seed", "negative"),
    ("BestResponse", "linearize", "none"),
    ("Unroll", "initial", "none"),
    ("UnrollMap", "initial", "none"),
    ("CG", "preconditioner", "none"),
    ("GaussNewton", "penalty", "none"),
}


def _lineax() -> Any:
    import lineax

    return lineax.CG(rtol=1e-9, atol=0.0)


def cases() -> Iterator[Case]:
    """One case for each field and odd value; and each traced number outside its range."""
    for s in settings():
        usual = functools.cache(lambda s=s: p.solve(s.make(s.usual)).value)
        legal = usual if s.expect is None else s.expect
        names = (s.field, f"{s.owner}.{s.field}", "response")
        for kind, value, fits in s.odd():
            if s.odd is flags or (s.owner, s.field, kind) in LEGAL:
                # What is not a bool is refused, or is taken as a bool: then any of the two.
                expect = ANY
            elif kind == "none" and fits:
                expect = ANY if s.expect is None else legal
            else:
                expect = legal if fits else REFUSE
            yield Case(
                "settings",
                kind,
                f"{s.owner}({s.field}={kind})",
                lambda s=s, value=value, fits=fits: p.solve(s.make(value()), shared=fits),
                names,
                expect,
                rtol=1e-5,
                own=s.field in ("model", "output_loss", "penalty"),
            )
        if s.odd not in (flags, TX, SOLVER, FUNCTION, _tx) and isinstance(s.usual, float):
            yield from _traced(s, names)


def _traced(s: Setting, names: tuple[str, ...]) -> Iterator[Case]:
    """Numbers that come out of a jitted computation: only a status can tell."""
    limits = {f: v for f, v in (("nan", float("nan")), ("inf", float("inf")), ("negative", -1.0))}
    for kind, number in limits.items():

        def call(number: float = number) -> Number:
            def run(value: Any) -> Any:
                solution = b.hypergrad_solve(
                    p.outer, p.inner, s.make(value), p.W, p.LAM,
                    inner_batch=p.batch_of(s.make(value)), outer_batch=p.VALID, key=p.KEY,
                )  # fmt: skip
                return solution.grads, solution.result

            return Number(*jax.jit(run)(number))

        yield Case("settings", f"traced {kind}", f"{s.owner}({s.field}=traced {kind})", call, names)
