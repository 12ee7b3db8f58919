"""Settings of the `stn_ptb` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Starts:
    """Every number of the part about starting points. Costs are in inner gradients (G).

    Attributes:
      corpus, words, sizes: the text, its vocabulary, its cut.
      units: width of the embedding and of the LSTM layer.
      embedding: factor on the first embeddings, which are uniform in (-0.1, 0.1).
      batch, valid_batch: windows of a training step and of a validation step.
      steps: tokens of a window, through which gradients are taken.
      context: tokens before them that only prepare the state.
      lr: first step size of the Adam that trains, for every method; falls to zero on a cosine.
      clip: global norm that its gradients are clipped to.
      top: upper end of the rate.
      starts: where the rate starts, a run each.
      scale: of the perturbations, in logits, fixed.
      inner_steps: training steps of a cycle; then comes one validation step.
      warm_up: part of the cycles that only train.
      outer_lr: first step size of the SGD that moves the logit; falls to zero on a cosine.
      outer_clip: size that its gradients are clipped to.
      budget: G of a run, of a fixed rate, and of a whole search.
      random_trials: networks of the random search, which share its budget.
      tpe_trials: those of TPE, whose first ten are drawn at random.
      grid: the fixed rates.
      points: measurements of the validation loss along a run.
      eval_batch: parallel streams of a measurement.
    """

    corpus: str = "ptb"
    words: int | None = 300
    sizes: tuple[int | None, int | None, int | None] = (10_000, 10_000, 20_000)
    units: int = 64
    embedding: float = 5.0
    batch: int = 16
    valid_batch: int = 8
    steps: int = 16
    context: int = 4
    lr: float = 2e-2
    clip: float = 1.0
    top: float = 0.95
    starts: tuple[float, ...] = (0.05, 0.3, 0.5, 0.7, 0.9)
    scale: float = 1.5
    inner_steps: int = 2
    warm_up: float = 0.05
    outer_lr: float = 0.4
    outer_clip: float = 0.1
    budget: float = 3_000.0
    random_trials: int = 3
    tpe_trials: int = 12
    grid: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 0.85, 0.9)
    points: int = 25
    eval_batch: int = 50


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment. Costs are in inner-gradient evaluations (G).

    Attributes:
      corpus, words, sizes: as in the `lstm` experiment: the text, its vocabulary, its cut.
      units: width of the embedding and of both LSTM layers (the decoder is the embedding).
      embedding: factor on the first embeddings, which are uniform in (-0.1, 0.1).
      batch: parallel streams.
      steps: tokens of a window, through which gradients are taken.
      context: tokens before them that only prepare the state.
      lr: first step size of the Adam that trains, for every method.
      clip: global norm that gradients are clipped to.
      patience: measurements without a better validation loss after which the step size falls.
      shrink: by this factor.
      start: all five rates at the start of tuning.
      penalty: both activation penalties at the start of tuning.
      top: upper end of the rates.
      scale: of the perturbations, fixed.
      inner_steps: training steps of a cycle; then comes one validation step.
      warm_up: part of the cycles that only train.
      outer_lr: of the Adam that moves the hyperparameters.
      budget: G of a tuning run, of the whole random search, and of each point of the grid.
      trials: networks of the random search, which share its budget.
      grid: values of one rate for all five places, each trained with a whole budget.
      points: measurements of the validation loss along a run.
      eval_batch: parallel streams of a measurement.
      starts: the second part, one rate from five starting points.
    """

    corpus: str = "ptb"
    words: int | None = 1_000
    sizes: tuple[int | None, int | None, int | None] = (20_000, 30_000, 60_000)
    units: int = 64
    embedding: float = 5.0
    batch: int = 16
    steps: int = 32
    context: int = 4
    lr: float = 5e-3
    clip: float = 1.0
    patience: int = 3
    shrink: float = 0.5
    start: float = 0.05
    penalty: float = 0.05
    top: float = 0.9
    scale: float = 0.5
    inner_steps: int = 2
    warm_up: float = 0.15
    outer_lr: float = 0.03
    budget: float = 1_500.0
    trials: int = 3
    grid: tuple[float, ...] = (0.05, 0.2, 0.4)
    points: int = 15
    eval_batch: int = 50
    starts: Starts = Starts()


def smoke() -> Config:
    """Seconds, on a made-up text that needs no download: does everything run?"""
    return Config(
        corpus="markov",
        words=50,
        sizes=(4_000, 2_000, 2_000),
        units=16,
        batch=8,
        steps=16,
        budget=240.0,
        trials=2,
        grid=(0.05,),
        points=4,
        eval_batch=10,
        starts=Starts(
            corpus="markov",
            words=50,
            sizes=(4_000, 2_000, 2_000),
            units=16,
            starts=(0.05, 0.9),
            budget=160.0,
            random_trials=2,
            tpe_trials=2,
            grid=(0.0, 0.4),
            points=2,
            eval_batch=10,
        ),
    )


def cpu() -> Config:
    """The corpus cut to 20 000 tokens and 1000 words, and a small model: minutes on one core."""
    return Config()


def paper() -> Config:
    """The whole corpus and the paper's two layers of 650 units, for a GPU."""
    return Config(
        words=None,
        sizes=(None, None, None),
        units=650,
        embedding=1.0,
        batch=40,
        steps=70,
        context=20,
        lr=1e-3,
        clip=0.25,
        patience=5,
        scale=1.0,
        outer_lr=0.01,
        budget=60_000.0,
        trials=10,
        points=100,
        eval_batch=10,
        starts=Starts(
            words=None,
            sizes=(None, None, None),
            units=650,
            embedding=1.0,
            batch=40,
            valid_batch=40,
            steps=70,
            context=20,
            lr=1e-3,
            clip=0.25,
            budget=60_000.0,
            random_trials=4,
            tpe_trials=12,
            points=100,
            eval_batch=10,
        ),
    )
