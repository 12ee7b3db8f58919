r"""One step of MAID: a certified hypergradient, and a step size whose decrease is certain."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, ModelState, Params, Scalar
from bilevel.ground.cost import Cost
from bilevel.ground.loops import keep_types, strong_types
from bilevel.ground.settings import check_one_real, is_function
from bilevel.ground.status import Status, status_of, worst
from bilevel.hypergradient.base import Hypergradient
from bilevel.inner.minimize import Minimum
from bilevel.outer.base import KEEP, Info, own
from bilevel.outer.inexact.certificate import Certificate, Constant, Constants, error_bound
from bilevel.outer.inexact.solves import Solves
from bilevel.outer.variable import Mover, Variable
from bilevel.problem.validate import check_point
from bilevel.space.bounds import Simplex

GROWTH = 10 / 9
"""What an accepted step size is multiplied with for the next trial."""

REFINEMENTS = 40
"""Most times that the accuracy is tightened for one hypergradient."""


class MaidState(NamedTuple):
    """Everything a run is: save this one tree and nothing is forgotten.

    Attributes:
      params: the inner minimum at which the last value and hypergradient were taken.
      ahead: that at the hyperparameters of now, where the next step starts.
      outer: the hyperparameters.
      response: the last solution of the linear system.
      accuracy: how far from the inner minimum the parameters may be.
      length: the step size that the next search begins with; zero before the first step.
      trials: int32, most step sizes that it tries.
      step: int32, steps made.
    """

    params: Params
    ahead: Params
    outer: Variable
    response: Any
    accuracy: Scalar
    length: Scalar
    trials: jax.Array
    step: jax.Array

    @property
    def model_state(self) -> ModelState:
        """None: the solves are deterministic."""
        return None

    @property
    def hparams(self) -> Hparams:
        """What the losses read."""
        return self.outer.hparams


class _Certified(NamedTuple):
    """A hypergradient and what is known of its error."""

    minimum: Minimum
    solution: Hypergradient
    grads: Hparams
    norm: Scalar
    bound: Scalar
    distance: Scalar
    slack: Scalar  # by how much the outer loss may differ from the true value
    certified: jax.Array


class _Refining(NamedTuple):
    count: jax.Array
    accuracy: Scalar
    gradients: jax.Array
    products: jax.Array
    found: _Certified


class _Searching(NamedTuple):
    count: jax.Array
    accepted: jax.Array
    length: Scalar
    gradients: jax.Array
    outer: Variable
    params: Params


ZERO: Any = np.int32(0)  # an array of JAX would start its back end on import


@dataclasses.dataclass(frozen=True)
class CertifiedDescent:
    """The settings of :func:`~bilevel.maid`, checked, and the step they make."""

    solves: Solves
    certificate: Certificate
    accuracy: float
    first_step: float
    descent: float
    backtrack: float
    tighten: float
    loosen: float
    trials: int
    mover: Mover
    smoothness: Constant | None = None

    def init(self, params: Params, hparams: Hparams) -> MaidState:
        """The first state; see :func:`~bilevel.maid`."""
        check_point(params, hparams)
        self.certificate.at(params, hparams)
        params, hparams = own(params), own(hparams)
        response = self.solves.begin(params, hparams)
        zero = jnp.zeros((), tree.norm(params).dtype)
        counts = (jnp.asarray(self.trials, jnp.int32), jnp.zeros((), jnp.int32))
        outer = self.mover.begin(hparams)
        return own(MaidState(params, params, outer, response, zero + self.accuracy, zero, *counts))

    def step(
        self,
        state: MaidState,
        *,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key | None = None,
    ) -> tuple[MaidState, Info]:
        """One step; see :func:`~bilevel.maid`."""
        batch = self.solves.batch(state, MaidState, inner_batches, outer_batch)
        refined = self._refine(state, batch, outer_batch, key)
        found, solution = refined.found, refined.found.solution
        begun = self.first_step * jnp.sqrt(tree.size(found.grads)) / found.norm
        length = jnp.where(state.step == 0, jnp.where(found.norm == 0, 1, begun), state.length)
        search = self._search(state, refined, length, batch, outer_batch)
        new = MaidState(
            found.minimum.params,
            tree.where(search.accepted, search.params, found.minimum.params),
            tree.where(search.accepted, search.outer, state.outer),
            solution.state,
            refined.accuracy * jnp.where(search.accepted, self.loosen, self.tighten),
            jnp.where(search.accepted, GROWTH * search.length, length),
            state.trials + jnp.where(search.accepted | ~found.certified, 0, 1),
            state.step + 1,
        )
        new = self._poisoned(new, found)
        gradients = refined.gradients + search.gradients
        stats = {
            **solution.stats,
            "error_bound": found.bound,
            "distance": found.distance,
            "accuracy": refined.accuracy,
            "certified": found.certified,
            "accepted": search.accepted,
            "step_size": search.length,
            "num_trials": search.count,
            "num_gradients": gradients,
        }
        cost = Cost(gradients, refined.products, refined.count + search.count)
        info = Info(
            solution.value,
            found.minimum.stats["value"],
            found.norm,
            state.hparams,
            self._status(found, state.hparams),
            stats,
            cost.arrays(),
            solution.aux,
        )
        return keep_types(new, state, "state", KEEP), info

    def _status(self, found: _Certified, hparams: Hparams) -> jax.Array:
        convexity = self.certificate.at(found.minimum.params, hparams).convexity
        uncertified = status_of(Status.ok, (~found.certified, Status.stagnated))
        invalid = status_of(Status.ok, (~(convexity > 0), Status.invalid_setting))
        return worst(found.minimum.result, found.solution.result, uncertified, invalid)

    def _poisoned(self, new: MaidState, found: _Certified) -> MaidState:
        """NaN passes on, as in every loop: into what was computed from it, and no further."""

        def lost_where(bad: Scalar, old: Any) -> Any:
            return jax.tree.map(
                lambda x: jnp.where(jnp.isnan(bad), jnp.nan, x).astype(x.dtype), old
            )

        outer = new.outer._replace(hparams=lost_where(found.norm, new.outer.hparams))
        if outer.raw is not None:
            outer = outer._replace(raw=lost_where(found.norm, outer.raw))
        params = lost_where(found.minimum.stats["stationarity"], new.params)
        return new._replace(outer=outer, params=params)

    def _refine(
        self, state: MaidState, batch: Batch, outer_batch: Batch, key: Key | None
    ) -> _Refining:
        """A certified hypergradient, from solves that are tightened until it is."""
        lam, dtype = state.hparams, state.accuracy.dtype
        # Parameters have no digits for an accuracy below this.
        least = jnp.finfo(dtype).eps * tree.norm(state.ahead)

        def attempt(params: Params, start: Any, accuracy: Scalar) -> tuple[_Certified, Any, Any]:
            at = self.certificate.at(params, lam)
            minimum = self._minimum(params, lam, batch, accuracy)
            residual = at.outer_smoothness * accuracy
            solved = self.solves.hypergradient(
                minimum, lam, batch, outer_batch, start, key, atol=jnp.maximum(residual, 0)
            )
            found = self._certify(state, solved.minimum, solved.solution)
            return strong_types((found, solved.gradients, solved.products))

        def goes_on(c: _Refining) -> jax.Array:
            more = (c.count < REFINEMENTS) & (self.tighten * c.accuracy >= least)
            finite = jnp.isfinite(c.found.bound) & jnp.isfinite(c.found.norm)
            return (c.count == 0) | (~c.found.certified & more & finite)

        def advance(c: _Refining) -> _Refining:
            first = c.count == 0
            accuracy = c.accuracy * jnp.where(first, 1, self.tighten)
            params = tree.where(first, state.ahead, c.found.minimum.params)
            start = tree.where(first, state.response, c.found.solution.state)
            found, gradients, products = attempt(params, start, accuracy)
            return _Refining(
                c.count + 1, accuracy, c.gradients + gradients, c.products + products, found
            )

        accuracy = jnp.maximum(state.accuracy, least)
        shapes = jax.eval_shape(attempt, state.ahead, state.response, accuracy)
        found, gradients, products = jax.tree.map(lambda s: jnp.zeros_like(s, s.dtype), shapes)
        begin = _Refining(ZERO, accuracy, gradients, products, found)
        return jax.lax.while_loop(goes_on, advance, begin)

    def _minimum(self, params: Params, hparams: Hparams, batch: Batch, accuracy: Scalar) -> Minimum:
        """The inner minimum up to a distance, by the solver that the known constants allow."""
        convexity = self.certificate.at(params, hparams).convexity
        given: Any = self.smoothness
        if given is None:
            curvatures = None
        else:
            largest = given(params, hparams) if is_function(given) else given
            check_one_real("smoothness", largest, 0, strict=True)
            curvatures = (jnp.maximum(convexity, 0), jnp.asarray(largest).astype(convexity.dtype))
        return self.solves.minimum(params, hparams, batch, convexity * accuracy, curvatures)

    def _certify(self, state: MaidState, minimum: Minimum, solution: Hypergradient) -> _Certified:
        """What the certificate says of a hypergradient, in what moves."""
        at = self.certificate.at(minimum.params, state.hparams)
        stats = solution.stats
        distance = stats["stationarity"] / at.convexity
        bound = error_bound(at, distance, stats["residual_norm"], stats["rhs_norm"])
        bound = bound * self._stretch(state.outer)
        grads = self.mover.pull(state.outer, solution.grads)
        norm = tree.norm(grads)
        certified = (bound <= (1 - self.descent) * norm) & (at.convexity > 0)
        slack = _slack(at, distance, stats["rhs_norm"], solution.value)
        return _Certified(minimum, solution, grads, norm, bound, distance, slack, certified)

    def _stretch(self, variable: Variable) -> Scalar | int:
        """A bound on the norm of the derivative of what is read in what moves."""
        space = self.mover.space
        if space is None:
            return 1
        ones = jax.tree.map(jnp.ones_like, variable.hparams)
        slopes = jax.tree.leaves(self.mover.pull(variable, ones))
        steepest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in slopes]))
        bounds = jax.tree.leaves(space.bounds, is_leaf=lambda x: isinstance(x, Simplex))
        # That of a softmax is at most 1/2; all other bounds act on each entry alone.
        return jnp.maximum(steepest, 0.5 if any(isinstance(b, Simplex) for b in bounds) else 0)

    def _search(
        self,
        state: MaidState,
        refined: _Refining,
        length: Scalar,
        batch: Batch,
        outer_batch: Batch,
    ) -> _Searching:
        """The first step size whose decrease is certain."""
        found, problem = refined.found, self.solves.problem

        def advance(c: _Searching) -> _Searching:
            tried = (length * self.backtrack**c.count).astype(length.dtype)
            outer, _ = self.mover.move(
                state.outer, tree.scale(tried, found.grads), value=found.solution.value
            )
            lam = outer.hparams
            minimum = self._minimum(found.minimum.params, lam, batch, refined.accuracy)
            at = self.certificate.at(minimum.params, lam)
            (value, _), (g, _) = problem.outer_grads(minimum.params, lam, outer_batch)
            distance = minimum.stats["stationarity"] / at.convexity
            slack = _slack(at, distance, tree.norm(g), value)
            change = value - found.solution.value + slack + found.slack
            decreases = change <= -(self.descent**2) * tried * found.norm**2
            accepted = decreases & (at.convexity > 0)
            gradients = c.gradients + minimum.stats["num_gradients"]
            return strong_types(
                _Searching(c.count + 1, accepted, tried, gradients, outer, minimum.params)
            )

        def goes_on(c: _Searching) -> jax.Array:
            return found.certified & ~c.accepted & (c.count < state.trials)

        begin = _Searching(
            ZERO, jnp.asarray(False), length, jnp.zeros_like(refined.gradients), state.outer,
            found.minimum.params,
        )  # fmt: skip
        return jax.lax.while_loop(goes_on, advance, strong_types(begin))


def _slack(at: Constants, distance: Scalar, g_norm: Scalar, value: Scalar) -> Scalar:
    """By how much the computed outer loss can differ from that at the inner minimum."""
    rounding = 4 * jnp.finfo(distance.dtype).eps * jnp.abs(value)
    return g_norm * distance + 0.5 * at.outer_smoothness * distance**2 + rounding
