"""`unem` in miniature: soft k-means without its coefficient, and that it runs."""

import jax
import numpy as np
import pytest

from experiments.common import record
from experiments.unem import config, figure, problem, run


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("unem")
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        run.run(config.smoke(), 0, out, resume=False)
    return out


def test_it_runs(out):
    records = record.read(out)
    last = record.final(records)
    for method in figure.METHODS:
        assert last[f"mixture_{method}", 0].metrics["accuracy"] > 100 / 6
    assert len(last["mixture_layers", 0].metrics["gamma"]) == config.smoke().layers
    assert run.summary(records)["mixture_layers_less_grid"]["seeds"] == 1
    assert all(path.exists() for path in figure.figures(out))


def test_without_its_coefficient_it_is_soft_k_means():
    settings = config.smoke()
    batch, _ = problem.episodes("mixture", settings, 1)
    with jax.numpy_rank_promotion("allow"):
        found = run.response(settings).run(problem.blank(batch), run._same(0.0), batch)
    support, queries = (np.asarray(x, np.float64) for x in batch[:2])
    means = support
    for _ in range(settings.layers):
        far = ((queries[:, :, None] - means[:, None]) ** 2).sum(-1)
        u = np.exp(-0.5 * (far - far.min(-1, keepdims=True)))
        u /= u.sum(-1, keepdims=True)
        pulled = np.einsum("eqk,eqd->ekd", u, queries)
        means = (pulled + settings.shots * support) / (u.sum(1) + settings.shots)[..., None]
    np.testing.assert_allclose(found.means, means, rtol=1e-4, atol=1e-5)


def test_queries_come_from_few_classes():
    batch, _ = problem.episodes("mixture", config.smoke(), 2)
    for labels in np.asarray(batch.labels):
        assert len(set(labels.tolist())) <= config.smoke().effective
