"""Twelve faults of a run: nothing before the last checkpoint is lost, the resumed run has the
bits of one never interrupted, and the message says what to do."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from faults_run import ALG, OUTER, STEPS, first_state, inner_data, run

from bilevel import fit
from bilevel.run import NonfiniteError
from bilevel.run.checkpoint import Checkpoints

BAD = 13  # the step of every fault that has one; checkpoints are at 4, 8, 12, ...


def bits(result):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((result.state, result[1:6]))]


def lines(folder):
    """The log without its time fields."""
    records = [json.loads(s) for s in (Path(folder) / "log.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records


def saved(folder):
    return sorted(p.name for p in (Path(folder) / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run that nothing interrupts: what every other one must end with."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


@pytest.fixture
def copy(whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    return folder


def assert_same_run(whole, folder, result):
    assert bits(result) == bits(whole[1])
    assert lines(folder) == lines(whole[0])
    assert saved(folder) == saved(whole[0])  # no lock, no half-written folder either
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "log.jsonl"]


# Processes that end: by kill -9, SIGTERM and SIGINT; and two at once.


def start(folder, pause):
    """The run as another process, with a pause after every step."""
    program = Path(__file__).parents[1] / "faults_run.py"
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    command = [sys.executable, str(program), str(folder), str(STEPS), str(pause)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(process, folder, step):
    """Until this process has told the log about ``step``."""
    at, deadline = folder / "at", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        told = at.read_text().split() if at.exists() else []
        if len(told) == 2 and int(told[0]) == process.pid and int(told[1]) >= step:
            return
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """One folder, three processes after another, each ended by another signal."""
    folder = tmp_path_factory.mktemp("ended")
    told = {}
    for name, step in (("SIGKILL", 6), ("SIGTERM", 11), ("SIGINT", 17)):
        process = start(folder, 0.2)
        wait_for(process, folder, step)
        if name == "SIGKILL":
            with pytest.raises(BlockingIOError) as told["second process"]:
                run(folder)
            with pytest.raises(BlockingIOError) as told["second log"]:
                run(folder, checkpoint_dir=None)
            told["pid"] = process.pid
        process.send_signal(getattr(signal, name))
        errors = process.communicate(timeout=60)[1]
        told[name] = (process.returncode, errors, saved(folder))
    return folder, told


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_killed_process_leaves_its_last_checkpoint_and_no_stale_lock(ended, name):
    code, errors, checkpoints = ended[1][name]
    assert code == -getattr(signal, name), errors
    assert checkpoints[-1] >= {"SIGKILL": "00000004", "SIGTERM": "00000008"}[name]


def test_ctrl_c_saves_the_finished_step_and_says_where_to_go_on(ended):
    code, errors, checkpoints = ended[1]["SIGINT"]
    assert code == -signal.SIGINT, errors  # how Python ends by an interrupt that nobody caught
    assert "KeyboardInterrupt" in errors and "Traceback" in errors
    last = checkpoints[-1]
    assert f"the same call goes on from {ended[0] / 'checkpoints' / last}" in errors
    assert int(last) >= 17  # the step under way too: not a multiple of 4, unless by chance
    assert "cannot schedule new futures" not in errors and "Segmentation" not in errors


def test_a_second_process_is_refused_and_told_about_the_first(ended):
    for name, setting in (("second process", "checkpoint_dir"), ("second log", "log")):
        message = str(ended[1][name].value)
        assert message.startswith(f"`{setting}` ") and "is in use by another run" in message
        assert f"process {ended[1]['pid']} on host " in message
        assert "started " in message and f"or choose another `{setting}`" in message


def test_after_three_ends_the_run_has_the_same_bits(whole, ended, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(ended[0], folder)
    result = run(folder)
    assert result.resumed_from >= 17 and len(result.history) == STEPS
    assert bits(result) == bits(whole[1]) and lines(folder) == lines(whole[0])


def test_an_interrupt_while_compiling_ends_cleanly(tmp_path):
    process = start(tmp_path, 0)
    lock, deadline = tmp_path / "log.jsonl.lock", time.monotonic() + 120
    while not lock.exists() and time.monotonic() < deadline:  # `fit` has begun: it traces next
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT, errors
    assert errors.count("Traceback") == 1 and "KeyboardInterrupt" in errors
    assert not list(tmp_path.rglob("*.lock")) and not list(tmp_path.rglob(".writing*"))


@pytest.fixture
def interrupts():
    """Ctrl-C raises here as in a program; a test runner may have set that aside."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("times", [1, 2])
def test_the_first_interrupt_waits_for_its_step_and_the_second_does_not(
    whole, tmp_path, interrupts, times
):
    def data(step):
        if step == BAD:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return inner_data(step)

    with pytest.raises(KeyboardInterrupt) as caught:
        run(tmp_path, inner_data=data)
    done = BAD + 1 if times == 1 else BAD
    assert f"checkpoints/{done:08d}" in "".join(caught.value.__notes__)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(lines(tmp_path)) == done  # the steps that were finished, no more
    result = run(tmp_path)
    assert result.resumed_from == done
    assert bits(result) == bits(whole[1]) and lines(tmp_path) == lines(whole[0])


def test_an_interrupt_after_the_last_step_is_not_swallowed(tmp_path, interrupts, monkeypatch):
    save = Checkpoints.save

    def slow(self, step, tree, notes):
        signal.raise_signal(signal.SIGINT)
        return save(self, step, tree, notes)

    monkeypatch.setattr(Checkpoints, "save", slow)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, steps=2)  # the only checkpoint is written when all steps are made
    assert saved(tmp_path) == ["00000002"]


# What surrounds a run fails: the disk, its files, the clock.


@pytest.fixture
def small_disk():
    """Files may not grow beyond a size: what a full disk does, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def when(step, do):
    """Data that does something before it gives the batch of a step."""

    def data(i):
        if i == step:
            do()
        return inner_data(i)

    return data


def test_a_full_disk_under_the_checkpoints_loses_nothing(whole, tmp_path, small_disk):
    message = r"`checkpoint_dir` .* could not take the checkpoint after step 16 .*00000012"
    with pytest.raises(OSError, match=message) as caught:
        run(tmp_path, log=None, inner_data=when(BAD, lambda: small_disk(100)))
    small_disk(resource.RLIM_INFINITY)
    assert "Free space on that disk and call `fit` again" in str(caught.value)
    assert saved(tmp_path) == ["00000004", "00000008", "00000012"]
    result = run(tmp_path, log=None)
    assert result.resumed_from == 12 and bits(result) == bits(whole[1])


def test_what_a_full_disk_left_half_written_is_removed_at_the_next_start(copy):
    left = copy / "checkpoints" / ".writing-00000028"
    (left / "arrays").mkdir(parents=True)
    (left / "arrays" / "half").write_text("x")
    run(copy)
    assert not left.exists()


def test_a_full_disk_under_the_log_loses_nothing(whole, tmp_path, small_disk):
    size = (whole[0] / "log.jsonl").stat().st_size * BAD // STEPS  # in the middle of a line
    message = "`log` .* could not take the record of step 1[0-9] .*free space on that disk"
    with pytest.raises(OSError, match=message) as caught:
        # The last step before the disk is full is far enough from any checkpoint.
        run(tmp_path, checkpoint_every=5, inner_data=when(6, lambda: small_disk(size)))
    small_disk(resource.RLIM_INFINITY)
    assert any("goes on from" in note for note in caught.value.__notes__)
    result = run(tmp_path, checkpoint_every=5)
    assert result.resumed_from == 10
    assert bits(result) == bits(whole[1]) and lines(tmp_path) == lines(whole[0])


def test_a_damaged_checkpoint_costs_one_interval(whole, copy):
    manifest = copy / "checkpoints" / f"{STEPS:08d}" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    with pytest.warns(UserWarning, match=f"{STEPS:08d} is damaged .*continuing from .*00000020"):
        result = run(copy)
    assert result.resumed_from == 20
    assert bits(result) == bits(whole[1]) and lines(copy) == lines(whole[0])


def test_a_checkpoint_that_holds_nan_is_passed_over(whole, copy):
    """Such as one from before steps that are not finite were dropped."""
    checkpoints = Checkpoints(copy / "checkpoints", 3, {"run_id": None, "key": None})
    trained = whole[1].state.trained
    trained = trained._replace(params=trained.params * np.nan)
    state = whole[1].state._replace(trained=trained)
    newest = copy / "checkpoints" / f"{STEPS:08d}"
    notes = json.loads((newest / "manifest.json").read_text())["body"]["notes"]
    from bilevel.run.best import no_best

    best = no_best(ALG, state, state.params.dtype)
    checkpoints.save(STEPS, {"state": state, "best": best}, notes)  # in place of the good one
    with pytest.warns(UserWarning, match="NaN or infinite parameters.*continuing from .*00000020"):
        result = run(copy)
    assert bits(result) == bits(whole[1])
    for folder in (copy / "checkpoints").glob("0*"):
        shutil.rmtree(folder)
    checkpoints.save(STEPS, {"state": state, "best": best}, notes)
    with pytest.raises(OSError, match="every checkpoint in .* is damaged .*NaN or infinite"):
        run(copy)


def test_a_foreign_checkpoint_is_refused_and_a_foreign_folder_left_alone(whole, copy):
    with pytest.raises(ValueError, match="another run: its `run_id` .*Choose another `checkpoint"):
        run(copy, run_id="other")
    assert saved(copy) == saved(whole[0]) and lines(copy) == lines(whole[0])
    for name in ("100", "notes"):  # somebody else's, one with a number for a name
        (copy / "checkpoints" / name).mkdir()
    (copy / "checkpoints" / "00000099").write_text("a file")
    result = run(copy)
    assert result.resumed_from == STEPS
    assert {"100", "notes", "00000099"} <= set(saved(copy))


def damaged_log(copy, change):
    log = copy / "log.jsonl"
    found = log.read_bytes().splitlines(keepends=True)
    change(found)
    log.write_bytes(b"".join(found))
    return log.read_bytes()


def test_a_log_damaged_in_the_middle_keeps_the_records_after_the_damage(whole, copy):
    def change(found):
        found[5] = found[5][:20] + b"\xff\x00" + found[5][22:]
        found[6] = b"{}\n"
        found[9] = found[9][: len(found[9]) // 2]  # it swallows the next line

    before = damaged_log(copy, change)
    message = "`log` .* is damaged in line 6-7, 10: .*Steps without a record: 5-6, 9-10. The file"
    with pytest.warns(UserWarning, match=message):
        result = run(copy)
    assert (copy / "log.jsonl.damaged-1").read_bytes() == before
    kept = [r for r in lines(whole[0]) if r["step"] not in (5, 6, 9, 10)]
    assert lines(copy) == kept
    assert [r["step"] for r in result.history] == [r["step"] for r in kept]
    run(copy)  # mended: no further warning, which would be an error here
    assert not (copy / "log.jsonl.damaged-2").exists()


def test_lines_of_two_processes_are_sorted_out_and_order_is_kept(whole, copy):
    before = damaged_log(copy, lambda found: found.insert(8, found[3]))
    with pytest.warns(UserWarning, match="damaged in line 9: .*kept. The file as it was"):
        run(copy)
    assert lines(copy) == lines(whole[0])
    assert (copy / "log.jsonl.damaged-1").read_bytes() == before


def test_a_line_cut_short_by_a_kill_is_no_damage(whole, copy):
    shutil.rmtree(copy / "checkpoints" / f"{STEPS:08d}")
    damaged_log(copy, lambda found: found.append(b'{"step": 24, "outer'))
    assert_same_run(whole, copy, run(copy))


def test_clocks_that_jump_do_not_matter(whole, copy, monkeypatch):
    shutil.rmtree(copy / "checkpoints" / f"{STEPS:08d}")
    # The oldest checkpoint looks newest, and all of them seem to come from the future.
    for age, folder in enumerate(sorted((copy / "checkpoints").iterdir())):
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (4e9 - 1e6 * age, 4e9 - 1e6 * age))
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600.0 * next(ticks))  # backwards
    result = run(copy)
    assert result.resumed_from == 20
    assert bits(result) == bits(whole[1]) and lines(copy) == lines(whole[0])


# What the run is given fails: a batch, a loader, a callback.


def nan_at(step, data=inner_data):
    return lambda i: data(i) * (np.nan if i == step else 1.0)


def outer_nan_at(step):
    return lambda i: OUTER * (np.nan if i == step else 1.0)


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_a_nan_batch_raises_and_the_last_finite_state_is_kept(whole, tmp_path, where):
    data = {"inner_data": nan_at(BAD)} if where == "inner" else {"outer_data": outer_nan_at(BAD)}
    with pytest.raises(NonfiniteError) as caught:
        run(tmp_path, **data)
    error, message = caught.value, str(caught.value)
    assert message.startswith("step 13 was not finite: outer_loss, ")
    assert error.step == BAD and error.what[0] == "outer_loss"
    assert ("inner_loss" in error.what or "params" in error.what) == (where == "inner")
    assert error.checkpoint == tmp_path / "checkpoints" / "00000013"
    assert f"the last finite checkpoint is {error.checkpoint}" in message
    for part in ("(status nonfinite_input)", "`inner_data(13)`", "on_nonfinite='skip'", "'stop'"):
        assert part in message
    assert saved(tmp_path)[-1] == "00000013"
    # The state is that of the run before, though the host had learnt of it one step late.
    before = fit(ALG, first_state(), inner_data, OUTER, steps=BAD, progress=False)
    assert bits(error.result) == bits(before)
    assert lines(tmp_path)[-1]["step"] == BAD and lines(tmp_path)[-1]["nonfinite"] == error.what
    # With the batch mended the same call goes on, to the same bits.
    result = run(tmp_path)
    assert result.resumed_from == BAD
    assert bits(result) == bits(whole[1]) and lines(tmp_path) == lines(whole[0])


def test_without_a_folder_the_error_holds_the_state():
    with pytest.raises(NonfiniteError, match="in `error.result`; with `checkpoint_dir`") as caught:
        fit(ALG, first_state(), nan_at(2), OUTER, steps=9, progress=False)
    assert caught.value.checkpoint is None and int(caught.value.result.state.step) == 2
    again = fit(ALG, caught.value.result.state, inner_data, OUTER, steps=9, progress=False)
    assert bits(again)[:5] == bits(fit(ALG, first_state(), inner_data, OUTER, steps=9,
                                       progress=False))[:5]  # fmt: skip


def test_a_nan_batch_stops_the_run_with_the_last_finite_state(tmp_path):
    result = run(tmp_path, inner_data=nan_at(BAD), on_nonfinite="stop")
    assert result.stopped == "nonfinite" and int(result.state.step) == BAD
    assert np.all(np.isfinite(result.state.params)) and result.best_step < BAD
    assert [r["step"] for r in result.history] == list(range(BAD + 1))
    assert result.trust.nonfinite == 1
    again = run(tmp_path, inner_data=nan_at(BAD), on_nonfinite="stop")
    assert again.resumed_from == BAD and bits(again) == bits(result)


def test_a_skipped_batch_leaves_the_state_and_the_run_goes_on(tmp_path):
    result = run(tmp_path, inner_data=nan_at(BAD), on_nonfinite="skip")
    assert result.stopped == "steps" and int(result.state.step) == STEPS
    record = result.history[BAD]
    assert record["status"] == "nonfinite_input" and record["nonfinite"][0] == "outer_loss"
    assert not any("nonfinite" in r for r in result.history if r["step"] != BAD)
    # By hand: every step but that one, with its own number.
    state, step = first_state(), jax.jit(ALG.step)
    for i in range(STEPS):
        if i != BAD:
            state, _ = step(state, inner_batches=inner_data(i), outer_batch=OUTER)
    for name in ("trained", "outer"):
        mine, theirs = getattr(result.state, name), getattr(state, name)
        # Another compiled program: rounding, amplified by 24 steps of two Adams.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), mine, theirs)


def test_a_run_that_skips_resumes_to_the_same_bits(tmp_path):
    data = nan_at(5, nan_at(BAD))
    together = run(tmp_path / "together", inner_data=data, on_nonfinite="skip")
    with pytest.raises(NonfiniteError, match="step 5 was not finite"):
        run(tmp_path / "parts", inner_data=data)
    for stop in (9, BAD, STEPS):
        result = run(tmp_path / "parts", inner_data=data, on_nonfinite="skip", steps=stop)
    assert bits(result) == bits(together)
    assert lines(tmp_path / "parts") == lines(tmp_path / "together")


def test_a_loader_that_raises_is_named_with_its_step(whole, tmp_path):
    def fail():
        raise OSError("connection reset")

    message = "function `inner_data` raised OSError at step 13: connection reset.*call `fit` again"
    with pytest.raises(RuntimeError, match=message) as caught:
        run(tmp_path, inner_data=when(BAD, fail))
    assert isinstance(caught.value.__cause__, OSError)
    assert "checkpoints/00000013" in "".join(caught.value.__notes__)
    result = run(tmp_path)
    assert result.resumed_from == BAD
    assert bits(result) == bits(whole[1]) and lines(tmp_path) == lines(whole[0])


def test_a_callback_that_raises_keeps_its_own_error(whole, tmp_path):
    class Pruned(Exception):
        pass

    def callback(step, record):
        if step == BAD:
            raise Pruned("by a study")

    with pytest.raises(Pruned) as caught:
        run(tmp_path, callbacks=[lambda step, record: None, callback])
    notes = "".join(caught.value.__notes__)
    assert "raised by `callbacks[1]` at step 13" in notes and "checkpoints/00000014" in notes
    result = run(tmp_path)
    assert result.resumed_from == BAD + 1
    assert bits(result) == bits(whole[1]) and lines(tmp_path) == lines(whole[0])


def test_numbers_are_still_read_one_step_late(tmp_path):
    """So that the device does not wait for the host, NaN watch or not."""
    seen = []

    def data(step):
        log = tmp_path / "log.jsonl"
        seen.append(log.read_bytes().count(b"\n") if log.exists() else 0)
        return inner_data(step)

    run(tmp_path, inner_data=data, checkpoint_dir=None, steps=6)
    assert seen == [0, 0, 1, 2, 3, 4]
