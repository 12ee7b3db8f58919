# %% [markdown]
# # Dropout and cutout by self-tuning
#
# How much dropout? How large a hole to cut into the images? No derivative of the training loss
# answers: masks are drawn, and the side of a hole is a whole number. A self-tuning network learns
# instead how its weights *respond* when these settings move a little, while it trains; the
# validation loss then pulls the settings through that response. One run finds them, and the
# schedule they should follow.
#
# The data are scikit-learn's 8×8 digits. The camera that took the training images was clean; the
# one in use has a smear of 3×3 pixels, somewhere. There are 200 clean images to learn from, 300
# smeared ones to tune on, and 1297 smeared ones that nobody sees, the *test* set. Cutting holes
# into the training images must help. How large, and is dropout needed beside them?

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevel
from bilevel.regularizers import cutout, dropout

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x = jnp.asarray(images[order] / 16, jnp.float32).reshape(-1, 8, 8, 1)
y = jnp.asarray(labels[order])
smeared = cutout(jax.random.key(0), x, holes=1, length=3, max_holes=1)
training, valid_set = (x[:200], y[:200]), (smeared[200:500], y[200:500])
test_set = (smeared[500:], y[500:])

# %% [markdown]
# ## What is tuned
#
# Two dropout rates, of the pixels and of the hidden units, and the side of one square hole, a
# whole number from 0 to 4. A `Space` keeps them in their ranges. The training loss reads them;
# randomness comes from a key in the batch.

# %%
space = bilevel.Space({
    "pixels": bilevel.Interval(0.0, 0.8),
    "hidden": bilevel.Interval(0.0, 0.8),
    "hole": bilevel.Integer(0, 4),
})  # fmt: skip


def init(key):
    one, two = jax.random.split(key)
    return {
        "in": jax.random.normal(one, (64, 128)) / 8, "b": jnp.zeros(128),
        "out": jax.random.normal(two, (128, 10)) / 12, "c": jnp.zeros(10),
    }  # fmt: skip


def noisy(w, hparams, batch):
    first, second, third = jax.random.split(batch["key"], 3)
    x = cutout(first, batch["x"], holes=1, length=hparams["hole"], max_holes=1)
    x = dropout(second, x.reshape(len(x), -1), hparams["pixels"])
    hidden = dropout(third, jax.nn.relu(x @ w["in"] + w["b"]), hparams["hidden"])
    logits = hidden @ w["out"] + w["c"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def logits(w, x):
    return jax.nn.relu(x.reshape(len(x), -1) @ w["in"] + w["b"]) @ w["out"] + w["c"]


def clean(w, hparams, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits(w, batch["x"]), batch["y"]).mean()


# %% [markdown]
# ## The run
#
# A step of the loop is five training steps, of weights and response, and one validation step.
# `scale` is how far the settings are perturbed while the response is learned, in units of the
# unbounded variable; it is tuned too. That of the hole is larger, so that neighbouring whole
# numbers are tried: a response that only ever sees holes of 2 cannot tell what 3 would do.
# `groups` is how many perturbations share a batch of 100. The first 100 steps train without moving
# the settings, because an untrained response points anywhere.

# %%
steps = 400  # smoke: 2
tuning = bilevel.self_tuning(
    clean, noisy, optax.adam(2e-3), optax.adam(0.02),
    network=bilevel.StructuredResponse(), constrain=space,
    scale={"pixels": 0.5, "hidden": 0.5, "hole": 1.0}, entropy=1e-3, groups=4, warm_up=100,
)  # fmt: skip
start = {"pixels": jnp.float32(0.1), "hidden": jnp.float32(0.1), "hole": jnp.float32(2.0)}


def sample(key):
    rows, masks = jax.random.split(key)
    index = jax.random.randint(rows, (5, 100), 0, 200)
    inner = {"x": training[0][index], "y": training[1][index], "key": jax.random.split(masks, 5)}
    return inner, {"x": valid_set[0], "y": valid_set[1]}


run = jax.jit(lambda state, key: bilevel.scan_run(tuning, state, sample, steps, key=key))
found = run(tuning.init(init(jax.random.key(0)), start), jax.random.key(1))
end = {name: float(value) for name, value in found.state.hparams.items()}
print({name: round(value, 2) for name, value in end.items()})

# %% [markdown]
# ## The schedule
#
# What the settings were while the network trained is a result of its own.

# %% figure: Dropout rates and the side of the hole against the training step
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
when = 5 * np.arange(steps)
for name in ("pixels", "hidden"):
    axes[0].plot(when, found.infos.hparams[name], label=f"dropout of {name}")
axes[0].set(xlabel="training step", ylabel="rate", title="Dropout", ylim=(0, None))
axes[0].legend()
axes[1].plot(when, found.infos.hparams["hole"], drawstyle="steps-post")
axes[1].set(xlabel="training step", ylabel="pixels", title="Side of the hole", ylim=(-0.2, 4.2))
figure

# %% [markdown]
# ## In test
#
# Plain training with settings held fixed, for as many steps, five seeds each. `HyperSchedule`
# replays what was found in a training loop that knows nothing of responses.

# %%
schedule = bilevel.HyperSchedule.from_infos(found.infos, steps_each=5)
tx = optax.adam(2e-3)


def trained(settings, key):
    """Test loss and error of a network trained with `settings(step)`."""
    w = init(key)

    def step(carry, i):
        w, state = carry
        rows, masks = jax.random.split(jax.random.fold_in(key, i))
        index = jax.random.randint(rows, (100,), 0, 200)
        batch = {"x": training[0][index], "y": training[1][index], "key": masks}
        updates, state = tx.update(jax.grad(noisy)(w, settings(i), batch), state)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), jnp.arange(5 * steps))
    wrong = jnp.mean(jnp.argmax(logits(w, test_set[0]), 1) != test_set[1])
    return clean(w, None, {"x": test_set[0], "y": test_set[1]}), wrong


@jax.jit
def fixed(pixels, hidden, hole, keys):
    settings = {"pixels": pixels, "hidden": hidden, "hole": hole}
    return jax.lax.map(lambda key: trained(lambda i: settings, key), keys)


keys = jax.random.split(jax.random.key(5), 5)
results = {
    "no regularization": fixed(0.0, 0.0, 0.0, keys),
    "dropout of 0.5 in the hidden layer": fixed(0.0, 0.5, 0.0, keys),
    "dropout of 0.5 and a hole of 2": fixed(0.0, 0.5, 2.0, keys),
    "dropout of 0.5 and the hole of the camera": fixed(0.0, 0.5, 3.0, keys),
    "the last settings found": fixed(end["pixels"], end["hidden"], end["hole"], keys),
    "the schedule found": jax.jit(
        lambda keys: jax.lax.map(lambda key: trained(schedule, key), keys)
    )(keys),
}
for name, (losses, errors) in results.items():
    print(f"test loss {losses.mean():.3f}, error {errors.mean():.3f}  {name}")

# %% [markdown]
# The schedule is the best row, ahead of the hole of the camera with the dropout that everyone
# takes. The side of the hole goes to and fro between two and three pixels, which differ little;
# dropout of pixels is hardly needed beside it; and dropout of the hidden units rises as the
# network sees its 200 images again and again. A grid over three settings would train a network at
# each of its points, and could not find that one of them should rise.
#
# The order of the rows is that of five seeds of one split, not a law. What can be tuned this way,
# and what cannot, is on the page about
# [self-tuning](../self_tuning.md#what-it-can-and-cannot-tune).

# %% check
losses = {name: float(result[0].mean()) for name, result in results.items()}
assert np.isin(found.infos.hparams["hole"], (2, 3)).mean() > 0.9
assert end["pixels"] < 0.2 and end["hidden"] > 0.5
assert losses["the schedule found"] < 1.05 * min(losses.values())
assert losses["the schedule found"] < 0.7 * losses["no regularization"]
