"""The driver: numbers against a plain loop, logs, checkpoints, kills, stops, messages."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

jax.config.update("jax_enable_x64", True)  # this file is also the program that gets killed

from bilevel import (  # noqa: E402
    CG,
    Algorithm,
    Implicit,
    Interval,
    Positive,
    Space,
    alternate,
    fit,
)
from bilevel.run.packed import pack, unpack  # noqa: E402
from bilevel.run.record import numbers_of  # noqa: E402

INNER_STEPS = 3


def dataset():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 5))
    return x, np.tanh(x @ rng.normal(size=5)) + 0.2 * rng.normal(size=96)


X, Y = dataset()
VALID = (jnp.asarray(X[64:]), jnp.asarray(Y[64:]))


def train(w, lam, batch):
    x, y = batch
    penalty = sum(jnp.sum(d * v**2) for d, v in zip(lam["decay"].values(), w.values(), strict=True))
    return jnp.mean((jnp.tanh(x @ w["in"]) @ w["out"] - y) ** 2) + penalty


def valid(w, lam, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ w["in"]) @ w["out"] - y) ** 2) * (1 + 0 * lam["mix"])


def inner_data(step):
    """Batches by number: what makes a resumed run equal an uninterrupted one."""
    rows = np.random.default_rng((1, step)).integers(0, 64, size=(INNER_STEPS, 16))
    return X[rows], Y[rows]


def outer_data(step):
    return VALID


def algorithm():
    return alternate(
        lambda w, lam, b: valid(w, lam, b) + 1e-3 * (lam["mix"] - 0.3) ** 2,
        train,
        Implicit(CG(max_steps=4)),
        optax.adam(0.02),
        optax.adam(0.1),
        INNER_STEPS,
        constrain=Space({"decay": Positive(), "mix": Interval(0.0, 1.0)}),
    )


ALG = algorithm()


def first_state():
    keys = jax.random.split(jax.random.key(3))
    params = {"in": 0.5 * jax.random.normal(keys[0], (5, 4)), "out": jnp.zeros(4)}
    return ALG.init(params, {"decay": {"in": 0.01, "out": 0.02}, "mix": 0.5})


def run(folder, steps=60, **kwargs):
    settings = dict(
        steps=steps,
        key=jax.random.key(7),
        log=Path(folder) / "log.jsonl",
        checkpoint_dir=Path(folder) / "checkpoints",
        checkpoint_every=4,
        run_id={"case": "test"},
        progress=False,
    )
    return fit(ALG, first_state(), inner_data, outer_data, **(settings | kwargs))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def outcome(result):
    return bits((result.state, result[1:6]))


def lines(folder):
    """The log without its time fields."""
    records = [json.loads(s) for s in (Path(folder) / "log.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def copied(whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    return folder


def test_fit_is_the_plain_loop_and_keeps_the_pair_that_was_measured(whole):
    folder, result = whole
    step = jax.jit(ALG.step)
    state, best = first_state(), None
    for i in range(60):
        before = state.hparams
        state, info = step(
            state,
            inner_batches=inner_data(i),
            outer_batch=outer_data(i),
            key=jax.random.fold_in(jax.random.key(7), i),
        )
        record = result.history[i]
        # Another compiled program: rounding, amplified by 60 steps of two Adams.
        np.testing.assert_allclose(record["outer_loss"], info.value, rtol=1e-7)
        np.testing.assert_allclose(record["hparams"]["decay/in"], before["decay"]["in"], rtol=1e-7)
        if best is None or info.value < best[0]:
            best = (float(info.value), i, state.params, before)
    assert result.best_step == best[1] and result.stopped == "steps"
    np.testing.assert_allclose(result.best_value, best[0], rtol=1e-7)
    for mine, theirs in ((result.best_params, best[2]), (result.best_hparams, best[3])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mine, theirs)
    # The pair reproduces the value, and with the hyperparameters of the next step it would not.
    again = valid(result.best_params, result.best_hparams, VALID)
    again += 1e-3 * (result.best_hparams["mix"] - 0.3) ** 2
    np.testing.assert_allclose(again, result.best_value, rtol=1e-12)
    after = result.history[result.best_step + 1]["hparams"]["mix"]
    assert abs(after - float(result.best_hparams["mix"])) > 1e-4


def test_many_hyperparameters_are_summed_up_in_the_log():
    weights = jnp.arange(-3.0, 17.0, dtype=jnp.bfloat16)[::-1]  # twenty entries
    many = jnp.arange(10001.0).reshape(73, 137)
    every = {"w": weights, "few": weights[:16], "many": many}
    names = numbers_of(SimpleNamespace(value=1.0), every)["hparams"]
    assert set(names) == {"few"} | {
        f"{leaf}/{n}" for leaf in ("w", "many") for n in ("norm", "min", "median", "mean", "max")
    }
    assert names["few"].shape == (16,)
    told = [float(names[f"w/{n}"]) for n in ("norm", "min", "median", "mean", "max")]
    exact = np.arange(-3.0, 17.0)
    # The lower of the two middle entries, to a millionth of the range.
    known = [np.linalg.norm(exact), -3.0, 6.0, exact.mean(), 16.0]
    np.testing.assert_allclose(told, known, rtol=1e-5)
    np.testing.assert_allclose(float(names["many/median"]), 5000.0, atol=0.01)


def test_the_log_has_one_line_a_step_and_the_numbers_to_judge_it(whole):
    records = lines(whole[0])
    assert [r["step"] for r in records] == list(range(60))
    wanted = {"outer_loss", "inner_loss", "hypergrad_norm", "residual_norm", "stationarity"}
    # A network in training, and CG on its Hessian: no minimum, curvature of both signs, a budget.
    statuses = {"ok", "truncated", "not_stationary", "negative_curvature"}
    assert all(wanted <= set(r) and r["status"] in statuses for r in records)
    names = sorted(p.name for p in (whole[0] / "checkpoints").iterdir())
    assert names == ["00000052", "00000056", "00000060"]
    files = [p.name for p in (whole[0] / "checkpoints").rglob("*")]
    assert not any(name.endswith((".pkl", ".pickle")) for name in files)


def kill_and_resume(folder, moments):
    """Run this file as a program; kill it at each moment (lines in its log), then let it end."""
    command = [sys.executable, __file__, str(folder)]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    log = folder / "log.jsonl"
    killed = 0
    for moment, pause in moments:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and log.read_bytes().count(b"\n") >= moment:
                break
            time.sleep(0.002)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1].decode()
        # On a slow machine a late kill may find the program at its end.
        assert process.returncode in (-signal.SIGKILL, 0), errors
        killed += process.returncode == -signal.SIGKILL
    assert killed > len(moments) / 2
    final = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert final.returncode == 0, final.stderr
    return folder / "outcome.npz"


def check_kills(whole, tmp_path, kills):
    draw = random.Random(kills)
    moments = [(m, 0.05 * draw.random()) for m in sorted(draw.sample(range(2, 50), kills))]
    saved = np.load(kill_and_resume(tmp_path, moments))
    expected = outcome(whole[1])
    assert len(saved.files) == len(expected)
    for i, leaf in enumerate(expected):
        assert saved[str(i)].tobytes() == leaf, (i, moments)
    assert lines(tmp_path) == lines(whole[0])


def test_a_run_killed_three_times_ends_with_the_same_bits(whole, tmp_path):
    check_kills(whole, tmp_path, 3)


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_same_bits(whole, tmp_path):
    check_kills(whole, tmp_path, 10)


def truncate(folder):
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])


def flip(folder):
    path = next(p for p in sorted((folder / "arrays" / "d").rglob("*")) if p.is_file())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def lose(folder):
    next(p for p in sorted((folder / "arrays" / "d").rglob("*")) if p.is_file()).unlink()


def spoil_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 60', '"step": 61'))


@pytest.mark.parametrize("damage", [truncate, flip, lose, spoil_manifest])
def test_a_damaged_newest_checkpoint_is_set_aside_for_the_one_before(whole, tmp_path, damage):
    folder = copied(whole, tmp_path)
    damage(folder / "checkpoints" / "00000060")
    with pytest.warns(UserWarning, match="00000060 is damaged .*continuing from .*00000056 inst"):
        result = run(folder)
    assert result.resumed_from == 56
    assert outcome(result) == outcome(whole[1])
    assert lines(folder) == lines(whole[0])
    assert (folder / "checkpoints" / "damaged-00000060").is_dir()
    assert (folder / "checkpoints" / "00000060").is_dir()


def test_only_damaged_checkpoints_and_those_of_another_run_are_refused(whole, tmp_path):
    folder = copied(whole, tmp_path)
    with pytest.raises(ValueError, match="another run: its `run_id` is {'case': 'test'}, this r"):
        run(folder, run_id={"case": "other"})
    with pytest.raises(ValueError, match="another run: its `key` is"):
        run(folder, key=jax.random.key(8))
    bigger = ALG.init(
        {"in": jnp.zeros((5, 6)), "out": jnp.zeros(6)},
        {"decay": {"in": 0.01, "out": 0.02}, "mix": 0.5},
    )
    with pytest.raises(ValueError, match=r"it holds .*\['in'\]: float64\[5,4\].*float64\[5,6\]"):
        fit(
            ALG, bigger, inner_data, outer_data, steps=1, progress=False, key=jax.random.key(7),
            checkpoint_dir=folder / "checkpoints", run_id={"case": "test"},
        )  # fmt: skip
    for checkpoint in (folder / "checkpoints").iterdir():
        truncate(checkpoint)
    with pytest.raises(OSError, match="every checkpoint in .* is damaged"):
        run(folder)


def test_a_finished_run_goes_on_when_asked_for_more_steps(whole, tmp_path):
    result = run(tmp_path, steps=21)
    assert int(result.state.step) == 21 and len(result.history) == 21
    (tmp_path / "checkpoints" / ".writing-00000099").mkdir()  # left by a kill while writing
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 21, "outer_loss": 9.0}\n{"step": 22, "outer')  # past the checkpoint
    longer = run(tmp_path)
    assert longer.resumed_from == 21 and len(longer.history) == 60
    assert outcome(longer) == outcome(whole[1])
    assert lines(tmp_path) == lines(whole[0])
    assert not list((tmp_path / "checkpoints").glob(".writing*"))


def test_patience_stops_exactly_and_stays_stopped(tmp_path):
    # From the second step on the outer loss only rises: the training data has left the valley.
    def rising(step):
        return VALID[0], VALID[1] + step

    kwargs = dict(steps=40, patience=3, progress=False, checkpoint_dir=tmp_path, checkpoint_every=4)
    result = fit(ALG, first_state(), inner_data, rising, **kwargs)
    assert result.stopped == "patience" and result.best_step == 0
    assert int(result.state.step) == len(result.history) == 4  # the best one and three more
    again = fit(ALG, first_state(), inner_data, rising, **kwargs)
    assert again.resumed_from == 4 and again.stopped == "patience"
    assert outcome(again) == outcome(result)  # the best point too, which lies before the resume
    more = fit(ALG, first_state(), inner_data, rising, **(kwargs | {"patience": 6}))
    assert int(more.state.step) == 7 and more.best_step == 0


def test_evaluate_callbacks_and_constant_data():
    seen, points = [], []

    def callback(step, record):
        seen.append((step, record["outer_loss"], record.get("evaluate")))
        return step == 5

    def evaluate(point):
        points.append(float(point.hparams["mix"]))
        return [3.0, 1.0, 2.0][len(points) - 1]

    state = first_state()
    result = fit(
        ALG, state, inner_data(0), VALID, steps=50, progress=False,
        evaluate=evaluate, evaluate_every=2, callbacks=[callback],
    )  # fmt: skip
    assert result.stopped == "callback" and int(result.state.step) == 6
    assert [s[0] for s in seen] == list(range(6))
    assert [s[2] for s in seen] == [None, 3.0, None, 1.0, None, 2.0]
    assert (result.best_value, result.best_step) == (1.0, 3)
    assert float(result.best_hparams["mix"]) == points[1] == result.history[3]["hparams"]["mix"]
    assert float(state.hparams["mix"]) == 0.5  # the given state is not consumed


def test_nan_is_told_and_never_the_best(tmp_path):
    def data(step):
        return VALID[0], VALID[1] * (np.nan if step >= 2 else 1.0)

    log = tmp_path / "log"
    result = fit(
        ALG, first_state(), inner_data, data, steps=4, log=log, progress=False,
        on_nonfinite="skip",
    )  # fmt: skip
    assert [r["status"] for r in result.history[2:]] == ["nonfinite_input"] * 2
    assert np.isnan(result.history[2]["outer_loss"]) and result.best_step < 2
    strict = [json.loads(s, parse_constant=pytest.fail) for s in log.read_text().splitlines()]
    assert strict[2]["outer_loss"] == "nan"


def test_typed_keys_empty_arrays_and_half_precision_survive_a_checkpoint(tmp_path):
    from bilevel.run.checkpoint import Checkpoints

    tree = {
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "none": None,
        "empty": jnp.zeros((0, 3)),
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "flag": jnp.array([True, False]),
    }
    Checkpoints(tmp_path, 1, {}).save(3, tree, {"a": 1})
    like = jax.tree.map(lambda x: jnp.zeros_like(x) if x.dtype != tree["key"].dtype else x, tree)
    like["key"] = jax.random.key(0)
    found = Checkpoints(tmp_path, 1, {}).restore(like)
    assert (found.step, found.notes) == (3, {"a": 1})
    for name in ("key", "keys"):
        mine, theirs = found.tree[name], tree[name]
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(jax.random.key_data(mine), jax.random.key_data(theirs))
    for name in ("empty", "half", "flag"):
        assert found.tree[name].dtype == tree[name].dtype
        np.testing.assert_array_equal(found.tree[name], tree[name])


def test_tensorboard_and_bar_are_written(tmp_path, monkeypatch, capsys):
    from bilevel.run import display, driver

    monkeypatch.setattr(driver, "wants_bar", lambda asked: asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # inside tensorboardX's protobuf
        fit(ALG, first_state(), inner_data, outer_data, steps=3, tensorboard=tmp_path)
    assert list(tmp_path.glob("events*"))
    shown = capsys.readouterr().out
    for part in ("3/3", "inner ", "outer ", "|grad| ", "/s\n"):
        assert part in shown.replace(" \n", "\n"), shown
    assert not display.wants_bar(True)  # under pytest there is no terminal


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(steps=-1), ValueError, "`steps` must be at least 0"),
        (dict(steps=1.5), TypeError, "`steps` must be a Python int"),
        (dict(checkpoint_every=0), ValueError, "`checkpoint_every` must be at least 1"),
        (dict(keep=0), ValueError, "`keep` must be at least 1"),
        (dict(patience=0), ValueError, "`patience` must be at least 1"),
        (dict(min_delta=-1.0), ValueError, "`min_delta` must be at least 0"),
        (dict(evaluate=3), TypeError, "`evaluate` must be a function"),
        (dict(evaluate_every=0), ValueError, "`evaluate_every` must be at least 1"),
        (dict(run_id=object()), TypeError, "`run_id` must be a JSON value"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, **settings)


def test_what_cannot_be_written_or_driven_is_said_before_the_first_step(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    called = []

    def data(step):
        called.append(step)
        return inner_data(step)

    with pytest.raises(OSError, match="`checkpoint_dir` .* cannot be written"):
        fit(ALG, first_state(), data, VALID, steps=1, checkpoint_dir=blocked / "x")
    assert not called
    with pytest.raises(OSError, match="`log` .* cannot be written"):
        fit(ALG, first_state(), inner_data, VALID, steps=1, log=blocked / "x", progress=False)
    with pytest.raises(TypeError, match="`alg` must be a pair"):
        fit(ALG.step, first_state(), data, VALID, steps=1)
    with pytest.raises(TypeError, match="`state` must be what `alg.init` returns"):
        fit(ALG, {"w": 1}, data, VALID, steps=1)
    vector = ALG._replace(step=lambda s, **kw: (s, (lambda i: i._replace(value=s.params["out"]))(
        ALG.step(s, **kw)[1])))  # fmt: skip
    with pytest.raises(TypeError, match="info with a scalar `value`"):
        fit(vector, first_state(), inner_data, outer_data, steps=1, progress=False)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    leaves = jax.tree.leaves((final := run(target)) and (final.state, final[1:6]))
    np.savez(target / "outcome.npz", **{str(i): np.asarray(x) for i, x in enumerate(leaves)})


class Count(NamedTuple):
    params: jax.Array
    hparams: jax.Array
    step: jax.Array


class Drawn(NamedTuple):
    value: jax.Array
    inner_value: jax.Array
    hypergrad_norm: jax.Array
    result: jax.Array
    stats: dict


def test_every_step_draws_with_its_own_number_folded_into_the_key():
    def step(state, *, inner_batches, outer_batch, key):
        drawn = jax.random.uniform(key)
        info = Drawn(drawn, drawn, drawn, jnp.zeros((), jnp.int32), {})
        return state._replace(step=state.step + 1), info

    state = Count(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))
    key, alg = jax.random.key(5), Algorithm(lambda *args: state, step)
    result = fit(alg, state, jnp.ones(1), jnp.ones(1), steps=4, key=key, progress=False)
    expected = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(4)]
    assert [record["outer_loss"] for record in result.history] == expected


def test_numbers_of_all_kinds_come_to_the_host_in_one_array():
    numbers = {
        "empty": jnp.zeros(0), "bool": jnp.array([True, False]), "int8": jnp.int8(-3),
        "uint32": jnp.uint32(4_000_000_000), "bfloat16": jnp.bfloat16(1.5),
        "float16": jnp.float16(jnp.inf), "float64": jnp.asarray(0.1), "complex": 1 - 2j,
        "matrix": jnp.arange(4.0).reshape(2, 2), "none": {},
    }  # fmt: skip
    packed = jax.jit(pack)(numbers)
    assert packed.data.dtype == jnp.uint8 and packed.data.ndim == 1
    assert unpack(packed) == {
        "empty": [], "bool": [True, False], "int8": -3, "uint32": 4_000_000_000, "bfloat16": 1.5,
        "float16": float("inf"), "float64": float(jnp.asarray(0.1)), "complex": [1.0, -2.0],
        "matrix": [[0.0, 1.0], [2.0, 3.0]], "none": {},
    }  # fmt: skip
