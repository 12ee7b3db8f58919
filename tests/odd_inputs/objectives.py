"""Settings of the objectives, and the batches that they read, with odd values in their place."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from bilevel import objectives as o
from odd_inputs import problem as p
from odd_inputs.case import ANY, REFUSE, Case, Number, evaluate
from odd_inputs.odd import Odd, choices, counts, flags, objects, reals, things

LAM = {"log_precision": np.float64(0.25)}
Q = o.Variational(jnp.asarray(p.W), jnp.asarray(-2.0))


def _likelihood(f: Any, hparams: Any, batch: Any) -> Any:
    return 0.5 * (f - batch[1]) ** 2


def _evidence(*, batch: Any = p.TRAIN, params: Any = p.W, hparams: Any = LAM, **settings: Any):
    given: dict[str, Any] = dict(model=p.model, likelihood=_likelihood, num_examples=p.M) | settings
    objective = o.LaplaceEvidence(**given)
    if given.get("outputs") == "single" and batch is p.TRAIN:
        batch = (batch, p.KEY)
    return Number(evaluate(lambda: (objective.outer(params, hparams, batch), 0))[0])


def _elbo(*, batch: Any = (p.TRAIN, p.KEY), params: Any = Q, **settings: Any):
    given: dict[str, Any] = dict(loss=p.inner, num_examples=p.M) | settings
    objective = o.DataEmphasizedELBO(**given)
    return Number(evaluate(lambda: (objective.outer(params, p.LAM, batch), 0))[0])


def _width(scale: Any) -> Number:
    return Number(o.DataEmphasizedELBO(p.inner, p.M).init(jnp.asarray(p.W), scale).scale)


def _fine(*, batch: Any = None, **settings: Any):
    given: dict[str, Any] = (
        dict(outer_loss=p.outer, fine_loss=p.inner, tx=optax.sgd(p.RATE), steps=2) | settings
    )
    batch = (p.stacked(2), p.VALID) if batch is None else batch
    objective = o.FineTuned(**given)
    return Number(evaluate(lambda: (objective.outer(jnp.asarray(p.W), p.LAM, batch), 0))[0])


def _sure(**settings: Any) -> Number:
    given: dict[str, Any] = dict(sigma=0.5) | settings
    objective = o.SURE(**given)
    return Number(evaluate(lambda: (objective.risk(lambda y: 0.5 * y, jnp.asarray(p.Y)), 0))[0])


def _prior(**settings: Any) -> Number:
    given: dict[str, Any] = dict(like=p.LAM, strength=0.5)
    objective = o.HyperPrior(**(given | settings))
    moved = objective.init(jnp.asarray(p.LAM))
    return Number(evaluate(lambda: (objective.penalty(moved), 0))[0])


def _folds(count: Any, folds: Any) -> Number:
    return Number(float(len(o.k_folds(count, folds))))


class Setting(NamedTuple):
    """One argument: how to call with ``value`` in it, the usual value, and odd ones."""

    owner: str
    field: str
    call: Callable[[Any], Number]
    usual: Any
    odd: Callable[[], Iterator[Odd]]
    own: bool = False


def settings() -> list[Setting]:
    """The fields of the objectives, by owner."""

    def of(call: Callable[..., Number], field: str) -> Callable[[Any], Number]:
        return lambda value: call(**{field: value})

    several = functools.partial(reals, 0.5, strict=True)
    optional = functools.partial(reals, 0.5, strict=True, optional=True)
    rows: list[tuple[Any, ...]] = [
        ("LaplaceEvidence", _evidence, "model", p.model, objects, True),
        ("LaplaceEvidence", _evidence, "likelihood", _likelihood, objects, True),
        ("LaplaceEvidence", _evidence, "num_examples", p.M, lambda: counts(p.M)),
        ("LaplaceEvidence", _evidence, "log_precision", lambda h: 0.25, objects, True),
        ("LaplaceEvidence", _evidence, "outputs", "full",
         lambda: choices("Full", "all", "singles", "")),
        ("LaplaceEvidence", _evidence, "block", 4, lambda: counts(4, optional=True)),
        ("LaplaceEvidence", _evidence, "groups", lambda b: jnp.zeros(p.M, int), objects, True),
        ("LaplaceEvidence", _evidence, "frozen_curvature", True, flags),
        ("DataEmphasizedELBO", _elbo, "loss", p.inner, objects, True),
        ("DataEmphasizedELBO", _elbo, "num_examples", p.M, lambda: counts(p.M)),
        ("DataEmphasizedELBO", _elbo, "kappa", 0.5, optional),
        ("DataEmphasizedELBO", _elbo, "prior_variance", 0.5, optional),
        ("DataEmphasizedELBO", _elbo, "samples", 2, lambda: counts(2)),
        ("FineTuned", _fine, "outer_loss", p.outer, objects, True),
        ("FineTuned", _fine, "fine_loss", p.inner, objects, True),
        ("FineTuned", _fine, "tx", optax.sgd(p.RATE),
         lambda: objects(("optax factory", lambda: optax.sgd))),
        ("FineTuned", _fine, "steps", 2, lambda: counts(2, low=0)),
        ("FineTuned", _fine, "copied", lambda w, b: w, objects, True),
        ("SURE", _sure, "sigma", 0.5, several),
        ("SURE", _sure, "probes", 2, lambda: counts(2, optional=True)),
        ("SURE", _sure, "seed", 2, lambda: counts(2, low=0)),
        ("HyperPrior", _prior, "strength", 0.5, lambda: reals(0.5)),
        ("HyperPrior", _prior, "degrees", 4.0, lambda: reals(4.0, strict=True, optional=True)),
        ("HyperPrior", _prior, "groups", "tensor", lambda: choices("tensors", "Unit", "")),
    ]  # fmt: skip
    made = [Setting(r[0], r[2], of(r[1], r[2]), r[3], r[4], *r[5:]) for r in rows]
    return [
        *made,
        Setting("DataEmphasizedELBO", "scale", _width, 0.5, several),
        Setting("k_folds", "num_examples", lambda v: _folds(v, 2), 8, lambda: counts(8, low=2)),
        Setting("k_folds", "folds", lambda v: _folds(8, v), 2, lambda: counts(2, low=2)),
    ]


# Several variances, one per group, may be given as a list; the usual groups have one.
LEGAL = {
    ("LaplaceEvidence", "groups", "none"),
    ("DataEmphasizedELBO", "prior_variance", "list"),
    ("DataEmphasizedELBO", "prior_variance", "tuple"),
    ("HyperPrior", "strength", "inf"),
    ("HyperPrior", "strength", "jax inf"),
}


def cases() -> Iterator[Case]:
    """One case for each setting and odd value, and for batches that do not fit."""
    for s in settings():
        usual = functools.cache(lambda s=s: s.call(s.usual).value)
        for kind, value, fits in s.odd():
            if s.odd is flags or kind == "none" and fits or (s.owner, s.field, kind) in LEGAL:
                expect: Any = ANY
            else:
                expect = usual if fits else REFUSE
            yield Case(
                "objectives", kind, f"{s.owner}({s.field}={kind})",
                lambda s=s, value=value: s.call(value()), (s.field,), expect, own=s.own, rtol=1e-2,
            )  # fmt: skip
    doors: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
        ("LaplaceEvidence", _evidence, ("batch", "model", "likelihood")),
        ("DataEmphasizedELBO", _elbo, ("batch", "key", "loss")),
        ("FineTuned", _fine, ("batch", "batches")),
    )
    for door, call, names in doors:
        for kind, value, _ in things():
            yield Case(
                "objectives", kind, f"{door}.outer(batch={kind})",
                lambda call=call, value=value: call(batch=value()), names, own=True,
            )  # fmt: skip
