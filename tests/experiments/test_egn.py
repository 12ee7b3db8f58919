"""`egn` in miniature: it runs, and its exact steps need the fewest epochs."""

import jax
import pytest

from experiments.common import record
from experiments.egn import config, figure, run

pytest.importorskip("sklearn", reason="needs bilevel[experiments]")


def test_it_runs(tmp_path):
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        run.run(config.smoke(), 0, tmp_path, resume=False)
    records = record.read(tmp_path)
    last = record.final(records)
    losses = {m: last[f"digits_{m}", 0].metrics["train_loss"] for m in config.smoke().methods}
    assert losses["egn"] < min(losses["sgd"], losses["adam"])
    assert run.summary(records)["digits_train_loss_egn_over_adam"]["mean"] < 1
    assert all(path.exists() for path in figure.figures(tmp_path))
