"""Functions that a caller hands over: one of another form is refused, by name, when traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import (
    Dense,
    Evolution,
    FiniteDifference,
    GaussNewton,
    Implicit,
    LinearModel,
    Unroll,
    Woodbury,
)

X, Y = np.eye(3), np.arange(3.0)
W, LAM, BATCH = np.ones(3), np.zeros(3), (X, Y)
SGD = optax.sgd(0.1)
KEY = jax.random.key(0)


def model(w, lam, batch):
    return batch[0] @ w


def output_loss(z, lam, batch):
    return 0.5 * jnp.mean((z - batch[1]) ** 2)


def penalty(w, lam):
    return 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def outer(w, lam, batch):
    return output_loss(model(w, lam, batch), lam, batch)


def inner(w, lam, batch):
    return outer(w, lam, batch) + penalty(w, lam)


SPLIT = dict(model=model, output_loss=output_loss, penalty=penalty)


def solve(response, batch=BATCH, **options):
    """Traced only: what is refused must be refused then."""
    return jax.eval_shape(
        lambda: bilevel.hypergrad_solve(
            outer, inner, response, W, LAM, inner_batch=batch, outer_batch=BATCH, key=KEY, **options
        )
    )


def stacked(steps=2):
    return jax.tree.map(lambda x: np.broadcast_to(x, (steps, *x.shape)), BATCH)


def gauss_newton(solver=Dense, **changes):
    return Implicit(solver(), GaussNewton(damping=0.1, **(SPLIT | changes)))


def best_response(**changes):
    split = GaussNewton(**(SPLIT | changes))
    return bilevel.BestResponse(tx=SGD, steps=1, linearize=split)


def test_the_good_forms_pass():
    for response in (gauss_newton(), gauss_newton(Woodbury), best_response()):
        solve(response)
    solve(gauss_newton(model=jax.jit(model), penalty=functools.partial(penalty)))
    solve(gauss_newton(penalty=lambda w, lam: 0.0))
    solve(gauss_newton(model=LinearModel(lambda lam, batch: batch[0]), penalty=None))
    solve(Unroll(lambda lam, rate=0.1: optax.sgd(rate), 2), stacked())
    solve(Unroll(SGD, 2, initial=lambda w, lam: w + lam), stacked())
    solve(Unroll(SGD, 2, initial=lambda w, lam: np.ones(3, np.int32)), stacked())
    solve(Unroll(SGD, 2, evaluate=lambda state, w: w), stacked())


@pytest.mark.parametrize("make", [gauss_newton, best_response])
@pytest.mark.parametrize(
    ("part", "given", "match"),
    [
        ("model", lambda w, lam: w, r"`model` cannot be called as model\(params, hparams, batch\)"),
        ("model", lambda *_: None, r"`model` must return the outputs \(arrays\), got .*None"),
        ("output_loss", lambda z: z, r"`output_loss` cannot be called as output_loss\(outputs, hp"),
        ("output_loss", lambda z, lam, b: z, r"`output_loss` must return a scalar, .*shape \(3,\)"),
        (
            "penalty",
            lambda w: 0.0,
            r"`penalty` cannot be called as penalty\(params, hparams\): too",
        ),
        ("penalty", lambda w, lam: w, r"`penalty` must return a scalar, got an array of shape"),
        ("penalty", lambda w, lam: None, "`penalty` must return a scalar, got .*a sum or a mean"),
    ],
)
def test_parts_of_a_split_loss(make, part, given, match):
    with pytest.raises(TypeError, match=match):
        solve(make(**{part: given}))


def test_parts_of_a_split_loss_in_self_tuning():
    split = GaussNewton(**(SPLIT | {"penalty": lambda w: 0.0}))
    tuned = bilevel.self_tuning(outer, inner, SGD, SGD, inner_steps=1, groups=1, linearize=split)
    state = tuned.init(W, LAM)
    step = functools.partial(tuned.step, inner_batches=stacked(1), outer_batch=BATCH, key=KEY)
    with pytest.raises(TypeError, match=r"`penalty` cannot be called as penalty\(params, hparams"):
        jax.eval_shape(step, state)


def test_parts_of_a_split_loss_beside_frozen_leaves():
    """There the library wraps them, and asks for the signature of what is inside."""

    def of(loss):
        return lambda w, *rest: loss(w["w"], *rest)

    frozen = optax.multi_transform(
        {"train": SGD, "freeze": optax.set_to_zero()}, {"w": "train", "c": "freeze"}
    )
    response = gauss_newton(model=of(model), penalty=lambda w: 0.0)
    alternation = bilevel.alternate(of(outer), of(inner), response, frozen, SGD, inner_steps=1)
    state = alternation.init({"w": W, "c": W}, LAM)
    step = functools.partial(alternation.step, inner_batches=stacked(1), outer_batch=BATCH)
    with pytest.raises(TypeError, match=r"`penalty` cannot be called as penalty\(params, hparams"):
        jax.eval_shape(step, state)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: GaussNewton(model, output_loss, penalty=dict), "`penalty` must be callable"),
        (lambda: GaussNewton(dict, output_loss), "`model` must be callable .a function, not a cl"),
        (lambda: GaussNewton(model, dict), "`output_loss` must be callable"),
        (lambda: LinearModel(dict), "`features` must be callable"),
        (lambda: LinearModel(lambda batch: batch), r"`features` cannot be called as features\(hpa"),
        (lambda: Unroll(SGD, 2, initial=dict), "`initial` must be callable"),
        (lambda: Unroll(SGD, 2, initial=lambda w: w), r"`initial` cannot be called as initial\(pa"),
        (lambda: Unroll(SGD, 2, evaluate=dict), "`evaluate` must be callable"),
        (lambda: Unroll(SGD, 2, evaluate=lambda w: w), r"`evaluate` cannot be called as evaluate"),
        (lambda: Unroll(SGD.update, 2), r"`inner_tx` cannot be called as .*not its `update`"),
        (lambda: Evolution(SGD.update, 2, 2, 0.1), r"`inner_tx` cannot be called as inner_tx\(hpa"),
        (lambda: FiniteDifference(SGD.update), r"`inner_tx` cannot be called as inner_tx\(hparams"),
    ],
)
def test_settings_that_are_functions(make, match):
    with pytest.raises(TypeError, match=match):
        make()


@pytest.mark.parametrize("setting", ["initial", "evaluate"])
@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (lambda *_: None, TypeError, "`{}` returned None: end it with a `return`"),
        (lambda *_: "w", TypeError, "the result of `{}` is a str, expected an array of numbers"),
        (lambda *_: {"w": W}, ValueError, "the result of `{}` has another tree structure"),
        (lambda *_: W[:2], ValueError, r"the result of `{}` has shape \(2,\), expected \(3,\)"),
    ],
)
def test_what_settings_of_unroll_return(setting, given, error, match):
    with pytest.raises(error, match=match.format(setting)):
        solve(Unroll(SGD, 2, **{setting: given}), stacked())


def several(outer, inner, **options):
    given = dict(inner_batch=BATCH, outer_batch=BATCH, argnums=(1, 2)) | options
    return jax.eval_shape(
        lambda: bilevel.hypergrad_solve(outer, inner, Implicit(Dense()), W, LAM, LAM, **given)
    )


def three(w, a, b, batch):
    return inner(w, a + b, batch)


def test_losses_of_several_hyperparameters():
    several(three, three)
    form = r"cannot be called as loss\(params, hparams_1, hparams_2, batch\): .*functools.partial"
    for argnums in (1, (1, 2)):
        with pytest.raises(TypeError, match=f"`inner` {form}"):
            several(three, inner, argnums=argnums)
        with pytest.raises(TypeError, match=f"`outer` {form}"):
            several(lambda w, a, b, batch, more: 0.0, three, argnums=argnums)
    with pytest.raises(TypeError, match=r"loss\(params, hparams_1, hparams_2, batch, model_state"):
        several(three, three, has_state=True)
    with pytest.raises(TypeError, match=f"`inner` {form}"):
        bilevel.hypergrad_init(three, inner, Implicit(), W, LAM, LAM)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (lambda key, lam: None, TypeError, "`sample` returned None"),
        (lambda key, lam: "lam", TypeError, "the result of `sample` is a str"),
        (lambda key, lam: {"a": lam}, ValueError, "the result of `sample` has another tree"),
        (lambda key, lam: lam[:2], ValueError, r"the result of `sample` has shape \(2,\)"),
        (lambda key: None, TypeError, r"`sample` cannot be called as sample\(key, hparams\)"),
    ],
)
def test_draws_of_global_response(given, error, match):
    network = bilevel.StructuredResponse(centred=False)

    def run(sample):
        made = bilevel.global_response(outer, inner, network, sample, SGD, SGD, draws=2)
        call = dict(inner_batches=stacked(1), outer_batch=BATCH, key=KEY)
        return jax.eval_shape(functools.partial(made.step, **call), made.init(W, LAM))

    run(lambda key, lam: jnp.round(lam).astype(jnp.int32))  # cast, as always
    with pytest.raises(error, match=match):
        run(given)


RUN = bilevel.alternate(outer, inner, Implicit(Dense()), SGD, SGD, inner_steps=1)


def spoilt(part, **changes):
    state = RUN.init(W, LAM)
    return state._replace(**{part: getattr(state, part)._replace(**changes)})


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        (r"`evaluate` cannot be called as evaluate\(point\)", {"evaluate": lambda: 0.0}),
        ("`evaluate` must be a function", {"evaluate": dict}),
        (r"`callbacks\[1\]` cannot be called as callback\(step, record\)",
         {"callbacks": [lambda i, r: None, lambda r: None]}),
        (r"`callbacks\[0\]` must be a function", {"callbacks": [dict]}),
        ("`inner_data` is None: .*an empty tuple", {"inner_data": None}),
        ("`outer_data` returned None at step 0: end it", {"outer_data": lambda i: None}),
        (r"state.trained.params is a str, but `state` must be",
         {"state": spoilt("trained", params="w")}),
        (r"state.outer.hparams\['a'\] is a object, but `state`",
         {"state": spoilt("outer", hparams={"a": object()})}),
    ],
)  # fmt: skip
def test_functions_and_data_of_fit(match, changes):
    call = dict(alg=RUN, state=RUN.init(W, LAM), inner_data=stacked(1), outer_data=BATCH, steps=1)
    with pytest.raises(TypeError, match=match):
        bilevel.fit(**(call | changes), progress=False)


def test_fit_takes_an_empty_tuple_for_no_data():
    """``None`` is a mistake there, but a loss may read nothing."""
    quiet = lambda w, lam, batch: penalty(w, lam)  # noqa: E731
    run = bilevel.alternate(quiet, inner, Implicit(Dense()), SGD, SGD, inner_steps=1)
    result = bilevel.fit(run, run.init(W, LAM), stacked(1), (), steps=2, progress=False)
    assert np.isfinite(result.best_value)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        (r"`sample` cannot be called as sample\(key\)", {"sample": lambda: 0}),
        ("`sample` must be a function key", {"sample": dict}),
        (r"`score` cannot be called as score\(state\)", {"score": lambda: 0.0}),
        ("state.trained.params is a str", {"state": spoilt("trained", params="w")}),
    ],
)
def test_functions_of_scan_run(match, changes):
    call = dict(algorithm=RUN, state=RUN.init(W, LAM), sample=lambda key: 0, steps=1, key=KEY)
    with pytest.raises(TypeError, match=match):
        bilevel.scan_run(**(call | changes))


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        (r"`solve` cannot be called as solve\(params, hparams, batch\)", {"solve": lambda w: w}),
        ("`solve` must be a function", {"solve": dict}),
        (r"`step` has shape \(2,\), expected one number", {"step": np.full(2, 1e-3)}),
        (r"`step` is empty", {"step": np.zeros(0)}),
        (r"`tolerance` has shape \(1,\), expected one number", {"tolerance": np.full(1, 1e-3)}),
        ("hparams is not finite", {"hparams": np.array([0.0, np.inf, 0.0])}),
        ("params is not finite", {"params": np.array([0.0, np.nan, 0.0])}),
        ("`resolve_first` must be True or False", {"resolve_first": 1}),
        ("`has_state` must be True or False", {"has_state": 1}),
        (
            r"params\['f'\] is a custom_jvp, .*bilevel.split_nnx",
            {"params": {"w": W, "f": jax.nn.relu}},
        ),
    ],
)
def test_arguments_of_check_hypergrad(match, changes):
    call = dict(outer=outer, inner=inner, response=Implicit(Dense()), params=W, hparams=LAM)
    with pytest.raises((TypeError, ValueError), match=match):
        bilevel.check_hypergrad(**(call | changes), inner_batch=BATCH, outer_batch=BATCH)


def test_switches_are_booleans():
    tuned = functools.partial(bilevel.self_tuning, outer, inner, SGD, SGD)
    plain = functools.partial(bilevel.alternate, outer, inner, Implicit(), SGD, SGD, 1)
    solved = functools.partial(bilevel.with_response, lambda w, lam, b: w, inner, Implicit())
    for name, call in (
        ("tune_scales", lambda v: tuned(tune_scales=v)),
        ("has_state", lambda v: tuned(has_state=v)),
        ("has_state", lambda v: plain(has_state=v)),
        ("has_aux", lambda v: plain(has_aux=v)),
        ("unroll", lambda v: plain(unroll=v)),
        ("has_aux", lambda v: solved(has_aux=v)),
        ("has_status", lambda v: solved(has_status=v)),
        ("has_aux", lambda v: solve(Implicit(Dense()), has_aux=v)),
        ("has_state", lambda v: solve(Implicit(Dense()), has_state=v)),
        ("print", lambda v: bilevel.diagnose(inner, W, LAM, inner_batch=BATCH, print=v)),
    ):
        for value in (1, "yes", jax.random.key(0)):
            with pytest.raises(TypeError, match=f"`{name}` must be True or False"):
                call(value)
    plain(unroll=None)
    plain(unroll=np.True_)


def test_arguments_of_self_tuning():
    tuned = functools.partial(bilevel.self_tuning, outer, inner, SGD, SGD)
    with pytest.raises(ValueError, match=r"`entropy` has shape \(2,\), expected one number"):
        tuned(entropy=np.zeros(2))
    with pytest.raises(ValueError, match="`shared`: no leaf has 'dacay' in its path"):
        tuned(shared="dacay").init(W, {"decay": LAM})
    for scale in (None, {}, [0.5]):
        with pytest.raises(ValueError, match="`scale` must be a scalar or a tree like `hparams`"):
            tuned(scale=scale).init(W, LAM)
        with pytest.raises(ValueError, match="`scale` must be a scalar or a tree like `hparams`"):
            solve(bilevel.BestResponse(tx=SGD, steps=1, scale=scale))


def test_bounds_name_their_end():
    for lo, hi, name in ((KEY, 1.0, "lo"), (0.0, KEY, "hi")):
        with pytest.raises(TypeError, match=f"`{name}` must be a real number known in advance"):
            bilevel.Interval(lo, hi)
    space = bilevel.Space(bilevel.Integer(1, 2**60))
    with pytest.raises(ValueError, match=r"its bound is `Integer\(lo=1, hi=1152921504606846976\)`"):
        space.constrain(jnp.zeros(()))
