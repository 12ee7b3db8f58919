"""`attribution` in miniature: scores of a run predict retraining, and the rows each step reads."""

import jax
import numpy as np

from experiments.attribution import config, figure, problem, run
from experiments.common import record


def test_a_run_reads_every_example_equally_often():
    settings = config.smoke()
    task = problem.task("digits", settings, config.Setting(steps=6), seed=0)
    counts = np.bincount(np.asarray(task.batches).ravel(), minlength=settings.train)
    assert (counts == 2).all()  # 6 steps of 20 examples are two epochs of 60
    assert task.train[0].shape == (60, 64) and task.queries[0].shape == (4, 64)
    assert problem.losses("relu")(task.params, task.train).shape == (60,)


def test_scores_predict_and_figures_are_drawn(tmp_path):
    with jax.enable_x64(False):
        run.run(config.smoke(), 0, tmp_path, resume=False)
    first = (tmp_path / record.FILE).read_bytes()
    rows = {r.method: r.metrics for r in record.read(tmp_path)}
    assert set(rows) == {"digits", "setting_0", "setting_1", "ordering"}
    assert rows["digits"]["lds"] > 0.9
    assert rows["setting_0"]["metasmoothness"] > rows["setting_1"]["metasmoothness"]
    assert all(path.exists() for path in figure.figures(tmp_path))
    assert (tmp_path / record.FILE).read_bytes() == first
