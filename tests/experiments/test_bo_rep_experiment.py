"""`bo_rep` in miniature: what its texts are, what its loops cost, and that it runs."""

import dataclasses

import numpy as np
import pytest

from experiments.bo_rep import config, figure, methods, problem, run, texts
from experiments.common import record

SETTINGS = dataclasses.replace(config.smoke(), budget=120.0, points=2)


def test_sentences_are_padded_in_front_and_no_part_shares_one():
    corpus = texts.load("made_up", length=12, words=100, held=0.4, seed=3)
    ids = corpus.train.ids
    assert (ids[:, :2] == texts.PAD).all() and (ids[:, 2:] > 0).all()
    assert [len(p.y) for p in (corpus.train, corpus.validation, corpus.guard)] == [360, 120, 120]
    rows = [{tuple(r) for r in p.ids.tolist()} for p in corpus[:3]]
    # Unknown words make a few sentences equal; drawn twice, all 120 of a part would be.
    assert len(rows[0] & rows[1]) < 10 and len(rows[1] & rows[2]) < 10


def test_padding_leaves_the_features_as_they_are():
    encoder = problem.encoder(SETTINGS, words=20, seed=0)
    ids = np.array([[3, 4, 5]])
    padded = np.array([[0, 0, 3, 4, 5]])
    one, other = (np.asarray(problem.features(encoder, x)) for x in (ids, padded))
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("name", methods.NAMES)
def test_a_loop_spends_what_it_is_budgeted(name):
    end = run._finish(SETTINGS, name, (0.1, 0.1), *run._parts(SETTINGS, "made_up", 0), 0)
    # Steps come in whole chunks, the warm-up of BO-REP makes no product, CG may stop early.
    assert 0.4 * SETTINGS.budget < end["spent"] <= SETTINGS.budget
    assert np.isfinite(end["guard_loss"]) and not end["diverged"]


def test_it_runs_and_resumes_to_the_same_records(tmp_path):
    run.run(SETTINGS, 0, tmp_path, resume=False)
    written = (tmp_path / record.FILE).read_bytes()
    run.run(SETTINGS, 0, tmp_path, resume=True)
    assert (tmp_path / record.FILE).read_bytes() == written
    ends = {m for m, _ in record.final(record.read(tmp_path))}
    assert {"made_up_bo_rep", "made_up_plain", "made_up_tried"} <= ends
    assert all(path.exists() for path in figure.figures(tmp_path))
