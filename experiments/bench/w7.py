"""W7: tuning while training: 20 or 40 Adam steps of the MLP of W2, then one hypergradient.

The hand-written column is the training alone; a cell of the others says what tuning 668 672 decays
adds to it. States come from two cycles before, so that what is carried from call to call is warm.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from experiments.bench import plain, w2, w3
from experiments.bench.config import Config
from experiments.bench.measure import Row

RATE = 1e-3
OUTER_RATE = 1e-2
B1, B2, EPS = 0.9, 0.999, 1e-8
TERMS = 5
CG_STEPS = 10
DAMPING = 1e-2
NO_LOOP = "no loop of training and tuning"
NONE = dict.fromkeys(("lineax", "optimistix", "jaxopt"), NO_LOOP)
RESPONSES = {
    "bilevel": bilevel.Implicit(bilevel.Neumann(TERMS), bilevel.Hessian()),
    "bilevel_uncertified": bilevel.Implicit(
        bilevel.Neumann(TERMS), bilevel.Hessian(), certify=False
    ),
    "neumann_gn": bilevel.Implicit(bilevel.Neumann(TERMS), w2._operator()),
    "neumann_gn_uncertified": bilevel.Implicit(
        bilevel.Neumann(TERMS), w2._operator(), certify=False
    ),
    "cg_gn": bilevel.Implicit(bilevel.CG(CG_STEPS), w2._operator(DAMPING)),
    "cg_gn_uncertified": bilevel.Implicit(
        bilevel.CG(CG_STEPS), w2._operator(DAMPING), certify=False
    ),
    "identity": bilevel.Implicit(bilevel.Identity(), bilevel.Hessian()),
}


def _algorithm(response: Any, steps: int) -> bilevel.Algorithm:
    outer_tx = optax.adam(OUTER_RATE)
    tx = optax.adam(RATE, B1, B2, EPS)
    return bilevel.alternate(w2.outer, w2.inner, response, tx, outer_tx, inner_steps=steps)


@functools.lru_cache(maxsize=1)
def arguments(tiny: bool, seed: int, steps: int) -> tuple[Any, str]:
    """The states of each method after two cycles, and the batches of the third."""
    (params, lam, batches, held_out, key), source = w3.arguments(tiny, seed, steps, w3.BATCH)
    states = {}
    for name, response in RESPONSES.items():
        if name.removesuffix("_uncertified") in states:
            states[name] = states[name.removesuffix("_uncertified")]
            continue
        algorithm = _algorithm(response, steps)
        step = jax.jit(algorithm.step)
        state = algorithm.init(params, lam)
        for _ in range(2):
            state, _ = step(state, inner_batches=batches, outer_batch=held_out)
        states[name] = state
    trained = states["bilevel"].trained
    return (trained.params, states["bilevel"].hparams, (batches, states), held_out, key), source


def _adam(rate: float, w: Any, moments: tuple, g: Any) -> tuple[Any, tuple]:
    m, v, count = moments
    m = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, m, g)
    v = jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g * g, v, g)
    count = count + 1
    a, b = (1 - base**count for base in (B1, B2))
    w = jax.tree.map(lambda w, m, v: w - rate * (m / a) / (jnp.sqrt(v / b) + EPS), w, m, v)
    return w, (m, v, count)


def _moments(state: Any) -> tuple:
    return state.mu, state.nu, state.count


def _trained(steps: int, params: Any, lam: Any, inner_batch: Any) -> tuple[Any, tuple]:
    """Parameters and moments after the Adam steps of a cycle."""
    batches, states = inner_batch

    def step(carry: tuple, i: Any) -> tuple:
        w, moments = carry
        g = jax.grad(w2.inner)(w, lam, plain.pick(batches, i))
        return _adam(RATE, w, moments, g), None

    start = (params, _moments(states["bilevel"].trained.opt_state[0]))
    return jax.lax.scan(step, start, jnp.arange(steps))[0]


def train_by_hand(steps: int) -> Any:
    """Adam steps from the state that the tuned run has; the rest of it stays as it is."""

    def function(params: Any, lam: Any, inner_batch: Any, held_out: Any, key: Any) -> Any:
        return _trained(steps, params, lam, inner_batch)[0], lam

    return function


def tune_by_hand(steps: int) -> Any:
    """The same and a hypergradient by Neumann (5), whose products also give its step."""

    def function(params: Any, lam: Any, inner_batch: Any, held_out: Any, key: Any) -> Any:
        batches, states = inner_batch
        state = states["bilevel"]
        params, _ = _trained(steps, params, lam, inner_batch)
        batch = plain.pick(batches, steps - 1)

        def solve(g: Any, params: Any, lam: Any, batch: Any, key: Any) -> Any:
            return plain.series(w2._hessian(params, lam, batch), g, TERMS)

        gradient = plain.hypergradient(w2.outer, w2.inner, solve)
        grads = gradient(params, lam, batch, held_out, key)
        lam = _adam(OUTER_RATE, lam, _moments(state.outer.opt_state[0]), grads)[0]
        return params, lam

    return function


def _tuned(name: str, steps: int) -> Any:
    step = _algorithm(RESPONSES[name], steps).step

    def function(params: Any, lam: Any, inner_batch: Any, held_out: Any, key: Any) -> Any:
        batches, states = inner_batch
        state, info = step(states[name], inner_batches=batches, outer_batch=held_out)
        # A loop that reads its report pays for the residual, and carries the state of the response:
        # zero times their numbers keeps both in the program.
        rest = jax.tree.leaves((info.value, info.result, info.stats, state.response))
        told = 0.0 * sum(jnp.sum(x).astype(jnp.float32) for x in rest)
        *layers, (kernel, bias) = state.params
        return [*layers, (kernel, bias + told)], state.hparams

    return function


def _row(steps: int, config: Config, seed: int) -> Row:
    args, source = arguments(config.tiny, seed, steps)

    def inner(params: Any, hparams: Any, inner_batch: Any) -> Any:
        return w2.inner(params, hparams, plain.pick(inner_batch[0], 0))

    columns = {"jax": train_by_hand(steps), "bilevel": _tuned("bilevel", steps), **NONE}
    extras = {name: _tuned(name, steps) for name in RESPONSES if name != "bilevel"}
    return Row(
        f"w7_tuning_{steps}",
        f"W7 {steps} Adam steps and one hypergradient",
        source,
        args,
        inner,
        columns=columns,
        extras=extras | {"by_hand": tune_by_hand(steps)},
        twin=tune_by_hand(steps),
    )


def tuning_20(config: Config, seed: int) -> Row:
    return _row(20, config, seed)


def tuning_40(config: Config, seed: int) -> Row:
    return _row(40, config, seed)


ROWS = {"w7_tuning_20": tuning_20, "w7_tuning_40": tuning_40}
