"""Regularizers: images of whole numbers, axes and tokens that are not there, odd strengths."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import prox
from bilevel import regularizers as r
from odd_inputs.case import ANY, REFUSE, Case, Number
from odd_inputs.odd import Thing, reals

KEY = jax.random.key(0)
B = 4
_RNG = np.random.default_rng(1)
ROWS = _RNG.uniform(0.1, 0.9, (B, 6)).astype(np.float32)
IMAGES = _RNG.uniform(0.1, 0.9, (B, 4, 4, 3)).astype(np.float32)
SEQUENCES = _RNG.uniform(0.1, 0.9, (B, 5, 3)).astype(np.float32)
SOFT = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
TABLE = _RNG.uniform(0.1, 0.9, (7, 3)).astype(np.float32)
TOKENS = np.array([[0, 1], [2, 3], [4, 5], [6, 0]])
WEIGHTS = {"a": ROWS[:2], "b": ROWS[0]}

Function = Callable[..., Any]


def functions() -> dict[str, tuple[Function, dict[str, Any], dict[str, float], str]]:
    """Good arguments, the strengths among them, and the name of the array."""
    return {
        "dropout": (functools.partial(r.dropout, KEY), {"x": ROWS, "rate": 0.5}, {"rate": 1}, "x"),
        "dropout_mask": (functools.partial(r.dropout_mask, KEY),
                         {"shape": (B, 6), "rate": 0.5}, {"rate": 1}, ""),
        "locked_dropout": (functools.partial(r.locked_dropout, KEY),
                           {"x": SEQUENCES, "rate": 0.5}, {"rate": 1}, "x"),
        "embedding_dropout": (functools.partial(r.embedding_dropout, KEY),
                              {"table": TABLE, "tokens": TOKENS, "rate": 0.5}, {"rate": 1},
                              "table"),
        "word_mask": (functools.partial(r.word_mask, KEY),
                      {"num_words": 7, "tokens": TOKENS, "rate": 0.5}, {"rate": 1}, ""),
        "weight_drop": (functools.partial(r.weight_drop, KEY),
                        {"kernel": ROWS, "rate": 0.5}, {"rate": 1}, "kernel"),
        "mixup": (functools.partial(r.mixup, KEY),
                  {"x": ROWS, "targets": SOFT, "alpha": 0.5}, {"alpha": np.inf}, "x"),
        "label_smoothing": (r.label_smoothing, {"targets": SOFT, "amount": 0.25}, {"amount": 1},
                            "targets"),
        "input_noise": (functools.partial(r.input_noise, KEY), {"x": ROWS, "std": 0.5},
                        {"std": np.inf}, "x"),
        "input_scaling": (functools.partial(r.input_scaling, KEY),
                          {"x": ROWS, "strength": 0.5}, {"strength": np.inf}, "x"),
        "cutout": (functools.partial(r.cutout, KEY, max_holes=2),
                   {"images": IMAGES, "holes": 1.5, "length": 2.0},
                   {"holes": 3, "length": np.inf}, ""),
        "color_jitter": (functools.partial(r.color_jitter, KEY),
                         {"images": IMAGES, "brightness": 0.25, "contrast": 0.25,
                          "saturation": 0.25, "hue": 0.25},
                         {"brightness": np.inf, "contrast": np.inf, "saturation": np.inf,
                          "hue": 0.5}, "images"),
        "activation_penalty": (r.activation_penalty, {"activations": SEQUENCES, "strength": 0.5},
                               {"strength": np.inf}, "activations"),
        "temporal_activation_penalty": (r.temporal_activation_penalty,
                                        {"activations": SEQUENCES, "strength": 0.5},
                                        {"strength": np.inf}, "activations"),
        "prox_l1": (prox.l1, {"params": ROWS, "strength": 0.5}, {"strength": np.inf}, "params"),
        "prox_group_lasso": (prox.group_lasso, {"params": ROWS, "strength": 0.5},
                             {"strength": np.inf}, "params"),
    }  # fmt: skip


def cases() -> Iterator[Case]:
    for name, (function, good, strengths, array) in functions().items():
        call = functools.partial(_case, name, function, good)
        for strength, high in strengths.items():
            yield from _strengths(call, strength, good, high)
        if array:
            yield from _arrays(call, array, good, name)
        yield from _keys(name, function, good)
    yield from _shapes()
    yield from _penalties()


def _case(
    name: str, function: Function, good: dict[str, Any], kind: str, where: str,
    make: Callable[[], Any], *, expect: Any = REFUSE, traced: bool = False, rtol: float = 1e-5,
    names: tuple[str, ...] = (),
) -> Case:  # fmt: skip
    def call() -> Number:
        if traced:
            run = jax.jit(lambda value: function(**{**good, where: value}))
            return Number(run(make()))
        return Number(function(**{**good, where: make()}))

    label = f"{name}({where}={kind})"
    return Case("regularizers", kind, label, call, names or (where,), expect, rtol)


def _strengths(call: Any, where: str, good: dict[str, Any], high: float) -> Iterator[Case]:
    function = call.args[1]
    usual = lambda: function(**good)  # noqa: E731
    base = good[where]
    draws = call.args[0] in ("mixup", "input_scaling", "color_jitter")
    for kind, make, legal in reals(base):
        expect = usual if legal else REFUSE
        # JAX draws other numbers for other types; a list of one is an array of one, True is 1.
        if (legal and draws) or kind in ("list", "tuple", "bool", "numpy bool"):
            expect = ANY
        yield call(kind, where, make, expect=expect, rtol=1e-2)
    per_example = where != "rate" or "kernel" not in good
    yield call("one per example", where, lambda: np.full(B, base),
               expect=ANY if per_example else REFUSE)  # fmt: skip
    yield call("wrong length", where, lambda: np.full(B + 1, base))
    yield call("one too few", where, lambda: np.full(B - 1, base))
    yield call("one nan among them", where, lambda: np.array([base] * (B - 1) + [np.nan]))
    yield call("one negative among them", where, lambda: np.array([base] * (B - 1) + [-1.0]))
    yield call("one inf among them", where, lambda: np.array([base] * (B - 1) + [np.inf]))
    for kind, value in (("traced nan", np.nan), ("traced negative", -0.5), ("traced inf", np.inf)):
        yield call(kind, where, lambda value=value: jnp.asarray(value), traced=True)
    if np.isfinite(high):
        closed = where in ("amount", "hue")
        above = np.nextafter(np.float32(high), np.float32(9)) if closed else high
        yield call("at its end", where, lambda: float(above))
        yield call("above its end", where, lambda: high + 1.0)
        yield call("traced above its end", where, lambda: jnp.asarray(high + 1.0), traced=True)
        yield call("jax above its end", where, lambda: jnp.asarray(high + 1.0))


def _arrays(call: Any, where: str, good: dict[str, Any], name: str) -> Iterator[Case]:
    """Whole numbers in place of floats round to nothing, or wrap."""
    x = good[where]
    for dtype in ("uint8", "int32", "int8", "bool"):
        # A penalty of whole numbers is computed in float; the others would round or wrap.
        expect = ANY if "penalty" in name else REFUSE
        yield call(f"{dtype} array", where,
                   lambda d=dtype: np.asarray(x * 100).astype(d), expect=expect)  # fmt: skip
    yield call("complex array", where, lambda: x + 0j)
    yield call("float16 array", where, lambda: np.asarray(x, np.float16), expect=ANY)
    yield call("bfloat16 array", where, lambda: jnp.asarray(x, jnp.bfloat16), expect=ANY)
    yield call("float64 array", where, lambda: np.asarray(x, np.float64), expect=ANY)
    yield call("nan array", where, lambda: np.where(x == x.ravel()[0], np.nan, x),
               expect=ANY)  # fmt: skip
    for kind, make in (
        ("string", lambda: "image"), ("none", lambda: None), ("object", Thing),
        ("list of lists", lambda: x.tolist()), ("number", lambda: 1.0),
        ("object array", lambda: x.astype(object)), ("function", lambda: len),
    ):  # fmt: skip
        # Lists are refused by JAX everywhere; a number has no examples.
        expect = ANY if kind in ("list of lists", "number", "object array") else REFUSE
        yield call(kind, where, make, expect=expect)


def _keys(name: str, function: Function, good: dict[str, Any]) -> Iterator[Case]:
    if not isinstance(function, functools.partial) or not function.args:
        return
    for kind, make in (
        ("none", lambda: None), ("number", lambda: 0), ("float", lambda: 0.5),
        ("string", lambda: "seed"), ("two keys", lambda: jax.random.split(KEY)),
        ("object", Thing), ("class", lambda: Thing), ("function", lambda: jax.random.key),
        ("list", lambda: [0, 0]), ("floats", lambda: np.zeros(2)),
    ):  # fmt: skip

        def call(make: Any = make) -> Number:
            return Number(function.func(make(), **function.keywords, **good))

        yield Case("regularizers", f"key: {kind}", f"{name}(key={kind})", call, ("key",))

    def raw() -> Number:
        return Number(function.func(jax.random.PRNGKey(0), **function.keywords, **good))

    yield Case("regularizers", "key: raw", f"{name}(key=raw)", raw, ("key",), ANY)


def _shapes() -> Iterator[Case]:
    """Axes, tokens, channels, targets and counts that do not fit."""
    locked, embed = functools.partial(r.locked_dropout, KEY, SEQUENCES, 0.5), r.embedding_dropout

    def add(kind: str, label: str, call: Callable[[], Any], *names: str, **more: Any) -> Case:
        return Case("regularizers", kind, label, lambda: Number(call()), names, **more)

    for axis in (3, 5, 100, -4, -7, 1.0, None, "time", True, (1,), np.int64(9)):
        yield add("axis", f"locked_dropout(time_axis={axis!r})",
                  lambda a=axis: locked(time_axis=a), "time_axis", "axis",
                  expect=ANY if axis is True else REFUSE)  # fmt: skip
        yield add("axis", f"temporal_activation_penalty(time_axis={axis!r})",
                  lambda a=axis: r.temporal_activation_penalty(SEQUENCES, 0.5, time_axis=a),
                  "time_axis", "axis", expect=ANY if axis is True else REFUSE)  # fmt: skip
        yield add("axis", f"dropout(broadcast_axes=({axis!r},))",
                  lambda a=axis: r.dropout(KEY, SEQUENCES, 0.5, broadcast_axes=(a,)),
                  "broadcast_axes", "axis", expect=ANY if axis is True else REFUSE)  # fmt: skip
    for axes in (1, "1", None, (1, 1), (0, -3), 1.5, {"a": 1}):
        yield add("axis", f"dropout(broadcast_axes={axes!r})",
                  lambda a=axes: r.dropout(KEY, SEQUENCES, 0.5, broadcast_axes=a),
                  "broadcast_axes", "axis")  # fmt: skip
    for kind, tokens in (
        ("beyond the table", np.array([[7, 0]] * B)), ("far beyond", np.array([[10**6, 0]] * B)),
        ("negative", np.array([[-1, 0]] * B)), ("floats", TOKENS + 0.5), ("bools", TOKENS > 0),
        ("strings", np.array([["a", "b"]] * B)), ("none", None), ("objects", TOKENS.astype(object)),
    ):  # fmt: skip
        for rate in (0.5, np.full(B, 0.5), 0.0):
            which = f"{kind}, {'one rate' if np.ndim(rate) == 0 else 'rates'} {np.max(rate)}"
            yield add(f"tokens {kind}", f"embedding_dropout(tokens={which})",
                      lambda t=tokens, a=rate: embed(KEY, TABLE, t, a), "tokens",
                      expect=ANY if kind == "bools" else REFUSE)  # fmt: skip
            if kind in ("beyond the table", "negative"):
                yield add(f"traced tokens {kind}", f"embedding_dropout(traced tokens={which})",
                          lambda t=tokens, a=rate: jax.jit(embed)(KEY, TABLE, jnp.asarray(t), a),
                          "tokens")  # fmt: skip
            yield add(f"tokens {kind}", f"word_mask(tokens={which})",
                      lambda t=tokens, a=rate: r.word_mask(KEY, 7, t, a), "tokens",
                      expect=ANY if kind == "bools" else REFUSE)  # fmt: skip
    for kind, targets in (
        ("another length", SOFT[:-1]), ("one", SOFT[:1]), ("longer", np.concatenate([SOFT, SOFT])),
        ("class numbers", np.arange(B)), ("scalar", np.float32(1.0)), ("nothing", None),
        ("a string", "labels"), ("bools", SOFT > 0), ("complex", SOFT + 0j),
    ):  # fmt: skip
        yield add(f"targets {kind}", f"mixup(targets={kind})",
                  lambda t=targets: r.mixup(KEY, ROWS, t, 0.5), "targets",
                  expect=ANY if kind == "nothing" else REFUSE)  # fmt: skip
        yield add(f"targets {kind}", f"label_smoothing(targets={kind})",
                  lambda t=targets: r.label_smoothing(t, 0.25), "targets",
                  expect=ANY if kind in ("another length", "one", "longer") else REFUSE,
                  )  # fmt: skip
    for kind, images in (
        ("two axes", ROWS), ("one image", IMAGES[0]), ("gray", IMAGES[..., :1]),
        ("channels first", np.moveaxis(IMAGES, -1, 1)), ("nothing", None),
        ("five axes", IMAGES[None]),
    ):  # fmt: skip
        yield add(f"images {kind}", f"color_jitter(images={kind})",
                  lambda i=images: r.color_jitter(KEY, i, hue=0.1), "images")  # fmt: skip
        legal = kind in ("gray", "channels first")
        yield add(f"images {kind}", f"cutout(images={kind})",
                  lambda i=images: r.cutout(KEY, i, 1, 2, max_holes=1), "images",
                  expect=ANY if legal else REFUSE)  # fmt: skip
    for holes in (0, -1, 1.5, None, "1", True, 1j, np.inf, [1], 10.0):
        yield add("max_holes", f"cutout(max_holes={holes!r})",
                  lambda h=holes: r.cutout(KEY, IMAGES, 0, 2, max_holes=h), "max_holes",
                  )  # fmt: skip
    for fill in ("0", None, 1j, [0.0, 0.0], {}, Thing):
        yield add("fill", f"cutout(fill={fill!r})",
                  lambda f=fill: r.cutout(KEY, IMAGES, 1, 2, max_holes=1, fill=f), "fill",
                  )  # fmt: skip


def _penalties() -> Iterator[Case]:
    def add(kind: str, label: str, call: Callable[[], Any], *names: str, **more: Any) -> Case:
        return Case("regularizers", kind, label, lambda: Number(call()), names, **more)

    strengths: dict[str, tuple[Any, Any]] = {
        "string": ("1", REFUSE), "none": (None, REFUSE), "complex": (1j, REFUSE),
        "object": (Thing(), REFUSE), "nan": (np.nan, REFUSE), "inf": (np.inf, REFUSE),
        "vector": (np.zeros(2), REFUSE), "list": ([0.0], REFUSE), "int": (0, ANY),
        "bool": (True, REFUSE), "unknown leaf": ({"c": 0.0}, REFUSE), "empty dict": ({}, REFUSE),
        "leaf of another shape": ({"['a']": np.zeros(5)}, REFUSE),
        "string in dict": ({"['a']": "1"}, REFUSE), "nan in dict": ({"['a']": np.nan}, REFUSE),
        "key": (KEY, REFUSE), "function": (len, REFUSE),
    }  # fmt: skip
    for penalty in (r.l1_penalty, r.l2_penalty):
        for kind, (value, expect) in strengths.items():
            yield add(f"strength: {kind}", f"{penalty.__name__}(log_strength={kind})",
                      lambda f=penalty, v=value: f(WEIGHTS, v), "log_strength", "hparams",
                      expect=expect)  # fmt: skip
        for kind, leaves in (("none there", "kernel"), ("number", 3), ("object", Thing()),
                             ("empty", ()), ("bytes", b"a"), ("list of numbers", [1])):  # fmt: skip
            yield add(f"leaves: {kind}", f"{penalty.__name__}(leaves={kind})",
                      lambda f=penalty, v=leaves: f(WEIGHTS, 0.0, leaves=v), "leaves",
                      "params")  # fmt: skip
        for kind, params in (("none", None), ("string", "w"), ("integers", np.arange(3)),
                             ("complex", np.ones(2) * 1j), ("empty", {}),
                             ("object", Thing())):  # fmt: skip
            yield add(f"params: {kind}", f"{penalty.__name__}(params={kind})",
                      lambda f=penalty, v=params: f(v, 0.0), "params", "leaves",
                      expect=ANY if kind == "integers" else REFUSE)  # fmt: skip
    for kind, make, legal in reals(0.5, strict=True):
        expect = (lambda: r.penalty_init(WEIGHTS, 0.5)) if legal else REFUSE
        yield add(kind, f"penalty_init(strength={kind})",
                  lambda m=make: r.penalty_init(WEIGHTS, m()), "strength", expect=expect,
                  rtol=1e-2)  # fmt: skip
    for level in ("Tensor", "", None, 1, [], "tensors", b"unit", Thing()):
        yield add("level", f"penalty_init(level={level!r})",
                  lambda v=level: r.penalty_init(WEIGHTS, 0.5, v), "level")  # fmt: skip
