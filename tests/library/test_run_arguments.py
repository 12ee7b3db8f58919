"""What `fit` is given: arguments, batches and answers that are right, or refused in words."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults_run import ALG, OUTER, first_state, inner_data, train, valid

from bilevel import Identity, Implicit, alternate, fit, self_tuning
from bilevel.outer.base import Algorithm
from bilevel.run.best import point_of
from bilevel.run.data import Data
from bilevel.run.lock import locked
from bilevel.run.log import JsonLog
from bilevel.run.step import stays_finite
from bilevel.run.trust import Trust, trust_of


def short(steps=3, **kwargs):
    settings = dict(inner_data=inner_data, outer_data=OUTER, progress=False) | kwargs
    given = settings.pop("inner_data"), settings.pop("outer_data")
    alg, state = settings.pop("alg", ALG), settings.pop("state", None)
    return fit(alg, first_state() if state is None else state, *given, steps=steps, **settings)


# Callbacks and `evaluate`.


@pytest.mark.parametrize("true", [True, np.True_, np.array(True), jnp.array(True)])
def test_a_callback_may_return_any_true(true):
    result = short(callbacks=[lambda step, record: None, lambda step, record: true])
    assert (result.stopped, len(result.history)) == ("callback", 1)


@pytest.mark.parametrize("false", [None, False, np.False_, jnp.array(False)])
def test_a_callback_may_return_any_false(false):
    assert short(callbacks=[lambda step, record: false]).stopped == "steps"


@pytest.mark.parametrize("answer", [12, 0, 1.0, "stop", [True], np.array([True]), np.int64(1)])
def test_other_answers_of_a_callback_are_refused(answer):
    # `lambda i, r: file.write(...)` returns a number: neither stop nor go on is what was meant.
    with pytest.raises(TypeError, match=r"`callbacks\[0\]` returned .* at step 0: return True to"):
        short(callbacks=[lambda step, record: answer])


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5), np.array(0.5), jnp.array(0.5)])
def test_evaluate_may_return_any_real_number(value):
    assert short(evaluate=lambda point: value).best_value == float(value)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (None, "at step 0: it has no `return`"),
        ("0.5", "'0.5' of type str"),
        (1j, "1j of type complex"),
        ([0.5], r"\[0.5\] of type list"),
        (np.array([0.5]), "type ndarray"),
        ({"a": 1}, "type dict"),
    ],
)
def test_other_values_of_evaluate_are_refused(value, part):
    with pytest.raises(TypeError, match=f"`evaluate` must return one real number.*{part}"):
        short(evaluate=lambda point: value)


def test_an_error_of_evaluate_names_its_step():
    with pytest.raises(ZeroDivisionError) as caught:
        short(evaluate=lambda point: 1 / 0)
    assert "raised by `evaluate` at step 0" in caught.value.__notes__[0]


# Data.


def batches():
    return [inner_data(0), inner_data(1)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (batches(), "`inner_data` is a list, .*function of the integer step.*jnp.stack"),
        (iter(batches()), "`inner_data` is an iterator .*function of the integer step.*list"),
        ((b for b in batches()), r"`inner_data` is an iterator \(generator\)"),
        (range(3), "`inner_data` is a range, neither a function .*function of the integer"),
        (lambda: 1, r"`inner_data` is called with the integer step, but its signature is \(\)"),
        (lambda a, b: 1, r"its signature is \(a, b\)"),
        ("train.npz", "`inner_data` is a str: batches are trees of JAX or NumPy arrays"),
        ({"x": np.ones(3), "name": "a"}, r"holds at \['name'\] a str: batches .*leave it out of"),
        (np.array(["a"]), "`inner_data` is a ndarray"),
        (np.array([object()]), "`inner_data` is a ndarray"),
        (object(), "`inner_data` is a object: batches are trees"),
        (lambda step: {"x": "text"}, r"`inner_data` at step 0 holds at \['x'\] a str"),
    ],
)
def test_other_data_is_refused_and_the_message_says_what_to_pass(data, message):
    with pytest.raises(TypeError, match=message):
        short(inner_data=data)


def test_every_source_is_checked_by_its_name():
    for name in ("outer_data", "response_data"):
        with pytest.raises(TypeError, match=f"`{name}` is an iterator"):
            short(**{name: iter([])})


def at(step, other):
    return lambda i: other if i == step else inner_data(i)


@pytest.mark.parametrize(
    "other",
    [
        None,
        (inner_data(0),),
        inner_data(0)[..., None],
        inner_data(0).astype(np.float32),
        inner_data(0)[:, 0],
    ],
)
def test_a_batch_of_another_form_is_refused_at_its_step(other):
    with pytest.raises(ValueError, match="`inner_data` returned another kind of batch at step 2"):
        short(inner_data=at(2, other))


def test_batches_of_another_length_are_taken():
    result = short(inner_data=at(2, np.ones((1, 3))), outer_data=lambda i: OUTER)
    assert result.stopped == "steps"
    data = Data(inner_data, lambda step: np.ones(3 + step))
    assert [data(i)["outer_batch"].shape for i in (0, 1)] == [(3,), (4,)]


def test_an_iterator_in_disguise_is_named_when_it_runs_out():
    source = iter(batches())
    with pytest.raises(RuntimeError, match="`inner_data` ran out at step 2: it draws from an iter"):
        short(inner_data=lambda step: next(source))


def test_a_step_is_asked_for_once():
    asked = []

    def data(step):
        asked.append(step)
        return inner_data(step)

    short(inner_data=data)
    assert asked == [0, 1, 2]


def test_a_tuple_is_one_constant_batch():
    state = first_state()
    result = short(inner_data=inner_data(0), state=state)
    again = short(inner_data=lambda step: inner_data(0), state=state)
    assert result.history[-1]["outer_loss"] == again.history[-1]["outer_loss"]
    x = (np.ones((1, 3)), np.ones((1, 3)))
    assert jax.tree.structure(Data(x, OUTER)(5)["inner_batches"]) == jax.tree.structure(x)


# Settings.


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(steps=None), TypeError, "`steps` must be a Python int of at least 0, .* got None"),
        (dict(checkpoint_every=None), TypeError, "`checkpoint_every` must be a Python int"),
        (dict(keep=None), TypeError, "`keep` must be a Python int"),
        (dict(evaluate_every="2"), TypeError, "`evaluate_every` must be a Python int .* got '2'"),
        (dict(patience=True), TypeError, "`patience` must be a Python int"),
        (dict(patience=2.0), TypeError, "`patience` must be a Python int"),
        (dict(min_delta=None), TypeError, "`min_delta` must be one real number, got None"),
        (dict(min_delta="0.1"), TypeError, "`min_delta` must be a real number"),
        (dict(min_delta=np.ones(2)), TypeError, "`min_delta` must be one real number"),
        (dict(min_delta=float("nan")), ValueError, "`min_delta` must be"),
        (dict(log=3), TypeError, "`log` must be a file such as .* got 3 of type int"),
        (dict(log=b"log"), TypeError, "`log` must be a file .* got b'log' of type bytes"),
        (dict(log=True), TypeError, "`log` must be a file"),
        (dict(log=""), ValueError, "`log` is empty: pass a file such as"),
        (dict(checkpoint_dir=3), TypeError, "`checkpoint_dir` must be a folder such as"),
        (dict(checkpoint_dir=b"x"), TypeError, "`checkpoint_dir` must be a folder"),
        (dict(checkpoint_dir=""), ValueError, "`checkpoint_dir` is empty"),
        (dict(tensorboard=3), TypeError, "`tensorboard` must be a folder"),
        (dict(callbacks=print), TypeError, r"`callbacks` must be a list .*`callbacks=\[callback\]"),
        (dict(callbacks=None), TypeError, "`callbacks` must be a list or tuple of functions"),
        (dict(callbacks="print"), TypeError, "`callbacks` must be a list or tuple"),
        (dict(callbacks=[print, 3]), TypeError, r"`callbacks\[1\]` must be a function .* got 3"),
        (dict(on_nonfinite="ignore"), ValueError, "`on_nonfinite` must be one of 'raise', 'skip'"),
        (dict(on_nonfinite=None), TypeError, "`on_nonfinite` must be one of"),
        (dict(progress="no"), TypeError, "`progress` must be True or False, got 'no'"),
        (dict(key=0), TypeError, r"`key` must be a JAX random key, got 0 .*jax.random.key\(0\)"),
        (dict(key="0"), TypeError, "`key` must be a JAX random key"),
        (dict(key=np.ones(2)), TypeError, "`key` must be a JAX random key"),
        (dict(key=jax.random.split(jax.random.key(0))), ValueError, r"`key` has shape \(2,\), exp"),
        (dict(run_id={1, 2}), TypeError, "`run_id` must be a JSON value .*set is not JSON"),
        (dict(run_id=float("nan")), TypeError, "`run_id` must be a JSON value .*finite numbers"),
        (dict(run_id=np.ones(2)), TypeError, "`run_id` must be a JSON value .*tolist"),
        (dict(alg=None), TypeError, "`alg` must be a pair"),
        (dict(state=3), TypeError, "`state` must be what `alg.init` returns"),
    ],
)
def test_arguments_are_refused_by_name_before_anything_runs(settings, error, message):
    def never(step):
        raise AssertionError("asked for data")

    with pytest.raises(error, match=message):
        short(**(dict(inner_data=never) | settings))


def test_a_folder_for_a_file_and_a_file_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(IsADirectoryError, match="`log` .* is a folder: pass a file in it, such as"):
        short(log=tmp_path)
    for name in ("checkpoint_dir", "tensorboard"):
        with pytest.raises(NotADirectoryError, match=f"`{name}` .*file is a file: pass a folder"):
            short(**{name: tmp_path / "file"})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_numbers_of_numpy_are_settings_too(tmp_path):
    kwargs = dict(patience=np.int64(2), min_delta=jnp.float32(0.5), keep=np.int32(2))
    result = short(np.int64(5), checkpoint_dir=tmp_path, **kwargs)
    again = short(np.int64(5), checkpoint_dir=tmp_path, **kwargs)
    assert again.resumed_from == len(result.history) and again.stopped == result.stopped


def test_a_raw_key_and_a_typed_one_are_taken():
    for key in (jax.random.key(1), jax.random.PRNGKey(1)):
        assert short(1, key=key).stopped == "steps"


def test_the_state_of_another_algorithm_is_named():
    other = self_tuning(valid, train, optax.sgd(0.1), optax.adam(0.1), groups=1)
    state = other.init(jnp.zeros(3), jnp.array(-1.0))
    with pytest.raises(TypeError, match="of type SelfTuningState, but this `alg` carries Alt"):
        short(state=state)
    with pytest.raises(TypeError, match="of type AlternateState, but this `alg` carries Self"):
        short(alg=other)
    sgd = alternate(valid, train, Implicit(Identity(0.5)), optax.sgd(0.1), optax.sgd(0.1), 1)
    message = "`state` is of an algorithm with other settings: its `trained` is"
    with pytest.raises(TypeError, match=message):
        short(alg=sgd)


def test_an_error_of_the_losses_is_not_blamed_on_the_state():
    def broken(w, lam, batch):
        raise KeyError("mine")

    alg = alternate(broken, train, Implicit(Identity(0.5)), optax.sgd(0.1), optax.sgd(0.1), 1)
    with pytest.raises(KeyError, match="mine"):
        short(alg=alg, state=alg.init(jnp.zeros(3), -1.0))


# What is judged, kept and told.


def test_what_counts_as_not_finite():
    inf, nan, one = jnp.array([jnp.inf, 1.0]), jnp.array([1.0, jnp.nan]), jnp.ones(2)
    for memory in (False, True):
        assert stays_finite(one, one, memory) and stays_finite(inf, inf, memory)  # a mask
        assert not stays_finite(inf, one, memory) and not stays_finite(nan, one, memory)
        assert not stays_finite(nan, inf, memory)
        assert not stays_finite(jnp.array(jnp.nan), jnp.array(1.0), memory)
        assert not stays_finite([one, nan], [one, one], memory)
    infinite, number = jnp.array(jnp.inf), jnp.array(1.0)
    assert stays_finite(infinite, number, True)  # the largest error of a line search
    assert not stays_finite(infinite, number)
    counts, key = jnp.arange(3), jax.random.key(0)
    assert stays_finite([counts, key], [counts, key])


def nan_in(half, part):
    """`ALG`, but step 1 spoils one part of the state, and neither losses nor hypergradient."""

    def step(state, **kwargs):
        new, info = ALG.step(state, **kwargs)
        bad = jnp.where(state.step == 1, jnp.nan, 1.0)
        spoilt = jax.tree.map(
            lambda x: x * bad if jnp.issubdtype(x.dtype, jnp.floating) else x,
            getattr(getattr(new, half), part),
        )
        return new._replace(**{half: getattr(new, half)._replace(**{part: spoilt})}), info

    return Algorithm(ALG.init, step, *ALG[2:])


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("trained.params", "params"),
        ("outer.hparams", "hparams"),
        ("outer.opt_state", "state"),
    ],
)
def test_a_state_that_is_not_finite_is_dropped_though_its_numbers_are_fine(part, name):
    result = short(alg=nan_in(*part.split(".")), on_nonfinite="stop")
    assert result.stopped == "nonfinite" and result.history[-1]["nonfinite"] == [name]
    assert int(result.state.step) == 1 and np.all(np.isfinite(result.state.params))
    assert result.best_step == 0
    skipped = short(alg=nan_in(*part.split(".")), on_nonfinite="skip")
    # The counter moves on, or the step would spoil for ever.
    assert [("nonfinite" in r) for r in skipped.history] == [False, True, False]


def test_a_step_that_was_dropped_is_not_evaluated_and_nothing_after_it():
    seen = []

    def evaluate(point):
        seen.append(float(point.params[0]))
        return -float(len(seen))

    for mode in ("skip", "stop"):
        seen.clear()
        result = short(
            6,
            alg=nan_in("trained", "params"),
            evaluate=evaluate,
            evaluate_every=2,
            on_nonfinite=mode,
        )
        assert len(seen) == {"skip": 2, "stop": 0}[mode]
        assert result.best_step == {"skip": 5, "stop": -1}[mode]
    seen.clear()  # the step after it is finite, and under way before the host knows
    data = at(1, inner_data(1) * np.nan)
    result = short(6, inner_data=data, evaluate=evaluate, evaluate_every=3, on_nonfinite="stop")
    assert result.stopped == "nonfinite" and not seen


def test_keys_in_the_state_are_kept_like_the_rest():
    class Keyed:
        @staticmethod
        def step(state, **kwargs):
            new, info = ALG.step(state._replace(response=None), **kwargs)
            return new._replace(response=jax.random.split(state.response)[0]), info

    def init(*args):
        return ALG.init(*args)._replace(response=jax.random.key(3))

    alg = Algorithm(init, Keyed.step, *ALG[2:])
    state = init(jnp.zeros(3), -1.0)
    data = at(1, inner_data(1) * np.nan)
    result = short(alg=alg, state=state, inner_data=data, on_nonfinite="skip")
    expected = jax.random.split(jax.random.split(jax.random.key(3))[0])[0]  # twice, not thrice
    assert jnp.all(jax.random.key_data(result.state.response) == jax.random.key_data(expected))


def test_the_point_is_what_the_algorithm_deploys():
    class Deploying(tuple):
        """An algorithm with a third field."""

        init, step = ALG.init, staticmethod(ALG.step)

        @staticmethod
        def deploy(state, hparams=None):
            return state.params + (state.hparams if hparams is None else hparams)

    state = first_state()
    assert np.all(point_of(ALG, state, jnp.array(7.0)).params == state.params)
    point = point_of(Deploying(), state, jnp.array(7.0))
    assert np.all(point.params == state.params + 7.0) and point.hparams == 7.0
    for evaluate in (None, lambda point: float(jnp.sum(point.params))):
        result = short(alg=Deploying(), evaluate=evaluate)
        plain = short(evaluate=None if evaluate is None else lambda point: float(
            jnp.sum(point.params) + 3 * point.hparams))  # fmt: skip
        assert result.best_step == plain.best_step
        np.testing.assert_allclose(
            result.best_params, plain.best_params + plain.best_hparams, rtol=1e-12
        )


def record(step, status="ok", residual=None, right=1.0, distance=None, **rest):
    out = {"step": step, "status": status, "seconds": 0.0} | rest
    if residual is not None:
        out |= {"residual_norm": residual, "rhs_norm": right}
    return out if distance is None else out | {"relative_stationarity": distance}


def test_the_last_line_counts_and_ranks():
    history = [record(i, residual=2.0 * (i + 1), right=4.0, distance=0.1 * i) for i in range(9)]
    history.append(record(9, "negative_curvature", residual=100.0, distance=9.0))
    history.append(record(10, "nonfinite_input", float("nan"), 1.0, nonfinite=["outer_loss"]))
    history.append(record(11, residual=0.0, right=0.0))  # nothing to solve: no ratio
    trust = trust_of(history)
    assert trust.statuses == {"ok": 10, "negative_curvature": 1, "nonfinite_input": 1}
    assert (trust.steps, trust.nonfinite) == (12, 1)
    # 0.5, 1.0, ... 4.5 and 100: the fifth and the ninth of ten.
    assert (trust.residual_median, trust.residual_90) == (2.5, 4.5)
    np.testing.assert_allclose((trust.stationarity_median, trust.stationarity_90), (0.4, 0.8))
    text = str(trust)
    assert text.startswith("12 steps: 10 ok, 1 negative_curvature, 1 nonfinite_input; 1 not fin")
    assert "relative residual 2.5 (median), 4.5 (90 %)" in text and "\n" not in text
    empty = trust_of([])
    assert empty == Trust(0, {}, 0, None, None, None, None) and str(empty) == "0 steps: no status"


@pytest.mark.parametrize(
    ("match", "course"),
    [
        ("`inner_loss` grew from 10 to 1e", lambda i: {"inner_loss": 10.0**i}),
        ("`hypergrad_norm` grew from .* hypergradients grow", lambda i: {"hypergrad_norm": 3.0**i}),
        ("`outer_loss` grew .* need bounds", lambda i: {"outer_loss": 3.0**i}),
        ("may be swapped", lambda i: {"outer_loss": 0.4}),
    ],
)
def test_a_run_that_goes_astray_says_so_once(match, course):
    fine = {"outer_loss": 1.2, "inner_loss": 1.0, "hypergrad_norm": 1.0}
    assert trust_of([record(i, **fine) for i in range(12)]).notices == ()
    trust = trust_of([record(i, **(fine | course(i))) for i in range(12)])
    assert len(trust.notices) == 1 and re.search(match, trust.notices[0]), trust
    assert str(trust).count("\n- ") == 1
    assert trust_of([record(i, **(fine | course(i))) for i in range(5)]).notices == ()


def test_a_run_returns_its_trust():
    result = short()
    assert result.trust == trust_of(result.history)
    ratios = sorted(r["residual_norm"] / r["rhs_norm"] for r in result.history)
    assert result.trust.residual_median == ratios[1]


def test_the_bar_ends_with_the_trust(monkeypatch, capsys):
    from bilevel.run import driver

    monkeypatch.setattr(driver, "wants_bar", lambda asked: asked)
    result = short(progress=True)
    assert str(result.trust) in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_log_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "log"
    path.write_text('{"step": 0}\n{"step": 1, "x": "nan"}')  # an editor took the last newline
    log = JsonLog(path, 2)
    assert [r["step"] for r in log.kept] == [0, 1] and np.isnan(log.kept[1]["x"])
    log.write({"step": 2})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    path.write_text('{"step": 5}\n{"step": 0}\n{"step": true}\n{"step": -1}\n[]\n')
    with pytest.warns(UserWarning, match="damaged in line 3-5:.*Steps without a record: 1-2"):
        log = JsonLog(path, 3)
    log.close()
    assert path.read_text() == '{"step": 0}\n'


def test_a_lock_is_free_again_and_does_not_trust_what_a_file_says(tmp_path):
    path = tmp_path / "lock"
    path.write_text('{"pid": 1, "host": "elsewhere", "started": "long ago"}')  # by a killed process
    with locked("log", tmp_path, path):
        with pytest.raises(BlockingIOError, match="`log` .* in use .*process [0-9]+ on host"):
            with locked("log", tmp_path, path):
                pass
        path.write_text("")  # not written yet: the other has only just begun
        with pytest.raises(BlockingIOError, match="process unknown on host unknown, started at"):
            with locked("log", tmp_path, path):
                pass
    assert not path.exists()
    with locked("log", tmp_path, path):
        assert path.exists()
