"""The table of outer loops, all on one tiny problem: a new loop is one row.

`library/test_loops.py` holds every row against `bilevel.testing.check_algorithm`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import bilevel
from bilevel import (
    CG,
    Algorithm,
    BestResponse,
    Evolution,
    FiniteDifference,
    Implicit,
    Integer,
    Interval,
    Neumann,
    StructuredResponse,
    Unroll,
)
from bilevel.inner.layers import TunedLinear, split_layers

EXAMPLES = 4
RNG = np.random.default_rng(0)
PARAMS = {"a": jnp.array([0.3, -0.2]), "b": jnp.array(0.1)}
HPARAMS = {"decay": jnp.array(0.5), "count": jnp.array(2.0)}
SPACE = bilevel.Space({"decay": Interval(0.0, 2.0), "count": Integer(0, 5)})


class LoopRow(NamedTuple):
    """A loop and the arguments of `check_algorithm` that are its own.

    `inner` is the number of training batches of a step; `cost` what a step evaluates (inner
    gradients, products, outer gradients; None for those that the loop counted); `outer` the loss
    that its value is (None where it reports another); `bounded` whether its hyperparameters are in
    `SPACE`. One loop of each kind goes through `fit` too: it does the same for all, and costs a
    compilation. `wrap` makes of the inner and the outer batches what the loop wants. `rtol` is that
    of states of two compiled programs, where rounding is not all that they differ by.
    """

    name: str
    algorithm: Algorithm
    inner: int
    cost: tuple[float | None, float | None, float | None]
    outer: Any
    bounded: bool = False
    params: Any = PARAMS
    hparams: Any = HPARAMS
    model_state: Any = None
    through_fit: bool = False
    wrap: Any = None
    rtol: float | None = None


def batch(*leading: int) -> Any:
    x = jnp.asarray(RNG.standard_normal((*leading, EXAMPLES, 2)))
    return x, jnp.asarray(RNG.standard_normal((*leading, EXAMPLES)))


def errors(w, batch):
    x, y = batch
    return jnp.sum(x * w["a"][None], 1) + w["b"] - y


def train(w, lam, batch):
    strength = lam["decay"] + 0.1 * lam["count"]
    return jnp.mean(errors(w, batch) ** 2) + strength * (jnp.sum(w["a"] ** 2) + w["b"] ** 2)


def valid(w, lam, batch):
    return jnp.mean(errors(w, batch) ** 2) + 0.1 * (lam["decay"] + 0.3 * lam["count"])


def train_counting(w, lam, batch, seen):
    return train(w, lam, batch) + 0.1 * seen * lam["decay"] * w["b"] ** 2, 0.9 * seen + 0.1


def valid_counting(w, lam, batch, seen):
    return valid(w, lam, batch) + 0.1 * seen * w["b"] ** 2, seen


def rated(lam):
    return optax.inject_hyperparams(optax.sgd)(learning_rate=0.1 * lam["count"])


def train_rated(w, lam, batch):
    return train(w, {"decay": lam["decay"], "count": 0.0}, batch)


NETWORK, LAYERS = split_layers(TunedLinear(2, 1, 2, rngs=nnx.Rngs(0)), gain_scale=0.3)


def valid_of_layers(params, lam, batch):
    model, d = NETWORK.merge(params)
    return jnp.mean((model(batch[0], d)[:, 0] - batch[1]) ** 2)


def train_of_layers(params, lam, batch):
    return valid_of_layers(params, lam, batch) * jnp.exp(jnp.mean(lam["decay"] - lam["count"]))


OWN = {"params", "hparams", "model_state", "through_fit"}
TX, MOMENTUM = optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)


def alternate(name, response, inner, cost, tx=TX, outer_tx=MOMENTUM, losses=(valid, train), **rest):
    own = {k: rest.pop(k) for k in OWN & rest.keys()}
    algorithm = bilevel.alternate(*losses, response, tx, outer_tx, 2, **rest)
    return LoopRow(
        f"alternate_{name}", algorithm, inner, cost, losses[0], "constrain" in rest, **own
    )


def tuning(name, cost=(4, 0, 1), losses=(valid, train), centred=True, tune_scales=False, **rest):
    own = {k: rest.pop(k) for k in OWN & rest.keys()}
    network = rest.pop("network", StructuredResponse(centred=centred, gain_scale=0.3))
    algorithm = bilevel.self_tuning(
        *losses, MOMENTUM, optax.sgd(0.5), 2, network=network, groups=2, scale=0.1,
        tune_scales=tune_scales, **rest,
    )  # fmt: skip
    # With tuned scales the value is that of perturbed hyperparameters.
    outer = None if tune_scales else losses[0]
    return LoopRow(f"self_tuning_{name}", algorithm, 2, cost, outer, "constrain" in rest, **own)


def single(name, algorithm, inner, cost, wrap=None, **rest):
    # `info.value` is of the batch that is wrapped.
    outer = valid if wrap is None else lambda w, lam, batch: valid(w, lam, batch.batch)
    return LoopRow(name, algorithm, inner, cost, outer, wrap=wrap, **rest)


def indexed(inner, outer):
    return bilevel.Indexed(inner, jnp.zeros(1, jnp.int32)), bilevel.Indexed(outer, jnp.array(1))


def anchored(inner, outer):
    return bilevel.Anchored(inner, ALL), bilevel.Anchored(outer, ALL)


THREE = valid, train, TX, MOMENTUM, TX  # the state of the adjoint's optimizer is carried


def penalty(name, cost, make, tx=TX, outer_tx=MOMENTUM, losses=(valid, train), **rest):
    own = {k: rest.pop(k) for k in OWN & rest.keys()}
    algorithm = make(*losses, tx, outer_tx, 2, **rest)
    return LoopRow(name, algorithm, 2, cost, losses[0], "constrain" in rest, **own)


SERIES = Implicit(Neumann(3, 0.1))  # compiles in a third of the time of CG
COUNTING: Any = dict(
    losses=(valid_counting, train_counting), has_state=True, model_state=jnp.array(0.5)
)
# Of `train`: its Hessian is at least twice the strength, and B = 2 w (1, 0.1). The Hessian of
# `valid` is twice the mean square of its few rows at most: below 20.
CERTIFICATE = bilevel.Certificate(
    lambda w, lam: 2 * (lam["decay"] + 0.1 * lam["count"]),
    20.0,
    lambda w, lam: 2 * np.sqrt(1.01) * jnp.sqrt(jnp.sum(w["a"] ** 2) + w["b"] ** 2),
    2 * np.sqrt(1.01),
)
LOOPS = [
    alternate("cg", Implicit(CG(rtol=1e-10)), 2, (2, None, 1)),
    alternate("unroll_momentum", Unroll(MOMENTUM, 2), 4, (2 + 2, 2, 1), MOMENTUM, through_fit=True),
    alternate(
        "best_response", BestResponse(StructuredResponse(gain_scale=0.3), TX, 1, groups=2),
        2,
        (2 + 1, 0, 1),
    ),
    alternate("evolution", Evolution(TX, 1, particles=2, sigma=0.1), 3, (2 + 5, 0, 1)),
    alternate("finite_difference", FiniteDifference(TX), 2, (2 + 3, 0, 1)),
    alternate("bounds", SERIES, 2, (2, 4, 1), outer_tx=optax.adam(0.5), constrain=SPACE),
    alternate("model_state", SERIES, 2, (2, 4, 1), **COUNTING),
    alternate("model_state_unrolled", Unroll(TX, 1), 3, (2 + 1, 1, 1), **COUNTING),
    alternate(
        "injected_rate", Unroll(rated, 1), 3, (2 + 1, 1, 1), rated, losses=(valid, train_rated)
    ),
    tuning("stn", (2, 0, 1), centred=False),
    tuning("stn_bounds_integers", (2, 0, 1), centred=False, constrain=SPACE, through_fit=True),
    tuning("delta_stn_scales", tune_scales=True),
    tuning("delta_stn_bounds_integers_warm_up", constrain=SPACE, warm_up=1),
    tuning("delta_stn_model_state", **COUNTING),
    tuning(
        "layers", (2 * 8 / 3, 0, 4 / 3), (valid_of_layers, train_of_layers), network=NETWORK,
        params=LAYERS,
    ),
    penalty("f2sa", (2 * 2 + 2, 0, 2 + 1), bilevel.f2sa, through_fit=True),
    penalty("f2sa_order_2_bounds", (3 * 2 + 2, 0, 2 * 3), bilevel.f2sa, MOMENTUM, order=2,
            constrain=SPACE),
    penalty("f2sa_model_state", (2 * 2 + 2, 0, 2 + 1), bilevel.f2sa, **COUNTING),
    penalty("pbgd", (2 + 2, 0, 1), bilevel.pbgd, penalized_tx=MOMENTUM),
    penalty("pbgd_model_state_bounds", (2 + 2, 0, 1), bilevel.pbgd, constrain=SPACE, **COUNTING),
    penalty("bome", (2 + 2, 0, 1), bilevel.bome, MOMENTUM),
    penalty("bome_model_state_bounds", (2 + 2, 0, 1), bilevel.bome, constrain=SPACE, **COUNTING),
    LoopRow(
        "global_response",
        bilevel.global_response(
            valid, train, bilevel.Hypernetwork((3,)),
            lambda key, lam: jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key), lam),
            TX, optax.sgd(0.5), 2, draws=2,
        ),
        2,
        (2 * 2, 0, 1),
        valid,
        through_fit=True,
    ),
    # What an inner solve leaves is a difference of large numbers: rounding is 1e-10 of it.
    LoopRow("hoag", bilevel.hoag(valid, train), 1, (None, None, 1), valid, through_fit=True,
            rtol=1e-8),
    LoopRow(
        "hoag_bounds", bilevel.hoag(valid, train, "cubic", constrain=SPACE, first_step=0.3),
        1, (None, None, 1), valid, bounded=True, rtol=1e-8,
    ),
    LoopRow(
        "maid", bilevel.maid(valid, train, CERTIFICATE), 1, (None, None, None), valid, rtol=1e-8
    ),
    LoopRow(
        "maid_bounds", bilevel.maid(valid, train, CERTIFICATE, constrain=SPACE), 1,
        (None, None, None), valid, bounded=True, rtol=1e-8,
    ),
    LoopRow("bo_rep", bilevel.bo_rep(valid, train, MOMENTUM, 0.05, 2), 3, (2, 1, 1), valid),
    LoopRow(
        "bo_rep_bounds_model_state",
        bilevel.bo_rep(
            valid_counting, train_counting, TX, 0.05, 1, every=1, warm_up=1, constrain=SPACE,
            has_state=True,
        ),
        2, (1, 1, 1), valid_counting, bounded=True, model_state=COUNTING["model_state"],
    ),
    single("soba", bilevel.soba(*THREE, constrain=SPACE), 1, (1, 1, 1), bounded=True,
           through_fit=True),
    single("soba_independent", bilevel.soba(*THREE, independent=True), 3, (1, 2, 1)),
    LoopRow(
        "soba_model_state", bilevel.soba(valid_counting, train_counting, *THREE[2:],
                                         has_state=True),
        1, (1, 1, 1), valid_counting, model_state=jnp.array(0.5),
    ),
    single("saba", bilevel.saba(*THREE, 2, 2), 1, (1, 1, 1), indexed, through_fit=True),
    single("fsla", bilevel.fsla(*THREE, 0.5), 1, (1, 2, 2)),
    single("srba", bilevel.srba(*THREE, 3), 1, (2, 2, 2), anchored, through_fit=True),
    single("spaba", bilevel.spaba(*THREE, 1e-6), 1, (2, 2, 2), anchored),
    single("mrbo", bilevel.mrbo(valid, train, TX, TX, 0.5, 0.5, 2, 0.1), 4, (2, 6, 2)),
    single("stocbio", bilevel.stocbio(valid, train, TX, TX, 2, 3, 0.1), 6, (2, 4, 1)),
    single("amigo", bilevel.amigo(*THREE, 2, 3), 6, (2, 4, 1)),
]  # fmt: skip
INNER = {row.inner: batch(row.inner) for row in LOOPS}
OUTER = batch()
ALL = jax.tree.map(jnp.concatenate, batch(2))


def within(hparams) -> bool:
    """Strictly inside `SPACE`, whose whole numbers are relaxed."""
    decay, count = float(hparams["decay"]), float(hparams["count"])
    return 0 < decay < 2 and -0.5 < count < 5.5
