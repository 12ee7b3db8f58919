"""Settings of the `lstm` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      sets: corpora.
      words: size of the vocabulary; None keeps the publisher's.
      sizes: tokens of the training, validation and test part; None keeps all.
      units: width of the embedding and of every LSTM layer (the decoder is the embedding).
      layers: LSTM layers.
      batch: parallel streams; even, because the noise of one half mirrors that of the other.
      steps: tokens of a window, through which gradients are taken.
      context: tokens before a validation window that only prepare the state.
      lr: first step size of the Adam that trains, for every method.
      clip: global norm that gradients are clipped to.
      patience: measurements without a better validation loss after which the step size falls.
      shrink: by this factor.
      rate, decay, penalty: dropout rates, log decays and log activation penalties at the start
        of tuning, and of the model that is not tuned.
      rates, decays: ends of the ranges of the rates and of the log decays. A weight that a decay
        has killed has no hypergradient to come back by, and one per weight runs away to any upper
        end there is: -9 keeps all alive, -4 did not.
      inner_steps: training steps between two hypergradients.
      warm_up: part of the budget that is spent on plain training before tuning begins: while
        the model still under-fits, a hypergradient only asks to learn faster.
      outer_lr: first step size of the Adam that moves the number of each kind.
      own_lr: the same of the Adam that moves the offsets of units, words and weights.
      products: Hessian products of one hypergradient; 0 is the identity (T1-T2).
      budget: G that every method may spend on one corpus.
      points: measurements of the validation loss along a run.
      trials: of TPE over the strengths that `few` tunes; none: no search.
      startup: of these, drawn at random.
      trial_budget: G of one trial, held to its strengths from the start.
      searched: ends of the rates, and of the log penalties, among which TPE searches; log decays
        are searched in their whole range.
      eval_batch: parallel streams of a measurement.
    """

    sets: tuple[str, ...] = ("wikitext2", "ptb")
    words: int | None = 1_000
    sizes: tuple[int | None, int | None, int | None] = (20_000, 30_000, 60_000)
    units: int = 64
    layers: int = 1
    batch: int = 16
    steps: int = 32
    context: int = 8
    lr: float = 5e-3
    clip: float = 1.0
    patience: int = 3
    shrink: float = 0.5
    rate: float = 0.05
    decay: float = -12.0
    penalty: float = -9.0
    rates: tuple[float, float] = (0.005, 0.9)
    decays: tuple[float, float] = (-16.0, -9.0)
    inner_steps: int = 4
    warm_up: float = 0.2
    outer_lr: float = 0.1
    own_lr: float = 0.02
    products: int = 0
    budget: float = 2_400.0
    points: int = 20
    trials: int = 8
    startup: int = 4
    trial_budget: float = 1_200.0
    searched: tuple[tuple[float, float], tuple[float, float]] = ((0.005, 0.7), (-12.0, 0.0))
    eval_batch: int = 50


def smoke() -> Config:
    """Seconds, on a made-up text that needs no download: does everything run?"""
    return Config(
        sets=("markov",),
        words=50,
        sizes=(4_000, 2_000, 2_000),
        units=16,
        batch=8,
        steps=16,
        budget=300.0,
        points=5,
        trials=2,
        startup=1,
        trial_budget=100.0,
        eval_batch=10,
    )


def cpu() -> Config:
    """Both corpora cut to 20 000 tokens and 1000 words, and a small model: minutes on one core."""
    return Config()


def paper() -> Config:
    """The whole corpora and the two layers of 650 units of the paper, for a GPU."""
    return Config(
        words=None,
        sizes=(None, None, None),
        units=650,
        layers=2,
        batch=40,
        steps=70,
        context=20,
        lr=1e-3,
        clip=0.25,
        patience=5,
        budget=200_000.0,
        points=100,
        trials=20,
        trial_budget=100_000.0,
        eval_batch=10,
        inner_steps=1,
        outer_lr=1e-3,
        own_lr=1e-3,
    )
