r"""Self-tuning networks: weights, their response and the hyperparameters learn together."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax

from bilevel.ground.aliases import Loss
from bilevel.ground.settings import (
    check_count,
    check_flag,
    check_one_real,
    check_real,
)
from bilevel.inner.network import Network, StructuredResponse
from bilevel.inner.optimizer import check_fixed_tx, check_tx
from bilevel.outer.base import Algorithm
from bilevel.outer.self_tuning.cycle import deploy, init, step
from bilevel.outer.self_tuning.losses import Tuning
from bilevel.outer.variable import Mover, check_space
from bilevel.problem.operators.gauss_newton import GaussNewton
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_losses
from bilevel.space.space import Space


def self_tuning(
    outer: Loss,
    inner: Loss,
    inner_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    inner_steps: int = 5,
    *,
    outer_steps: int = 1,
    network: Network | None = None,
    response_tx: optax.GradientTransformation | None = None,
    scale_tx: optax.GradientTransformation | None = None,
    scale: Any = 0.5,
    tune_scales: bool = True,
    entropy: float = 1e-3,
    groups: int = 8,
    shared: str | Sequence[str] = (),
    linearize: GaussNewton | None = None,
    constrain: Space | None = None,
    warm_up: int = 0,
    has_state: bool = False,
    seed: int = 0,
    unroll: bool | None = None,
) -> Algorithm:
    r"""Self-tuning networks (STN) and Delta-STN, on any model.

    Hyperparameters :math:`λ` are unconstrained, the losses read :math:`T(λ)`:
    bounded by ``constrain``, integers rounded. A cycle has ``inner_steps`` training steps,

    .. math::
        w &← w - u(∇_w h(w, T(λ))) &\text{(general)} \\
        φ &← φ - u'(∇_φ E_ε
            h(\hat w_φ(σε), T(λ + σε)))
            &\text{(response)}

    then ``outer_steps`` steps on the validation loss, weights fixed,

    .. math::
        min_{λ, σ} E_ε
            f(\hat w_φ(λ' - \bar λ), T(λ')) - τ ∑_k log σ_k,
            λ' = λ + σε,
            \bar λ = λ \text{ held fixed}

    Dropout, augmentation and whole numbers are tuned through :math:`φ` alone: no derivative
    of ``inner`` in its hyperparameters is taken. With an uncentred network (STN) both training
    steps are one, on :math:`w` and :math:`φ` together, and the displacement is
    :math:`λ + σε` itself.

    Args:
      outer: validation loss, ``loss(params, hparams, batch) -> scalar``, usually blind to
        ``hparams`` (no dropout, no penalty).
      inner: training loss of the same form.
      inner_tx: optax transformation of the weights. Leaves that it freezes do not respond.
      outer_tx: optax transformation of :math:`λ`. Those that normalize (Adam, RMSprop)
        random-walk on a signal that is all noise: lower their rate late. No line search.
      inner_steps: training steps per cycle.
      outer_steps: validation steps per cycle.
      network: how weights follow; ``StructuredResponse()`` (Delta-STN) if ``None``.
      response_tx: of :math:`φ`; ``inner_tx`` if ``None``.
      scale_tx: of the raw scales; ``outer_tx`` if ``None``.
      scale: first :math:`σ > 0`, a scalar or a tree like ``hparams``, in unconstrained
        units. Whole numbers get a signal only where a scale reaches over one.
      tune_scales: False fixes them, and the outer loss is then taken unperturbed.
      entropy: :math:`τ ≥ 0`; without it scales shrink to nothing.
      groups: perturbations a batch, which is cut in as many parts (a network for layers
        perturbs every example instead). With a batch cut in parts, arrays in it share
        their leading axis, and single PRNG keys (``jax.random.key``) are split.
      shared: parts of the names of hyperparameters that are perturbed once a batch.
      linearize: ``GaussNewton(model, output_loss, penalty=...)``, ``inner`` split in a model and
        a loss of its outputs: trains the response on linearized outputs, as Delta-STN does.
        For centred networks.
      constrain: bounds; ``None`` leaves the hyperparameters free.
      warm_up: cycles at the start that only train.
      has_state: both losses are ``loss(params, hparams, batch, model_state) -> (scalar,
        model_state)``; the general step alone advances the statistics.
      seed: of the network's first parameters, where ``init`` gets no ``key``.
      unroll: write the loops out step by step; None decides by itself (convolutions on CPU).

    Returns:
      ``Algorithm(init, step, deploy)``, pure functions.

      ``init(params, hparams, model_state=None, *, key=None) -> SelfTuningState``.

      ``step(state, *, inner_batches, outer_batch, key) -> (state, Info)``, one cycle.
      ``inner_batches`` has a leading axis of ``inner_steps``, ``outer_batch`` one of
      ``outer_steps`` if that is above 1 (a single ``jax.random.key`` may come without, and is
      split by step). Keys that are leaves of a batch give the losses their randomness,
      independent in the general and the response step.

      ``deploy(state, hparams=None)``: what the losses read as weights at ``hparams``, those of
      the state if ``None``. Given the hyperparameters from before the step that returned
      ``state``, the weights that its ``value`` was measured with.

    Cost: per training step two inner gradients (linearized: about three), and one multiply-add
    a weight and group; an uncentred network one gradient. No matrix product is doubled with
    ``groups=1``. Memory: weights, response and their optimizer states, and ``groups`` sets of
    weights while a perturbed loss is differentiated.

    Raises:
      TypeError, ValueError: at construction or at trace time, for settings, trees and values
        outside bounds; a hyperparameter that neither loss reads (a learning rate) is sent
        to ``Unroll``.

    Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel
    Optimization of Hyperparameters using Structured Best-Response Functions", 2019; Bae and
    Grosse, "Delta-STN: Efficient Bilevel Optimization for Neural Networks using Structured
    Response Jacobians", 2020.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def train(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2) + jnp.exp(lam) * jnp.sum(w**2)
      >>> def valid(w, lam, batch):
      ...     return jnp.mean((w - batch) ** 2)
      >>> alg = bilevel.self_tuning(valid, train, optax.sgd(0.1), optax.adam(0.05), groups=1)
      >>> state = alg.init(jnp.zeros(1), jnp.array(1.0))
      >>> step = jax.jit(alg.step)
      >>> for i in range(200):
      ...     state, info = step(state, inner_batches=jnp.full((5, 8, 1), 2.0),
      ...                        outer_batch=jnp.ones((8, 1)), key=jax.random.key(i))
      >>> bool(abs(state.params[0] - 1) < 0.1)  # the decay that halves the mean, e^lam = 1
      True
    """
    network = StructuredResponse() if network is None else network
    for name, count, low in (
        ("inner_steps", inner_steps, 1),
        ("outer_steps", outer_steps, 1),
        ("groups", groups, 1),
        ("warm_up", warm_up, 0),
    ):
        check_count(name, count, low)
    for leaf in jax.tree.leaves(scale):
        check_real("scale", leaf, 0, strict=True)
    check_one_real("entropy", entropy, 0)
    check_flag("tune_scales", tune_scales)
    check_flag("has_state", has_state)
    check_count("seed", seed, 0)
    check_flag("unroll", unroll, optional=True)
    if linearize is not None and not isinstance(linearize, GaussNewton):
        raise TypeError(
            "`linearize` must be `GaussNewton(model, output_loss, penalty=...)` or None, got "
            f"{linearize!r}."
        )
    if not isinstance(shared, (str, tuple, list)) or not all(isinstance(s, str) for s in shared):
        raise TypeError(
            "`shared` must be parts of the names of hyperparameters (a string or several), got "
            f"{shared!r}."
        )
    check_losses(outer=outer, inner=inner)
    response_tx = inner_tx if response_tx is None else response_tx
    scale_tx = outer_tx if scale_tx is None else scale_tx
    check_fixed_tx("inner_tx", inner_tx)
    check_fixed_tx("response_tx", response_tx)
    check_tx("outer_tx", outer_tx)
    check_tx("scale_tx", scale_tx)
    _check_network(network, linearize, has_state)
    check_space(constrain, "{'rate': Interval(0, 0.95)}")
    tuning = Tuning(
        problem=Problem(outer, inner, has_state=has_state),
        inner_tx=inner_tx,
        mover=Mover(outer_tx, constrain, rounded=True),
        inner_steps=inner_steps,
        outer_steps=outer_steps,
        network=network,
        response_tx=response_tx,
        scale_mover=Mover(scale_tx, None, name="scale_tx"),
        scale=scale,
        tune_scales=tune_scales,
        entropy=entropy,
        groups=groups,
        shared=(shared,) if isinstance(shared, str) else tuple(shared),
        linearize=linearize,
        warm_up=warm_up,
        seed=seed,
        unroll=unroll,
    )
    return Algorithm(
        functools.partial(init, tuning),
        functools.partial(step, tuning),
        functools.partial(deploy, tuning),
    )


def _check_network(network: Any, linearize: GaussNewton | None, has_state: bool) -> None:
    if not isinstance(network, Network) or isinstance(network, type):
        raise TypeError(
            f"`network` must be a network such as `StructuredResponse()`, got {network!r}."
        )
    if not network.centred and linearize is not None:
        raise ValueError(
            "`linearize` expands around no displacement, which an uncentred network has no use "
            "for: pass `StructuredResponse(centred=True)` or leave `linearize` out."
        )
    if not network.centred and has_state:
        raise ValueError(
            "`has_state=True` needs a centred network: statistics advance in the step that is "
            "not perturbed, which an uncentred network does not have."
        )
