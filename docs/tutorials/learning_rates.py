# %% [markdown]
# # A learned learning-rate schedule
#
# A learning rate leaves no trace in the training loss, so no implicit derivative sees it. But
# training is a program, and its last line is a validation loss: differentiate the program. This
# tutorial learns a schedule of twelve numbers for a run of 150 steps and compares it, on *test*
# images and with seeds it was not learned on, with the best constant rate and the best cosine
# schedule of a grid.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevel

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x = jnp.asarray(images[order] / 16, jnp.float32)
y = jnp.asarray(labels[order])
training, valid_set, test_set = (x[:600], y[:600]), (x[600:1000], y[600:1000]), (x[1000:], y[1000:])

STEPS = 150  # smoke: 12

# %% [markdown]
# ## A run to be tuned
#
# A small network, batches of 32, SGD with momentum. The schedule is a piecewise linear function of
# the step through the logarithms of twelve rates.


# %%
def init(key):
    one, two = jax.random.split(key)
    return {
        "in": jax.random.normal(one, (64, 64)) / 8, "b": jnp.zeros(64),
        "out": jax.random.normal(two, (64, 10)) / 8, "c": jnp.zeros(10),
    }  # fmt: skip


def loss(w, lam, batch):
    x, y = batch
    logits = jax.nn.relu(x @ w["in"] + w["b"]) @ w["out"] + w["c"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def sample(key):  # one batch for every step
    rows = jax.random.randint(key, (STEPS, 32), 0, 600)
    return jax.tree.map(lambda a: a[rows], training)


def scheduled(lam):
    knots = jnp.linspace(0, STEPS - 1, len(lam))
    return optax.sgd(lambda step: jnp.exp(jnp.interp(step, knots, lam)), momentum=0.9)


# %% [markdown]
# ## The derivative of a run
#
# `Unroll` is the response of the parameters through the whole run. Training and validation loss
# are the same function here, on different data.

# %%
response = bilevel.Unroll(scheduled, STEPS)
gradient = jax.jit(bilevel.value_and_hypergrad(loss, loss, response))

lam = jnp.full(12, jnp.log(0.03))
value, slopes = gradient(
    init(jax.random.key(0)), lam, inner_batch=sample(jax.random.key(1)), outer_batch=valid_set
)
print(f"validation loss {value:.3f} after {STEPS} steps; slope in each log rate:")
print(np.array2string(np.asarray(slopes), precision=3, suppress_small=True))

# %% [markdown]
# The first nine slopes are negative and the last three positive: learn faster, and slow down at
# the end. Nobody told it that schedules decay. Now follow the slopes. Each step of the outer
# optimizer sees a new initialization and new batches, so that the schedule does not learn one run
# by heart. Clipping keeps one unlucky run from moving it far.

# %%
outer_steps = 80  # smoke: 2
tx = optax.chain(optax.clip(0.1), optax.adam(0.1))
state = tx.init(lam)
history = [lam]
for i in range(outer_steps):
    one, two = jax.random.split(jax.random.fold_in(jax.random.key(2), i))
    value, slope = gradient(init(one), lam, inner_batch=sample(two), outer_batch=valid_set)
    updates, state = tx.update(slope, state)
    lam = optax.apply_updates(lam, updates)
    history.append(lam)
print(np.array2string(np.exp(lam), precision=3, suppress_small=True))

# %% [markdown]
# ## In test
#
# Twenty new seeds for every schedule. The best constant rate and the best cosine are chosen as you
# would choose them: by validation loss, each from eight rates, on five seeds of their own.


# %%
@jax.jit
def run(lam, keys):
    def one(key):
        start, batches = jax.random.split(key)
        w, tx = init(start), scheduled(lam)

        def step(carry, batch):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w, lam, batch), state)
            return (optax.apply_updates(w, updates), state), None

        (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), sample(batches))
        return loss(w, lam, valid_set), loss(w, lam, test_set)

    return jax.vmap(one)(keys)


rates = np.geomspace(0.01, 1.0, 8)
knots = np.arange(12) / 11
candidates = {
    "constant": [np.full(12, np.log(r)) for r in rates],
    "cosine": [np.log(r * (0.5 + 0.5 * np.cos(np.pi * knots)) + 1e-4) for r in rates],
}
few, many = jax.random.split(jax.random.key(3), 5), jax.random.split(jax.random.key(4), 20)
schedules = {
    name: min(tried, key=lambda lam: float(run(jnp.float32(lam), few)[0].mean()))
    for name, tried in candidates.items()
}
schedules["learned"] = lam
tests = {name: np.asarray(run(jnp.float32(s), many)[1]) for name, s in schedules.items()}
for name, values in tests.items():
    print(f"{name:9} {values.mean():.4f} +- {values.std(ddof=1) / 20**0.5:.4f}")
print(f"learned less cosine, seed by seed: {np.mean(tests['learned'] - tests['cosine']):+.4f}")

# %% figure: Three learning-rate schedules, and the test loss of each with twenty seeds
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, schedule in schedules.items():
    axes[0].semilogy(np.linspace(0, STEPS - 1, 12), np.exp(schedule), label=name)
axes[0].set(xlabel="step", ylabel="learning rate", title="The schedules", ylim=(1e-3, 2))
axes[0].legend()
axes[1].boxplot(list(tests.values()), tick_labels=list(tests))
axes[1].set(ylabel="test loss", title="Twenty new seeds")
figure

# %% [markdown]
# The learned schedule ends where the best cosine does, from twelve equal rates and without a grid,
# and both leave the best constant rate far behind. Between knots it wanders: many schedules are
# equally good, and the gradient stops at the first it finds. What it cost: 80 runs with their
# derivatives, about 240 plain runs; the grid of cosines, 40. With two or three numbers to tune, a
# grid is cheaper. With twelve, or one rate per layer, there is no grid, and the cost of the
# gradient stays. [Unrolled training](../unrolled.md) has the rest: memory of long runs, momentum,
# warm starts.

# %% check
assert np.all(np.asarray(slopes[:9]) < 0) and np.all(np.asarray(slopes[9:]) > 0)
assert tests["learned"].mean() < 0.8 * tests["constant"].mean()
assert abs(tests["learned"].mean() - tests["cosine"].mean()) < 0.01
