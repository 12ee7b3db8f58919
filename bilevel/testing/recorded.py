"""A run of an outer loop, recorded as NumPy arrays, and what each of its steps must keep."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Batch, Hparams, Key
from bilevel.ground.cost import Cost
from bilevel.ground.tree import paths
from bilevel.outer.base import Algorithm, Info
from bilevel.testing.methods import CheckFailed

ROUNDING = 1e3
"""Units of rounding, relative to the largest entry of a leaf, by which two programs may differ."""


class Record(NamedTuple):
    """A run on the host.

    Attributes:
      states: before and after every step, as lists of NumPy leaves.
      infos: of every step.
      like: the last state on the device.
      settled: whether the first step changed where leaves lie.
    """

    states: list[list[np.ndarray]]
    infos: list[Info]
    like: Any
    settled: bool


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop with all it is called with."""

    algorithm: Algorithm
    point: tuple[Any, ...]
    batches: dict[str, Batch]
    keys: Any
    steps: int
    rtol: float | None
    who: str

    def require(self, condition: Any, complaint: str) -> None:
        """Raise :class:`CheckFailed` unless ``condition`` holds."""
        if not condition:
            raise CheckFailed(f"{self.who}: {complaint}")

    def key(self, i: int) -> Key | None:
        """What step ``i`` draws with, as in ``fit``."""
        return None if self.keys is None else self.keys[i]

    def close(self, got: Any, expected: Any, name: str, against: str) -> None:
        """Every leaf within rounding of the other's; integers, keys and NaN exactly."""
        for (path, a), b in zip(paths(got, name), jax.tree.leaves(expected), strict=True):
            a, b = to_host(a), to_host(b)
            error, allowed = 0.0, 0.0
            if jnp.issubdtype(b.dtype, np.floating):
                unit = ROUNDING * float(jnp.finfo(b.dtype).eps) if self.rtol is None else self.rtol
                a, b = a.astype(np.float64), b.astype(np.float64)
                allowed = unit * float(np.max(np.abs(b), initial=0.0, where=np.isfinite(b)))
                finite = np.isfinite(a) & np.isfinite(b)
                error = float(np.max(np.abs(a - b), initial=0.0, where=finite))
                same = np.array_equal(a[~finite], b[~finite], equal_nan=True)
            else:
                same = np.array_equal(a, b)
            self.require(
                same and error <= allowed,
                f"`{path}` {against}: {a.ravel()[:4]} against {b.ravel()[:4]} (largest difference "
                f"{error:.3g}, allowed {allowed:.3g}).",
            )


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def to_host(x: Any) -> np.ndarray:
    return np.array(jax.random.key_data(x) if _is_key(x) else x)


def leaves_to_host(tree: Any) -> list[np.ndarray]:
    return [to_host(x) for x in jax.tree.leaves(tree)]


def from_host(leaves: list[np.ndarray], like: Any) -> Any:
    """The state on the device again, laid out as ``like``."""

    def leaf(x: np.ndarray, old: jax.Array) -> jax.Array:
        new = jnp.array(x)
        if _is_key(old):
            new = jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
        same = new.sharding.is_equivalent_to(old.sharding, old.ndim)
        return new if same else jax.device_put(new, old.sharding)

    old, treedef = jax.tree.flatten(like)
    return jax.tree.unflatten(treedef, [leaf(x, y) for x, y in zip(leaves, old, strict=True)])


def copied(tree: Any) -> Any:
    """The caller's own arrays are not put at risk; plain numbers stay what they are."""
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tree)


def differing(a: list[np.ndarray], b: list[np.ndarray]) -> list[int]:
    """Positions of leaves that differ in a bit."""
    return [
        i
        for i, (x, y) in enumerate(zip(a, b, strict=True))
        if x.shape != y.shape or x.dtype != y.dtype or x.tobytes() != y.tobytes()
    ]


def begin(loop: Loop) -> Any:
    """The first state, held against what ``init`` promises."""
    before = leaves_to_host(loop.point)
    state = loop.algorithm.init(*loop.point)
    loop.require(not differing(before, leaves_to_host(loop.point)), "`init` changed its input.")
    given = {id(x) for x in jax.tree.leaves(loop.point)}
    for path, leaf in paths(state, "state"):
        loop.require(
            isinstance(leaf, jax.Array),
            f"`{path}` of `init` is {leaf!r}, expected an array: a Python number is not saved "
            "with the state and compiles again when it changes.",
        )
        loop.require(
            not _weak(leaf),
            f"`{path}` of `init` has a weak type, {leaf.dtype}: the second step compiles again.",
        )
        loop.require(
            id(leaf) not in given,
            f"`{path}` of `init` is an array of the caller's or of another leaf: donating the "
            "state destroys it. Copy what you are given.",
        )
        given.add(id(leaf))
    for name in ("params", "hparams", "model_state", "step"):
        loop.require(hasattr(state, name), f"the state has no `{name}`.")
    loop.require(
        state.step.shape == () and state.step.dtype == jnp.int32,
        f"`state.step` is {_kind(state.step)}, expected int32[].",
    )
    loop.require(
        jax.tree.structure(state.hparams) == jax.tree.structure(loop.point[1]),
        f"`state.hparams` has the structure {jax.tree.structure(state.hparams)}, expected that "
        f"of `hparams`, {jax.tree.structure(loop.point[1])}.",
    )
    again = loop.algorithm.init(*loop.point)
    first = leaves_to_host(state)
    for i in differing(first, leaves_to_host(again)):
        loop.require(False, f"`{name_of(state, i)}` differs between two calls of `init`.")
    return state


def _kind(x: jax.Array) -> str:
    return f"{x.dtype}{list(x.shape)}{' (weak type)' if _weak(x) else ''}"


def _weak(x: jax.Array) -> bool:
    return getattr(x, "weak_type", False)  # keys have none


def name_of(state: Any, i: int) -> str:
    return paths(state, "state")[i][0]


def record_steps(
    loop: Loop,
    state: Any,
    donated: Callable[..., Any],
    inside: Callable[[Hparams], Any] | None,
) -> Record:
    """The steps one by one; types, records, bounds and the caller's arrays."""
    caller = leaves_to_host(loop.point)
    states, infos, like, settled = [leaves_to_host(state)], [], state, False
    _check_inside(loop, state, inside, "`init`")
    for i in range(loop.steps):
        structure, old = jax.tree.structure(state), jax.tree.leaves(state)
        hparams = jax.tree.map(to_host, state.hparams)
        new, info = donated(state, loop.batches, loop.key(i))
        loop.require(
            jax.tree.structure(new) == structure,
            f"`state` changes its structure in step {i}, from {structure} to "
            f"{jax.tree.structure(new)}.",
        )
        for (path, a), b in zip(paths(new, "state"), old, strict=True):
            loop.require(
                _kind(a) == _kind(b), f"`{path}` changes in step {i} from {_kind(b)} to {_kind(a)}."
            )
            moved = not a.sharding.is_equivalent_to(b.sharding, b.ndim)
            # A leaf on one device joins those that the caller spread over several.
            joins = moved and i == 0 and len(b.sharding.device_set) == 1
            settled = settled or joins
            loop.require(
                joins or not moved,
                f"`{path}` changes its sharding in step {i} from {b.sharding} to {a.sharding}.",
            )
        counted = int(new.step)
        loop.require(counted == i + 1, f"`state.step` is {counted} after {i + 1} steps.")
        _check_info(loop, info, hparams, i)
        _check_inside(loop, new, inside, f"step {i}")
        states.append(leaves_to_host(new))
        infos.append(jax.tree.map(to_host, info))
        state = like = new
    gone = [x for x in jax.tree.leaves(loop.point) if isinstance(x, jax.Array) and x.is_deleted()]
    loop.require(
        not gone and not differing(caller, leaves_to_host(loop.point)),
        "`init` hands out the memory it was given, which donating the state destroys: copy it "
        "there with `jnp.copy`, not `jax.device_put`.",
    )
    return Record(states, infos, like, settled)


def _check_inside(loop: Loop, state: Any, inside: Any, when: str) -> None:
    if inside is not None:
        loop.require(
            bool(np.all(inside(state.hparams))),
            f"`state.hparams` are outside their bounds after {when}: {state.hparams}.",
        )


def _check_info(loop: Loop, info: Any, hparams: Hparams, i: int) -> None:
    loop.require(isinstance(info, Info), f"`info` is a {type(info).__name__}, expected an `Info`.")
    for name in ("value", "inner_value", "hypergrad_norm", "result"):
        leaf, kind = getattr(info, name), jnp.integer if name == "result" else jnp.floating
        loop.require(
            jnp.shape(leaf) == () and jnp.issubdtype(jnp.result_type(leaf), kind),
            f"`info.{name}` is {leaf!r}, expected a scalar {kind.__name__}.",
        )
    loop.require(isinstance(info.cost, Cost), f"`info.cost` is {info.cost!r}, expected a `Cost`.")
    for name, count in info.cost._asdict().items():
        count = float(count)
        loop.require(
            np.isnan(count) or (np.isfinite(count) and count >= 0),
            f"`info.cost.{name}` is {count}, expected a number of evaluations, or NaN.",
        )
    loop.require(
        jax.tree.structure(info.hparams) == jax.tree.structure(hparams)
        and not differing(leaves_to_host(info.hparams), jax.tree.leaves(hparams)),
        f"`info.hparams` of step {i} are {info.hparams}, expected those of the state before the "
        f"step, {hparams}.",
    )
