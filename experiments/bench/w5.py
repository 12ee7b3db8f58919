"""W5: one step of a self-tuning network against the ordinary training step of the same network.

A small CNN (batch 64) and an LSTM of two layers of 256 units (40 sequences of 35 words), three
dropout rates tuned. The hand-written column is the step of an STN in weight space with one
perturbation a batch; `ordinary` in the records is the training step without any tuning, against
which the bounds are stated.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import bilevel
from bilevel.inner.layers import split_layers
from bilevel.outer.self_tuning import cycle
from bilevel.regularizers import dropout
from experiments.bench import inputs
from experiments.bench.config import Config
from experiments.bench.measure import Row
from experiments.bench.w5_networks import CNN, LSTM, RATES, Drop, drop_by_hand

LEARNING_RATE = 0.1
MOMENTUM = 0.9
ENTROPY = 1e-3
HIGHEST = 0.9
GROUPS = 8
NO_PEER = "no best-response networks"
PEERS = {"lineax": NO_PEER, "optimistix": NO_PEER, "jaxopt": NO_PEER}


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network, its layers of best responses, and the losses of both.

    `params` of the plain network are a tree of arrays; of the layered one what `layers.merge`
    takes. A batch is a dictionary with `x`, `y`, and for training `keys`, one per dropout.
    """

    net: Any
    layers: Any

    def logits(self, params: Any, hparams: Any, batch: Any, rule: Any = dropout) -> jax.Array:
        """Of the plain network."""
        return self.net(params, batch["x"], self._drop(hparams, batch, rule))

    def inner(self, params: Any, hparams: Any, batch: Any, rule: Any = dropout) -> jax.Array:
        """Training loss of the plain network."""
        return _cross_entropy(self.logits(params, hparams, batch, rule), batch["y"])

    def outer(self, params: Any, hparams: Any, batch: Any) -> jax.Array:
        """Validation loss of the plain network, without dropout."""
        return _cross_entropy(self.net(params, batch["x"], Drop(None, None, dropout)), batch["y"])

    def layered_inner(self, params: Any, hparams: Any, batch: Any) -> jax.Array:
        """Training loss of the layered network."""
        model, d = self.layers.merge(params)
        drop = self._drop(hparams, batch, dropout)
        return _cross_entropy(model(batch["x"], drop, d), batch["y"])

    def layered_outer(self, params: Any, hparams: Any, batch: Any) -> jax.Array:
        """Validation loss of the layered network."""
        model, d = self.layers.merge(params)
        return _cross_entropy(model(batch["x"], Drop(None, None, dropout), d), batch["y"])

    def _drop(self, hparams: Any, batch: Any, rule: Any) -> Drop:
        keys = [jax.random.fold_in(batch["key"], i) for i in range(RATES)]
        return Drop(hparams["rates"], keys, rule, self.net.locked)

    def tuning(self, *, layered: bool = False, centred: bool = False, groups: int = 1) -> Any:
        """The algorithm of one training and one validation step."""
        network = bilevel.StructuredResponse(centred=centred, gain_scale=0.01)
        inner, outer, linearize = self.inner, self.outer, None
        if layered:
            network = dataclasses.replace(self.layers, centred=centred)
            inner, outer = self.layered_inner, self.layered_outer
        elif centred:
            linearize = bilevel.GaussNewton(
                self.logits, lambda z, hparams, batch: _cross_entropy(z, batch["y"])
            )
        return bilevel.self_tuning(
            outer,
            inner,
            optax.sgd(LEARNING_RATE, MOMENTUM),
            optax.sgd(1.0),
            network=network,
            inner_steps=1,
            entropy=ENTROPY,
            groups=groups,
            linearize=linearize,
            constrain=bilevel.Space({"rates": bilevel.Interval(0, HIGHEST)}),
        )


@functools.lru_cache(maxsize=1)
def _prepared(name: str, tiny: bool, seed: int) -> tuple[Workload, Any, str]:
    """A workload, the arguments of its rows and where its data came from."""
    key = jax.random.key(seed)
    if name == "cnn":
        net: Any = CNN(8, (2, 3)) if tiny else CNN()
        count = 8 if tiny else 64
        x, y, source = inputs.images(2 * count, net.side**2, seed)
        x, y = jnp.asarray(x.reshape(-1, net.side, net.side, 1)), jnp.asarray(y)
    else:
        net = LSTM(11, 4) if tiny else LSTM()
        count, steps = (8, 3) if tiny else (40, 35)
        words = jax.random.randint(key, (2 * count, steps + 1), 0, net.words, jnp.int32)
        x, y, source = words[:, :-1], words[:, 1:], "random words"
    layers, base = split_layers(net.layered(nnx.Rngs(seed)), gain_scale=0.01)
    workload = Workload(net, layers)
    params, hparams = net.init(key), {"rates": jnp.full(RATES, 0.2, jnp.float32)}
    states = {
        "weight": workload.tuning().init(params, hparams, key=key),
        "layer": workload.tuning(layered=True).init(base, hparams, key=key),
        "delta": workload.tuning(centred=True).init(params, hparams, key=key),
    }
    train = {"x": x[:count], "y": y[:count], "key": key}
    held_out = {"x": x[count:], "y": y[count:]}
    return workload, (params, hparams, (train, states), held_out, key), source


def _settings(algorithm: bilevel.Algorithm) -> Any:
    """Those that its step is bound to: the parts of a cycle are measured one by one."""
    step: Any = algorithm.step
    return step.args[0]


def _training(workload: Workload, which: str, **settings: Any) -> Any:
    tuning = _settings(workload.tuning(**settings))

    def function(params: Any, hparams: Any, inner: Any, held_out: Any, key: Any) -> Any:
        batch, states = inner
        batches = jax.tree.map(lambda a: a[None], batch)
        trained, *_ = cycle.train(tuning, states[which], batches, key, not workload.net.locked)
        return (
            trained.weights.params,
            trained.weights.opt_state[0].trace,
            trained.network.params,
            trained.network.opt_state[0].trace,
        )

    return function


def _validation(workload: Workload, which: str, **settings: Any) -> Any:
    tuning = _settings(workload.tuning(**settings))

    def function(params: Any, hparams: Any, inner: Any, held_out: Any, key: Any) -> Any:
        state = inner[1][which]
        moved, *_ = cycle.tune(tuning, state, state.trained, held_out, key)
        return moved.outer.moving, moved.widths.moving

    return function


def _ordinary(workload: Workload) -> Any:
    """The training step without tuning: a gradient and SGD with momentum."""

    def function(params: Any, hparams: Any, inner: Any, held_out: Any, key: Any) -> Any:
        batch, states = inner
        state = states["weight"]
        gradient = jax.grad(workload.inner)(state.params, state.hparams, batch, drop_by_hand)
        return _descend(state.params, state.trained.weights.opt_state[0].trace, gradient)

    return function


def _descend(params: Any, trace: Any, gradient: Any) -> tuple[Any, Any]:
    trace = jax.tree.map(lambda m, g: MOMENTUM * m + g, trace, gradient)
    return jax.tree.map(lambda p, m: p - LEARNING_RATE * m, params, trace), trace


def _displaced(params: Any, response: Any, d: jax.Array) -> Any:
    """`P + R (d U)` by hand."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    moved = []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        gate = (d @ response.gains[name]).reshape((1,) * (leaf.ndim - 1) + (-1,))
        moved.append(leaf + (response.weights[name] * gate if leaf.ndim > 1 else gate))
    return jax.tree.unflatten(treedef, moved)


def _perturbed(raw: Any, raw_scales: Any, key: Any) -> jax.Array:
    noise = jax.random.normal(key, (1, RATES), jnp.float32)[0]  # the same draws in float64
    return raw["rates"] + jax.nn.softplus(raw_scales["rates"]) * noise


def _training_by_hand(workload: Workload) -> Any:
    def function(params: Any, hparams: Any, inner: Any, held_out: Any, key: Any) -> Any:
        batch, states = inner
        state = states["weight"]
        lam = _perturbed(state.raw, state.raw_scales, jax.random.fold_in(key, 0))
        batch = batch | {"key": jax.random.fold_in(batch["key"], 1)}

        def loss(params: Any, response: Any) -> jax.Array:
            rates = {"rates": HIGHEST * jax.nn.sigmoid(lam)}
            return workload.inner(_displaced(params, response, lam), rates, batch, drop_by_hand)

        gradients = jax.grad(loss, argnums=(0, 1))(state.params, state.network_params)
        return (
            *_descend(state.params, state.trained.weights.opt_state[0].trace, gradients[0]),
            *_descend(state.network_params, state.trained.network.opt_state[0].trace, gradients[1]),
        )

    return function


def _validation_by_hand(workload: Workload) -> Any:
    def function(params: Any, hparams: Any, inner: Any, held_out: Any, key: Any) -> Any:
        state = inner[1]["weight"]

        def objective(raw: Any, raw_scales: Any) -> jax.Array:
            lam = _perturbed(raw, raw_scales, jax.random.fold_in(key, 1))
            value = workload.outer(
                _displaced(state.params, state.network_params, lam), None, held_out
            )
            return value - ENTROPY * jnp.sum(jnp.log(jax.nn.softplus(raw_scales["rates"])))

        start = (state.raw, state.raw_scales)
        gradients = jax.grad(objective, argnums=(0, 1))(*start)
        return jax.tree.map(lambda x, g: x - g, start, gradients)

    return function


def _row(kind: str, name: str, config: Config, seed: int, **fields: Any) -> Row:
    workload, args, source = _prepared(name, config.tiny, seed)

    def inner(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return workload.inner(params, hparams, batch[0])

    title = f"W5 {name.upper()}, STN {kind} step"
    return Row(f"w5_{name}_{kind}", title, source, args, inner, **fields)


def _train_row(name: str, config: Config, seed: int) -> Row:
    workload, *_ = _prepared(name, config.tiny, seed)
    columns = {
        "jax": _training_by_hand(workload),
        "bilevel": _training(workload, "weight"),
        **PEERS,
    }
    extras = {
        "ordinary": _ordinary(workload),
        "groups": _training(workload, "weight", groups=GROUPS),
        "layer": _training(workload, "layer", layered=True),
        "delta": _training(workload, "delta", centred=True),
    }
    return _row("training", name, config, seed, columns=columns, extras=extras)


def _validation_row(name: str, config: Config, seed: int) -> Row:
    workload, *_ = _prepared(name, config.tiny, seed)
    columns = {
        "jax": _validation_by_hand(workload),
        "bilevel": _validation(workload, "weight"),
        **PEERS,
    }
    extras = {
        "ordinary": _ordinary(workload),
        "layer": _validation(workload, "layer", layered=True),
    }
    return _row("validation", name, config, seed, columns=columns, extras=extras)


def cnn_training(config: Config, seed: int) -> Row:
    """A training step of the CNN."""
    return _train_row("cnn", config, seed)


def cnn_validation(config: Config, seed: int) -> Row:
    """A step of its hyperparameters and their scales."""
    return _validation_row("cnn", config, seed)


def lstm_training(config: Config, seed: int) -> Row:
    """A training step of the LSTM."""
    return _train_row("lstm", config, seed)


def lstm_validation(config: Config, seed: int) -> Row:
    """A step of its hyperparameters and their scales."""
    return _validation_row("lstm", config, seed)


ROWS = {
    "w5_cnn_training": cnn_training,
    "w5_cnn_validation": cnn_validation,
    "w5_lstm_training": lstm_training,
    "w5_lstm_validation": lstm_validation,
}
