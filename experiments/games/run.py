"""Runs `games`: complex momentum on games that rotate, against real momentum."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import record
from experiments.games import problem
from experiments.games.config import Config

TABLE = ("ratio", "radius", "decay_error", "cooperative_radius")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """Both games from a random start, by every momentum; and the map of spectral radii."""
    records = record.Records(out, seed)
    games = {
        "bilinear": (problem.ROTATION, config.rate, config.steps),
        "mixed": (problem.mixed(), config.mixed_rate, config.mixed_steps),
    }
    for name, (jacobian, rate, steps) in games.items():
        for method, momentum in problem.METHODS.items():
            full = f"{name}_{method}"
            if records.finished(full, config.points):
                continue
            distances = play(jacobian, momentum, rate, steps, seed)
            radius = problem.radius(momentum, rate, jacobian)
            cooperative = problem.radius(momentum, rate, np.eye(1))
            for k in range(1, config.points + 1):
                step = round(steps * k / config.points)
                records.append(
                    full,
                    step,
                    step,
                    ratio=float(distances[step] / distances[0]),
                    radius=radius,
                    cooperative_radius=cooperative,
                    **(_decay(distances, radius) if k == config.points else {}),
                )
    _map(config, out)


def play(
    jacobian: np.ndarray, momentum: tuple[float, float], rate: float, steps: int, seed: int
) -> np.ndarray:
    """Distances to the equilibrium, at the start and after every step; all players move at once."""
    start = np.random.default_rng(seed).standard_normal(len(jacobian))
    distances = np.asarray(
        _played(steps)(jnp.asarray(jacobian), start, jnp.array([rate, *momentum]))
    )
    return np.where(np.isnan(distances), np.inf, distances)  # infinity less infinity


def _length(point: Any) -> jax.Array:
    """The norm, whose squares do not overflow."""
    largest = jnp.max(jnp.abs(point))
    return largest * jnp.linalg.norm(point / largest)


@functools.cache
def _played(steps: int) -> Any:
    @jax.jit
    def run(jacobian: jax.Array, start: jax.Array, settings: jax.Array) -> jax.Array:
        tx = bilevel.complex_momentum(*settings)  # pyright: ignore[reportArgumentType]
        start = jnp.asarray(start, jacobian.dtype)

        def step(carry: Any, _: Any) -> Any:
            point, state = carry
            moves, state = tx.update(jacobian @ point, state, point)
            point = optax.apply_updates(point, moves)
            return (point, state), _length(point)

        _, distances = jax.lax.scan(step, (start, tx.init(start)), length=steps)
        return jnp.concatenate([_length(start)[None], distances])

    return run


def _decay(distances: np.ndarray, radius: float) -> dict[str, float]:
    """How far the fitted rate of the second half is from that of the spectral radius, in parts."""
    if not np.isfinite(distances).all():
        return {}
    half = len(distances) // 2
    steps = np.arange(half, len(distances))
    slope = np.polyfit(steps, np.log(distances[half:]), 1)[0]
    return {
        "fitted_radius": float(np.exp(slope)),
        "decay_error": float(abs(slope / np.log(radius) - 1)),
    }


def _map(config: Config, out: Path) -> None:
    """Spectral radii on the bilinear game, over the angle and the step size."""
    angles = np.linspace(0, 1, config.angles)
    rates = np.geomspace(1e-3, 1.0, config.rates)
    radii = [[problem.radius((config.beta, a), r, problem.ROTATION) for a in angles] for r in rates]
    record.save_arrays(out, "map", angles=angles, rates=rates, radii=np.array(radii))
