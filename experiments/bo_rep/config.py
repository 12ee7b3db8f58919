"""Settings of the `bo_rep` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Setting:
    """One of the two problems.

    Attributes:
      data: the sentences.
      ridge: of the parameters; it makes the readout of `representation` strongly convex.
      wrong: fraction of the training labels that are replaced.
      inner_rates, outer_rates: step sizes that every method is tried with, on the tuning seeds.
    """

    data: str
    ridge: float
    wrong: float
    inner_rates: tuple[float, ...]
    outer_rates: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      representation: an encoder above a linear readout.
      cleaning: one weight per training sentence above a classifier.
      length, words: words kept of a sentence, and of the vocabulary.
      embedding, hidden: sizes of the recurrent network.
      held: fraction of the training sentences held out: half for hypergradients, half to choose
        points along a run.
      batch: sentences in a batch, of either kind.
      budget: G of every run.
      first_seed, tuning_seeds: seeds that choose the step sizes; they are not reported.
      points: measurements along a run.
      solve_rate: step size of the adjoint, for all loops that carry one.
      decay: step sizes fall by this factor until the end, like a cosine.
    """

    representation: Setting
    cleaning: Setting
    length: int = 24
    words: int = 2_000
    embedding: int = 32
    hidden: int = 64
    held: float = 0.4
    batch: int = 64
    budget: float = 6_000.0
    first_seed: int = 100
    tuning_seeds: int = 1
    points: int = 20
    solve_rate: float = 0.05
    decay: float = 0.01


def smoke() -> Config:
    """Seconds, on made-up sentences that need no file: does it all run?"""
    setting = Setting("made_up", 1e-2, 0.0, (0.3,), (0.1,))
    return Config(
        setting,
        dataclasses.replace(setting, wrong=0.3),
        length=10, words=200, embedding=8, hidden=8, batch=16, budget=300.0, points=4,
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config(
        Setting("trec", 1e-2, 0.0, (0.1, 1.0), (0.001, 0.01, 0.1, 1.0, 10.0)),
        Setting("sst2", 1e-4, 0.3, (0.1, 1.0), (0.01, 0.1, 1.0, 10.0, 100.0)),
    )


def paper() -> Config:
    """Wider networks, longer runs, more tuning seeds; the sizes of the paper need GloVe vectors."""
    return dataclasses.replace(
        cpu(), embedding=300, hidden=2_048, words=10_000, budget=60_000.0, tuning_seeds=3
    )
