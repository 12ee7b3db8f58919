"""W6: how the cost of the unrolled MLP of W2 grows with the number of steps.

Time of mixed mode at 25, 50 and 100 steps, and memory of square-root rematerialization at 25, 100
and 400 steps (small batches: it is carries of parameters that are kept, not activations).
"""

from experiments.bench import plain, w3
from experiments.bench.config import Config
from experiments.bench.measure import Row

SMALL = 16
NONE = dict.fromkeys(("lineax", "optimistix", "jaxopt"), "see W3")


def _time(steps: int, config: Config, seed: int) -> Row:
    args, source = w3.arguments(config.tiny, seed, steps, w3.BATCH)
    inner, outer, rate = w3.inner, w3.outer, w3.LEARNING_RATE
    columns = {
        "jax": plain.unrolled(outer, inner, steps, rate, plain.mixed_gradient(inner)),
        "bilevel": w3.unrolled(outer, inner, steps),
        **NONE,
    }
    title = f"W6 {steps} SGD steps, mixed mode"
    name = f"w6_steps_{steps}"
    return Row(name, title, source, args, w3.first_batch(inner), columns=columns)


def _memory(steps: int, config: Config, seed: int) -> Row:
    args, source = w3.arguments(config.tiny, seed, steps, SMALL)
    inner, outer, rate = w3.inner, w3.outer, w3.LEARNING_RATE
    gradient = plain.mixed_gradient(inner)
    segment = round(steps**0.5)
    columns = {
        "jax": plain.unrolled(outer, inner, steps, rate, gradient, segment=segment),
        "bilevel": w3.unrolled(outer, inner, steps, remat="sqrt"),
        **NONE,
    }
    title = f'W6 {steps} SGD steps, `remat="sqrt"`, batch {SMALL}'
    name = f"w6_sqrt_{steps}"
    return Row(name, title, source, args, w3.first_batch(inner), columns=columns)


def steps_25(config: Config, seed: int) -> Row:
    return _time(25, config, seed)


def steps_50(config: Config, seed: int) -> Row:
    return _time(50, config, seed)


def steps_100(config: Config, seed: int) -> Row:
    return _time(100, config, seed)


def sqrt_25(config: Config, seed: int) -> Row:
    return _memory(25, config, seed)


def sqrt_100(config: Config, seed: int) -> Row:
    return _memory(100, config, seed)


def sqrt_400(config: Config, seed: int) -> Row:
    return _memory(400, config, seed)


ROWS = {
    "w6_steps_25": steps_25,
    "w6_steps_50": steps_50,
    "w6_steps_100": steps_100,
    "w6_sqrt_25": sqrt_25,
    "w6_sqrt_100": sqrt_100,
    "w6_sqrt_400": sqrt_400,
}
