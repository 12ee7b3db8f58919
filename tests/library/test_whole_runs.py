"""Gradients of whole runs: schedules of states, memory, and the driver on the host."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import InnerState, Unroll
from bilevel.inner.rerun import rerun
from bilevel.inner.reversal import longest, places_for, plan, recomputed
from bilevel.problem.two_losses import Problem
from bilevel.run import replay
from bilevel.run.segments import compiled_steps, floats_of

ROOT = Path(__file__).parents[2]
STEPS, D = 13, 3
X, Y = jax.random.normal(jax.random.key(0), (STEPS, 4, D)), jnp.ones((STEPS, 4))
BATCHES, OUTER_BATCH = (X, Y), (X[0] + 0.1, 1.5 * Y[0])
W = {"w": jnp.array([0.3, -0.2, 0.1]), "b": jnp.zeros(())}
LAM = {"rate": jnp.float64(0.05), "decay": jnp.array([-2.0, -1.0, 0.0])}


def inner(w, lam, batch):
    fit = jnp.mean((jnp.tanh(batch[0] @ w["w"]) + w["b"] - batch[1]) ** 2)
    return fit + jnp.sum(jnp.exp(lam["decay"]) * w["w"] ** 2)


def outer(w, lam, batch):
    return jnp.mean((batch[0] @ w["w"] + w["b"] - batch[1]) ** 2) + 0.1 * lam["rate"] ** 2


def adam(lam):
    return optax.adam(lam["rate"])


def batches(step):
    return X[step], Y[step]


def close(got, want, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-14), got, want)


@functools.cache
def expected():
    solve = functools.partial(bilevel.hypergrad_solve, outer, inner)
    call = jax.jit(lambda r: solve(r, W, LAM, inner_batch=BATCHES, outer_batch=OUTER_BATCH),
                   static_argnums=0)  # fmt: skip
    return call(Unroll(adam, STEPS, mode="reverse"))


@pytest.mark.parametrize("places", [0, 1, 2, 3, 7])
def test_every_state_is_there_when_it_is_needed(places):
    for steps in range(1, 30):
        schedule = plan(steps, places)
        kept, at = {0: 0}, 0
        for count, place in schedule.forward:
            at += count
            kept[place] = at
        for step, phase in zip(reversed(range(steps)), schedule.phases, strict=True):
            at = phase.first
            assert kept[phase.place] == at
            for count, place in phase.runs:
                at += count
                kept[place] = at
            assert at + phase.tail == step and max(kept) <= places


@functools.cache
def fewest(steps, places):
    """The least number of steps made, from the recursion itself."""
    if steps == 1:
        return 0
    if places == 0:
        return steps * (steps - 1) // 2
    return min(m + fewest(steps - m, places - 1) + fewest(m, places) for m in range(1, steps))


def test_no_schedule_makes_fewer_steps():
    for steps, places in [(5, 1), (17, 2), (40, 3), (60, 5), (60, 1)]:
        made = recomputed(plan(steps, places)) + sum(n for n, _ in plan(steps, places).forward)
        assert made == fewest(steps, places)
    assert places_for(200, "sqrt") == 18 and places_for(200, "log") == 8
    assert recomputed(plan(10_000, 27)) == 25_044  # 30 states, with two at work
    assert longest(18, 2) >= 200 > longest(17, 2)


def carries(remat, steps):
    """Temporary memory of a run with Adam, in copies of its carry."""
    n = 4000
    w = jax.ShapeDtypeStruct((n,), jnp.float32)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    stack = jax.ShapeDtypeStruct((steps,), jnp.float32)

    def train(w, lam, batch):
        return jnp.sum((jnp.tanh(w) - batch) ** 2) + lam * jnp.sum(w**2)

    def valid(w, lam, batch):
        return jnp.sum(w**2)

    run = Unroll(lambda lam: optax.adam(lam), steps, remat=remat)
    call = jax.jit(lambda w, lam, b: bilevel.hypergrad(valid, train, run)(
        w, lam, inner_batch=b, outer_batch=()))  # fmt: skip
    compiled = call.lower(w, rate, stack).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (3 * 4 * n)


def test_memory_of_a_run_with_adam():
    assert carries("none", 60) - carries("none", 20) <= 1.05 * 40
    assert carries("sqrt", 200) <= 28
    assert carries("log", 200) <= 16


@pytest.mark.parametrize("mode,remat", [("mixed", "none"), ("mixed", "log"), ("reverse", "sqrt")])
def test_steps_made_again_change_nothing(mode, remat):
    """Also under vmap, with a start from an earlier call and integers in the state."""
    run = Unroll(adam, STEPS, mode=mode, remat=remat)

    def grads(rate):
        lam = {**LAM, "rate": rate}
        sol = bilevel.hypergrad_solve(
            outer, inner, run, W, lam, inner_batch=BATCHES, outer_batch=OUTER_BATCH
        )
        return sol.grads, sol.params, sol.state.opt_state

    found = jax.jit(jax.vmap(grads))(jnp.array([0.05, 0.01]))
    sol = expected()
    close(jax.tree.map(lambda x: x[0], found), (sol.grads, sol.params, sol.state.opt_state))


@pytest.mark.parametrize("unroll", [False, True])
def test_second_derivatives_of_a_loop_that_is_run_again(unroll):
    """Reverse over reverse and forward over reverse, with an integer state and closed-over data."""
    rates = jnp.linspace(0.05, 0.2, 5)

    def end(lam, w, loop):
        def step(state, i):
            w, count = state
            slope = jnp.cos(w) + lam * w
            return (w - rates[i] * slope / (1.0 + count), count + 1), jnp.sum(w)

        (w, count), info = loop(step, (w, jnp.int32(0)))
        return jnp.sum(w**3) + count

    def again(step, state):
        return rerun(step, state, first=0, steps=5, places=2, unroll=unroll)

    def plain(step, state):
        return jax.lax.scan(step, state, jnp.arange(5))

    w = jnp.array([0.3, -0.7])
    for order in (jax.jacrev, jax.jacfwd):
        found, want = (
            jax.jit(order(jax.grad(functools.partial(end, loop=loop), argnums=(0, 1)), (0, 1)))(
                0.4, w
            )
            for loop in (again, plain)
        )
        close(found, want)


def test_loops_and_straight_lines_agree():
    """With a key and a count in the state; what a step closes over is differentiated too."""

    def step(a, state, i):
        x, count, key = state
        key, sub = jax.random.split(key)
        x = jnp.sin(a["rate"] * x) + 0.1 * i * jax.random.normal(sub, x.shape) * a["noise"]
        return (x, count + 1, key), jax.lax.stop_gradient(x.sum())

    def value(a, x, how):
        state, told = (x, jnp.int32(0), jax.random.key(1)), []
        if how == "plain":
            for i in range(2, 11):
                state, info = step(a, state, i)
                told.append(info)
            told = jnp.stack(told)
        else:
            state, told = rerun(functools.partial(step, a), state, first=2, steps=9, places=2,
                                unroll=how == "straight")  # fmt: skip
        return jnp.sum(state[0] ** 3), (told, state[1])

    args = {"rate": jnp.float64(0.9), "noise": jnp.float64(0.5)}, jnp.arange(3.0)
    call = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True), static_argnums=2)
    for how in ("loop", "straight"):
        close(call(*args, how), call(*args, "plain"))


def run_whole(**kwargs):
    call = dict(steps=STEPS, outer_batch=OUTER_BATCH, progress=False)
    return bilevel.metagradient(outer, inner, adam, W, LAM, batches, **(call | kwargs))


@pytest.mark.parametrize("max_states", [3, 6, STEPS + 3, None])
def test_metagradient_is_the_unrolled_one(max_states):
    found, sol = run_whole(max_states=max_states), expected()
    close((found.value, found.grads, found.direct), (sol.value, sol.grads, sol.direct))
    close((found.end.params, found.end.opt_state), (sol.params, sol.state.opt_state))
    assert found.losses.shape == (STEPS,) and int(found.result) == 0
    assert found.losses[0] == pytest.approx(float(inner(W, LAM, batches(0))))


def test_activations_are_kept_where_they_fit(monkeypatch):
    """No step is made again then, and its derivative takes fewer products."""
    run = compiled_steps(Problem(outer, inner), adam)
    begun = run.begin(W, LAM, None, None)
    asked = functools.partial(replay._places, run, begun, LAM, batches(0))
    assert asked(9, STEPS, None) == 6 and asked(None, STEPS, None) is None
    step = begun, LAM, batches(0)
    new, _, kept = run.link(*step)
    size = sum(x.nbytes for x in jax.tree.leaves((new, kept, batches(0))))
    monkeypatch.setattr(replay, "ROOM", 4 * size)
    assert asked(None, 5, None) == 32 - 3 and asked(None, 4, None) is None
    assert asked(None, STEPS, 4) is None  # of the steps between two checkpoints
    given = [jnp.ones_like(x) for x in floats_of(begun)]
    follow = run.follow.lower(kept, *step, given, LAM).compile().cost_analysis()["flops"]
    pull = run.pull.lower(*step, given, LAM).compile().cost_analysis()["flops"]
    assert follow < 0.9 * pull
    # What a step is given is not copied: beside it stand the gradient and products.
    shapes = sorted(x.shape for x in jax.tree.leaves(kept))
    assert shapes == [(1,), (1, 3), (1, 4)], shapes


def test_a_loader_may_fill_its_arrays_again():
    """One array for all steps, as many loaders have it."""
    here = np.array(X[0]), np.array(Y[0])

    def filled(step):
        here[0][...], here[1][...] = X[step], Y[step]
        return here

    found = bilevel.metagradient(
        outer, inner, adam, W, LAM, filled, steps=STEPS, outer_batch=OUTER_BATCH, progress=False
    )
    close(found.grads, expected().grads)


def test_runs_compose():
    """Two runs one after the other give the derivative of the whole, in the start too."""
    later = {}

    def rest(end):
        later["run"] = run_whole(steps=STEPS - 5, first=5, opt_state=end.opt_state, params=end)
        return later["run"].start

    def run_whole(params, **kwargs):
        return bilevel.metagradient(
            outer, inner, adam, params.params, LAM, batches, outer_batch=OUTER_BATCH,
            progress=False, **kwargs,
        )  # fmt: skip

    head = bilevel.metagradient(
        None, inner, adam, W, LAM, batches, steps=5, cotangent=rest, progress=False
    )
    whole = jax.tree.map(jnp.add, head.grads, later["run"].grads)
    close(whole, expected().grads)
    of_start = jax.jit(jax.grad(lambda w: bilevel.hypergrad_solve(
        outer, inner, Unroll(adam, STEPS, mode="reverse"), w, LAM,
        inner_batch=BATCHES, outer_batch=OUTER_BATCH).value))(W)  # fmt: skip
    close(head.start.params, of_start)
    assert head.start.opt_state is None and head.value is None


class Stop(Exception):
    """Raised by a batch function where a process would be killed."""


def interrupted_at(call):
    """The batches, until so many were read."""
    read = iter(range(call))

    def source(step):
        if next(read, None) is None:
            raise Stop
        return batches(step)

    return source


def test_goes_on_where_it_was(tmp_path):
    """Stopped in both passes: the same bits as without a stop, and few steps made again."""
    call = dict(steps=STEPS, outer_batch=OUTER_BATCH, progress=False, checkpoint_every=4)
    run = functools.partial(bilevel.metagradient, outer, inner, adam, W, LAM, **call)
    whole = run(batches, checkpoint_dir=tmp_path / "whole")
    for stop in (6, 8, 7):  # in the forward pass, again there, in the backward pass
        with pytest.raises(Stop):
            run(interrupted_at(stop), checkpoint_dir=tmp_path / "killed")
    read = []
    found = run(
        lambda step: (read.append(step), batches(step))[1], checkpoint_dir=tmp_path / "killed"
    )
    jax.tree.map(np.testing.assert_array_equal, tuple(found), tuple(whole))
    close(found.grads, expected().grads)
    assert max(read[1:]) < 12  # the last segment was pulled back before
    with pytest.raises(ValueError, match="of another run: its `params and hparams` is"):
        bilevel.metagradient(outer, inner, adam, W, {**LAM, "rate": 0.2}, batches,
                             checkpoint_dir=tmp_path / "killed", **call)  # fmt: skip
    with pytest.raises(ValueError, match="of another run: its `outer` is"):
        run(batches, checkpoint_dir=tmp_path / "killed", outer_batch=batches(3))
    (tmp_path / "whole" / "forward" / "00000004" / "manifest.json").write_text("{}")
    shutil.rmtree(tmp_path / "whole" / "backward")
    with pytest.warns(UserWarning, match="is damaged .*: its steps are made again"):
        found = run(batches, checkpoint_dir=tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, tuple(found), tuple(whole))


KILLED = """
import os, signal, sys
import numpy as np
sys.path.insert(0, "tests/library")
import test_whole_runs as t
left = [int(sys.argv[2])]
def batches(step):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return t.batches(step)
found = t.bilevel.metagradient(t.outer, t.inner, t.adam, t.W, t.LAM, batches, steps=t.STEPS,
    outer_batch=t.OUTER_BATCH, progress=False, checkpoint_every=4, checkpoint_dir=sys.argv[1])
print(np.asarray(found.grads["rate"]).tobytes().hex())
"""


@pytest.mark.slow
def test_killed_processes_resume_to_the_same_bits(tmp_path):
    def process(folder, reads):
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / folder), str(reads)], cwd=ROOT,
            env={**os.environ, "JAX_ENABLE_X64": "1"}, capture_output=True, text=True,
        )  # fmt: skip

    for reads in (7, 15):
        assert process("killed", reads).returncode == -9
    last, whole = process("killed", 0), process("whole", 0)
    assert last.returncode == 0 == whole.returncode, last.stderr
    assert last.stdout == whole.stdout and len(last.stdout) > 10


@pytest.mark.slow
def test_ten_thousand_steps_with_thirty_states():
    def valid(w, lam, batch):
        return jnp.sum((w - 1) ** 2)

    def train(w, lam, batch):
        return lam * jnp.sum((w - batch) ** 2)

    def source(step):
        return np.float64(np.sin(step))

    tx, w, lam = optax.sgd(1e-3), jnp.zeros(2), jnp.float64(0.1)
    found = bilevel.metagradient(
        valid, train, tx, w, lam, source, steps=10_000, max_states=30, progress=False
    )
    stack = jnp.sin(jnp.arange(10_000.0))
    want = jax.jit(lambda: bilevel.hypergrad(valid, train, Unroll(tx, 10_000, remat="log"))(
        w, lam, inner_batch=stack, outer_batch=()))()  # fmt: skip
    close(found.grads, want, rtol=1e-9)


def goes_on():
    rows = iter(range(1000))
    return lambda step: (X[next(rows) % STEPS], Y[step])


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda: dict(batches=goes_on()), "`batches` is not a function of the step: step 12 gave"),
        (lambda: dict(batches=BATCHES), "`batches` must be a function step -> batch, got tuple"),
        (lambda: dict(outer=None), "`outer` is None and there is no `cotangent`"),
        (lambda: dict(max_states=2), "`max_states` must be at least 3"),
        (lambda: dict(cotangent=(1,)), r"`cotangent` must be an `InnerState"),
        (lambda: dict(cotangent=InnerState({}, None, None)), "`cotangent.params` has the tree"),
        (lambda: dict(hparams={"n": 3}), "hparams"),
    ],
)
def test_what_is_refused(change, message):
    call = dict(outer=outer, inner=inner, inner_tx=adam, params=W, hparams=LAM, batches=batches)
    with pytest.raises((TypeError, ValueError), match=message):
        bilevel.metagradient(
            **(call | dict(steps=STEPS, outer_batch=OUTER_BATCH, progress=False) | change())
        )


def test_half_precision_is_marked_and_what_nothing_reads_refused():
    """As `Unroll` does: 100 steps in bfloat16 lose too much, ten do not."""

    def loss(w, lam, batch):
        return 0.5 * jnp.sum((w - batch) ** 2) + lam * jnp.sum(w**2)

    one = jnp.ones(2, jnp.bfloat16)
    call = functools.partial(
        bilevel.metagradient, loss, loss, optax.sgd(0.1), 0 * one, jnp.float32(0.1), lambda t: one,
        outer_batch=one, progress=False,
    )  # fmt: skip
    told = [bilevel.Status(int(call(steps=steps).result)) for steps in (10, 100)]
    assert told == [bilevel.Status.ok, bilevel.Status.rounding]

    def unread(w, lam, batch):
        return loss(w, 0.0, batch)

    with pytest.raises(ValueError, match="No derivative reaches hparams"):
        bilevel.metagradient(
            unread, unread, optax.sgd(0.1), jnp.zeros(2), 0.1, lambda t: jnp.ones(2), steps=3,
            outer_batch=jnp.ones(2), progress=False,
        )  # fmt: skip
