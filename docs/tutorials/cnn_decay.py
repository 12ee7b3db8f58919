# %% [markdown]
# # Weight decay of a CNN, tuned while it trains
#
# How strongly should each layer of a convolutional network be decayed? The usual answer is one
# number for all layers, from a search that trains the network many times. Here each layer has its
# own, and all of them follow their gradient *while the network trains once*.
#
# The network is written in flax.nnx and has batch norm; the data are scikit-learn's 8×8 digits
# with noise: 150 images to learn from, 250 to tune on, and 1397 that nobody sees, the *test* set.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import bilevel

images, labels = load_digits(return_X_y=True)
rng = np.random.default_rng(0)
order = rng.permutation(len(labels))
x = images[order].reshape(-1, 8, 8, 1) / 16 + rng.normal(0, 0.3, (len(labels), 8, 8, 1))
x, y = x.astype(np.float32), jax.nn.one_hot(labels[order], 10)
training = {"x": x[:150], "y": y[:150]}
validation = {"x": x[150:400], "y": y[150:400]}
test = {"x": x[400:], "y": y[400:]}


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.readout = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.norm(self.first(x))), (2, 2), (2, 2))
        x = nnx.avg_pool(nnx.relu(self.second(x)), (2, 2), (2, 2))
        return self.readout(x.reshape(len(x), -1))


# %% [markdown]
# ## From a module to losses
#
# `split_nnx` takes the module apart into what is trained and everything else, here the statistics
# of batch norm. `train` and `valid` are the losses that you would write anyway; what is new is the
# penalty, which reads one logarithm for each layer.

# %%
params, rest, merge = bilevel.split_nnx(CNN(nnx.Rngs(0)))
hparams = {name: jnp.float32(-9.0) for name in ("first", "second", "readout")}


def model(params, hparams, batch, rest):
    return merge(params, rest)(batch["x"])


def cross_entropy(logits, hparams, batch):
    return jnp.mean(optax.softmax_cross_entropy(logits, batch["y"]))


def penalty(params, hparams):
    return sum(
        jnp.exp(log_decay) * jnp.sum(params[name]["kernel"] ** 2)
        for name, log_decay in hparams.items()
    )


def train(params, hparams, batch, rest):
    net = merge(params, rest)
    loss = cross_entropy(net(batch["x"]), hparams, batch) + penalty(params, hparams)
    return loss, merge.rest(net)


def valid(params, hparams, batch, rest):
    net = merge(params, rest)
    net.eval()  # batch norm by its running averages
    return cross_entropy(net(batch["x"]), hparams, batch), rest


# %% [markdown]
# ## The loop
#
# The [recipe for networks](../networks.md): ten training steps, then one hypergradient by ten
# steps of CG on the damped Gauss–Newton matrix, then a step of Adam on the logarithms. A step of
# the loop is a pure function; the loop around it is yours, so it may also look at the test set,
# and change nothing.

# %%
STEPS = 100  # smoke: 2
curvature = bilevel.GaussNewton(model, cross_entropy, damping=0.1, penalty=penalty)
response = bilevel.Implicit(bilevel.CG(max_steps=10, unroll=False), curvature)
loop = bilevel.alternate(
    valid, train, response, optax.adam(3e-3), optax.adam(0.1),
    inner_steps=10, has_state=True, unroll=False,
)  # fmt: skip


@jax.jit
def test_scores(params, rest):
    net = merge(params, rest)
    net.eval()
    logits = net(test["x"])
    wrong = jnp.mean(jnp.argmax(logits, 1) != jnp.argmax(test["y"], 1))
    return cross_entropy(logits, None, test), wrong


def batches(step):  # ten batches of 50
    rows = np.random.default_rng((1, step)).integers(0, 150, (10, 50))
    return jax.tree.map(lambda a: a[rows], training)


step = jax.jit(loop.step)
state = loop.init(params, hparams, rest)
tuned = []
for i in range(STEPS):
    state, info = step(state, inner_batches=batches(i), outer_batch=validation)
    tuned.append((info.value, *test_scores(state.params, state.model_state), info.hparams))
print({name: round(float(value), 2) for name, value in state.hparams.items()})
print(f"test loss {tuned[-1][1]:.3f}, error {tuned[-1][2]:.3f}")

# %% [markdown]
# May the numbers be trusted? Every step says how well its linear system was solved, and how far
# the parameters were from a minimum:

# %%
relative = info.stats["residual_norm"] / info.stats["rhs_norm"]
print(bilevel.Status(int(info.result)).name, f"residual {relative:.2f} of the right side")

# %% [markdown]
# A network in training is at no minimum, and ten steps of CG leave part of the system unsolved.
# That is the price of tuning while training: directions are right and sizes are not, which Adam,
# on the logarithms, does not mind ([how good the recipe
# is](../networks.md#why-gaussnewton-and-why-damping-of-01)).

# %% [markdown]
# ## Beside fixed decays
#
# The same 1000 training steps with one decay for all layers, for each of six values. That is what
# a search would do, and it costs a whole run for each.


# %%
@jax.jit
def plain_step(params, rest, opt_state, log_decay, batch):
    same = {name: log_decay for name in hparams}
    (_, rest), grads = jax.value_and_grad(train, has_aux=True)(params, same, batch, rest)
    updates, opt_state = optax.adam(3e-3).update(grads, opt_state)
    return optax.apply_updates(params, updates), rest, opt_state


def trained(log_decay):
    w, statistics, opt_state = params, rest, optax.adam(3e-3).init(params)
    history = []
    for i in range(STEPS):
        stack = batches(i)
        for k in range(10):
            batch = {name: a[k] for name, a in stack.items()}
            w, statistics, opt_state = plain_step(w, statistics, opt_state, log_decay, batch)
        value = validation_loss(w, statistics)
        history.append((value, *test_scores(w, statistics)))
    return history


validation_loss = jax.jit(lambda w, rest: valid(w, None, validation, rest)[0])
log_decays = (-30.0, -9.0, -7.5, -6.0, -4.5, -3.0)  # smoke: (-30.0, -6.0)
fixed = {log_decay: trained(jnp.float32(log_decay)) for log_decay in log_decays}
for log_decay, history in fixed.items():
    value, loss, wrong = history[-1]
    print(f"{log_decay:6}: validation loss {value:.3f}, test loss {loss:.3f}, error {wrong:.3f}")

# %% figure: Test loss of three runs against training steps, and the tuned log decays
best = min(fixed, key=lambda log_decay: float(fixed[log_decay][-1][0]))
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
when = 10 * np.arange(1, STEPS + 1)
curves = {
    "no decay": fixed[log_decays[0]], f"best of the grid, {best}": fixed[best], "tuned": tuned
}  # fmt: skip
for name, history in curves.items():
    axes[0].plot(when, [record[1] for record in history], label=name)
axes[0].set(xlabel="training step", ylabel="test loss", title="Test loss", ylim=(0.6, 1.5))
axes[0].legend()
for name, line in zip(hparams, ("-", "-", "--"), strict=True):
    axes[1].plot(when, [record[3][name] for record in tuned], line, label=name)
axes[1].set(xlabel="training step", ylabel="log decay", title="The decays, while training")
axes[1].legend()
figure

# %% [markdown]
# One run ends near the loss of the best of six, and a third below that of the network without
# decay. In the error all of them are within the noise of 1397 images (0.01), except the largest
# decay: decay makes this network less sure of its mistakes, and does not make fewer. (Stopping the
# run without decay after 250 steps would have done as well. With decay it does not matter when you
# stop.)
#
# The picture on the right shows how. While the network still learns what is easy, decays fall,
# because they are in its way; once it overfits, they rise by as much per step as Adam lets them.
# The first layer, whose scale batch norm takes out again, turns back: its decay has nothing to
# gain. Two things to know before you do this on your own network:
#
# - **The validation images are used up.** Three decays hardly overfit 250 images; thousands would.
#   Keep a third split ([many hyperparameters](../objectives.md#many-hyperparameters)).
# - **A schedule comes for free.** What was found is a path; `bilevel.HyperSchedule` replays it.

# %% check
best_loss = float(fixed[best][-1][1])
assert tuned[-1][1] < 0.75 * fixed[log_decays[0]][-1][1]
assert tuned[-1][1] < 1.1 * best_loss
assert 0.05 < relative < 0.5
assert tuned[-1][3]["first"] < -7 < -5 < tuned[-1][3]["second"]
