"""One of two processes with four devices each that drive one run: `library/test_processes.py`.

python tests/processes_run.py RANK PORT FOLDER [kill | disagree]
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bilevel

STEPS, EXAMPLES = 6, 16


def valid(w, lam, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ w["a"]) @ w["b"] - y) ** 2)


def train(w, lam, batch):
    return valid(w, lam, batch) + jnp.exp(lam["decay"]) * sum(jnp.sum(v**2) for v in w.values())


def rows(step: int, *leading: int) -> Any:
    rng = np.random.default_rng((len(leading), step))
    x = rng.standard_normal((*leading, EXAMPLES, 4))
    return x, np.sin(x.sum(-1))


def run(folder: Path, mesh: Any = None, decay: float = -3.0, **options: Any) -> Any:
    """The run of one process alone, or of all that share ``mesh``."""

    def put(tree: Any, *axes: Any) -> Any:
        if mesh is None:
            return tree
        sharding = NamedSharding(mesh, P(*axes))

        def leaf(x: Any) -> Any:  # each process hands over what its own devices hold
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(leaf, tree)

    k = jax.random.split(jax.random.key(0))
    a, b = jax.random.normal(k[0], (4, 8)) / 2, jax.random.normal(k[1], (8,)) / 3
    response = bilevel.Implicit(bilevel.CG(3), bilevel.Hessian(damping=0.1))
    alg = bilevel.alternate(
        valid, train, response, optax.sgd(0.1, momentum=0.9), optax.adam(0.1), 2
    )
    state = alg.init({"a": a, "b": b}, {"decay": decay})
    if mesh is not None:
        # The columns of `a` are divided, and what is shaped like it; `fit` places the rest.
        state = jax.tree.map(lambda x: put(x, None, "d") if x.shape == a.shape else x, state)
    return bilevel.fit(
        alg,
        state,
        lambda step: put(rows(step, 2), None, "d"),
        lambda step: put(rows(step), "d"),
        steps=STEPS,
        key=jax.random.key(5),
        log=folder / "log.jsonl",
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every=2,
        progress=False,
        **options,
    )


def numbers(result: Any) -> dict[str, Any]:
    """What two runs are compared by; every process holds it whole."""
    return {
        "value": result.best_value,
        "decay": float(result.state.hparams["decay"]),
        "b": np.asarray(result.state.params["b"]).tolist(),
        "resumed_from": result.resumed_from,
        "steps": [record["step"] for record in result.history],
    }


def main(rank: int, port: str, folder: Path, what: str) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(
        f"localhost:{port}", 2, rank, heartbeat_timeout_seconds=10, initialization_timeout=60
    )
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def dies(step: int, record: Any) -> None:
        if step == 4 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    found: dict[str, Any] = {}
    if what == "disagree":
        try:
            run(folder, mesh, decay=-3.0 - rank)
        except ValueError as error:
            found["refused"] = str(error)
    found |= numbers(run(folder, mesh, callbacks=[dies] if what == "kill" else []))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4] if sys.argv[4:] else "")
