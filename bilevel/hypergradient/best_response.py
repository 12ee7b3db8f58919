r"""Best response: a trained network predicts how the parameters follow the hyperparameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Params, Scalar, Stats, Vector
from bilevel.ground.cost import Cost
from bilevel.ground.loops import loop, unrolls
from bilevel.ground.settings import check_count, check_number, check_real, check_settings, count
from bilevel.ground.status import Status, status_of
from bilevel.ground.traced import depends
from bilevel.hypergradient.base import Pullback
from bilevel.inner.descend import InnerState, take_step
from bilevel.inner.groups import draw_noise, fold_keys, loop_over_groups, split_batch
from bilevel.inner.network import Network, StructuredResponse, gradient_cost
from bilevel.problem.operators.gauss_newton import GaussNewton
from bilevel.problem.two_losses import Problem
from bilevel.problem.validate import check_inner, check_same_tree, check_split, require_loss


class BestResponseState(NamedTuple):
    """What a :class:`BestResponse` carries: the network's parameters and their optimizer's."""

    network_params: Any
    opt_state: Any


def perturbed_loss(
    problem: Problem,
    network: Network,
    network_params: Any,
    params: Params,
    displacement: Hparams,
    hparams: Hparams,
    batch: Batch,
    linearize: GaussNewton | None = None,
) -> Scalar:
    r"""The inner loss of the weights the network gives at one ``displacement``.

    .. math::
        h(\hat w_φ(d), λ')  \text{or, linearized,}
        ℓ(z(w) + J_d z(\hat w_φ(d))|_{d=0} d, λ')
            + r(\hat w_φ(d), λ')

    The linearized form is one forward-mode pass in weight space: primal and tangent share the
    random numbers of the batch. The penalty r is not linearized, it needs no model.

    Args:
      hparams: :math:`λ'`, what the losses read (constrained, discrete ones rounded).
      linearize: the inner loss split as ``GaussNewton(model, output_loss, penalty=...)``; with
        ``None`` the loss is taken at the perturbed weights themselves.
    """
    if linearize is None:
        return problem.inner_loss(
            network.apply(network_params, params, displacement), hparams, batch
        )
    at_centre, change = _linearised_outputs(
        linearize, problem, network, network_params, params, displacement, hparams, batch
    )
    loss = linearize.output_loss(tree.add(at_centre, change), hparams, batch)
    if linearize.penalty is not None:
        loss = loss + linearize.penalty(
            network.apply(network_params, params, displacement), hparams
        )
    return loss


def _linearised_outputs(
    split: GaussNewton,
    problem: Problem,
    network: Network,
    network_params: Any,
    params: Params,
    displacement: Hparams,
    hparams: Hparams,
    batch: Batch,
) -> tuple[Any, Any]:
    """The model's outputs at no displacement and their tangent along ``displacement``."""
    state = problem.state_arguments
    centre = jax.tree.map(jnp.zeros_like, displacement)
    if getattr(network, "per_example", False):

        def outputs(d: Hparams) -> Any:
            return split.model(network.apply(network_params, params, d), hparams, batch, *state)

        return jax.jvp(outputs, (centre,), (displacement,))

    # Through the weights rather than through d: the primal pass then does not depend on the
    # response, and its gradient needs no backward pass. Leaves that never move get no tangent.
    leaves, treedef = jax.tree.flatten(params)
    moved = jax.tree.leaves(network.apply(network_params, params, displacement))
    moving = [i for i, (new, old) in enumerate(zip(moved, leaves, strict=True)) if new is not old]

    def weights(d: Hparams) -> list[Any]:
        at = jax.tree.leaves(network.apply(network_params, params, d))
        return [at[i] for i in moving]

    tangents = jax.jvp(weights, (centre,), (displacement,))[1]

    def outputs_at(parts: list[Any]) -> Any:
        at = list(leaves)
        for i, part in zip(moving, parts, strict=True):
            at[i] = part
        return split.model(jax.tree.unflatten(treedef, at), hparams, batch, *state)

    return jax.jvp(outputs_at, ([leaves[i] for i in moving],), (tangents,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BestResponse:
    r"""The pullback :math:`g ↦ (∂\hat w_φ/∂λ)ᵀ g` of a network.

    ``params`` are the base weights, the plain model's, as for every response; the network's own
    parameters :math:`φ` are the ``state``. With a centred network (Delta-STN)
    :math:`\hat w_φ(λ') = w + Δ_φ(λ' - λ)`, so ``params`` come back
    unchanged and only their derivative is new. With an uncentred one (STN, hypernetworks)
    the point returned is :math:`\hat w_φ(λ)`.

    Where :math:`φ` comes from: with ``steps`` > 0 each call first trains it, on
    ``inner_batch`` and with fresh perturbations :math:`ε ∼ N(0, I)`,

    .. math::
        min_φ E_ε
            h(\hat w_φ(λ + σε), λ + σε)

    from the previous ``state`` on; with ``steps=0`` the ``state`` is taken as trained, such as
    that of ``self_tuning``: ``BestResponseState(network_params, None)``. No derivative of the inner
    loss in :math:`λ` is taken, so sampled and discrete hyperparameters respond too;
    what the inner loss does not read cannot (a learning rate is for ``Unroll``).

    Args:
      network: a :class:`~bilevel.StructuredResponse` or a hypernetwork.
      tx: optax transformation that trains :math:`φ`; needed with ``steps``.
      steps: training steps of :math:`φ` a call.
      groups: perturbations a step; the batch is cut in as many parts.
      scale: :math:`σ > 0`, a scalar for all or a tree like ``hparams``.
      linearize: ``GaussNewton(model, output_loss, penalty=...)``, the inner loss split in a
        model and a loss of its outputs: trains on the linearized outputs, whose optimum is
        the true response Jacobian rather than a secant of width :math:`σ`.
      seed: of the network's first parameters.
      unroll: write the steps out one by one; None decides by itself (convolutions on CPU).

    Cost: ``steps`` inner gradients (linearized: about two each), one multiply-add per weight.

    Status ``invalid_setting``: a traced ``scale`` is not positive, or the network's Jacobian gives
    exactly zero for an outer gradient that is not, as an untrained network's does.

    Raises:
      ValueError, TypeError: at trace time: an untrained network with ``steps=0``, training without
        ``tx`` or ``key``, an uncentred network to be trained alone, or a hyperparameter that
        neither loss reads.

    Reference: Bae and Grosse, "Delta-STN: Efficient Bilevel Optimization for Neural Networks
    using Structured Response Jacobians", 2020.
    """

    network: Network = dataclasses.field(default=StructuredResponse(), metadata={"static": True})
    tx: optax.GradientTransformation | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    steps: int = count(0, low=0)
    groups: int = count(1)
    scale: Any = 0.5
    linearize: GaussNewton | None = None
    seed: int = dataclasses.field(default=0, metadata={"static": True})
    unroll: bool | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        check_settings(self)
        check_count("seed", self.seed, 0)
        for leaf in jax.tree.leaves(self.scale):
            check_real("scale", leaf, 0, strict=True)
        if self.steps and self.tx is None:
            raise ValueError("`steps` > 0 needs `tx`, e.g. `tx=optax.sgd(0.1, momentum=0.9)`.")
        if self.steps and not self.network.centred:
            raise ValueError(
                "an uncentred network is trained together with the base weights: use "
                "`self_tuning`, or `StructuredResponse(centred=True)`."
            )

    def cost(self, hparams: Hparams, stats: Stats) -> Cost:
        """The training steps of the network."""
        each = gradient_cost(self.network, learns=1) if self.linearize is None else 2
        return Cost(self.steps * each)

    def init(self, problem: Problem, params: Params, hparams: Hparams) -> BestResponseState:
        """An untrained network (see ``seed``) and its optimizer's state."""
        started = self.network.init(jax.random.key(self.seed), params, hparams)
        return BestResponseState(started, None if self.tx is None else self.tx.init(started))

    def check(
        self,
        problem: Problem,
        params: Params,
        hparams: Hparams,
        inner_batch: Batch,
        outer_batch: Batch,
        state: Any,
    ) -> None:
        """Raise what this response can tell is wrong, at trace time."""
        require_loss(problem, "BestResponse")
        check_inner(problem, params, hparams, inner_batch)
        check_responds(problem, params, hparams, inner_batch, outer_batch)
        if self.linearize is not None and self.steps:
            check_split(self.linearize, problem, params, hparams, inner_batch)
        if state is None:
            if self.steps == 0:
                raise ValueError(
                    "`state` is None and `steps` is 0: an untrained response says that nothing "
                    "moves. Pass `state=BestResponseState(network_params, None)` of a trained one, "
                    "or set `steps` and `tx` to train it in every call."
                )
            return
        if not isinstance(state, BestResponseState):
            raise TypeError(
                f"`state` must be a BestResponseState(network_params, opt_state), got "
                f"{type(state).__name__}."
            )
        expected = jax.eval_shape(lambda: self.init(problem, params, hparams).network_params)
        check_same_tree(state.network_params, expected, "state.network_params")

    def vjp(
        self,
        problem: Problem,
        params: Params,
        hparams: Hparams,
        inner_batch: Batch,
        state: BestResponseState | None,
        *,
        key: Key | None = None,
    ) -> tuple[Params, Pullback]:
        """The network's weights at ``hparams`` and the transposed Jacobian of that map."""
        if state is None:
            state = self.init(problem, params, hparams)
        stats: Stats = {}
        if self.steps:
            if key is None:
                raise ValueError("`key` is missing: training a BestResponse draws perturbations.")
            state, loss = self._train(problem, params, hparams, inner_batch, state, key)
            stats["response_loss"] = loss
        centre = jax.lax.stop_gradient(hparams)

        def point(hparams: Hparams) -> Params:
            d = tree.sub(hparams, centre) if self.network.centred else hparams
            return self.network.apply(state.network_params, params, d)

        w, transposed = jax.vjp(point, hparams)

        def pullback(g: Vector) -> tuple[Hparams, Any, jax.Array, Stats]:
            (indirect,) = transposed(tree.cast_like(g, w))
            stationarity = tree.norm(problem.inner_grad(w, hparams, inner_batch))
            # An untrained network says that nothing moves: a zero that is no answer.
            dead = (tree.norm(indirect) == 0) & (tree.norm(g) > 0)
            result = status_of(Status.ok, (dead | self._bad_scale(), Status.invalid_setting))
            return indirect, state, result, {"stationarity": stationarity, **stats}

        return w, pullback

    def _bad_scale(self) -> jax.Array:
        """Whether a scale that training used is not positive and finite (known if traced)."""
        bad = jnp.asarray(False)
        for scale in jax.tree.leaves(self.scale) if self.steps else ():
            bad = bad | ~jnp.all((jnp.asarray(scale) > 0) & jnp.isfinite(scale))
        return bad

    def _train(
        self,
        problem: Problem,
        params: Params,
        hparams: Hparams,
        batch: Batch,
        state: BestResponseState,
        key: Key,
    ) -> tuple[BestResponseState, Scalar]:
        scale = scale_like(self.scale, hparams)
        unroll = unrolls(self.unroll, problem.inner_loss, params, hparams, batch)
        tx = optax.identity() if self.tx is None else self.tx

        def step(state: BestResponseState, i: Any) -> tuple[BestResponseState, Scalar]:
            def loss(network_params: Any) -> Scalar:
                noise = draw_noise(jax.random.fold_in(key, i), hparams, self.groups)
                d = jax.tree.map(lambda s, e: jnp.expand_dims(s, 0) * e, scale, noise)
                return mean_over_groups(
                    lambda d, part: perturbed_loss(
                        problem,
                        self.network,
                        network_params,
                        params,
                        d,
                        tree.add(hparams, d),
                        part,
                        self.linearize,
                    ),
                    d,
                    fold_keys(batch, i),
                    self.groups,
                    unroll,
                )

            trained, info = take_step(lambda w, _: (loss(w), None), tx, InnerState(*state))
            return BestResponseState(trained.params, trained.opt_state), info.loss

        carry = state, jnp.zeros((), jax.eval_shape(step, state, 0)[1].dtype)
        return loop(self.steps, lambda i, carry: step(carry[0], i), carry, unroll)


def scale_like(scale: Any, hparams: Hparams) -> Hparams:
    """A scalar scale for every hyperparameter, or the tree as given, in at least float32."""
    for path, leaf in tree.paths(scale, "scale"):
        check_number(path, leaf)
    if jax.tree.structure(scale) != jax.tree.structure(hparams):
        if not jax.tree_util.all_leaves([scale]) or jnp.ndim(scale) != 0:
            raise ValueError(
                "`scale` must be a scalar or a tree like `hparams`, got "
                f"{jax.tree.structure(scale)} for {jax.tree.structure(hparams)}."
            )
        scale = jax.tree.map(lambda x: scale, hparams)
    return jax.tree.map(
        lambda s, x: jnp.broadcast_to(
            jnp.asarray(s, tree.accumulator_dtype(jnp.result_type(x))), jnp.shape(x)
        ),
        scale,
        hparams,
    )


def mean_over_groups(
    loss: Callable[[Any, Batch], Scalar],
    perturbed: Any,
    batch: Batch,
    groups: int,
    unroll: bool = False,
) -> Scalar:
    """Mean of ``loss(perturbed[g], part g)``; one group takes the batch as it is.

    Accelerators map over the groups. XLA on CPU has no fast product with a weight matrix a
    group (measured four times slower than one group after the other), so there they are
    looped over, or written out one by one if ``unroll`` (convolutions in a loop are slow).
    """
    if groups == 1:
        return loss(jax.tree.map(lambda x: x[0], perturbed), batch)
    stack = (perturbed, split_batch(batch, groups))
    if unroll:
        values = [loss(*jax.tree.map(lambda x, g=g: x[g], stack)) for g in range(groups)]
        return jnp.mean(jnp.stack(values))
    if jax.default_backend() != "cpu":
        return jnp.mean(jax.vmap(loss)(*stack))
    return loop_over_groups(loss, *stack) / groups


def check_responds(
    problem: Problem, params: Params, hparams: Hparams, inner_batch: Batch, outer_batch: Batch
) -> None:
    """Refuse hyperparameters that no response can follow, in value.

    Those that neither the outer loss nor the *gradient* of the inner loss reads: a term that is
    only added to the loss moves no weight.
    """
    leaves, treedef = jax.tree.flatten(hparams)

    def dead_in(loss: Any, batch: Batch) -> list[bool]:
        closed = jax.make_jaxpr(loss)(leaves, params, batch)
        program = core.jaxpr_as_fun(closed)
        flat = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]

        def reads(i: int) -> bool:
            rest = flat[:i] + flat[i + 1 :]
            return any(depends(lambda x, *xs: program(*xs[:i], x, *xs[i:]), flat[i], *rest))

        return [not reads(i) for i in range(len(leaves))]

    def inner(leaves: Any, params: Params, batch: Batch) -> list[Any]:
        lam = jax.tree.unflatten(treedef, leaves)
        # In whatever the network gives as weights, which may hold more than floats.
        grads = jax.grad(problem.inner_loss, allow_int=True)(params, lam, batch)
        return [x for x in jax.tree.leaves(grads) if x.dtype != jax.dtypes.float0]

    def outer(leaves: Any, params: Params, batch: Batch) -> Scalar:
        return problem.outer_loss(params, jax.tree.unflatten(treedef, leaves), batch)[0]

    unread = dead_in(inner, inner_batch)
    if any(unread):
        in_outer = dead_in(outer, outer_batch)
        names = [path for path, _ in tree.paths(hparams, "hparams")]
        named = [n for n, *dead in zip(names, unread, in_outer, strict=True) if all(dead)]
        if named:
            raise ValueError(
                f"Neither loss reads {', '.join(named)} in a way that moves weights: those that "
                "minimize the inner loss do not respond to it. A learning rate, a momentum or "
                "another setting of the inner optimizer needs `Unroll(inner_tx=lambda hparams: "
                "..., steps=...)`."
            )
