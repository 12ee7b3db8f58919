"""What experiments budget for a step is what the loop itself counts, weighed by examples."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.hypergradient.base import cost_of
from experiments.augment import config as augment_config
from experiments.augment import problem as augment_problem
from experiments.augment import run as augment_run
from experiments.common import batches, budget, record, stn, stn_cnn
from experiments.decay import config as decay_config
from experiments.decay import problem as decay_problem
from experiments.decay import run as decay_run
from experiments.digits import config as digits_config
from experiments.digits import methods as digits_methods
from experiments.digits import problem as digits_problem
from experiments.digits import run as digits_run
from experiments.distill import config as distill_config
from experiments.distill import problem as distill_problem
from experiments.distill import run as distill_run
from experiments.hypernet import config as hypernet_config
from experiments.hypernet import decays, training
from experiments.hypernet import problem as hypernet_problem
from experiments.learning_rate import config as rate_config
from experiments.learning_rate import schedules
from experiments.learning_rate import tune as rate_tune
from experiments.lstm import config as lstm_config
from experiments.lstm import problem as lstm_problem
from experiments.lstm import run as lstm_run
from experiments.mip import config as mip_config
from experiments.mip import networks as mip_networks
from experiments.mip import tasks as mip_tasks
from experiments.overfit import config as overfit_config
from experiments.overfit import run as overfit_run
from experiments.pes import config as pes_config
from experiments.pes import problem as pes_problem
from experiments.pes import tune as pes_tune
from experiments.stn_cifar import config as cifar_config
from experiments.stn_cifar import problem as cifar_problem
from experiments.stn_cifar import train as cifar_train
from experiments.stn_digits import config as stn_digits_config
from experiments.stn_digits import problem as stn_digits_problem
from experiments.stn_digits import train as stn_digits_train
from experiments.stn_fashion import config as fashion_config
from experiments.stn_fashion import problem as fashion_problem
from experiments.stn_fashion import train as fashion_train
from experiments.stn_ptb import config as ptb_config
from experiments.stn_ptb import problem as ptb_problem
from experiments.stn_ptb import run as ptb_run
from experiments.stn_ptb import starts_problem, starts_train
from experiments.stn_ridge import config as ridge_config
from experiments.stn_ridge import problem as ridge_problem
from experiments.stn_ridge import run as ridge_run

KEY = jax.random.key(0)
WORDS = 50


class Step(NamedTuple):
    """A step of a real loop, and what the experiment budgets for it."""

    budgeted: float
    algorithm: bilevel.Algorithm
    state: Any
    inner_batches: Any
    outer_batch: Any
    examples: tuple[int, int]  # of the outer batch, and of an inner one
    more: dict[str, Any] = {}  # noqa: RUF012


@pytest.fixture(autouse=True)
def defaults():
    """What those who run the experiments have: float32 and broadcasting."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


def rows(batch: Any, axis: int = 0) -> int:
    """Examples of a batch, of which keys have one for all."""
    return max(np.shape(leaf)[axis] for leaf in jax.tree.leaves(batch) if np.ndim(leaf) > axis)


def weighed(cost: budget.Cost, outer: int, inner: int) -> float:
    """The rule of two batch sizes, on what a loop counted."""
    return float(cost._replace(outer_gradients=cost.outer_gradients * outer / inner).total)


def counted(step: Step) -> float:
    """What the loop says; the compiler leaves out what its count does not need."""
    state = step.state
    if hasattr(state, "moved"):  # in the warm-up of self-tuning no outer gradient is counted
        state = state._replace(step=jnp.asarray(10**6, state.step.dtype))

    def cost(state: Any, inner: Any, outer: Any) -> budget.Cost:
        read = {"inner_batches": inner, "outer_batch": outer, **step.more}
        return step.algorithm.step(state, **read, key=KEY)[1].cost

    return weighed(jax.jit(cost)(state, step.inner_batches, step.outer_batch), *step.examples)


def stack(batch: Any, count: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), batch)


def stn_digits(method: str) -> Step:
    config, module = stn_digits_config.smoke(), stn_digits_train
    loop = module.algorithm(method, config, module.Mode(1.0, 1.0, 1.0))
    params = stn_digits_problem.initial(config.hidden, 0)
    state = loop.init(params, stn_digits_problem.rates(jnp.float32(0.3)), key=KEY)
    inner, outer = module.sample(config, stn_digits_problem.batches(config, 0), KEY)
    sizes = (rows(outer), rows(inner, 1))
    return Step(module.cycle_cost(method, config), loop, state, inner, outer, sizes)


def stn_fashion(centred: bool) -> Step:
    config, module = fashion_config.smoke(), fashion_train
    loop = module.algorithm(config, centred, module.Mode(1.0))
    parts = fashion_problem.sets(config, 0)
    start = fashion_problem.start(config)
    state = loop.init(fashion_problem.task(config).initial(0), start, key=KEY)
    steps, valid = module.TRAINING, config.valid_batch
    inner, outer = stn_cnn.sample(config, steps, valid, parts["train"], parts["valid"], KEY)
    sizes = (len(outer["y"]), inner["y"].shape[1])
    return Step(module.cycle_cost(config, centred), loop, state, inner, outer, sizes)


def stn_cifar() -> Step:
    config, module = cifar_config.smoke(), cifar_train
    loop, parts = module.algorithm(config), cifar_problem.parts(config, 0)
    state = loop.init(cifar_problem.task(config).initial(0), stn.start(config), key=KEY)
    steps, valid = config.inner_steps, config.batch
    inner, outer = stn_cnn.sample(config, steps, valid, parts["train"], parts["valid"], KEY)
    sizes = (len(outer["y"]), inner["y"].shape[1])
    return Step(module.cycle_cost(config), loop, state, inner, outer, sizes)


def stn_ptb() -> Step:
    config = ptb_config.smoke()
    loop = ptb_run.compiled(config, WORDS).algorithm
    like = ptb_problem.hparams(config.start, config.penalty)
    state = loop.init(ptb_problem.build(config, WORDS, KEY)[1], like, key=KEY)
    ids = jnp.arange(400) % WORDS
    inner = starts_problem.windows(config, ids, KEY, (config.inner_steps, config.batch))
    outer = starts_problem.windows(config, ids, KEY, (config.batch,))
    sizes = (len(outer["y"]), inner["y"].shape[1])
    return Step(ptb_run.cycle_cost(config), loop, state, inner, outer, sizes)


def stn_ptb_starts(method: str) -> Step:
    config = ptb_config.smoke().starts
    loop = starts_train.algorithm(method, config, WORDS)
    params = starts_problem.build(config, WORDS, method == "delta_stn", KEY)[1]
    state = loop.init(params, starts_problem.hparams(0.5), key=KEY)
    ids = jnp.arange(400) % WORDS
    inner = starts_problem.windows(config, ids, KEY, (config.inner_steps, config.batch))
    outer = starts_problem.windows(config, ids, KEY, (config.valid_batch,))
    sizes = (len(outer["y"]), inner["y"].shape[1])
    return Step(starts_problem.cycle_cost(config, method), loop, state, inner, outer, sizes)


def stn_ridge(method: str) -> Step:
    config = ridge_config.smoke()
    loop = ridge_run.algorithm(method, config)
    train, valid = ridge_problem.data(config, 0)
    state = loop.init(jnp.zeros(config.features), jnp.float32(0), key=KEY)
    inner = stack(train, ridge_run.TRAINING)
    sizes = (len(valid[1]), len(train[1]))
    return Step(ridge_run.cycle_cost(method), loop, state, inner, valid, sizes)


def hypernet_curve(method: str) -> Step:
    config = hypernet_config.smoke().curves[0]
    train, valid = hypernet_problem.images(config, 0)
    loop = training.algorithm(method, config)
    params = hypernet_problem.initial(train[0].shape[1])
    state = loop.init(params, jnp.float32(config.start), key=KEY)
    outer = jax.tree.map(lambda x: x[:1], valid) if method == "global" else valid
    cost = training.step_cost(method, config, len(valid[1]))
    return Step(cost, loop, state, stack(train, 1), outer, (len(outer[1]), len(train[1])))


def hypernet_decays() -> Step:
    config = hypernet_config.smoke().decays
    train, valid, _ = decays.images(config, 0)
    pixels = train[0].shape[1]
    loop = decays.algorithm("local_shared", config)
    start = decays.start("local_shared", pixels, config)
    state = loop.init(decays.initial(pixels), start, key=KEY)
    inner = stack(batches.draw(train, KEY, (config.batch,)), 1)
    outer = batches.draw(valid, KEY, (config.outer_batch,))
    sizes = (len(outer[1]), inner[1].shape[1])
    return Step(decays.step_cost(config), loop, state, inner, outer, sizes)


def mip() -> Step:
    task = mip_config.smoke().tasks[0]
    data = mip_tasks.images(task, 0)
    loop = mip_networks.algorithm("plain", task, optax.sgd(0.1))
    state = loop.init(mip_tasks.initial(task, data[0].shape[1], KEY), jnp.float32(0.5), key=KEY)
    batch = jax.tree.map(lambda x: x[: task.batch or None], data)
    sizes = (0, rows(batch))  # its outer loss is a constant: it reads no example
    return Step(mip_networks.step_cost(task), loop, state, stack(batch, 1), batch, sizes)


def warm(step: Step) -> Step:
    """The next step, whose solve starts where the last one ended, and pays a product for it."""
    read = {"inner_batches": step.inner_batches, "outer_batch": step.outer_batch}
    return step._replace(state=jax.jit(step.algorithm.step)(step.state, **read)[0])


def digits(method: str) -> Step:
    config = digits_config.smoke()
    parts = digits_run._batches(config, 0)
    loop, params = digits_run._algorithm(method, config), digits_problem.initial(config, 0)
    many = method.endswith("per_weight")
    state = loop.init(params, digits_problem.decays(params, config.start, per_weight=many))
    inner, outer = (
        stack(parts["train"], config.inner_steps),
        {k: parts[k] for k in ("valid", "test")},
    )
    sizes = (len(parts["valid"]["y"]), len(parts["train"]["y"]))
    return warm(Step(digits_methods.step_cost(method, config), loop, state, inner, outer, sizes))


def decay(held: int) -> Step:
    config = decay_config.smoke()
    parts = decay_run._batches(config, 0)
    params = decay_problem.initial(parts["train"]["x"].shape[1], config.hidden, 0)
    loop, _ = decay_run._algorithm(config, held)
    state = loop.init(params, decay_problem.decays(params, config.start, "per_layer"))
    outer = jax.tree.map(lambda x: x[held:], parts["validation"])
    inner = stack(parts["train"], config.inner_steps)
    sizes = (len(outer["y"]), len(parts["train"]["y"]))
    return warm(Step(decay_run.step_cost(config, held), loop, state, inner, outer, sizes))


def overfit() -> Step:
    config = overfit_config.smoke()
    parts = overfit_run._batches("digits", config, 0)
    loop, _, _ = overfit_run._algorithm(config, 40)
    params, hparams = overfit_run._start("mlp", "per_weight", config, 0)
    inner, outer = stack(parts["train"], config.inner_steps), parts["validation"]
    sizes = (len(outer["y"]), len(parts["train"]["y"]))
    state = loop.init(params, hparams)
    return warm(Step(overfit_run.step_cost(config), loop, state, inner, outer, sizes))


def lstm(products: int) -> Step:
    config = dataclasses.replace(lstm_config.smoke(), products=products)
    params = lstm_problem.initial(config, WORDS, KEY)
    loop, _ = lstm_run.pieces(config)
    carry = lstm_problem.zero_carry(config, config.batch)
    state = loop.init(params, lstm_problem.hparams(config, params, many=False), carry)
    ids = jnp.arange(2_000) % WORDS
    parts = {"train": ids[: 8 * 200].reshape(config.batch, -1), "ids": ids}
    read = lstm_run.sample(config, parts, KEY, 0)
    inner, outer = read["inner_batches"], read["outer_batch"]
    sizes = (len(outer["y"]), inner["y"].shape[1])
    more = {"response_batch": read["response_batch"]}
    return Step(lstm_run.outer_cost(config), loop, state, inner, outer, sizes, more)


STEPS: dict[str, Any] = {
    "stn_digits, Delta-STN": lambda: stn_digits("delta_stn"),
    "stn_digits, STN": lambda: stn_digits("stn"),
    "stn_digits, Delta-STN linearized": lambda: stn_digits("delta_stn_low"),
    "stn_fashion, Delta-STN": lambda: stn_fashion(True),
    "stn_fashion, STN": lambda: stn_fashion(False),
    "stn_cifar": stn_cifar,
    "stn_ptb": stn_ptb,
    "stn_ptb from starts, Delta-STN": lambda: stn_ptb_starts("delta_stn"),
    "stn_ptb from starts, STN": lambda: stn_ptb_starts("stn"),
    "stn_ridge, Delta-STN": lambda: stn_ridge("delta_stn"),
    "stn_ridge, STN": lambda: stn_ridge("stn"),
    "hypernet, global": lambda: hypernet_curve("global"),
    "hypernet, local": lambda: hypernet_curve("local"),
    "hypernet, decays": hypernet_decays,
    "mip": mip,
    "digits, CG": lambda: digits("cg_per_tensor"),
    "digits, Neumann": lambda: digits("neumann_per_tensor"),
    "decay": lambda: decay(decay_config.smoke().guard),
    "overfit": overfit,
    "lstm, identity": lambda: lstm(0),
    "lstm, Neumann": lambda: lstm(3),
}


# The other method of an experiment has the same builders and another count of the same loop.
TWINS = {
    "stn_digits, STN", "stn_digits, Delta-STN", "stn_fashion, STN", "stn_ptb from starts, STN",
    "stn_digits, Delta-STN linearized", "stn_cifar", "hypernet, global",
    "digits, Neumann", "lstm, Neumann",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in TWINS else n for n in STEPS]
)
def test_a_loop_counts_what_is_budgeted_for_its_step(name):
    step = STEPS[name]()
    assert counted(step) == pytest.approx(step.budgeted, rel=1e-6)  # float32


class Calls:
    """Costs of all calls of ``hypergrad_solve``, by their response, as the loops count them."""

    def __init__(self, monkeypatch: Any, inner: int):
        self.seen: list[float] = []
        solve = bilevel.hypergrad_solve

        def spied(*arguments: Any, outer_batch: Any, **more: Any) -> Any:
            solution = solve(*arguments, outer_batch=outer_batch, **more)
            outer, (response, hparams) = rows(outer_batch), (arguments[2], arguments[4])

            def log(stats: Any) -> None:
                cost = cost_of(response, hparams, stats).plus(budget.Cost(outer_gradients=1))
                self.seen.append(weighed(cost, outer, inner))

            jax.debug.callback(log, solution.stats)
            return solution

        monkeypatch.setattr(bilevel, "hypergrad_solve", spied)


@pytest.mark.slow
def test_augment_counts_its_rounds(monkeypatch, tmp_path):
    config = dataclasses.replace(augment_config.smoke(), train=50, valid=100, steps=20, points=1)
    config = dataclasses.replace(config, every=10, batch=10, outer_batch=40)
    calls = Calls(monkeypatch, config.batch)
    parts = augment_problem.load("digits", config, 0)
    augment_run._run("digits", "learned", config, parts, record.Records(tmp_path, 0))
    jax.effects_barrier()
    (last,) = record.read(tmp_path)
    assert len(calls.seen) == 2
    assert last.cost == pytest.approx(20 + sum(calls.seen))


def test_distill_counts_its_hypergradients(monkeypatch):
    # Few enough products that CG makes them all.
    config = dataclasses.replace(distill_config.smoke(), outer_batch=40, products=5)
    train, _ = distill_run._parts("digits", 0)
    batch = {"y": jnp.asarray(distill_problem.labels(1))}
    calls = Calls(monkeypatch, len(batch["y"]))
    start, step, _ = distill_run._step(config)
    real = jax.tree.map(lambda x: x[: config.outer_batch], train)
    carry = start(0.02 * jax.random.normal(KEY, (10, 64), jnp.float32))
    for _ in range(2):
        carry, _ = step(carry, batch, real)
    jax.effects_barrier()
    newton = config.newton_steps * (1 + budget.Cost(products=config.products).total)
    expected = distill_run.step_cost(config, budget.weight(40, 10))
    assert newton + calls.seen[-1] == pytest.approx(expected)


@pytest.mark.parametrize("length", [1, 50])
def test_learning_rate_counts_its_windows(monkeypatch, length):
    config = dataclasses.replace(rate_config.smoke(), steps=50, train=64)
    images = jnp.zeros((64, 28, 28), jnp.float32), jnp.zeros(64, jnp.int32)
    calls = Calls(monkeypatch, config.batch)
    schedule = schedules.start(3, config.windows, 0.01, 0.5)
    jax.jit(rate_tune.hypergradient(config, "mlp", length))(schedule, images, images, KEY)
    jax.effects_barrier()
    assert len(calls.seen) == 50 // length
    assert sum(calls.seen) == pytest.approx(rate_tune.cost(config, length))


@pytest.mark.parametrize("method", pes_tune.METHODS)
def test_pes_counts_its_windows(monkeypatch, method):
    config = dataclasses.replace(pes_config.smoke(), train=64, hidden=8, pairs=5)
    train = jnp.zeros((64, 16), jnp.float32), jnp.zeros(64, jnp.int32)
    calls = Calls(monkeypatch, config.batch)
    carry = pes_tune.start(method, config, pes_problem.initial(16, config.hidden, KEY))
    pes_tune.tuner(method, config)(carry, train, KEY, 2)
    jax.effects_barrier()
    assert calls.seen == pytest.approx([pes_tune.cost(method, config)] * 2)
