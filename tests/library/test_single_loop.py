"""Single loops against their equations in NumPy, closed forms, and what their theory promises."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Anchored, Indexed, Page, Saga, Space, Spider, Status, Storm

N, P, EXAMPLES = 4, 3, 16
RHO, SIGMA, ETA = 0.11, 0.13, 0.07  # of the parameters, the adjoint, the hyperparameters


class Inner(NamedTuple):
    """h = w'Aw/2 + lam'Cw + a'w, one example per leading index."""

    A: np.ndarray
    C: np.ndarray
    a: np.ndarray


class Outer(NamedTuple):
    """f = w'Fw/2 + lam'G lam/2 + lam'Kw + c'w + e'lam."""

    F: np.ndarray
    G: np.ndarray
    K: np.ndarray
    c: np.ndarray
    e: np.ndarray


def definite(rng, size, count, low):
    m = rng.standard_normal((count, size, size)) / np.sqrt(size)
    return m @ m.swapaxes(1, 2) + low * np.eye(size)


def problem(seed=0, count=EXAMPLES):
    rng = np.random.default_rng(seed)
    inner = Inner(
        definite(rng, N, count, 0.5), rng.normal(size=(count, P, N)), rng.normal(size=(count, N))
    )
    outer = Outer(
        definite(rng, N, count, 0.2), definite(rng, P, count, 1.0),
        0.3 * rng.normal(size=(count, P, N)), rng.normal(size=(count, N)),
        rng.normal(size=(count, P)),
    )  # fmt: skip
    return inner, outer


INNER, OUTER = problem()
PARAMS = {"u": jnp.array([0.3, -0.2]), "v": jnp.array([0.5, 0.1])}
LAM = jnp.array([0.4, -0.6, 0.2])


def flat(w):
    return jnp.concatenate([w["u"], w["v"]])


def mean(batch):
    return jax.tree.map(lambda x: x.mean(0), batch)


def train(w, lam, batch):
    A, C, a = mean(batch)
    w = flat(w)
    return 0.5 * w @ A @ w + lam @ C @ w + a @ w


def valid(w, lam, batch):
    F, G, K, c, e = mean(batch)
    w = flat(w)
    return 0.5 * w @ F @ w + 0.5 * lam @ G @ lam + lam @ K @ w + c @ w + e @ lam


def oracles(w, q, lam, inner, outer):
    """By hand: grad_w h, H q, B'q, grad_w f, d_lam f."""
    A, C, a = (x.mean(0) for x in inner)
    F, G, K, c, e = (x.mean(0) for x in outer)
    return A @ w + C.T @ lam + a, A @ q, C @ q, F @ w + K.T @ lam + c, G @ lam + K @ w + e


def combined(five):
    inner, product, cross, outer, direct = five
    return inner, product - outer, direct - cross


def solution(inner=INNER, outer=OUTER):
    """The minimiser of F, its inner solution and its adjoint."""
    A, C, a = (x.mean(0) for x in inner)
    F, G, K, c, e = (x.mean(0) for x in outer)
    J, start = -np.linalg.solve(A, C.T), -np.linalg.solve(A, a)
    hessian = J.T @ F @ J + G + K @ J + (K @ J).T
    lam = -np.linalg.solve(hessian, J.T @ F @ start + K @ start + J.T @ c + e)
    w = start + J @ lam
    return lam, w, np.linalg.solve(A, F @ w + K.T @ lam + c)


def gradient(lam, inner=INNER, outer=OUTER):
    """The gradient of F, in closed form."""
    A, C, a = (x.mean(0) for x in inner)
    F, G, K, c, e = (x.mean(0) for x in outer)
    w = -np.linalg.solve(A, C.T @ lam + a)
    return G @ lam + K @ w + e - C @ np.linalg.solve(A, F @ w + K.T @ lam + c)


STEPS, SIZE = 10, 4
ROWS = np.random.default_rng(7).integers(0, EXAMPLES // SIZE, (STEPS, 8))
OTHER = np.random.default_rng(8).integers(0, EXAMPLES // SIZE, STEPS)


def cut(data, i):
    return type(data)(*(x[SIZE * i : SIZE * (i + 1)] for x in data))


def stack(parts):
    return jax.tree.map(lambda *x: np.stack(x), *parts)


def inner_of(t, count=1):
    return [cut(INNER, i) for i in ROWS[t, :count]]


def outer_of(t):
    return cut(OUTER, OTHER[t])


def indexed(t, count=1):
    rows = ROWS[t, :count].astype(np.int32)
    return Indexed(stack(inner_of(t, count)), rows), Indexed(outer_of(t), np.int32(OTHER[t]))


def anchored(t):
    return Anchored(stack(inner_of(t)), INNER), Anchored(outer_of(t), OUTER)


def plain(count=1):
    return lambda t: (stack(inner_of(t, count)), outer_of(t))


SGD = optax.sgd(RHO), optax.sgd(SIGMA), optax.sgd(ETA)


def make(estimator=None, txs=SGD, **options):
    return bilevel.single_loop(valid, train, *txs, estimator, **options)


def run(alg, batches, steps=STEPS, params=PARAMS, hparams=LAM, step=None):
    """Every state after the first, and every info."""
    state, step = alg.init(params, hparams), step or jax.jit(alg.step)
    seen = []
    for t in range(steps):
        inner, outer = batches(t)
        key = jax.random.key(t)
        state, info = step(state, inner_batches=inner, outer_batch=outer, key=key)
        seen.append((state, info))
    return seen


def start():
    return np.array(flat(PARAMS)), np.zeros(N), np.array(LAM)


def moved(point, directions):
    rates = RHO, SIGMA, ETA
    return tuple(x - r * d for x, r, d in zip(point, rates, directions, strict=True))


def agrees(seen, points):
    """Ten steps of well-conditioned quadratics in float64: rounding only."""
    for (state, info), (before, after) in zip(seen, points, strict=True):
        w, q, lam = after
        np.testing.assert_allclose(flat(state.params), w, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(flat(state.measured), before[0], rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(state.hparams, lam, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(info.hparams, before[2], rtol=1e-11, atol=1e-13)
        if q is not None:
            np.testing.assert_allclose(flat(state.adjoint), q, rtol=1e-11, atol=1e-13)


def transcribed(directions):
    """(before, after) of every step with ``directions(t, point, past)``, past a dict."""
    point, past, points = start(), {}, []
    for t in range(STEPS):
        new = moved(point, directions(t, point, past))
        points.append((point, new))
        point = new
    return points


def read(t, point, inner=None, outer=None):
    inner = inner_of(t)[0] if inner is None else inner
    return oracles(*point, inner, outer_of(t) if outer is None else outer)


def test_soba_is_its_equations():
    seen = run(bilevel.soba(valid, train, *SGD), plain())
    agrees(seen, transcribed(lambda t, point, past: combined(read(t, point))))
    state, info = seen[3]
    at = flat(seen[2][0].params), flat(seen[2][0].adjoint), seen[2][0].hparams
    five = read(3, at)
    got = info.stats, info.hypergrad_norm
    expected = {
        "residual_norm": np.linalg.norm(five[1] - five[3]),
        "rhs_norm": np.linalg.norm(five[3]),
        "stationarity": np.linalg.norm(five[0]),
        "direct_norm": np.linalg.norm(five[4]),
        "indirect_norm": np.linalg.norm(five[2]),
    }
    assert got[0].keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[0][name], value, rtol=1e-11)
    np.testing.assert_allclose(got[1], np.linalg.norm(five[4] - five[2]), rtol=1e-11)
    inner_value = jax.jit(train)(seen[2][0].params, at[2], inner_of(3)[0])
    np.testing.assert_allclose(info.inner_value, inner_value, rtol=1e-11)
    assert int(state.step) == 4


def test_one_schedule_is_that_of_each_optimizer():
    def falls(t):
        return 1 / (1.0 + t)

    scheduled = [optax.sgd(lambda t, r=r: r * falls(t)) for r in (RHO, SIGMA, ETA)]
    each = run(bilevel.soba(valid, train, *scheduled), plain())
    for (one, _), (other, _) in zip(
        run(bilevel.soba(valid, train, *SGD, schedule=falls), plain()), each, strict=True
    ):
        np.testing.assert_allclose(flat(one.params), flat(other.params), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(flat(one.adjoint), flat(other.adjoint), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(one.hparams, other.hparams, rtol=1e-12, atol=1e-14)


def test_independent_batches_have_a_product_each():
    def directions(t, point, past):
        parts = [read(t, point, inner) for inner in inner_of(t, 3)]
        five = (parts[0][0], parts[1][1], parts[2][2], *parts[0][3:])
        return combined(five)

    agrees(run(make(independent=True), plain(3)), transcribed(directions))


@pytest.mark.parametrize("count", [1, 3])
def test_saba_is_its_equations(count):
    batches = EXAMPLES // SIZE

    def directions(t, point, past):
        parts = [read(t, point, inner) for inner in inner_of(t, count)]
        pick = [0, 1, 2] if count == 3 else [0, 0, 0]
        five = (*(parts[pick[k]][k] for k in range(3)), *parts[0][3:])
        rows = [*(ROWS[t, pick[k]] for k in range(3)), OTHER[t], OTHER[t]]
        table = past.setdefault("table", [np.zeros((batches, len(x))) for x in five])
        estimate = []
        for new, row, entries in zip(five, rows, table, strict=True):
            estimate.append(new - entries[row] + entries.mean(0))
            entries[row] = new
        return combined(estimate)

    alg = bilevel.saba(valid, train, *SGD, batches, batches, independent=count == 3)
    agrees(run(alg, lambda t: indexed(t, count)), transcribed(directions))


def storm(rates):
    def directions(t, point, past):
        new = combined(read(t, point))
        kept = [0.0 if t == 0 or a is None else 1 - a(t) for a in rates]
        if t:
            old = combined(read(t, past["point"]))
            new = tuple(
                d + keep * (b - o)
                for d, keep, b, o in zip(new, kept, past["directions"], old, strict=True)
            )
        past |= {"point": point, "directions": new}
        return new

    return directions


def test_storm_is_its_equations():
    alg = make(Storm(0.3, lambda step: 1 / (1.0 + step), 0.6))
    rates = [lambda t: 0.3, lambda t: 1 / (1 + t), lambda t: 0.6]
    agrees(run(alg, plain()), transcribed(storm(rates)))


def test_fsla_is_its_equations():
    alg = bilevel.fsla(valid, train, *SGD, 0.4)
    agrees(run(alg, plain()), transcribed(storm([None, None, lambda t: 0.4])))


def spider(restarts):
    def directions(t, point, past):
        if restarts(t):
            new = combined(read(t, point, INNER, OUTER))
        else:
            new, old = combined(read(t, point)), combined(read(t, past["point"]))
            new = tuple(d - o + b for d, o, b in zip(new, old, past["directions"], strict=True))
        past |= {"point": point, "directions": new}
        return new

    return directions


def test_srba_is_its_equations_and_full_steps_cost_the_data():
    seen = run(bilevel.srba(valid, train, *SGD, 4), anchored)
    agrees(seen, transcribed(spider(lambda t: t % 4 == 0)))
    assert [tuple(map(float, info.cost)) for _, info in seen[3:6]] == [
        (2, 2, 2), (5, 5, 5), (2, 2, 2),
    ]  # fmt: skip
    # What a full step reports is of its own batches.
    at = seen[3][0].params, seen[3][0].hparams
    np.testing.assert_allclose(seen[4][1].value, jax.jit(valid)(*at, outer_of(4)), rtol=1e-11)


def test_spaba_is_its_equations():
    drawn = [bool(jax.random.bernoulli(jax.random.key(t), 0.3)) for t in range(STEPS)]
    assert 1 < sum(drawn) < STEPS - 2
    seen = run(bilevel.spaba(valid, train, *SGD, 0.3), anchored)
    agrees(seen, transcribed(spider(lambda t: t == 0 or drawn[t])))


def series(w, lam, inner, outer, a, mixed):
    """q = a sum_j prod (I - a H_i) g with a fresh matrix per product, and B'q of another batch."""
    g = oracles(w, np.zeros(N), lam, inner[0], outer)[3]
    term = a * g
    q = term
    for batch in inner:
        term = term - a * batch.A.mean(0) @ term
        q = q + term
    return oracles(w, q, lam, mixed, outer)


def test_mrbo_is_its_equations():
    a, rates = 0.2, (0.3, 0.6)

    def at(t, point):
        w, lam = point
        batches = inner_of(t, 5)
        five = series(w, lam, batches[1:4], outer_of(t), a, batches[4])
        inner = oracles(w, np.zeros(N), lam, batches[0], outer_of(t))[0]
        return inner, five[4] - five[2]

    w, _, lam = start()
    points, past = [], None
    for t in range(STEPS):
        new = at(t, (w, lam))
        if past:
            new = tuple(
                d + (1 - r) * (b - o)
                for d, r, b, o in zip(new, rates, past[1], at(t, past[0]), strict=True)
            )
        past = (w, lam), new
        before, (w, lam) = (w, None, lam), (w - RHO * new[0], lam - ETA * new[1])
        points.append((before, (w, None, lam)))
    alg = bilevel.mrbo(valid, train, SGD[0], SGD[2], *rates, 3, a)
    agrees(run(alg, plain(5)), points)


def nested(seen, steps):
    for (state, _), (w, lam) in zip(seen, steps, strict=True):
        np.testing.assert_allclose(flat(state.params), w, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(state.hparams, lam, rtol=1e-11, atol=1e-13)


def test_stocbio_is_its_equations():
    w, _, lam = start()
    steps = []
    for t in range(STEPS):
        batches = inner_of(t, 6)
        for batch in batches[:2]:
            w = w - RHO * oracles(w, w, lam, batch, OUTER)[0]
        five = series(w, lam, batches[2:5], outer_of(t), 0.2, batches[5])
        lam = lam - ETA * (five[4] - five[2])
        steps.append((w, lam))
    nested(run(bilevel.stocbio(valid, train, SGD[0], SGD[2], 2, 3, 0.2), plain(6)), steps)


def test_amigo_is_its_equations():
    w, q, lam = start()
    steps = []
    for t in range(STEPS):
        batches = inner_of(t, 6)
        for batch in batches[:2]:
            w = w - RHO * oracles(w, q, lam, batch, OUTER)[0]
        for batch in batches[2:5]:
            five = oracles(w, q, lam, batch, outer_of(t))
            q = q - SIGMA * (five[1] - five[3])
        five = oracles(w, q, lam, batches[5], outer_of(t))
        lam = lam - ETA * (five[4] - five[2])
        steps.append((w, lam))
    nested(run(bilevel.amigo(valid, train, *SGD, 2, 3), plain(6)), steps)


def test_stocbio_on_full_batches_is_a_neumann_series():
    def full(t):
        return stack([INNER] * 6), OUTER

    one = bilevel.alternate(
        valid, train, bilevel.Implicit(bilevel.Neumann(3, 0.2)), SGD[0], SGD[2], 2
    )
    expected = run(one, lambda t: (stack([INNER] * 2), OUTER), 3)
    for (a, info), (b, other) in zip(
        run(bilevel.stocbio(valid, train, SGD[0], SGD[2], 2, 3, 0.2), full, 3), expected,
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(a.hparams, b.hparams, rtol=1e-12)
        np.testing.assert_allclose(info.hypergrad_norm, other.hypergrad_norm, rtol=1e-12)


def many(alg, draw, steps, seed=0):
    """``steps`` steps as one scan over ``draw(key) -> inner_batches, outer_batch``."""

    @jax.jit
    def scanned(state, keys):
        def body(state, key):
            inner, outer = draw(key)
            state, info = alg.step(state, inner_batches=inner, outer_batch=outer, key=key)
            return state, (info.result, info.hypergrad_norm)

        return jax.lax.scan(body, state, keys)

    return scanned(alg.init(PARAMS, LAM), jax.random.split(jax.random.key(seed), steps))


FULL = jax.tree.map(jnp.asarray, (stack([INNER]), OUTER))


def test_the_fixed_point_is_the_solution():
    rates = optax.sgd(0.2), optax.sgd(0.2), optax.sgd(0.05)
    state, (result, _) = many(make(txs=rates), lambda key: FULL, 3000)
    lam, w, q = solution()
    np.testing.assert_allclose(state.hparams, lam, rtol=1e-10)
    np.testing.assert_allclose(flat(state.params), w, rtol=1e-10)
    np.testing.assert_allclose(flat(state.adjoint), q, rtol=1e-10)
    assert int(result[-1]) == Status.ok
    np.testing.assert_allclose(gradient(lam), 0, atol=1e-12)


def test_at_rest_the_direction_is_the_gradient_of_the_value_function():
    txs = optax.sgd(0.2), optax.sgd(0.2), optax.set_to_zero()
    state, (_, norm) = many(make(txs=txs), lambda key: FULL, 500)
    np.testing.assert_allclose(norm[-1], np.linalg.norm(gradient(np.array(LAM))), rtol=1e-10)
    wanted = jax.jit(
        lambda w: bilevel.hypergrad_solve(
            valid, train, bilevel.Implicit(bilevel.Dense()), w, LAM,
            inner_batch=INNER, outer_batch=OUTER,
        ).grads
    )(state.params)  # fmt: skip
    np.testing.assert_allclose(wanted, gradient(np.array(LAM)), rtol=1e-9)


def test_momentum_and_decay_of_the_adjoint_are_its_optimizers():
    decay = 0.7
    linear = optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1, momentum=0.8))
    alg = make(txs=(optax.sgd(0.2), linear, optax.set_to_zero()))
    state, _ = many(alg, lambda key: FULL, 800)
    A, C, a = (x.mean(0) for x in INNER)
    F, _, K, c, _ = (x.mean(0) for x in OUTER)
    w = -np.linalg.solve(A, C.T @ LAM + a)
    q = np.linalg.solve(A + decay * np.eye(N), F @ w + K.T @ LAM + c)
    np.testing.assert_allclose(flat(state.adjoint), q, rtol=1e-10)
    velocity = [x for x in jax.tree.leaves(state.linear) if x.shape]
    assert len(velocity) == 2  # a momentum for each leaf, kept from step to step
    two = run(alg, plain(), 2)[-1][0]
    first = combined(read(0, start()))[1]
    q1 = -0.1 * first
    w1 = start()[0] - 0.2 * combined(read(0, start()))[0]
    second = combined(read(1, (w1, q1, np.array(LAM))))[1] + decay * q1
    np.testing.assert_allclose(flat(two.adjoint), q1 - 0.1 * (second + 0.8 * first), rtol=1e-10)


def drawn(kind):
    """Batches of 4 of 16 examples, one for each loss, by a key."""
    parts = stack([cut(INNER, i) for i in range(4)]), stack([cut(OUTER, i) for i in range(4)])
    parts = jax.tree.map(jnp.asarray, parts)

    def draw(key):
        i, j = jax.random.randint(key, (2,), 0, 4, jnp.int32)
        inner = jax.tree.map(lambda x: x[i][None], parts[0])
        outer = jax.tree.map(lambda x: x[j], parts[1])
        if kind is Indexed:
            return Indexed(inner, i[None]), Indexed(outer, j)
        if kind is Anchored:
            return Anchored(inner, INNER), Anchored(outer, OUTER)
        return inner, outer

    return draw


CONSTANT = optax.sgd(0.1), optax.sgd(0.1), optax.sgd(0.02)
REDUCED = {"saba": (Saga(4, 4), Indexed), "srba": (Spider(8), Anchored),
           "spaba": (Page(0.2), Anchored)}  # fmt: skip


def final(estimator, kind, steps=4000):
    state, _ = many(make(estimator, CONSTANT), drawn(kind), steps)
    return np.sum(gradient(np.array(state.hparams)) ** 2)


def test_soba_stalls_with_constant_steps_and_reduced_variance_does_not():
    initial = np.sum(gradient(np.array(LAM)) ** 2)
    stalled = final(None, None)
    assert stalled > 1e-6 * initial
    for name, (estimator, kind) in REDUCED.items():
        assert final(estimator, kind) < 1e-10 * min(stalled, initial), name


def test_a_step_of_the_adjoint_beyond_its_limit_is_told():
    top = np.linalg.eigvalsh(INNER.A.mean(0))[-1]

    def results(rate):
        alg = make(txs=(optax.sgd(0.1), optax.sgd(rate), optax.set_to_zero()))
        return np.array(many(alg, lambda key: FULL, 3000)[1][0])

    below, above = results(1.9 / top), results(2.1 / top)
    assert (below == Status.ok).all()
    first = int(np.argmax(above == Status.worse_than_zero))
    assert above[first] == Status.worse_than_zero and (above[:first] == Status.ok).all()
    assert above[-1] == Status.diverged
    assert results(5 / top)[-1] >= Status.nonfinite_input


def test_a_right_side_that_vanishes_is_no_divergence():
    """The validation loss is solved exactly, so that the adjoint only follows rounding."""

    def fits(w, lam, batch):
        return jnp.mean((w - batch) ** 2) + lam * jnp.sum(w**2)

    alg = bilevel.soba(
        lambda w, lam, batch: jnp.mean((w - batch) ** 2), fits, *(optax.sgd(0.2),) * 3
    )

    def body(state, _):
        state, info = alg.step(state, inner_batches=2 * jnp.ones((1, 1)), outer_batch=jnp.ones(1))
        return state, info.result

    state, results = jax.jit(lambda s: jax.lax.scan(body, s, length=300))(
        alg.init(jnp.zeros(1), 0.5)
    )
    np.testing.assert_allclose(state.hparams, 1, rtol=1e-12)
    assert (np.array(results) == Status.ok).all()


def test_a_step_of_the_parameters_beyond_its_limit_is_told():
    top = np.linalg.eigvalsh(INNER.A.mean(0))[-1]
    alg = make(txs=(optax.sgd(2.5 / top), optax.sgd(0.1), optax.set_to_zero()))
    assert int(many(alg, lambda key: FULL, 3000)[1][0][-1]) == Status.nonfinite_input


def test_negative_curvature_is_told():
    bent = INNER._replace(A=INNER.A - 30 * np.eye(N))
    seen = run(make(), lambda t: (stack([bent]), OUTER), 2)
    assert int(seen[0][1].result) == Status.ok  # no adjoint yet, nothing to judge
    assert int(seen[1][1].result) == Status.negative_curvature


def test_tables_above_their_limit_are_refused_and_those_at_it_are_not():
    needed = 8 * (5 * (2 * N + P) + 7 * (N + P))
    state = make(Saga(5, 7, max_bytes=needed)).init(PARAMS, LAM)
    assert sum(x.nbytes for x in jax.tree.leaves(state.memory[0])) == needed
    with pytest.raises(
        ValueError, match=f"`Saga` would keep {needed} bytes.*max_bytes={needed - 1}"
    ):
        make(Saga(5, 7, max_bytes=needed - 1)).init(PARAMS, LAM)


@pytest.mark.parametrize("number", [-1, 4])
@pytest.mark.parametrize("which", [0, 1])
def test_a_number_outside_its_table_is_told_and_spoils_the_step(number, which):
    def batches(t):
        pair = list(indexed(t))
        pair[which] = pair[which]._replace(index=np.full_like(pair[which].index, number))
        return pair

    state, info = run(make(Saga(4, 4)), batches, 1)[0]
    assert int(info.result) == Status.invalid_setting
    assert np.isnan(state.params["u"] if which == 0 else flat(state.adjoint)).all()


BOUNDED = Space(bilevel.Interval(-1.0, 1.0))


def test_bounds_move_the_raw_variable():
    alg = make(constrain=BOUNDED)
    state, info = run(alg, plain(), 1)[0]
    raw = BOUNDED.unconstrain(LAM)
    slope = jax.vjp(BOUNDED.constrain, raw)[1](jnp.asarray(combined(read(0, start()))[2]))[0]
    np.testing.assert_allclose(info.hypergrad_norm, np.linalg.norm(slope), rtol=1e-11)
    np.testing.assert_allclose(state.outer.raw, raw - ETA * slope, rtol=1e-11)
    np.testing.assert_allclose(state.hparams, BOUNDED.constrain(raw - ETA * slope), rtol=1e-11)


FROZEN = optax.multi_transform(
    {"t": optax.sgd(RHO), "f": optax.set_to_zero()}, {"u": "t", "v": "f"}
)
ESTIMATORS = {
    "none": (None, plain()),
    "saga": (Saga(4, 4), indexed),
    "storm": (Storm(0.5, 0.5, 0.5), plain()),
    "spider": (Spider(3), anchored),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_frozen_leaves_have_no_adjoint(name):
    """The same as the problem of the other leaf alone, with the frozen one as a constant."""
    estimator, batches = ESTIMATORS[name]
    txs = FROZEN, *SGD[1:]
    seen = run(make(estimator, txs), batches, 4)
    small = bilevel.single_loop(
        lambda w, lam, batch: valid({"u": w, "v": PARAMS["v"]}, lam, batch),
        lambda w, lam, batch: train({"u": w, "v": PARAMS["v"]}, lam, batch),
        *SGD, estimator,
    )  # fmt: skip
    for (a, info), (b, other) in zip(seen, run(small, batches, 4, PARAMS["u"]), strict=True):
        assert a.adjoint["v"] is None
        np.testing.assert_allclose(a.adjoint["u"], b.adjoint, rtol=1e-11)
        np.testing.assert_allclose(a.params["u"], b.params, rtol=1e-11)
        np.testing.assert_array_equal(a.params["v"], PARAMS["v"])
        np.testing.assert_allclose(a.hparams, b.hparams, rtol=1e-11)
        np.testing.assert_allclose(info.stats["stationarity"], other.stats["stationarity"])


def test_leaves_that_the_inner_loss_does_not_read_have_a_zero_adjoint():
    def blind(w, lam, batch):
        return train({"u": w["u"], "v": jax.lax.stop_gradient(w["v"])}, lam, batch)

    alg = bilevel.soba(valid, blind, *SGD)
    state, info = run(alg, plain(), 3)[-1]
    np.testing.assert_array_equal(state.adjoint["v"], 0)
    assert np.all(state.adjoint["u"] != 0) and int(info.result) == Status.ok


def test_statistics_advance_once_and_the_outer_loss_reads_them():
    def counting(w, lam, batch, seen):
        return train(w, lam, batch) * (1 + seen), 0.5 * seen + 1

    def reading(w, lam, batch, seen):
        return valid(w, lam, batch) * seen, seen + 7

    alg = bilevel.single_loop(reading, counting, *SGD, Storm(0.5, 0.5, 0.5), has_state=True)
    state = alg.init(PARAMS, LAM, jnp.array(1.0))
    inner, outer = plain()(0)
    state, info = jax.jit(alg.step)(state, inner_batches=inner, outer_batch=outer)
    assert float(state.model_state) == 1.5
    five = oracles(*start(), inner_of(0)[0], outer_of(0))
    np.testing.assert_allclose(flat(state.params), start()[0] - RHO * 2 * five[0], rtol=1e-11)
    np.testing.assert_allclose(flat(state.adjoint), SIGMA * 1.5 * five[3], rtol=1e-11)
    np.testing.assert_allclose(info.value, 1.5 * valid(PARAMS, LAM, outer_of(0)), rtol=1e-11)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_half_precision_keeps_its_types_and_the_adjoint_is_wide(name):
    estimator, batches = ESTIMATORS[name]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    seen = run(make(estimator), batches, 3, params, LAM.astype(jnp.float32))
    reference = run(make(estimator), batches, 3)
    for (a, _), (b, _) in zip(seen, reference, strict=True):
        assert a.params["u"].dtype == jnp.bfloat16 and a.adjoint["u"].dtype == jnp.float32
        wide = {x.dtype for x in jax.tree.leaves(a.memory)} - {jnp.dtype(jnp.bfloat16)}
        assert name == "none" or jnp.dtype(jnp.float32) in wide
        # bfloat16 keeps 8 bits; three short steps.
        np.testing.assert_allclose(flat(a.adjoint), flat(b.adjoint), rtol=0.1, atol=0.02)


def test_a_loss_with_a_backward_rule_of_its_own():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))

    def fused(w, lam, batch):
        return train(w, lam, batch) + 0.1 * jnp.sum(square(flat(w)))

    def plainly(w, lam, batch):
        return train(w, lam, batch) + 0.1 * jnp.sum(flat(w) ** 2)

    a, b = (run(bilevel.soba(valid, loss, *SGD), plain(), 3)[-1][0] for loss in (fused, plainly))
    np.testing.assert_allclose(a.hparams, b.hparams, rtol=1e-12)
    np.testing.assert_allclose(flat(a.adjoint), flat(b.adjoint), rtol=1e-12)


def test_auxiliary_output_is_that_of_the_measured_point():
    alg = bilevel.soba(lambda w, lam, b: (valid(w, lam, b), flat(w)), train, *SGD, has_aux=True)
    (first, _), (_, info) = run(alg, plain(), 2)
    np.testing.assert_array_equal(info.aux, flat(first.params))


def step_once(alg, inner, outer, key=None):
    return alg.step(alg.init(PARAMS, LAM), inner_batches=inner, outer_batch=outer, key=key)


GOOD = plain()(0)
WRONG = {
    "estimator": (lambda: make(Saga), TypeError, "`estimator` must be None, `Saga"),
    "count of a table": (lambda: Saga(0, 4), ValueError, "`num_inner` must be at least 1"),
    "rate": (lambda: Storm(1.5), ValueError, "`inner` must be at most 1"),
    "zero rate": (lambda: Storm(outer=0.0), ValueError, "`outer` must be greater than 0"),
    "text as rate": (lambda: Storm("a"), TypeError, "`inner` must be a real number"),
    "rate without a step": (lambda: Storm(lambda: 1), TypeError, "cannot be called as inner.step"),
    "period": (lambda: Spider(0), ValueError, "`period` must be at least 1"),
    "probability": (lambda: Page(1.5), ValueError, "`probability` must be at most 1"),
    "function as optimizer": (
        lambda: make(txs=(lambda lam: SGD[0], *SGD[1:])), TypeError, "`inner_tx` must be an optax"),
    "no linear optimizer": (
        lambda: make(txs=(SGD[0], None, SGD[2])), TypeError, "`linear_tx` must be an optax"),
    "flag": (lambda: make(independent=3), TypeError, "`independent` must be True or False"),
    "schedule": (lambda: make(schedule=0.5), TypeError, "`schedule` must be a function schedule"),
    "option": (lambda: bilevel.soba(valid, train, *SGD, shared=1), TypeError, "shared"),
    "matvecs": (
        lambda: bilevel.mrbo(valid, train, SGD[0], SGD[2], 1, 1, -1, 0.1), ValueError,
        "`num_matvecs` must be at least 0"),
    "line search": (
        lambda: step_once(make(txs=(SGD[0], optax.lbfgs(), SGD[2])), *GOOD), ValueError,
        "`linear_tx` evaluates its objective at other points"),
    "stack": (
        lambda: step_once(make(independent=True), *GOOD), ValueError,
        "expected a leading axis of 3: one batch for the gradient, one for the product"),
    "stack of a series": (
        lambda: step_once(bilevel.mrbo(valid, train, SGD[0], SGD[2], 1, 1, 3, 0.1), *GOOD),
        ValueError, "leading axis of 5: one batch for the gradient, 3 for the products"),
    "no number": (
        lambda: step_once(make(Saga(4, 4)), *GOOD), TypeError,
        r"`inner_batches` must be `bilevel.Indexed\(batch, index\)` for this estimator, got Inner"),
    "no anchor": (
        lambda: step_once(make(Spider(3)), *indexed(0)), TypeError,
        r"must be `bilevel.Anchored\(batch, full\)` for this estimator, got Indexed"),
    "a number too many": (
        lambda: step_once(make(), *indexed(0)), TypeError,
        r"`inner_batches` is `Indexed\(...\)`, but this loop needs neither"),
    "a number that is a fraction": (
        lambda: step_once(make(Saga(4, 4)), indexed(0)[0]._replace(index=np.ones(1)),
                          indexed(0)[1]),
        TypeError, "`inner_batches.index` must be whole numbers"),
    "a number without an axis": (
        lambda: step_once(make(Saga(4, 4)), indexed(0)[0]._replace(index=1), indexed(0)[1]),
        ValueError, r"`inner_batches.index` has shape \(\), expected \(1,\)"),
    "an empty anchor": (
        lambda: step_once(
            make(Spider(3)), anchored(0)[0]._replace(full=Inner(*(x[:0] for x in INNER))),
            anchored(0)[1]),
        ValueError, "`?inner_batches.full.* is empty"),
    "no key": (lambda: step_once(make(Page(0.5)), *anchored(0)), ValueError, "`key` is missing"),
    "unread": (
        lambda: step_once(
            bilevel.soba(lambda w, lam, b: valid(w, 0 * LAM, b), lambda w, lam, b: train(
                w, 0 * LAM, b), *SGD), *GOOD),
        ValueError, "No derivative reaches hparams"),
    "state": (
        lambda: make().step(PARAMS, inner_batches=GOOD[0], outer_batch=GOOD[1]), TypeError,
        "`state` must be what `init` returns, a SingleLoopState"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.slow
def test_saba_converges_where_soba_stalls_on_256_examples():
    """S14 of the method sheet: batches of 8, 40 000 steps, constant step sizes."""
    inner, outer = problem(1, 256)
    parts = [jax.tree.map(lambda x: jnp.asarray(x.reshape(32, 8, *x.shape[1:])), data)
             for data in (inner, outer)]  # fmt: skip

    def draw(wrap):
        def of(key):
            i, j = jax.random.randint(key, (2,), 0, 32, jnp.int32)
            a = jax.tree.map(lambda x: x[i][None], parts[0])
            b = jax.tree.map(lambda x: x[j], parts[1])
            return (Indexed(a, i[None]), Indexed(b, j)) if wrap else (a, b)

        return of

    def last(estimator):
        state, _ = many(make(estimator, CONSTANT), draw(estimator is not None), 40_000)
        return np.sum(gradient(np.array(state.hparams), inner, outer) ** 2), state.hparams

    initial = np.sum(gradient(np.array(LAM), inner, outer) ** 2)
    (soba, _), (saba, lam) = last(None), last(Saga(32, 32))
    assert saba <= 1e-3 * soba and saba <= 1e-10 * initial
    np.testing.assert_allclose(lam, solution(inner, outer)[0], rtol=1e-6)


@pytest.mark.slow
def test_soba_finds_the_wrong_labels_of_digits():
    """S15 of the method sheet: 40 % wrong labels of 600, weighed by 300 clean examples."""
    datasets = pytest.importorskip("sklearn.datasets")
    metrics = pytest.importorskip("sklearn.metrics")
    x, y = datasets.load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(y))
    x, y = np.c_[x[order] / 16, np.ones(len(y))], y[order]
    wrong = rng.random(600) < 0.4
    labels = np.where(wrong, rng.integers(0, 10, 600), y[:600])
    wrong = labels != y[:600]
    clean, test = (x[600:900], y[600:900]), (x[900:1600], y[900:1600])

    def loss(w, x, y, weights=1.0):
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ w, y)
        return jnp.mean(weights * losses)

    def cleaning(w, lam, batch):
        rows, x, y = batch
        return loss(w, x, y, jax.nn.sigmoid(lam[rows])) + 0.5e-3 * jnp.sum(w**2)

    alg = bilevel.soba(
        lambda w, lam, batch: loss(w, *batch), cleaning, optax.sgd(1.0), optax.sgd(0.5),
        optax.sgd(200.0),
    )  # fmt: skip
    batch = (np.arange(600), x[:600], labels)

    @jax.jit
    def train_all(state):
        def body(state, _):
            state, info = alg.step(
                state, inner_batches=jax.tree.map(lambda x: jnp.asarray(x)[None], batch),
                outer_batch=clean,
            )  # fmt: skip
            return state, info.value

        return jax.lax.scan(body, state, length=2000)

    state, _ = train_all(alg.init(jnp.zeros((65, 10)), jnp.zeros(600)))
    weights = np.array(jax.nn.sigmoid(state.hparams))

    @jax.jit
    def refit(weights):
        def body(w, _):
            return w - 1.0 * jax.grad(
                lambda w: loss(w, x[:600], labels, weights) + 0.5e-3 * jnp.sum(w**2)
            )(w), None

        return jax.lax.scan(body, jnp.zeros((65, 10)), length=3000)[0]

    def error(w):
        return np.mean(np.argmax(test[0] @ np.array(w), 1) != test[1])

    uniform, oracle = error(refit(0.5 * np.ones(600))), error(refit(1.0 * ~wrong))
    learned = error(state.params)
    assert metrics.roc_auc_score(~wrong, weights) >= 0.90
    assert weights[~wrong].mean() - weights[wrong].mean() >= 0.3
    assert learned <= uniform - 0.02 and learned <= oracle + 0.03
