r"""FedHyper: learning rates of federated training that follow hypergradients.

In a round t every selected client trains from the global parameters :math:`w_t`, and
:math:`D_t` is the mean of what they moved. All three schedulers take :math:`-D_t` (or a gradient)
where optax transformations take gradients. The inner products of the paper scale with the number
of parameters and the square of the rate; by default they are cosines here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from bilevel.ground import tree
from bilevel.ground.aliases import Params, Scalar, Vector
from bilevel.ground.settings import check_count, check_flag, check_one_real
from bilevel.outer.optimizers.alignment import alignment, check_interval, dtype_of, zeros_like


class FedHyperState(NamedTuple):
    """State of the schedulers of the server.

    Attributes:
      score: :math:`s_t`, what inner products have added up to.
      previous: the last change of the global parameters, with momentum if there is one.
      rate: the factor of the last global update, or the rate that clients are to use next.
    """

    score: Scalar
    previous: Vector
    rate: Scalar


class FedHyperClientState(NamedTuple):
    """State of the scheduler of a client: its rate's factor, its last update, the steps made."""

    factor: Scalar
    previous: Vector
    count: jax.Array


def fedhyper_global(
    hyper_rate: float = 1.0,
    *,
    momentum: float = 0.0,
    min_rate: float = 0.2,
    max_rate: float = 5.0,
    normalized: bool = True,
) -> optax.GradientTransformation:
    r"""FedHyper's global scheduler: the rate at which the server follows its clients.

    .. math::
        s_t &= clip(s_{t-1} + β ⟨D_t, \tilde D_{t-1}⟩),
            1 + s_t ∈ [α_{min}, α_{max}] \\
        w_{t+1} &= w_t + (1 + s_t) D_t + m s_t \tilde D_{t-1},
        \tilde D_t = D_t + m \tilde D_{t-1}

    Args:
      hyper_rate: :math:`β`; 1 in the paper, with its plain inner products.
      momentum: m, at least 0 and below 1: 0 for the scheduler ``G`` of the paper, 0.9 for ``GM``
        (with ``min_rate=0.8``).
      min_rate, max_rate: bounds of the factor :math:`1 + s_t`, kept in every round.
      normalized: cosines in place of inner products.

    Returns:
      An optax transformation of the global parameters: ``update(-D, state, params)``. Its state
      has the ``rate`` of the last round.

    Raises:
      TypeError, ValueError: for settings out of range; the message names the argument.

    Cost: one inner product a round. Memory: one vector on the server.

    Reference: Wang, Wang, Li, "FedHyper: a universal and robust learning rate scheduler for
    federated learning with hypergradient descent", ICLR 2024.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> tx = bilevel.fedhyper_global()
      >>> w = jnp.zeros(2)
      >>> state = tx.init(w)
      >>> moved = jnp.array([0.1, 0.0])  # what the clients moved, on average
      >>> for _ in range(3):
      ...     updates, state = tx.update(-moved, state, w)
      >>> float(state.rate)  # twice the same direction
      3.0
    """
    check_one_real("hyper_rate", hyper_rate, 0)
    _check_momentum(momentum)
    check_interval(min_rate, max_rate, "min_rate", "max_rate", 0)
    check_flag("normalized", normalized)

    def init(params: Params) -> FedHyperState:
        one = jnp.ones((), dtype_of(params))
        return FedHyperState(jnp.zeros_like(one), zeros_like(params), one)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Vector, FedHyperState]:
        moved = tree.scale(-1, tree.accumulate(updates))
        seen = alignment(moved, state.previous, normalized)
        score = jnp.clip(state.score + hyper_rate * seen, min_rate - 1, max_rate - 1)
        score = score.astype(state.score.dtype)
        step = tree.add(tree.scale(1 + score, moved), tree.scale(momentum * score, state.previous))
        previous = tree.axpy(momentum, state.previous, moved)
        return tree.cast_like(step, updates), FedHyperState(score, previous, 1 + score)

    return optax.GradientTransformation(init, update)


def fedhyper_server(
    learning_rate: float,
    hyper_rate: float = 1.0,
    *,
    min_rate: float = 1e-3,
    max_rate: float = 0.1,
    normalized: bool = True,
) -> optax.GradientTransformation:
    r"""FedHyper's server-side local scheduler: the rate that is sent to all clients.

    .. math::
        s_t = s_{t-1} + β ⟨D_t, D_{t-1}⟩,
        η_t = clip(η_0 (1 + s_t), η_{min}, η_{max}),
        w_{t+1} = w_t + D_t

    Args:
      learning_rate: :math:`η_0`, positive, within the bounds.
      hyper_rate: :math:`β`; 1 in the paper, with its plain inner products.
      min_rate, max_rate: bounds of the rate that is sent, kept in every round.
      normalized: cosines in place of inner products.

    Returns:
      An optax transformation of the global parameters: ``update(-D, state, params)``. Clients
      train with ``state.rate`` in the next round. :math:`s_t` has no bounds, as in the paper: a
      rate that stood at a bound for long takes as long to leave it.

    Raises:
      TypeError, ValueError: for settings out of range; the message names the argument.

    Cost: one inner product a round. Memory: one vector on the server.

    Reference: as :func:`fedhyper_global`.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> tx = bilevel.fedhyper_server(0.01)
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(3):
      ...     _, state = tx.update(jnp.array([-0.1, 0.0]), state)
      >>> round(float(state.rate), 6)
      0.03
    """
    check_one_real("learning_rate", learning_rate, 0, strict=True)
    check_one_real("hyper_rate", hyper_rate, 0)
    check_interval(min_rate, max_rate, "min_rate", "max_rate", 0)
    check_flag("normalized", normalized)

    def init(params: Params) -> FedHyperState:
        zero = jnp.zeros((), dtype_of(params))
        return FedHyperState(zero, zeros_like(params), _sent(zero))

    def _sent(score: Scalar) -> Scalar:
        return jnp.clip(learning_rate * (1 + score), min_rate, max_rate).astype(score.dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Vector, FedHyperState]:
        moved = tree.scale(-1, tree.accumulate(updates))
        seen = alignment(moved, state.previous, normalized)
        score = (state.score + hyper_rate * seen).astype(state.score.dtype)
        return tree.cast_like(moved, updates), FedHyperState(score, moved, _sent(score))

    return optax.GradientTransformation(init, update)


def fedhyper_client(
    learning_rate: float,
    hyper_rate: float = 1.0,
    *,
    clients: int = 1,
    global_weight: float = 0.1,
    max_growth: float = 1.1,
    min_factor: float = 0.1,
    max_factor: float = 10.0,
    normalized: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""FedHyper's client-side scheduler: each client's rate follows its own local steps.

    .. math::
        γ_k &= min \bigl(γ_{max}, max(0, 1 + β [⟨u_k, u_{k-1}⟩
            + g/n ⟨u_k, D⟩])\bigr),  k ≥ 1 \\
        c_k &= clip(c_{k-1} γ_k, c_{min}, c_{max}),
        w_{k+1} = w_k + u_k\frac{c_k}{c_{k-1}},  u_k = -c_{k-1} η ∇h(w_k)

    with the last global update :math:`D`. The factor of a client that turns back and forth falls;
    that of one that goes straight, and with the others, grows.

    Args:
      learning_rate: :math:`η`, positive.
      hyper_rate: :math:`β`.
      clients: n, how many are selected in a round, at least 1.
      global_weight: g.
      max_growth: :math:`γ_{max}`, above 1.
      min_factor, max_factor: bounds of the factor, kept in every local step.
      normalized: cosines in place of inner products.

    Returns:
      An optax transformation of a client's parameters: ``update(grads, state, params,
      global_update=D)``; without ``global_update`` the term is left out. Start a fresh state in
      every round, or keep a client's. Clients can be mapped with ``jax.vmap``.

    Raises:
      TypeError, ValueError: for settings out of range; the message names the argument.

    Cost: two inner products a local step. Memory: one vector a client.

    Reference: as :func:`fedhyper_global`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> tx = bilevel.fedhyper_client(0.01, clients=10)
      >>> w = jnp.ones(3)
      >>> state = tx.init(w)
      >>> for _ in range(5):
      ...     updates, state = tx.update(w, state, w, global_update=-w)
      ...     w = optax.apply_updates(w, updates)
      >>> round(float(state.factor), 4)  # straight on: at most 1.1 times a step
      1.4641
    """
    check_one_real("learning_rate", learning_rate, 0, strict=True)
    check_one_real("hyper_rate", hyper_rate, 0)
    check_count("clients", clients)
    check_one_real("global_weight", global_weight, 0)
    check_one_real("max_growth", max_growth, 1, strict=True)
    check_interval(min_factor, max_factor, "min_factor", "max_factor", 0)
    check_flag("normalized", normalized)

    def init(params: Params) -> FedHyperClientState:
        one = jnp.ones((), dtype_of(params))
        return FedHyperClientState(one, zeros_like(params), jnp.zeros((), jnp.int32))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        global_update: Any = None,
        **unused: Any,
    ) -> tuple[Vector, FedHyperClientState]:
        moved = tree.scale(-learning_rate * state.factor, tree.accumulate(updates))
        seen = alignment(moved, state.previous, normalized)
        if global_update is not None:
            others = alignment(moved, tree.accumulate(global_update), normalized)
            seen = seen + global_weight / clients * others
        growth = jnp.clip(1 + hyper_rate * seen, 0, max_growth)
        growth = jnp.where(state.count > 0, growth, 1)
        factor = jnp.clip(state.factor * growth, min_factor, max_factor).astype(state.factor.dtype)
        step = tree.scale(-learning_rate * factor, tree.accumulate(updates))
        count = jnp.asarray(optax.safe_increment(state.count))
        return tree.cast_like(step, updates), FedHyperClientState(factor, step, count)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_momentum(momentum: float) -> None:
    check_one_real("momentum", momentum, 0)
    if not isinstance(momentum, Tracer) and not momentum < 1:
        raise ValueError(f"`momentum` must be below 1, got {momentum}.")
