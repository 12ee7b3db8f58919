"""Settings of the `fedhyper` experiment and its presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the experiment.

    Attributes:
      name: data set.
      train, valid: images of the two parts; the test part is the publisher's.
      clients: among whom the training images are split.
      concentration: of the Dirichlet distribution of a class over the clients; lower is less even.
      selected: clients of a round.
      local_steps: training steps of a client in a round.
      batch: images of a local step.
      hidden: units of the network.
      rounds: of every run.
      poor, best: the two first rates of the clients: too low, and the best of a grid for FedAvg.
      server_rates: bounds of the rate that the server-side local scheduler sends.
      momentum_rates: bounds of the factor of the global scheduler with momentum.
      global_hyper, server_hyper, client_hyper: rates of the three schedulers.
      normalized: whether the global scheduler takes cosines; plain inner products are the paper's.
      target: validation accuracy that rounds are counted to.
    """

    name: str = "fashion_mnist"
    train: int = 10_000
    valid: int = 2_000
    clients: int = 50
    concentration: float = 0.5
    selected: int = 10
    local_steps: int = 20
    batch: int = 32
    hidden: int = 64
    rounds: int = 150
    poor: float = 0.03
    best: float = 0.3
    server_rates: tuple[float, float] = (1e-3, 0.5)
    momentum_rates: tuple[float, float] = (0.8, 1.5)
    global_hyper: float = 1.0
    server_hyper: float = 1.0
    client_hyper: float = 0.1
    normalized: bool = False
    target: float = 0.80


def smoke() -> Config:
    """Seconds, on scikit-learn's digits, which need no download: does everything run?"""
    return Config(
        name="digits", train=400, valid=200, clients=7, selected=3, local_steps=3, batch=16,
        hidden=16, rounds=8, target=0.3,
    )  # fmt: skip


def cpu() -> Config:
    """The experiment, sized for one core: minutes."""
    return Config()


def paper() -> Config:
    """All images and a hundred clients, as the published code has them."""
    return Config(
        train=50_000, valid=10_000, clients=100, local_steps=80, batch=64, hidden=256, rounds=200
    )
