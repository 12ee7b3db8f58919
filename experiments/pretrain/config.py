"""Settings of the `pretrain` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      source: `mnist` (averaged over squares of 2 x 2 pixels) or `digits`.
      examples: images to pre-train on.
      useful, useless: binary tasks of pre-training: is it this class; and which sign has a random
        pattern that is added to each image, by a coin.
      amplitude: of each pattern, of gray values in [0, 1].
      classes: of fine-tuning, the first ones.
      labels: labelled images of fine-tuning, of all classes, at each draw of a run half to train on
        and half to validate on; all of them to train on in the end.
      test: test images.
      hidden: units of the encoder.
      decay: of all weights in pre-training.
      pre_steps, pre_rate: Adam steps of pre-training from the start, all images in each.
      fine_steps: Adam steps of fine-tuning, all of which the outer loss goes through.
      fine_rate, body_rate: of the new head, and of the encoder.
      outer_steps, inner_steps, outer_rate: of tuning the weights of tasks.
      terms, step_size: of the Neumann series; None takes the step from its own products.
    """

    source: str = "mnist"
    examples: int = 500
    useful: int = 10
    useless: int = 10
    amplitude: float = 0.1
    classes: int = 5
    labels: int = 100
    test: int = 3_000
    hidden: int = 8
    decay: float = 1e-3
    pre_steps: int = 1_000
    pre_rate: float = 0.01
    fine_steps: int = 40
    fine_rate: float = 0.05
    body_rate: float = 0.001
    outer_steps: int = 500
    inner_steps: int = 10
    outer_rate: float = 0.1
    terms: int = 10
    step_size: float | None = None


def smoke() -> Config:
    """Seconds, and nothing to download: does everything run?"""
    return Config(
        source="digits", examples=200, test=300, pre_steps=60, fine_steps=10, outer_steps=10
    )


def cpu() -> Config:
    """The experiment, sized for two cores."""
    return Config()


def paper() -> Config:
    """More images, a wider encoder, longer runs."""
    return Config(
        examples=5_000, test=10_000, hidden=64, pre_steps=5_000, fine_steps=100, outer_steps=500
    )
