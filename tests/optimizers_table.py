"""One table, every optimizer of optax: what `Unroll` makes of it, or the reason why not.

The names are found by introspection, so that a new one of a new release fails the test until it has
a row. Each row is run for a few steps on a tiny network in float64; the hyperparameters are its
learning rate (or what takes its place) and a penalty in the loss. The oracle is the same run
written with optax by hand, and its central differences. ``python tests/optimizers_table.py`` writes
the table of ``docs/unrolled.md`` anew.
"""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib as contrib

import bilevel
from bilevel import Status, Unroll

STEPS = 3
MODES = ("mixed", "reverse", "forward")
K = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "w": 0.5 * jax.random.normal(K[0], (3, 2)),
    "b": 0.1 + 0.1 * jnp.arange(2.0),
}
BATCH = jax.random.normal(K[1], (STEPS, 6, 3)), jax.random.normal(K[2], (STEPS, 6, 2))
ONE = jax.tree.map(lambda x: x[0], BATCH)
LAM = {"rate": jnp.float64(0.05), "decay": jnp.float64(-2.0)}


def outer(params, lam, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) - y) ** 2)


def inner(params, lam, batch):
    squares = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
    return outer(params, lam, batch) + jnp.exp(lam["decay"]) * squares


class Row(NamedTuple):
    """An optimizer, or a part of one.

    Attributes:
      make: ``make(rate) -> transformation``.
      why: what a reader should know: why it is refused, or why its derivative is what it is.
      refused: the pattern of the error in place of a hypergradient, by mode.
      marked: the status in place of ``ok``, by mode; the number is no answer then.
      rate, rtol, step: where it is called, how closely it equals its differences, their step.
      flat: hyperparameters whose derivative is truthfully zero.
      params: the parameters from those of the model (a pair for lookahead).
      evaluate: as of ``Unroll``.
    """

    make: Callable[[Any], Any]
    why: str = ""
    refused: dict[str, str] = {}
    marked: dict[str, Status] = {}
    rate: float = 0.05
    rtol: float = 1e-6
    step: float = 1e-5
    flat: tuple[str, ...] = ()
    params: Callable[[Any], Any] = lambda params: params
    evaluate: Any = None

    def factory(self, lam):
        return self.make(lam["rate"])


def then_sgd(*parts: Any) -> Callable[[Any], Any]:
    return lambda rate: optax.chain(*parts, optax.sgd(rate))


def refused(pattern: str, modes: tuple[str, ...] = MODES) -> dict[str, str]:
    return dict.fromkeys(modes, pattern)


_SIGN = "updates are signs of the gradient: flat in all but the learning rate"
_SEARCH = refused("`inner_tx` has a loop whose length", ("mixed", "reverse"))
_ARGUMENT = refused("`inner_tx` needs an argument that steps do not have")
_EXAMPLES = "needs one gradient per example", refused("`per_example_global_norm_clip` expects")
_MONITOR = (
    "its state has another structure after the first step",
    refused("training state changes its tree structure"),
)
_COARSE = "works in float32 inside, so that differences are rough"


def _silently(make: Any, *args: Any, **kwargs: Any) -> Any:
    """What is deprecated is still offered."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


def _search(rate: Any) -> Any:
    return optax.chain(optax.lbfgs(), optax.scale(rate))


OPTIMIZERS: dict[str, Row] = {
    **{
        name: Row(getattr(optax, name))
        for name in (
            "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage "
            "lamb nadam nadamw novograd optimistic_adam_v2 optimistic_gradient_descent rmsprop sgd "
            "sm3 yogi"
        ).split()
    },
    **{
        name: Row(getattr(contrib, name))
        for name in (
            "acprop ademamix adopt madgrad muon simplified_ademamix schedule_free_sgd "
            "schedule_free_adamw"
        ).split()
    },
    "lars": Row(optax.lars, rtol=1e-5),
    "lbfgs": Row(
        _search, "its line search is a loop; `linesearch=None` has none", _SEARCH, rate=0.9
    ),
    "lbfgs without a search": Row(lambda rate: optax.lbfgs(rate, linesearch=None)),
    "lion": Row(optax.lion, _SIGN, flat=("decay",)),
    "noisy_sgd": Row(lambda rate: optax.noisy_sgd(rate, key=jax.random.key(0))),
    "optimistic_adam": Row(lambda rate: _silently(optax.optimistic_adam, rate, optimism=rate)),
    # Its step is the loss over the squared gradient below a limit, which is not met here.
    "polyak_sgd": Row(lambda rate: optax.chain(optax.polyak_sgd(1e3), optax.scale(rate))),
    "radam": Row(
        optax.radam,
        "takes the root of a negative number in its first steps, which reverse mode cannot pass",
        marked=dict.fromkeys(("mixed", "reverse"), Status.nonfinite_output),
    ),
    "rprop": Row(optax.rprop, _SIGN, flat=("decay",)),
    "sign_sgd": Row(optax.sign_sgd, _SIGN, flat=("decay",)),
    "signum": Row(optax.signum, _SIGN, flat=("decay",)),
    "cocob": Row(
        contrib.cocob, "its steps do not change with the scale of the gradient", flat=("rate",)
    ),
    "dadapt_adamw": Row(lambda rate: contrib.dadapt_adamw(rate, estim_lr0=0.03), rate=1.0),
    "prodigy": Row(lambda rate: contrib.prodigy(rate, estim_lr0=0.03), rate=1.0),
    "mechanize": Row(lambda rate: contrib.mechanize(optax.adam(rate), s_init=0.1), rate=1.0),
    "dog": Row(lambda rate: contrib.dog(rate, init_step=("heuristic", 0.1)), rate=1.5),
    "dowg": Row(lambda rate: contrib.dowg(rate, init_estim_sq_dist=0.1), rate=1.0),
    "dpsgd": Row(lambda rate: _silently(contrib.dpsgd, rate, 1.0, 0.1, 0), *_EXAMPLES),
    "galore": Row(contrib.galore, _COARSE, rtol=1e-2, step=1e-2),
    "momo": Row(contrib.momo),
    "momo_adam": Row(contrib.momo_adam),
    "sophia": Row(
        contrib.sophia, "draws Hessian products of a loss that steps do not pass", _ARGUMENT
    ),
    "sam": Row(lambda rate: contrib.sam(optax.sgd(rate), _ascend())),
    "sam, opaque": Row(
        lambda rate: contrib.sam(optax.sgd(rate), _ascend(), opaque_mode=True),
        "needs a gradient function; without `opaque_mode` it does not",
        _ARGUMENT,
    ),
    "schedule_free": Row(
        lambda rate: contrib.schedule_free(optax.sgd(rate), rate),
        evaluate=contrib.schedule_free_eval_params,
    ),
    "lookahead": Row(
        lambda rate: optax.lookahead(optax.adam(rate), 2, 0.5),
        params=optax.LookaheadParams.init_synced,
    ),
    "reduce_on_plateau": Row(
        lambda rate: optax.chain(optax.sgd(rate), contrib.reduce_on_plateau(patience=1))
    ),
    "MultiSteps": Row(
        lambda rate: optax.MultiSteps(optax.sgd(rate), 2), _COARSE, rtol=1e-3, step=1e-3
    ),
    "inject_hyperparams": Row(lambda rate: optax.inject_hyperparams(optax.adam)(rate)),
}


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), params)


def _ascend() -> Any:
    return optax.chain(contrib.normalize(), optax.sgd(0.05))


_KEEP = {"w": True, "b": False}

# What optimizers are made of, and what wraps one: tested in the slow tier.
PARTS: dict[str, Row] = {
    **{
        name: Row(then_sgd(getattr(optax, name)()))
        for name in (
            "scale_by_adadelta scale_by_adam scale_by_adamax scale_by_adan scale_by_amsgrad "
            "scale_by_belief scale_by_factored_rms scale_by_lbfgs scale_by_novograd "
            "scale_by_optimistic_gradient scale_by_param_block_norm scale_by_param_block_rms "
            "scale_by_rms scale_by_rss scale_by_sm3 scale_by_stddev scale_by_trust_ratio "
            "scale_by_yogi centralize identity zero_nans"
        ).split()
    },
    **{
        name: Row(then_sgd(getattr(contrib, name)()))
        for name in (
            "scale_by_acprop scale_by_ademamix scale_by_adopt "
            "scale_by_simplified_ademamix normalize"
        ).split()
    },
    "scale_by_lion": Row(then_sgd(optax.scale_by_lion()), _SIGN, flat=("decay",)),
    "scale_by_sign": Row(then_sgd(optax.scale_by_sign()), _SIGN, flat=("decay",)),
    "scale_by_rprop": Row(
        lambda rate: optax.chain(optax.scale_by_rprop(rate), optax.scale(-1.0)),
        _SIGN,
        flat=("decay",),
    ),
    "scale_by_radam": Row(
        then_sgd(optax.scale_by_radam()), OPTIMIZERS["radam"].why, marked=OPTIMIZERS["radam"].marked
    ),
    "scale_by_cocob": Row(
        lambda rate: optax.chain(
            contrib.scale_by_cocob(), optax.scale_by_learning_rate(rate, flip_sign=False)
        )
    ),
    "scale_by_galore": Row(then_sgd(contrib.scale_by_galore()), _COARSE, rtol=1e-2, step=1e-2),
    "scale_by_madgrad": Row(contrib.scale_by_madgrad),
    "scale_by_muon": Row(  # for matrices
        lambda rate: optax.partition(
            {
                "m": then_sgd(contrib.scale_by_muon(weight_dimension_numbers=_matrices))(rate),
                "s": optax.sgd(rate),
            },
            {"w": "m", "b": "s"},
        )
    ),
    "scale_by_polyak": Row(then_sgd(optax.scale_by_polyak(max_learning_rate=1e3))),
    "scale_by_distance_over_gradients": Row(
        then_sgd(optax.scale_by_distance_over_gradients(reps_rel=0.1, param_dtype=jnp.float64))
    ),
    "scale_by_backtracking_linesearch": Row(
        lambda rate: optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5), optax.scale(rate)
        )
    ),
    "scale_by_zoom_linesearch": Row(
        lambda rate: optax.chain(
            optax.sgd(1.0), optax.scale_by_zoom_linesearch(5), optax.scale(rate)
        ),
        OPTIMIZERS["lbfgs"].why,
        _SEARCH,
    ),
    "scale": Row(lambda rate: optax.scale(-rate)),
    "scale_by_learning_rate": Row(optax.scale_by_learning_rate),
    "scale_by_schedule": Row(
        lambda rate: optax.scale_by_schedule(lambda count: -rate / (1 + count))
    ),
    "add_decayed_weights": Row(
        lambda rate: optax.chain(optax.add_decayed_weights(rate), optax.sgd(0.1))
    ),
    "add_noise": Row(then_sgd(optax.add_noise(0.01, 0.5, jax.random.key(0)))),
    "adaptive_grad_clip": Row(then_sgd(optax.adaptive_grad_clip(0.1))),
    "clip": Row(then_sgd(optax.clip(0.1))),
    "clip_by_block_rms": Row(then_sgd(optax.clip_by_block_rms(0.05))),
    "clip_by_global_norm": Row(then_sgd(optax.clip_by_global_norm(0.1))),
    "normalize_by_update_norm": Row(then_sgd(optax.normalize_by_update_norm())),
    "trace": Row(lambda rate: optax.chain(optax.trace(rate), optax.sgd(0.1))),
    "ema": Row(lambda rate: optax.chain(optax.ema(rate), optax.sgd(0.1))),
    "apply_every": Row(lambda rate: optax.chain(optax.sgd(rate), optax.apply_every(2))),
    "apply_if_finite": Row(lambda rate: optax.apply_if_finite(optax.adam(rate), 3)),
    "chain": Row(lambda rate: optax.chain(optax.adam(rate))),
    "named_chain": Row(lambda rate: optax.named_chain(("adam", optax.adam(rate)))),
    "conditionally_mask": Row(
        lambda rate: optax.conditionally_mask(optax.adam(rate), lambda step, **_: step < 2)
    ),
    "conditionally_transform": Row(
        lambda rate: optax.conditionally_transform(optax.adam(rate), lambda step, **_: step < 2)
    ),
    "flatten": Row(lambda rate: optax.flatten(optax.adam(rate))),
    "freeze": Row(lambda rate: optax.chain(optax.adam(rate), optax.freeze(_KEEP))),
    "selective_transform": Row(
        lambda rate: optax.selective_transform(optax.adam(rate), freeze_mask=_KEEP)
    ),
    "masked": Row(lambda rate: optax.masked(optax.adam(rate), _KEEP)),
    **{
        name: Row(
            lambda rate, name=name: getattr(optax, name)(
                {"a": optax.adam(rate), "s": optax.sgd(rate)}, {"w": "a", "b": "s"}
            )
        )
        for name in ("partition", "multi_transform")
    },
    "inject_stateful_hyperparams": Row(
        lambda rate: _silently(optax.inject_stateful_hyperparams, optax.adam)(rate)
    ),
    "keep_params_nonnegative": Row(
        lambda rate: optax.chain(optax.adam(rate), optax.keep_params_nonnegative())
    ),
    "split_real_and_imaginary": Row(
        lambda rate: contrib.split_real_and_imaginary(optax.adam(rate))
    ),
    "with_extra_args_support": Row(lambda rate: optax.with_extra_args_support(optax.adam(rate))),
    "stateless": Row(
        lambda rate: optax.stateless(lambda g, _: jax.tree.map(lambda x: -rate * x, g))
    ),
    "stateless_with_tree_map": Row(
        lambda rate: optax.stateless_with_tree_map(lambda g, _: -rate * g)
    ),
    "set_to_zero": Row(
        lambda rate: optax.chain(optax.sgd(rate), optax.set_to_zero()),
        "nothing moves",
        refused("No derivative reaches"),
    ),
    "measure_with_ema": Row(
        lambda rate: optax.chain(
            optax.adam(rate),
            optax.monitor({"norm": optax.measure_with_ema(lambda g: optax.tree.norm(g), 0.9)}),
        ),
        *_MONITOR,
    ),
    "monitor": Row(
        lambda rate: optax.chain(
            optax.adam(rate), optax.monitor({"norm": lambda g: optax.tree.norm(g)})
        ),
        *_MONITOR,
    ),
    "snapshot": Row(
        lambda rate: optax.chain(
            optax.adam(rate), optax.snapshot("norm", lambda g: optax.tree.norm(g))
        )
    ),
    "differentially_private_aggregate": Row(
        lambda rate: _silently(
            then_sgd(_silently(contrib.differentially_private_aggregate, 1.0, 0.1, 0)), rate
        ),
        *_EXAMPLES,
    ),
    "hutchinson_estimator_diag_hessian": Row(
        then_sgd(contrib.hutchinson_estimator_diag_hessian()), OPTIMIZERS["sophia"].why, _ARGUMENT
    ),
}


def offered() -> set[str]:
    """The names of everything in optax that makes a gradient transformation."""
    found = {"MultiSteps"}  # the one class
    for module in (optax, contrib):
        for name, value in vars(module).items():
            if name.startswith("_") or not callable(value) or inspect.isclass(value):
                continue
            hints = str(getattr(value, "__annotations__", {}).get("return"))
            try:
                takes = inspect.signature(value).parameters
            except (TypeError, ValueError):
                continue
            if (
                "GradientTransformation" in hints
                or "learning_rate" in takes
                or name.startswith("scale_by_")
                or name in ("monitor", "hutchinson_estimator_diag_hessian")
            ):
                found.add(name)
    return found


def by_hand(row: Row, lam: Any) -> Any:
    """The outer loss after the run: a Python loop, no part of the library."""
    params = row.params(PARAMS)
    pair = isinstance(params, optax.LookaheadParams)
    tx = row.factory(lam)
    state = tx.init(params)
    loss = (lambda w, lam, b: inner(w.fast, lam, b)) if pair else inner
    for t in range(STEPS):
        batch = jax.tree.map(lambda x, t=t: x[t], BATCH)
        value, grads = jax.value_and_grad(loss)(params, lam, batch)
        extra = {}
        if isinstance(tx, optax.GradientTransformationExtraArgs):
            accepted = inspect.signature(tx.update).parameters.values()
            extra = {"value": value, "grad": grads, "value_fn": lambda w, b=batch: loss(w, lam, b)}
            if not any(p.kind is p.VAR_KEYWORD for p in accepted):
                extra = {p.name: extra[p.name] for p in accepted if p.name in extra}
        updates, state = tx.update(grads.fast if pair else grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    if row.evaluate is not None:
        params = row.evaluate(state, params)
    return outer(params.slow if pair else params, lam, ONE)


def solve(row: Row, lam: Any, mode: str) -> Any:
    params = row.params(PARAMS)
    losses = (outer, inner)
    if isinstance(params, optax.LookaheadParams):
        losses = (lambda w, lam, b: outer(w.slow, lam, b), lambda w, lam, b: inner(w.fast, lam, b))
    response = Unroll(row.factory, STEPS, mode=mode, evaluate=row.evaluate)
    return bilevel.hypergrad_solve(
        *losses, response, params, lam, inner_batch=BATCH, outer_batch=ONE
    )


def start(row: Row) -> Any:
    return {**LAM, "rate": jnp.float64(row.rate)}


def differences(row: Row, mode: str) -> tuple[Any, Any, Any]:
    """The solution, the value by hand, and central differences of it; one program."""
    lam, h = start(row), row.step
    shifts = jnp.array([0.0, h, -h, 0.0, 0.0]), jnp.array([0.0, 0.0, 0.0, h, -h])
    points = {"rate": lam["rate"] + shifts[0], "decay": lam["decay"] + shifts[1]}

    @jax.jit
    def run(lam, points):
        return solve(row, lam, mode), jax.vmap(lambda lam: by_hand(row, lam))(points)

    sol, values = run(lam, points)
    values = np.asarray(values)
    slopes = {
        "rate": (values[1] - values[2]) / (2 * h),
        "decay": (values[3] - values[4]) / (2 * h),
    }
    return sol, values[0], slopes


def outcome(row: Row) -> str:
    """What `Unroll` makes of an optimizer, in a few words."""
    bad = {**row.marked, **row.refused}
    if set(bad) == set(MODES):
        return "error"
    if bad:
        told = "error" if row.refused else f"status `{next(iter(row.marked.values())).name}`"
        return f"`forward` equals differences; {told} in the others"
    if row.flat:
        flat = " and ".join({"rate": "the learning rate", "decay": "all else"}[k] for k in row.flat)
        return f"equals differences; zero in {flat}"
    return "equals differences"


def page() -> str:
    """The table of ``docs/unrolled.md``."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, row in {**OPTIMIZERS, **PARTS}.items():
        if name in OPTIMIZERS or outcome(row) != "equals differences":
            groups.setdefault((outcome(row), row.why), []).append(f"`{name}`")
    lines = ["| optimizers | hypergradient | why |", "|---|---|---|"]
    lines += [f"| {', '.join(sorted(n))} | {o} | {why} |" for (o, why), n in sorted(groups.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCS = Path(__file__).parent.parent / "docs" / "unrolled.md"
    text = DOCS.read_text()
    first = text.index("| optimizers | hypergradient | why |")
    last = text.index("\n\n", first) + 1
    DOCS.write_text(text[:first] + page() + text[last:])
