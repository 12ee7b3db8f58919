"""A tiny run for `test_faults.py`, in this process or as a program that gets killed.

``python faults_run.py FOLDER STEPS PAUSE``: STEPS steps, with a pause after each.
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

jax.config.update("jax_enable_x64", True)

from bilevel import Identity, Implicit, alternate, fit  # noqa: E402

STEPS = 24


def train(w, lam, batch):
    return jnp.mean((w - batch) ** 2) + jnp.exp(lam) * jnp.sum(w**2)


def valid(w, lam, batch):
    return jnp.mean((w - batch) ** 2)


ALG = alternate(
    valid, train, Implicit(Identity(0.5)), optax.adam(0.1), optax.adam(0.1), inner_steps=1
)


def inner_data(step):
    return np.random.default_rng((1, step)).normal(2.0, 1.0, size=(1, 3))


OUTER = np.ones(3)


def first_state():
    return ALG.init(jnp.zeros(3), -1.0)


def run(folder, **kwargs):
    settings = dict(
        steps=STEPS,
        log=Path(folder) / "log.jsonl",
        checkpoint_dir=Path(folder) / "checkpoints",
        checkpoint_every=4,
        progress=False,
        inner_data=inner_data,
        outer_data=OUTER,
    )
    settings |= kwargs
    return fit(
        ALG, first_state(), settings.pop("inner_data"), settings.pop("outer_data"), **settings
    )


if __name__ == "__main__":
    target, steps, pause = sys.argv[1:]
    # A shell starts what it puts in the background with interrupts ignored: children inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def callback(step, record):
        Path(target, "at").write_text(f"{os.getpid()} {step}")
        time.sleep(float(pause))

    run(target, steps=int(steps), callbacks=[callback])
