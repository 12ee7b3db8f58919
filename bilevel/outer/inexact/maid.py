r"""MAID: adaptive accuracy with a certified error, and steps that decrease the true outer value."""

import optax

from bilevel.ground.aliases import Loss
from bilevel.ground.settings import check_count, check_one_real, check_takes, is_function
from bilevel.linear.cg import CG
from bilevel.outer.base import Algorithm, own_params
from bilevel.outer.inexact.certificate import Certificate, Constant
from bilevel.outer.inexact.certified import CertifiedDescent
from bilevel.outer.inexact.solves import HESSIAN, SOLVER, check_solves
from bilevel.outer.variable import Mover
from bilevel.space.space import Space


def maid(
    outer: Loss,
    inner: Loss,
    certificate: Certificate,
    *,
    accuracy: float = 0.1,
    first_step: float = 1.0,
    descent: float = 1e-4,
    backtrack: float = 0.5,
    tighten: float = 0.5,
    loosen: float = 1.05,
    trials: int = 10,
    smoothness: Constant | None = None,
    solver: CG = SOLVER,
    constrain: Space | None = None,
    has_aux: bool = False,
    max_steps: int = 1000,
) -> Algorithm:
    r"""Method of adaptive inexact descent (MAID): every accepted step decreases the true F.

    A step finds a hypergradient z whose error is known, tightening the accuracy
    :math:`ϵ ← τϵ` of both solves until the bound of the certificate is

    .. math:: ω ≤ (1 - η) ‖z‖,  \text{so that}
        ⟨∇F, z⟩ ≥ η ‖z‖^2.

    Then it tries :math:`α = β, ρβ, ρ^2β, …`, solving the inner problem
    at :math:`λ^+ = λ - α z`, and accepts the first with

    .. math:: (f^+ + ‖∇f^+‖ e^+ + L_f/2 e^{+2})
        - (f - ‖∇f‖ e - L_f/2 e^2) ≤ -η^2 α ‖z‖^2

    where :math:`e = ‖∇_w h‖/μ` is how far the parameters can be from the inner minimum:
    the left side is at least :math:`F(λ^+) - F(λ)`. After a success :math:`ϵ`
    grows by :math:`ν` and :math:`β = 10/9 α`; without one nothing moves,
    :math:`ϵ` is tightened, and the next step may try once more often.

    Args:
      outer: validation loss, ``loss(params, hparams, batch) -> scalar``.
      inner: training loss of the same form, smooth and strongly convex.
      certificate: the constants of both, :class:`~bilevel.Certificate`; what they are wrong by,
        the guarantee is wrong by.
      accuracy: the first :math:`ϵ`, a distance of parameters. The linear system is solved
        to a residual of :math:`L_f ϵ`, which weighs as much in the bound. It matters
        little: the accuracy finds itself.
      first_step: root mean square of the first trial move, in the units of what moves.
      descent: :math:`η`, in (0, 1).
      backtrack: :math:`ρ`, in (0, 1).
      tighten: :math:`τ`, in (0, 1).
      loosen: :math:`ν`, at least 1.
      trials: most step sizes that the first search tries.
      smoothness: L, no eigenvalue of the inner Hessian is larger; a number or a function
        ``(params, hparams) -> number``. With it the inner problem is solved by accelerated
        gradient steps, as in the paper; None: by L-BFGS. Either stops at the gradient that the
        accuracy asks for, so that the guarantees are the same.
      solver: conjugate gradients: its ``max_steps`` and preconditioner.
      constrain: bounds; None leaves the hyperparameters free.
      has_aux: ``outer`` returns ``(scalar, aux)``.
      max_steps: most steps of an inner minimization (:func:`~bilevel.minimize`).

    Returns:
      ``Algorithm(init, step, deploy)``; ``init(params, hparams) -> MaidState``, and
      ``step(state, *, inner_batches, outer_batch, key=None)``, where ``inner_batches`` has a
      leading axis of 1: the one batch that all steps solve on. ``deploy(state)`` is
      ``state.params``. ``info.stats`` has ``error_bound`` :math:`ω`, ``distance`` e,
      ``accuracy``, ``certified``, ``accepted``, ``step_size``, ``num_trials``,
      ``num_gradients``. Where rounding leaves no accuracy to certify, at the end of a run, the
      status is ``stagnated`` and nothing moves.

    Raises:
      TypeError, ValueError: at construction or when traced, for settings, trees and axes that do
        not fit, and constants that cannot be. A traced :math:`μ ≤ 0` is ``invalid_setting``.

    Cost: one or more pairs of solves, and an inner solve per trial; counted in ``info.cost``.
    Memory: twenty vectors (those of L-BFGS; four with ``smoothness``), two of warm starts.

    Reference: Salehi, Mukherjee, Roberts, Ehrhardt, "An adaptively inexact first-order method for
    bilevel optimization with application to hyperparameter learning", 2025.

    Example:
      >>> import jax, jax.numpy as jnp, bilevel
      >>> def train(w, lam, batch):
      ...     return 0.5 * jnp.sum((w - batch) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)
      >>> def valid(w, lam, batch):
      ...     return 0.5 * jnp.sum((w - batch) ** 2)
      >>> alg = bilevel.maid(valid, train, bilevel.Certificate.of_log_decays(outer_smoothness=1.0))
      >>> state = alg.init(jnp.zeros(1), jnp.array(1.0))
      >>> step = jax.jit(alg.step)
      >>> for _ in range(30):
      ...     state, info = step(state, inner_batches=jnp.full((1, 1), 2.0),
      ...                        outer_batch=jnp.ones(1))
      >>> bool(abs(info.hparams) < 0.05)  # the decay that halves the data, e^lam = 1
      True
    """
    solves = check_solves(outer, inner, solver, HESSIAN, constrain, has_aux, max_steps)
    if not isinstance(certificate, Certificate):
        raise TypeError(f"`certificate` must be a `Certificate(...)`, got {certificate!r}.")
    check_one_real("accuracy", accuracy, 0, strict=True)
    check_one_real("first_step", first_step, 0, strict=True)
    check_one_real("loosen", loosen, 1)
    check_count("trials", trials)
    for name, value in (("descent", descent), ("backtrack", backtrack), ("tighten", tighten)):
        check_one_real(name, value, 0, strict=True)
        if not value < 1:
            raise ValueError(f"`{name}` must be less than 1, got {value}.")
    if is_function(smoothness):
        check_takes("smoothness", smoothness, "smoothness(params, hparams)")
    elif smoothness is not None:
        check_one_real("smoothness", smoothness, 0, strict=True)
    mover = Mover(optax.scale(-1.0), constrain)
    run = CertifiedDescent(
        solves, certificate, accuracy, first_step, descent, backtrack, tighten, loosen, trials,
        mover, smoothness,
    )  # fmt: skip
    return Algorithm(run.init, run.step, own_params)
