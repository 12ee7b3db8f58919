"""Settings of the `data_weights` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      train, held_out: windows of text to train on, and clean ones for the outer loss and,
        others, for the test.
      corrupted: share of the training windows whose characters are shuffled.
      symbols: characters that are told apart; rarer ones are one symbol.
      context, predicted: characters that a prediction reads, and predictions of a window.
      embedding, hidden: sizes of the language model.
      features, scored: sizes of the scorer.
      batch, valid_batch: windows of a training step, and of an outer step.
      rate: of Adam.
      window: training steps that one hypergradient differentiates.
      updates: of the scorer; with ``window`` the length of the run that trains it.
      move: rate of the scorer's Adam.
      steps: of the runs that are compared.
      every: steps between two measurements of the test loss.
    """

    train: int = 10_000
    held_out: int = 1_000
    corrupted: float = 0.5
    symbols: int = 64
    context: int = 8
    predicted: int = 24
    embedding: int = 16
    hidden: int = 64
    features: int = 8
    scored: int = 16
    batch: int = 32
    valid_batch: int = 64
    rate: float = 3e-3
    window: int = 4
    updates: int = 400
    move: float = 3e-2
    steps: int = 1_000
    every: int = 20


def smoke() -> Config:
    """Seconds: does everything run?"""
    return Config(
        train=400, held_out=60, hidden=16, batch=16, valid_batch=16, updates=6, steps=40, every=10
    )


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """A wider model and longer runs."""
    return Config(hidden=1_024, embedding=64, context=32, steps=20_000, updates=2_000)
