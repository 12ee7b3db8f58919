"""Settings of the `bo_rep` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      data: the sentence sets.
      length, words: words kept of a sentence, and of the vocabulary.
      embedding, hidden: sizes of the recurrent network.
      ridge: of the readout.
      held: fraction of the training sentences held out: half for hypergradients, half to choose
        points along a run.
      batch: sentences in a batch, of either kind.
      budget: G of every run.
      inner_rates, outer_rates: first step sizes that every method is tried with; they fall to a
        hundredth like a cosine.
      solve_rate: step size of the adjoint, for all loops that carry one.
      plain_rates: those of Adam on the whole network.
      first_seed, tuning_seeds: seeds that choose the step sizes; they are not reported.
      points: measurements along a run.
    """

    data: tuple[str, ...] = ("trec", "sst2")
    length: int = 24
    words: int = 2_000
    embedding: int = 32
    hidden: int = 64
    ridge: float = 3e-3
    held: float = 0.4
    batch: int = 64
    budget: float = 3_000.0
    inner_rates: tuple[float, ...] = (0.3, 3.0)
    outer_rates: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    solve_rate: float = 0.1
    plain_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    first_seed: int = 100
    tuning_seeds: int = 1
    points: int = 20


def smoke() -> Config:
    """Seconds, on made-up sentences that need no file: does it all run?"""
    return Config(
        data=("made_up",), length=10, words=200, embedding=8, hidden=8, batch=16, budget=300.0,
        inner_rates=(0.3,), outer_rates=(0.1, 1.0), plain_rates=(3e-3,), points=4,
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """The paper's width, longer runs, more tuning seeds; its word vectors are not here."""
    return Config(embedding=300, hidden=2_048, words=10_000, budget=60_000.0, tuning_seeds=3)
