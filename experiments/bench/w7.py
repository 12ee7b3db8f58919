"""W7: tuning while training: 20 or 40 Adam steps of the MLP of W2, then one hypergradient.

A column returns the trained parameters, how far the decays moved, which is what is compared, and
its report: training losses, and what the tuning tells and carries. The hand-written column is the
training alone; a cell of the others says what tuning 668 672 decays adds to it, or one decay for
each layer, or one for all weights. States come from two cycles before, so that what is carried from
call to call is warm.
"""

import dataclasses
import functools
from collections.abc import Callable
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
UNREAD = ("bilevel", "neumann_gn", "cg_gn")
NO_LOOP = "no loop of training and tuning"
NONE = dict.fromkeys(("lineax", "optimistix", "jaxopt"), NO_LOOP)


def mean_penalty(params: Any, lam: Any) -> Any:
    """The penalty of W2 with the mean strength of each layer in place of one for each weight."""
    return w2.penalty(params, [jnp.log(jnp.mean(jnp.exp(x))) for x in lam])


def one_penalty(params: Any, lam: Any) -> Any:
    """Half the squares of all weights, biases too, times one strength."""
    return 0.5 * jnp.exp(lam) * plain.dot(params, params)


def _operator(penalty: Callable) -> bilevel.GaussNewton:
    return bilevel.GaussNewton(w2.model, w2.cross_entropy, DAMPING, penalty)


@dataclasses.dataclass(frozen=True, eq=False)
class Tuned:
    """What is tuned: its name in rows and titles, the decays, their penalty, the methods."""

    name: str
    title: str
    decays: Callable[[Any], Any]
    penalty: Callable[[Any, Any], Any]
    responses: dict[str, bilevel.Implicit]

    def inner(self, params: Any, lam: Any, batch: Any) -> Any:
        """Cross-entropy and penalty."""
        loss = w2.cross_entropy(w2.model(params, lam, batch), lam, batch)
        return loss + self.penalty(params, lam)


def _by_dual(name: str, title: str, decays: Callable, penalty: Callable) -> Tuned:
    operator = _operator(penalty)
    responses = {
        "bilevel": bilevel.Implicit(bilevel.DualCG(CG_STEPS), operator),
        "cg_gn": bilevel.Implicit(bilevel.CG(CG_STEPS), operator),
    }
    return Tuned(name, title, decays, penalty, responses)


WEIGHTS = Tuned(
    "",
    "",
    lambda lam: lam,
    w2.penalty,
    {
        "bilevel": bilevel.Implicit(bilevel.Neumann(TERMS), bilevel.Hessian()),
        "neumann_gn": bilevel.Implicit(bilevel.Neumann(TERMS), w2._operator()),
        "cg_gn": bilevel.Implicit(bilevel.CG(CG_STEPS), w2._operator(DAMPING)),
        "dual_cg_mean": bilevel.Implicit(bilevel.DualCG(CG_STEPS), _operator(mean_penalty)),
        "identity": bilevel.Implicit(bilevel.Identity(), bilevel.Hessian()),
    },
)
# As networks are tuned.
LAYERS = _by_dual(
    "_layers", ", a decay per layer", lambda lam: [jnp.mean(x) for x in lam], w2.penalty
)
# The curvature of the penalty is then one number, and the iterates of `DualCG` are those of CG.
ONE = _by_dual("_one", ", one decay", lambda lam: jnp.mean(lam[0]), one_penalty)


def _algorithm(tuned: Tuned, response: Any, steps: int) -> bilevel.Algorithm:
    outer_tx = optax.adam(OUTER_RATE)
    tx = optax.adam(RATE, B1, B2, EPS)
    return bilevel.alternate(w2.outer, tuned.inner, response, tx, outer_tx, inner_steps=steps)


@functools.lru_cache(maxsize=1)
def arguments(tiny: bool, seed: int, steps: int, tuned: Tuned = WEIGHTS) -> tuple[Any, str]:
    """The states of each method after two cycles, and the batches of the third."""
    (params, lam, batches, held_out, key), source = w3.arguments(tiny, seed, steps, w3.BATCH)
    lam = tuned.decays(lam)
    states = {}
    for name, response in tuned.responses.items():
        algorithm = _algorithm(tuned, response, steps)
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


def _moved(lam: Any, state: Any, grads: Any) -> Any:
    """How far the outer Adam moves the decays."""
    moments = _moments(state.outer.opt_state[0])
    return jax.tree.map(jnp.subtract, _adam(OUTER_RATE, lam, moments, grads)[0], lam)


def _trained(
    tuned: Tuned, steps: int, params: Any, lam: Any, inner_batch: Any
) -> tuple[Any, jax.Array]:
    """Parameters after the Adam steps of a cycle, and the losses that the steps saw."""
    batches, states = inner_batch

    def step(carry: tuple, i: Any) -> tuple:
        w, moments = carry
        value, g = jax.value_and_grad(tuned.inner)(w, lam, plain.pick(batches, i))
        return _adam(RATE, w, moments, g), value

    start = (params, _moments(states["bilevel"].trained.opt_state[0]))
    (params, _), losses = jax.lax.scan(step, start, jnp.arange(steps))
    return params, losses


def train_by_hand(tuned: Tuned, steps: int, losses_read: bool = True) -> Any:
    """Adam steps from the state that the tuned run has; the rest of it stays as it is."""

    def function(params: Any, lam: Any, inner_batch: Any, held_out: Any, key: Any) -> Any:
        params, losses = _trained(tuned, steps, params, lam, inner_batch)
        return params, jax.tree.map(jnp.zeros_like, lam), losses if losses_read else ()

    return function


def tune_by_hand(tuned: Tuned, steps: int) -> Any:
    """The same and a hypergradient by Neumann (5), whose products also give its step."""

    def function(params: Any, lam: Any, inner_batch: Any, held_out: Any, key: Any) -> Any:
        batches, states = inner_batch
        state = states["bilevel"]
        params, losses = _trained(tuned, steps, params, lam, inner_batch)
        batch = plain.pick(batches, steps - 1)

        def solve(g: Any, params: Any, lam: Any, batch: Any, key: Any) -> Any:
            return plain.series(w2._hessian(params, lam, batch), g, TERMS)

        gradient = plain.hypergradient(w2.outer, tuned.inner, solve)
        grads = gradient(params, lam, batch, held_out, key)
        return params, _moved(lam, state, grads), losses

    return function


def dual_by_hand(tuned: Tuned, steps: int) -> Any:
    """The same with CG (10) on Gauss–Newton, preconditioned by the decay.

    It starts from its last solution where that is better than zero, and ends no worse than that.
    Vectors are as long as the parameters: what agrees with the library, not how it is fast.
    """

    def function(params: Any, lam: Any, inner_batch: Any, held_out: Any, key: Any) -> Any:
        batches, states = inner_batch
        state = states["bilevel"]
        params, losses = _trained(tuned, steps, params, lam, inner_batch)

        def solve(g: Any, params: Any, lam: Any, batch: Any, key: Any) -> Any:
            curvature = plain.gauss_newton(
                lambda v: w2.model(v, lam, batch),
                lambda z: w2.cross_entropy(z, lam, batch),
                params,
            )
            bend = jax.linearize(jax.grad(lambda w: tuned.penalty(w, lam)), params)[1]
            decay = jax.tree.map(lambda d: d + DAMPING, bend(jax.tree.map(jnp.ones_like, params)))
            inverse = jax.tree.map(lambda d: 1 / d, decay)

            def mv(v: Any) -> Any:
                return jax.tree.map(lambda image, d, x: image + d * x, curvature(v), decay, v)

            left = plain.axpy(-1.0, mv(state.response), g)
            better = plain.dot(left, left) < plain.dot(g, g)
            start = jax.tree.map(lambda x: jnp.where(better, x, 0), state.response)
            left = jax.tree.map(lambda r, b: jnp.where(better, r, b), left, g)
            return plain.axpy(1.0, start, plain.cg_no_worse(mv, left, CG_STEPS - 1, inverse))

        gradient = plain.hypergradient(w2.outer, tuned.inner, solve)
        grads = gradient(params, lam, plain.pick(batches, steps - 1), held_out, key)
        return params, _moved(lam, state, grads), losses

    return function


def _tuned(tuned: Tuned, name: str, steps: int, losses_read: bool = True) -> Any:
    step = _algorithm(tuned, tuned.responses[name], steps).step

    def function(params: Any, lam: Any, inner_batch: Any, held_out: Any, key: Any) -> Any:
        batches, states = inner_batch
        state, info = step(states[name], inner_batches=batches, outer_batch=held_out)
        # A loop that reads its report pays for the residual and the losses, and carries the state
        # of the response.
        report = [info.value, info.result, info.stats, state.response]
        report += [info.inner_value] if losses_read else []
        return state.params, jax.tree.map(jnp.subtract, state.hparams, lam), report

    return function


def _row(tuned: Tuned, steps: int, config: Config, seed: int) -> Row:
    args, source = arguments(config.tiny, seed, steps, tuned)
    by_hand = (tune_by_hand if tuned is WEIGHTS else dual_by_hand)(tuned, steps)

    def inner(params: Any, hparams: Any, inner_batch: Any) -> Any:
        return tuned.inner(params, hparams, plain.pick(inner_batch[0], 0))

    methods = {name: _tuned(tuned, name, steps) for name in tuned.responses}
    columns = {"jax": train_by_hand(tuned, steps), "bilevel": methods.pop("bilevel"), **NONE}
    unread = {}
    if tuned is WEIGHTS and steps == 20:  # without the losses, a pass over all weights in each step
        unread = {f"{name}_unread": _tuned(tuned, name, steps, False) for name in UNREAD}
        unread["training_unread"] = train_by_hand(tuned, steps, False)
    return Row(
        f"w7_tuning{tuned.name}_{steps}",
        f"W7 {steps} Adam steps and one hypergradient{tuned.title}",
        source,
        args,
        inner,
        columns=columns,
        extras=methods | {"by_hand": by_hand} | unread,
        twin=by_hand,
        # Parameters after steps in float32 err alike in all columns.
        compared=lambda returned: returned[1],
    )


def tuning_20(config: Config, seed: int) -> Row:
    """A decay for each weight, 20 steps."""
    return _row(WEIGHTS, 20, config, seed)


def tuning_40(config: Config, seed: int) -> Row:
    """A decay for each weight, 40 steps."""
    return _row(WEIGHTS, 40, config, seed)


def tuning_layers_20(config: Config, seed: int) -> Row:
    """A decay for each layer, 20 steps."""
    return _row(LAYERS, 20, config, seed)


def tuning_one_20(config: Config, seed: int) -> Row:
    """One decay, 20 steps."""
    return _row(ONE, 20, config, seed)


def tuning_one_40(config: Config, seed: int) -> Row:
    """One decay, 40 steps."""
    return _row(ONE, 40, config, seed)


ROWS = {
    "w7_tuning_20": tuning_20,
    "w7_tuning_40": tuning_40,
    "w7_tuning_layers_20": tuning_layers_20,
    "w7_tuning_one_20": tuning_one_20,
    "w7_tuning_one_40": tuning_one_40,
}
