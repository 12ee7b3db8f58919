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

TABLE = ("test_loss", "strength")


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """All sets on one draw; a resumed run measures the draw again."""
    records = record.Records(out, seed)
    records.rewind()
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        for name, count in config.sets:
            _set(name, count, config, seed, records)


def name_of(strength: float) -> str:
    """`one`, `none`, or `prior_3em3`."""
    if math.isinf(strength):
        return "one"
    return f"prior_{strength:.0e}".replace("e-0", "em") if strength else "none"


class Tuned:
    """Penalties of all strengths, tuned on some rows, and the fits with them to these rows."""

    def __init__(self, kind: problem.Kind, rows: sets.Rows, config: Config):
        count, features = rows.x.shape
        self.lam = problem.tuner(kind, count, features, config)(tuple(rows))
        self.w = problem.fitter(kind, features)(self.lam, tuple(rows))


def _set(name: str, count: int, config: Config, seed: int, records: record.Records) -> None:
    fitted, test = sets.rows(name, count, config.test, seed)
    kind = problem.LOGISTIC if sets.table(name).classes else problem.RIDGE
    features = fitted.x.shape[1]
    strengths = sorted(config.strengths, reverse=True)
    whole = Tuned(kind, fitted, config)
    results = {
        s: float(np.mean(problem.losses(kind, w, test)))
        for s, w in zip(strengths, whole.w, strict=True)
    }
    for strength, lam in zip(strengths, whole.lam, strict=True):
        told = {"spread": float(jnp.std(lam)), "mean": float(jnp.mean(lam))}
        paid = cost(config, searches=1, tunings=int(math.isfinite(strength)))
        records.append(f"{name}_{name_of(strength)}", 0, paid, test_loss=results[strength], **told)

    lam = problem.repeated(kind, count, features, config)(tuple(fitted), whole.lam[0, 0])
    w = problem.fitter(kind, features)(jnp.full((1, features), lam), tuple(fitted))[0]
    records.append(
        f"{name}_one_repeated", 0, cost(config, repeats=1),
        test_loss=float(np.mean(problem.losses(kind, w, test))), mean=float(lam),
    )  # fmt: skip

    choice = chosen(kind, fitted, config, seed)
    runs = 1 + config.splits
    records.append(
        f"{name}_chosen", 0, cost(config, searches=runs, tunings=runs * (len(strengths) - 1)),
        test_loss=results[choice.strength], strength=name_of(choice.strength),
        gains=choice.gains.tolist(), gain_errors=choice.gain_errors.tolist(),
    )  # fmt: skip


def chosen(kind: problem.Kind, fitted: sets.Rows, config: Config, seed: int) -> Any:
    """The choice of the strength, by nested cross-validation."""
    found: dict[bytes, Tuned] = {}
    order = sorted(config.strengths, reverse=True)

    def tune(prior: HyperPrior, train: np.ndarray) -> Any:
        # All strengths are tuned in one program; the first that is asked for pays.
        key = train.tobytes()
        if key not in found:
            found[key] = Tuned(kind, fitted.at(train), config)
        return found[key].w[order.index(prior.strength)]

    def score(w: Any, held: np.ndarray) -> np.ndarray:
        return problem.losses(kind, w, fitted.at(held))

    return choose_strength(
        HyperPrior(jnp.zeros(fitted.x.shape[1]), 1.0, "all"), tune, score,
        k_folds(len(fitted.y), config.splits, seed=seed),
        strengths=config.strengths, rule="clearly_better", errors=config.errors,
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
