"""Runs `many`: one penalty per feature under priors of several strengths, beside one searched."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.objectives import HyperPrior, choose_strength, k_folds
from experiments.common import expected, record
from experiments.many import problem, sets
from experiments.many.config import Config

TABLE = ("test_loss", "spread")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All sets on one draw; a resumed run measures the draw again."""
    records = record.Records(out, seed)
    records.rewind()
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        for name, count in config.sets:
            _set(name, count, config, seed, records)


def strength(spread: float, count: int) -> float:
    """Of a prior under which log penalties deviate by ``spread``, beside a mean over the rows."""
    if math.isinf(spread):
        return 0.0
    return 1 / (count * spread**2) if spread else math.inf


def name_of(spread: float) -> str:
    """`one`, `none`, or `spread_0p5`."""
    if math.isinf(spread):
        return "none"
    return f"spread_{spread:g}".replace(".", "p") if spread else "one"


class Tuned:
    """Penalties of several strengths, tuned on some rows, and the fits with them to these rows.

    With an infinite strength it is the one penalty that is searched, where the others begin.
    """

    def __init__(
        self, kind: problem.Kind, rows: sets.Rows, config: Config, strengths: tuple[float, ...]
    ):
        count, features = rows.x.shape
        finite = tuple(s for s in strengths if math.isfinite(s))
        self.strengths = (math.inf, *finite)
        self.lam = problem.tuner(kind, count, features, finite, config)(tuple(rows))
        self.w = problem.fitter(kind, features)(self.lam, tuple(rows))

    def of(self, strength: float) -> Any:
        """The weights."""
        return self.w[self.strengths.index(strength)]


def _set(name: str, count: int, config: Config, seed: int, records: record.Records) -> None:
    fitted, test = sets.rows(name, count, config.test, seed)
    kind = problem.LOGISTIC if sets.table(name).classes else problem.RIDGE
    features = fitted.x.shape[1]
    spreads = {strength(s, count): s for s in (0.0, *config.spreads, math.inf)}
    whole = Tuned(kind, fitted, config, tuple(spreads))
    results = {s: float(np.mean(problem.losses(kind, whole.of(s), test))) for s in whole.strengths}
    for one, lam in zip(whole.strengths, whole.lam, strict=True):
        told = {"spread": float(jnp.std(lam)), "mean": float(jnp.mean(lam))}
        paid = cost(config, searches=1, tunings=int(math.isfinite(one)))
        records.append(f"{name}_{name_of(spreads[one])}", 0, paid, test_loss=results[one], **told)

    lam = problem.repeated(kind, count, features, config)(tuple(fitted), whole.lam[0, 0])
    w = problem.fitter(kind, features)(jnp.full((1, features), lam), tuple(fitted))[0]
    records.append(
        f"{name}_one_repeated", 0, cost(config, repeats=1),
        test_loss=float(np.mean(problem.losses(kind, w, test))), mean=float(lam),
    )  # fmt: skip

    choice = chosen(kind, fitted, tuple(spreads)[:-1], config, seed)
    runs = 1 + config.splits
    records.append(
        f"{name}_chosen", 0,
        cost(config, searches=runs, tunings=config.splits * len(config.spreads) + 1),
        test_loss=results[choice.strength], spread=spreads[choice.strength],
        gains=choice.gains.tolist(), gain_errors=choice.gain_errors.tolist(),
    )  # fmt: skip


def chosen(
    kind: problem.Kind,
    fitted: sets.Rows,
    strengths: tuple[float, ...],
    config: Config,
    seed: int,
) -> Any:
    """The choice of the strength, by nested cross-validation."""
    found: dict[bytes, Tuned] = {}

    def tune(prior: HyperPrior, train: np.ndarray) -> Any:
        # All strengths are tuned in one program; the first that is asked for pays.
        key = train.tobytes()
        if key not in found:
            found[key] = Tuned(kind, fitted.at(train), config, strengths)
        return found[key].of(prior.strength)

    def score(w: Any, held: np.ndarray) -> np.ndarray:
        return problem.losses(kind, w, fitted.at(held))

    return choose_strength(
        HyperPrior(jnp.zeros(fitted.x.shape[1]), 1.0, "all"), tune, score,
        k_folds(len(fitted.y), config.splits, seed=seed),
        strengths=strengths, rule="clearly_better", errors=config.errors,
    )  # fmt: skip


def cost(config: Config, searches: int = 0, tunings: int = 0, repeats: int = 0) -> float:
    """In fits to one fold: a hypergradient counts as one more."""
    grids = searches * config.points + repeats * config.repeats * config.points_beside
    return float(config.folds * (grids + repeats * config.points + 2 * tunings * config.steps))


def summary(records: list[record.Record]) -> dict[str, Any]:
    """Test losses over those of one searched penalty, draw by draw, and how many sets gain."""
    last = record.final(records)
    told: dict[str, Any] = {}
    names = sorted({name.removesuffix("_chosen") for name, _ in last if name.endswith("_chosen")})
    for base in ("one", "one_repeated"):
        for arm in ("none", "chosen"):
            ratios = [expected.paired(records, "test_loss", f"{n}_{arm}", f"{n}_{base}", ratio=True)
                      for n in names]  # fmt: skip
            told |= {f"{n}_{arm}_over_{base}": {"test_loss": r}
                     for n, r in zip(names, ratios, strict=True)}  # fmt: skip
            told[f"{arm}_against_{base}"] = {
                "worse": expected.statistics([float(sum(r["low"] > 1 for r in ratios))]),
                "better": expected.statistics([float(sum(r["high"] < 1 for r in ratios))]),
                "share_better": expected.statistics(
                    [float(np.mean([r["high"] < 1 for r in ratios]))]
                ),
            }
    return told
