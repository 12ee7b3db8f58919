"""W7: tuning while training: 20 or 40 Adam steps of the MLP of W2, then one hypergradient.

The hand-written column is the training alone; a cell of the others says what tuning 668 672 decays
adds to it, or one decay for each layer. States come from two cycles before, so that what is carried
from call to call is warm.
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


def mean_penalty(params: Any, lam: Any) -> Any:
    """The penalty of W2 with the mean strength of each layer in place of one for each weight."""
    return w2.penalty(params, [jnp.log(jnp.mean(jnp.exp(x))) for x in lam])


def _dual_cg(penalty: Any) -> bilevel.Implicit:
    operator = bilevel.GaussNewton(w2.model, w2.cross_entropy, DAMPING, penalty)
    return bilevel.Implicit(bilevel.DualCG(CG_STEPS), operator)


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
    "dual_cg_mean": _dual_cg(mean_penalty),
    "identity": bilevel.Implicit(bilevel.Identity(), bilevel.Hessian()),
}
# With one decay for each layer, as networks are tuned.
RESPONSES_OF_LAYERS = {"bilevel": _dual_cg(w2.penalty), "cg_gn": RESPONSES["cg_gn"]}


def _algorithm(response: Any, steps: int) -> bilevel.Algorithm:
    outer_tx = optax.adam(OUTER_RATE)
    tx = optax.adam(RATE, B1, B2, EPS)
    return bilevel.alternate(w2.outer, w2.inner, response, tx, outer_tx, inner_steps=steps)


@functools.lru_cache(maxsize=1)
def arguments(tiny: bool, seed: int, steps: int, by_layer: bool = False) -> tuple[Any, str]:
    """The states of each method after two cycles, and the batches of the third."""
    (params, lam, batches, held_out, key), source = w3.arguments(tiny, seed, steps, w3.BATCH)
    if by_layer:
        lam = [jnp.mean(x) for x in lam]
    states = {}
    for name, response in (RESPONSES_OF_LAYERS if by_layer else RESPONSES).items():
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


def dual_by_hand(steps: int) -> Any:
    """The same with CG (10) on Gauss–Newton, preconditioned by the decay, from its last solution.

    Vectors are as long as the parameters: what agrees with the library, not how it is fast.
    """

    def function(params: Any, lam: Any, inner_batch: Any, held_out: Any, key: Any) -> Any:
        batches, states = inner_batch
        state = states["bilevel"]
        params, _ = _trained(steps, params, lam, inner_batch)

        def solve(g: Any, params: Any, lam: Any, batch: Any, key: Any) -> Any:
            mv = w2._gauss_newton(params, lam, batch, DAMPING)
            inverse = jax.tree.map(lambda d: 1 / d, w2._decay(params, lam, DAMPING))
            start = state.response
            left = plain.axpy(-1.0, mv(start), g)
            return plain.axpy(1.0, start, plain.cg(mv, left, CG_STEPS - 1, inverse=inverse))

        gradient = plain.hypergradient(w2.outer, w2.inner, solve)
        grads = gradient(params, lam, plain.pick(batches, steps - 1), held_out, key)
        return params, _adam(OUTER_RATE, lam, _moments(state.outer.opt_state[0]), grads)[0]

    return function


def _tuned(response: bilevel.Implicit, name: str, steps: int) -> Any:
    step = _algorithm(response, steps).step

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


def _row(steps: int, config: Config, seed: int, by_layer: bool = False) -> Row:
    args, source = arguments(config.tiny, seed, steps, by_layer)
    responses = RESPONSES_OF_LAYERS if by_layer else RESPONSES
    by_hand = (dual_by_hand if by_layer else tune_by_hand)(steps)

    def inner(params: Any, hparams: Any, inner_batch: Any) -> Any:
        return w2.inner(params, hparams, plain.pick(inner_batch[0], 0))

    tuned = {name: _tuned(response, name, steps) for name, response in responses.items()}
    columns = {"jax": train_by_hand(steps), "bilevel": tuned.pop("bilevel"), **NONE}
    return Row(
        f"w7_tuning{'_layers' if by_layer else ''}_{steps}",
        f"W7 {steps} Adam steps and one hypergradient{', a decay per layer' if by_layer else ''}",
        source,
        args,
        inner,
        columns=columns,
        extras=tuned | {"by_hand": by_hand},
        twin=by_hand,
    )


def tuning_20(config: Config, seed: int) -> Row:
    return _row(20, config, seed)


def tuning_40(config: Config, seed: int) -> Row:
    return _row(40, config, seed)


def tuning_layers_20(config: Config, seed: int) -> Row:
    return _row(20, config, seed, by_layer=True)


ROWS = {
    "w7_tuning_20": tuning_20,
    "w7_tuning_40": tuning_40,
    "w7_tuning_layers_20": tuning_layers_20,
}
