"""Every message for bad input: it names the argument, what was expected and what to do."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import (
    CG,
    Dense,
    Diagonal,
    GaussNewton,
    Hessian,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    Stochastic,
    Woodbury,
)


def inner(w, lam, batch):
    return 0.5 * jnp.sum((w["a"] - batch) ** 2) + 0.5 * jnp.sum(lam["decay"] * w["a"] ** 2)


def outer(w, lam, batch):
    return 0.5 * jnp.sum((w["a"] - batch) ** 2)


W = {"a": np.ones(3)}
LAM = {"decay": np.ones(3)}
BATCH = np.arange(3.0)


def call(response=None, *, outer=outer, inner=inner, w=W, lam=LAM, tr=BATCH, va=BATCH, **options):
    """Everything here must be raised by tracing alone."""
    response = Implicit(CG()) if response is None else response
    return jax.eval_shape(
        lambda: bilevel.hypergrad_solve(
            outer, inner, response, w, lam, inner_batch=tr, outer_batch=va, **options
        )
    )


def test_the_good_call_passes():
    call()


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        # leaves that are not real floating-point arrays, by path
        (TypeError, r"hparams\['holes'\] has dtype int.*relax the integer",
         {"lam": {**LAM, "holes": np.arange(3)}}),
        (TypeError, r"hparams\['decay'\] has dtype complex", {"lam": {"decay": np.ones(3) * 1j}}),
        (TypeError, r"hparams\['name'\] is a str, expected a real floating-point array",
         {"lam": {**LAM, "name": "l2"}}),
        (TypeError, r"params\['steps'\] has dtype int.*Split the model",
         {"w": {**W, "steps": np.arange(2)}}),
        (TypeError, r"params\['flag'\] has dtype bool", {"w": {**W, "flag": np.ones(2, bool)}}),
        (ValueError, "`params` has no leaves", {"w": {}}),
        (ValueError, "`hparams` has no leaves", {"lam": {}}),
        # batches
        (ValueError, r"inner_batch\['x'\] is empty \(shape \(0, 3\)\): expected at least one",
         {"tr": {"x": np.zeros((0, 3))}}),
        (ValueError, r"outer_batch is empty", {"va": np.zeros((0,))}),
        # losses that are not one real number
        (TypeError, r"`inner` must return a scalar, got an array of shape \(3,\).*take the mean",
         {"inner": lambda w, lam, b: lam["decay"] * (w["a"] - b)}),
        (TypeError, r"`outer` must return a scalar, got an array of shape \(3,\).*take the mean",
         {"outer": lambda w, lam, b: w["a"] - b}),
        (TypeError, r"`outer` must return a scalar, got PyTreeDef.*`has_aux=True`",
         {"outer": lambda w, lam, b: (outer(w, lam, b), 1)}),
        (TypeError, r"`inner` must return a scalar, got PyTreeDef.*no auxiliary output",
         {"inner": lambda w, lam, b: (inner(w, lam, b), 1)}),
        (TypeError, "`inner` must return a real floating-point scalar, got complex",
         {"inner": lambda w, lam, b: 1j * inner(w, lam, b)}),
        (TypeError, "`outer` must return a real floating-point scalar, got int",
         {"outer": lambda w, lam, b: jnp.sum(w["a"] > 0)}),
        (TypeError, r"`outer` must return a pair \(scalar, aux\)", {"has_aux": True}),
        (TypeError, r"`outer` must return a pair \(scalar, model_state\)",
         {"has_state": True, "outer": lambda w, lam, b, s: outer(w, lam, b)}),
        (TypeError, r"`inner` must return a pair \(scalar, model_state\)",
         {"has_state": True, "outer": lambda w, lam, b, s: (outer(w, lam, b), s),
          "inner": lambda w, lam, b, s: inner(w, lam, b)}),
        (TypeError, r"\(scalar, \(model_state, aux\)\)",
         {"has_state": True, "has_aux": True, "outer": lambda w, lam, b, s: (outer(w, lam, b), s)}),
        (ValueError, "model state returned by `outer` has another tree structure",
         {"has_state": True, "model_state": {"mean": np.ones(2)},
          "outer": lambda w, lam, b, s: (outer(w, lam, b), 0.0)}),
        (ValueError, r"model state returned by `outer`\['mean'\] has shape \(3,\), expected \(2,\)",
         {"has_state": True, "model_state": {"mean": np.ones(2)},
          "outer": lambda w, lam, b, s: (outer(w, lam, b), {"mean": jnp.ones(3)})}),
        (ValueError, "`model_state` is given but `has_state` is False", {"model_state": 1.0}),
        (TypeError, r"`inner` must be a function loss\(params, hparams, batch\)", {"inner": 3}),
        (TypeError, r"`outer` must be a function loss\(params, hparams, batch\)", {"outer": "mse"}),
        # trees and shapes that do not fit
        (ValueError, "state has another tree structure", {"state": np.ones(3)}),
        (ValueError, r"state\['a'\] has shape \(4,\), expected \(3,\)",
         {"state": {"a": np.ones(4)}}),
        # argnums
        (ValueError, r"`argnums` must be 1 or higher, got 0: position 0 is `params`",
         {"argnums": 0}),
        (ValueError, "`argnums` must be 1 or higher, got -1", {"argnums": -1}),
        (ValueError, r"names position 2, but the losses receive params and 1 hyperparameter",
         {"argnums": 2}),
        (ValueError, "`argnums` repeats a position", {"argnums": (1, 1)}),
        (TypeError, "`argnums` must be an int or a sequence of ints", {"argnums": 1.0}),
        (TypeError, "`argnums` must be an int or a sequence of ints", {"argnums": ()}),
        (TypeError, "`argnums` must be an int or a sequence of ints", {"argnums": "1"}),
        # a response that is none
        (TypeError, "`response` must be a response such as `Implicit", {"response": CG()}),
        (TypeError, "`response` must be a response such as `Implicit", {"response": Implicit}),
    ],
)  # fmt: skip
def test_messages_of_a_call(error, match, options):
    with pytest.raises(error, match=match):
        call(**options)


def test_unread_hyperparameter_is_named_with_the_response_that_could_see_it():
    lam = {**LAM, "learning_rate": np.ones(()), "margin": np.ones(())}
    with pytest.raises(ValueError) as caught:
        call(lam=lam, outer=lambda w, lam, b: outer(w, lam, b) + lam["margin"])
    message = str(caught.value)
    assert "hparams['learning_rate']" in message
    assert "margin" not in message and "decay" not in message  # the outer loss reads the margin
    assert "`Unroll(inner_tx=lambda hparams: ..., steps=...)`" in message
    assert "`BestResponse`" in message


def test_hyperparameter_that_shifts_the_inner_loss_only_is_unread():
    with pytest.raises(ValueError, match=r"No derivative reaches hparams\['shift'\]"):
        call(
            lam={**LAM, "shift": np.ones(())},
            inner=lambda w, lam, b: inner(w, lam, b) + lam["shift"] ** 2,
        )


def test_hyperparameter_read_by_a_comparison_only_is_unread():
    with pytest.raises(ValueError, match=r"No derivative reaches hparams\['rate'\]"):
        call(
            lam={**LAM, "rate": np.ones(())},
            inner=lambda w, lam, b: jnp.sum(w["a"] ** 2 * (b < lam["rate"])) + inner(w, lam, b),
        )


def test_missing_hparams_and_batches():
    g = bilevel.hypergrad(outer, inner)
    with pytest.raises(TypeError, match="`hparams` is missing: pass it after `params`"):
        g(W, inner_batch=BATCH, outer_batch=BATCH)
    with pytest.raises(TypeError, match="inner_batch"):
        g(W, LAM, outer_batch=BATCH)
    with pytest.raises(TypeError):
        g(W, LAM, BATCH, BATCH)  # positions are hyperparameters, never batches
    with pytest.raises(ValueError, match="`argnums` must be 1 or higher"):
        bilevel.hypergrad(outer, inner, argnums=0)  # said before the first call


def test_wrong_shape_inside_a_loss_is_jaxs_own_message():
    with pytest.raises((TypeError, ValueError), match="shape"):
        call(tr=np.ones(4))


def test_missing_key():
    for solver in (Nystrom(2), CG(preconditioner=Diagonal())):
        with pytest.raises(ValueError, match=r"draws random numbers. Pass `key=jax.random.key"):
            call(Implicit(solver, Hessian(0.1)))
    call(Implicit(Nystrom(2), Hessian(0.1)), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: CG(max_steps=0), ValueError, "`max_steps` must be at least 1, got 0"),
        (lambda: CG(max_steps=2.5), TypeError, "`max_steps` must be a Python int"),
        (lambda: CG(max_steps=True), TypeError, "`max_steps` must be a Python int"),
        (lambda: CG(rtol=-1e-3), ValueError, "`rtol` must be at least 0, got -0.001"),
        (lambda: CG(atol=float("nan")), ValueError, "`atol` must be at least 0, got nan"),
        (lambda: Neumann(-1), ValueError, "`num_matvecs` must be at least 0"),
        (lambda: Neumann(5, step_size=0.0), ValueError, "`step_size` must be greater than 0"),
        (lambda: Stochastic(optax.sgd(0.1), 0), ValueError, "`steps` must be at least 1"),
        (lambda: Stochastic("sgd", 3), TypeError, "`tx` must be an optax gradient"),
        (lambda: Nystrom(0), ValueError, "`rank` must be at least 1"),
        (lambda: Woodbury(0), ValueError, "`max_outputs` must be at least 1"),
        (lambda: Dense(0), ValueError, "`max_size` must be at least 1"),
        (lambda: Identity(0.0), ValueError, "`scale` must be greater than 0"),
        (lambda: Diagonal(0), ValueError, "`num_probes` must be at least 1"),
        (lambda: Diagonal(floor=0.0), ValueError, "`floor` must be greater than 0"),
        (lambda: Hessian(-0.1), ValueError, "`damping` must be at least 0, got -0.1"),
        (lambda: GaussNewton(None, inner), TypeError, "`model` must be callable"),
        (lambda: GaussNewton(inner, inner, -1.0), ValueError, "`damping` must be at least 0"),
    ],
)
def test_settings_out_of_range(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_settings_may_be_tracers_and_placeholders():
    jax.eval_shape(lambda t: CG(rtol=t, atol=t).rtol, 1.0)
    jax.tree.unflatten(jax.tree.structure(Implicit(CG(rtol=0.1))), [object(), object()])


@pytest.mark.parametrize(
    ("response", "match"),
    [
        (Implicit(Dense(2)), "Dense would build a 3 x 3 matrix, above `max_size`=2"),
        (Implicit(Nystrom(2)), "damp"),
        (Implicit(Nystrom(7), Hessian(0.1)), "rank"),
        (Implicit(Woodbury()), "GaussNewton"),
        (Implicit(CG(), fresh_batches=True), "needs a solver for random matrices"),
        (
            Implicit(Neumann(4, 0.1), fresh_batches=True),
            r"leading axis of 5: .* one batch for each",
        ),
    ],
)
def test_solvers_refuse_what_they_cannot_solve(response, match):
    with pytest.raises(ValueError, match=match):
        call(response, key=jax.random.key(0))


def test_solver_refuses_a_map_to_another_tree():
    with pytest.raises(ValueError, match="must map a vector to one of the same tree structure"):
        CG().solve(lambda v: [v], jnp.ones(3))


def test_missing_extra_is_named(monkeypatch):
    import importlib

    there = importlib.import_module

    def missing(name):
        if not name.startswith("bilevel"):  # whose names are imported when they are used
            raise ImportError(name)
        return there(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r'pip install "bilevel\[lineax\]"'):
        call(Implicit(bilevel.Lineax(object())))
    with pytest.raises(ImportError, match=r'pip install "bilevel\[equinox\]"'):
        bilevel.split_equinox(None)


def test_raise_for_status_tells_cause_remedy_and_numbers():
    indefinite = jax.jit(
        lambda: bilevel.hypergrad_solve(
            outer, lambda w, lam, b: -inner(w, lam, b), Implicit(CG(5)), W, LAM,
            inner_batch=BATCH, outer_batch=BATCH,
        )
    )()  # fmt: skip
    with pytest.raises(bilevel.HypergradientError) as caught:
        bilevel.raise_for_status(indefinite)
    message = str(caught.value)
    assert message.startswith("negative_curvature") and "GaussNewton" in message
    assert "min_curvature=-2" in message and "residual_norm=" in message
    assert caught.value.status == bilevel.Status.negative_curvature

    with pytest.raises(TypeError, match="raise_for_status needs concrete values"):
        jax.jit(bilevel.raise_for_status)(indefinite)


@pytest.mark.parametrize(
    ("match", "error", "options"),
    [
        ("`num_steps` must be at least 1", ValueError, {"num_steps": 0}),
        ("`params` has no numbers", ValueError, {"params": {}}),
        (r"params\['a'\] has dtype int", TypeError, {"params": {"a": np.arange(3)}}),
        ("inner_batch is empty", ValueError, {"inner_batch": np.zeros(0)}),
        ("`inner` must return a scalar", TypeError, {"inner": lambda w, lam, b: w["a"]}),
    ],
)
def test_diagnose(match, error, options):
    kwargs = {"inner": inner, "params": W, "hparams": LAM, "inner_batch": BATCH, **options}
    with pytest.raises(error, match=match):
        bilevel.diagnose(**kwargs, print=False)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("`directions` must be at least 1", {"directions": 0}),
        ("`step` must be greater than 0", {"step": 0.0}),
        ("are rounding error: use a larger step", {"step": 1e-9}),
        ("`tolerance` must be greater than 0", {"tolerance": 0.0}),
    ],
)
def test_check_hypergrad(match, options):
    with pytest.raises(ValueError, match=match):
        bilevel.check_hypergrad(
            outer, inner, Implicit(), W, LAM, inner_batch=BATCH, outer_batch=BATCH, **options
        )


def test_step_of_a_float32_check_is_refused_where_float64_would_do():
    single = jax.tree.map(lambda x: np.asarray(x, np.float32), (W, LAM, BATCH))
    w, lam, batch = single
    with pytest.raises(ValueError, match="float32 are rounding error.*jax_enable_x64"):
        bilevel.check_hypergrad(
            outer, inner, Implicit(), w, lam, inner_batch=batch, outer_batch=batch, step=1e-5
        )


def test_adapters():
    with pytest.raises(TypeError, match="`model` must be a flax.nnx module, got dict"):
        bilevel.split_nnx({})
    with pytest.raises(TypeError, match="`variables` must be what `module.init"):
        bilevel.split_linen({"batch_stats": {}})
    with pytest.raises(TypeError, match="`solver` must be a lineax solver"):
        bilevel.Lineax("cg")


@pytest.mark.parametrize(
    ("match", "make"),
    [
        ("`solve` must be callable", lambda: bilevel.with_response(1, inner, Implicit())),
        ("`inner` must be a function loss", lambda: bilevel.with_response(inner, 1, Implicit())),
        ("`response` must be a response", lambda: bilevel.with_response(inner, inner, CG())),
    ],
)
def test_with_response(match, make):
    with pytest.raises(TypeError, match=match):
        make()


def with_state(w, lam, batch, seen):
    return inner(w, lam, batch), seen


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        # each kind of leaf gets a remedy of its own
        (
            TypeError,
            r"params\['b'\] has dtype complex128.*real and the imaginary part as two real leaves",
            {"w": {**W, "b": np.ones(2) * 1j}},
        ),
        (
            TypeError,
            r"hparams\['decay'\] has dtype complex128.*two real leaves",
            {"lam": {"decay": np.ones(3) * 1j}},
        ),
        (
            TypeError,
            r"hparams\['on'\] has dtype bool.*A switch has no derivative",
            {"lam": {**LAM, "on": np.array(True)}},
        ),
        (
            TypeError,
            r"hparams\['name'\] is a str, .*It is not a number: keep it out of the tree",
            {"lam": {**LAM, "name": "l2"}},
        ),
        (
            TypeError,
            r"params\['act'\] is a function, .*Split the model.*bilevel.split_nnx",
            {"w": {**W, "act": inner}},
        ),
        (
            TypeError,
            r"params\['n'\] has dtype int.*keys, counters",
            {"w": {**W, "n": np.arange(2)}},
        ),
        # batches of what no array can hold
        (
            TypeError,
            r"inner_batch\[1\] is a str \(str\), expected an array of numbers.*tokens",
            {"tr": (BATCH, "float32")},
        ),
        (
            TypeError,
            r"outer_batch\['text'\] is a ndarray \(<U1\), expected an array of numbers",
            {"va": {"x": BATCH, "text": np.array(["a", "b"])}},
        ),
        (
            TypeError,
            r"inner_batch\['o'\] is a ndarray \(object\), expected an array",
            {"tr": {"o": np.array([object()])}},
        ),
        (TypeError, r"inner_batch\[1\] is a object \(object\)", {"tr": (BATCH, object())}),
        (
            TypeError,
            r"inner_batch\[1\] is a function .*take a batch out of it first",
            {"tr": (BATCH, lambda step: BATCH)},
        ),
        # losses that cannot be called, or that give no array
        (
            TypeError,
            r"`inner` cannot be called as loss\(params, hparams, batch\): missing.*'seen'.*"
            r"pass `has_state=True`",
            {"inner": with_state},
        ),
        (
            TypeError,
            r"`outer` cannot be called as loss\(params, hparams, batch\).*functools.partial",
            {"outer": lambda w: 0.0},
        ),
        (
            TypeError,
            r"`outer` cannot be called as loss\(params, hparams, batch, model_state\): too many.*"
            r"both losses receive the model state",
            {"inner": with_state, "has_state": True, "model_state": np.ones(())},
        ),
        (
            TypeError,
            r"`outer` must return a JAX scalar, got the Python number 1.5.*`float\(...\)`",
            {"outer": lambda w, lam, b: 1.5},
        ),
        (
            TypeError,
            r"`outer` must return a JAX scalar, got the Python number 1.5",
            {"outer": lambda w, lam, b: (1.5, w), "has_aux": True},
        ),
        (
            TypeError,
            r"`inner` must return a JAX scalar, got the Python number 0",
            {"inner": lambda w, lam, b: 0},
        ),
    ],
)
def test_remedies_fit_what_went_wrong(error, match, options):
    with pytest.raises(error, match=match):
        call(**options)


@pytest.mark.parametrize(
    "response",
    [
        bilevel.Unroll(optax.sgd(0.1), 3),
        bilevel.FiniteDifference(optax.sgd(0.1)),
        bilevel.Evolution(optax.sgd(0.1), 3, 2, 0.1),
    ],
)
def test_every_response_says_so(response):
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="`inner` cannot be called as loss.*has_state=True"):
        call(response, inner=with_state, key=key)
    with pytest.raises(TypeError, match="`inner` must return a JAX scalar, got the Python number"):
        call(response, inner=lambda w, lam, b: 1.0, key=key)
    with pytest.raises(TypeError, match=r"inner_batch\['t'\]\[0\] is a"):
        call(response, tr={"t": ["a", "b", "c"]}, key=key)


def test_raise_for_status_of_many_lanes_tells_of_the_gravest():
    """One bad lane among good ones is enough, and its numbers are told, not another's."""

    class Lanes(NamedTuple):
        result: np.ndarray
        stats: dict

    status = bilevel.Status.negative_curvature
    lanes = Lanes(np.array([0, int(status), 0]), {"min_curvature": np.array([1.0, -2.0, 3.0])})
    with pytest.raises(bilevel.HypergradientError) as caught:
        bilevel.raise_for_status(lanes)
    assert str(caught.value).startswith("negative_curvature in 1 of 3")
    assert "min_curvature=-2" in str(caught.value)
    assert caught.value.stats == {"min_curvature": -2.0}
    bilevel.raise_for_status(lanes._replace(result=np.zeros(3, int)))
