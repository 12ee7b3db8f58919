# %% [markdown]
# # Ridge and elastic net for tabular data
#
# You have a table, a linear model and `GridSearchCV`. This tutorial tunes the same cross-validated
# error by its gradient: one penalty first, to see that both agree, then two penalties of an
# elastic net, then one penalty per feature, which no grid can search, and whether that was worth
# it.
#
# The data are scikit-learn's diabetes study: 442 patients, ten measurements, and how far the
# disease progressed in a year. With squares and products of the measurements there are 65
# features. A quarter of the patients is set aside as the *test* set, which no choice below ever
# sees.

# %%
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Ridge
from sklearn.model_selection import GridSearchCV, KFold, train_test_split
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

import bilevel
from bilevel.objectives import CrossValidation, HyperPrior, choose_strength, k_folds

table, target = load_diabetes(return_X_y=True)
table = PolynomialFeatures(2, include_bias=False).fit_transform(table)
x, x_test, y, y_test = train_test_split(table, target, test_size=0.25, random_state=0)
scaler = StandardScaler().fit(x)
x, x_test = (scaler.transform(a).astype(np.float32) for a in (x, x_test))
y, y_test = ((a - y.mean()) / y.std() for a in (y, y_test))
y, y_test = y.astype(np.float32), y_test.astype(np.float32)
n, p = x.shape
print(f"{n} patients to learn from, {len(y_test)} to test on, {p} features")

# %% [markdown]
# ## The usual way
#
# Five folds, a grid of 50 strengths. scikit-learn minimizes $|Xw-y|^2 + \alpha |w|^2$.

# %%
folds = list(KFold(5, shuffle=True, random_state=0).split(x))
grid = {"alpha": np.logspace(-1, 4, 50)}

search = GridSearchCV(
    Ridge(fit_intercept=False), grid, cv=folds, scoring="neg_mean_squared_error"
).fit(x, y)
print(f"alpha {search.best_params_['alpha']:.1f}, error {-search.best_score_:.5f} in validation,")
print(f"{np.mean((search.predict(x_test) - y_test) ** 2):.4f} in test")

# %% [markdown]
# ## The same by a gradient
#
# Write the losses of *one* fit. `lam` has the logarithms of the penalties, here of one, so that
# steps have no scale; dividing by $n$ makes the penalty $\alpha = n\,e^{\lambda}$.


# %%
def error(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def ridge(w, lam, batch):
    return 0.5 * error(w, lam, batch) + 0.5 * jnp.exp(lam[0]) * jnp.sum(w**2)


def fit(w, lam, batch):  # of one fold, from any start
    return bilevel.minimize(ridge, w, lam, batch, tol=1e-4).params


# %% [markdown]
# `CrossValidation` turns them into the losses of five fits, all of them in one `vmap`, on the
# folds that scikit-learn made. `with_response` makes the fit differentiable by the implicit
# function theorem: what follows is `jax.grad` of a cross-validated error.

# %%
cv = CrossValidation(folds, error, ridge)
rows, held_out, start = cv.inner_batch((x, y)), cv.outer_batch((x, y)), cv.init(jnp.zeros(p))
solve = bilevel.with_response(cv.each(fit), cv.inner, bilevel.Implicit(bilevel.CG()))


@jax.jit
@jax.value_and_grad
def cv_error(lam):
    return cv.outer(solve(start, lam, rows), lam, held_out)


value, slope = cv_error(jnp.log(jnp.array([10.0 / n])))
print(f"at alpha 10: error {value:.4f}, {slope[0]:.4f} per unit of log alpha")

# %% [markdown]
# The sign says that a larger penalty is better. A value with its slope is what SciPy's optimizers
# ask for:

# %%
most = 30  # smoke: 1


def descend(function, start):
    path = [np.array(start)]
    found = minimize(
        lambda lam: [np.float64(a) for a in function(jnp.float32(lam))], start, jac=True,
        method="L-BFGS-B", callback=lambda lam: path.append(lam.copy()),
        options={"maxiter": most, "ftol": 1e-6},
    )  # fmt: skip
    return found, np.array(path)


found, _ = descend(cv_error, [-4.0])
lam = jnp.float32(found.x)
w = fit(jnp.zeros(p), lam, (x, y))  # the choice, on all rows
print(f"alpha {n * np.exp(lam[0]):.1f}, error {found.fun:.5f} in validation,")
print(f"{error(w, lam, (x_test, y_test)):.4f} in test, after {found.nfev} evaluations")

# %% [markdown]
# The same error as the grid's best, to five digits, in fewer than half of its fifty evaluations:
# the minimum is flat, which is why two values of alpha serve. (With one penalty on a small table a
# grid takes a tenth of a second and needs no help. The gradient is for what follows.) How sure is
# the choice? `scores` has the error of each fold and its standard error; two choices closer than
# that cannot be told apart by these data.

# %%
scores = cv.scores(jax.jit(cv.each(fit))(start, lam, rows), lam, held_out)
print(f"{scores.mean:.3f} +- {scores.standard_error:.3f}")

# %% [markdown]
# ## Two penalties: the elastic net
#
# An L1 penalty is not smooth, so the training problem is a `Composite` of a smooth loss and a
# proximal step, in the place of `ridge`. Everything else stays as it was.


# %%
def shrink(w, lam, step_size):
    return bilevel.prox.elastic_net(w, (jnp.exp(lam[0]), jnp.exp(lam[1])), step_size)


def half_error(w, lam, batch):
    return 0.5 * error(w, lam, batch)


net = bilevel.Composite(half_error, shrink, step_size=0.05)


def fit_net(w, lam, batch):
    return bilevel.minimize(net, w, lam, batch, tol=1e-4).params


nets = CrossValidation(folds, error, net)
solve_net = bilevel.with_response(nets.each(fit_net), nets.inner, bilevel.Implicit(bilevel.CG()))


@jax.jit
@jax.value_and_grad
def net_error(lam):
    return nets.outer(solve_net(start, lam, rows), lam, held_out)


found, path = descend(net_error, [-2.0, 0.0])
lam_net = jnp.float32(found.x)
w_net = jax.jit(fit_net)(jnp.zeros(p), lam_net, (x, y))
print(f"L1 {np.exp(lam_net[0]):.4f}, L2 {np.exp(lam_net[1]):.4f}: {found.fun:.5f} in validation,")
print(f"{error(w_net, lam_net, (x_test, y_test)):.4f} in test, after {found.nfev} evaluations,")
print(f"with {int(jnp.sum(w_net != 0))} of {p} features")

# %% [markdown]
# scikit-learn's grid for the same problem, 10 by 10, each point five fits:

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    search_net = GridSearchCV(
        ElasticNet(fit_intercept=False),
        {"alpha": np.logspace(-3, 1, 10), "l1_ratio": np.linspace(0.05, 1, 10)},
        cv=folds, scoring="neg_mean_squared_error",
    ).fit(x, y)  # fmt: skip
test_of_grid = np.mean((search_net.predict(x_test) - y_test) ** 2)
print(f"{-search_net.best_score_:.5f} in validation, {test_of_grid:.4f} in test")

# %% [markdown]
# The path on the surface that it descended. It ends in a valley with a flat floor: the L2 penalty
# may as well be zero, and what is left is a lasso. (The surface is for the picture only. It takes
# 169 evaluations, and with three penalties nobody could draw it.)

# %% figure: Cross-validated error over two log penalties, with the path into its minimum
side = 13  # smoke: 2
l1, l2 = np.linspace(-6, -1, side), np.linspace(-8, 1, side)


@jax.jit
def surface(l1, l2):
    def one(lam):
        return nets.outer(nets.each(fit_net)(start, lam, rows), lam, held_out)

    pairs = jnp.stack(jnp.meshgrid(l1, l2), -1).reshape(-1, 2)
    return jax.lax.map(one, pairs).reshape(len(l2), len(l1))


bilevel.plot.response_surface(
    surface(jnp.float32(l1), jnp.float32(l2)), l1, l2, path=path,
    names=("log of the L1 penalty", "log of the L2 penalty"), label="cross-validated error",
)  # fmt: skip

# %% [markdown]
# ## One penalty per feature
#
# 65 penalties are out of reach for any grid, and for the gradient they cost what one costs. They
# also fit the folds: a penalty per feature can drop whatever does not help *these* held-out
# patients. A `HyperPrior` pulls the logarithms toward their mean, and `choose_strength` chooses
# how strongly, on rows that neither the fits nor the tuning have read (nested cross-validation,
# here with two splits).


# %%
def many(w, lam, batch):
    return half_error(w, lam, batch) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


outer_steps = 20  # smoke: 1


@jax.jit
def tuned(strength, data):
    prior = HyperPrior(jnp.full(p, -2.0), strength)
    cv = CrossValidation(k_folds(len(data[1]), 5), error, many)
    loop = bilevel.hoag(prior.outer(cv.outer), prior.inner(cv.inner))
    rows = jax.tree.map(lambda leaf: leaf[None], cv.inner_batch(data))

    def step(state, _):
        state, info = loop.step(state, inner_batches=rows, outer_batch=cv.outer_batch(data))
        return state, info.hparams

    state = loop.init(cv.init(jnp.zeros(p)), prior.init(jnp.full(p, -2.0)))
    _, path = jax.lax.scan(step, state, length=outer_steps)
    lam = prior.hparams(jax.tree.map(lambda leaf: leaf[-1], path))
    return bilevel.minimize(many, jnp.zeros(p), lam, data, tol=1e-4).params


def tune(prior, examples):  # compiled once: the strength may be traced
    return tuned(prior.strength, (x[examples], y[examples]))


prior = HyperPrior(jnp.full(p, -2.0), strength=1.0)
strengths = (float("inf"), 0.01, 0.0)  # smoke: (float("inf"),)
splits = k_folds(n, 4, seed=1)[:2]  # smoke: k_folds(n, 4, seed=1)[:1]
choice = choose_strength(
    prior, tune, lambda w, rows: error(w, None, (x[rows], y[rows])), splits, strengths=strengths
)
for strength, mean, scatter in zip(
    choice.strengths, choice.means, choice.standard_errors, strict=True
):
    print(f"strength {strength:<5} error {mean:.4f} +- {scatter:.4f} on rows that nothing has read")

# %% [markdown]
# On these rows free penalties do best, by about one standard error. They need not: where many
# penalties do not help, the choice falls on `inf`, one penalty for all.

# %% [markdown]
# ## In test
#
# The test patients, at last, for everything that was chosen above. Differences are taken patient
# by patient, because some patients are hard for every model.

# %%
w_many = tuned(choice.strength, (x, y))
squares = {
    name: np.asarray((x_test @ weights - y_test) ** 2)
    for name, weights in (("ridge", w), ("elastic net", w_net), ("a penalty per feature", w_many))
}
for name, each in squares.items():
    less = each - squares["ridge"]
    print(f"{each.mean():.4f}  {name}: {less.mean():+.4f} +- {less.std() / len(less) ** 0.5:.4f}")

# %% [markdown]
# The elastic net and the 65 penalties come out a little ahead of ridge, by less than one of their
# standard errors: 111 patients cannot tell these models apart, and a page that shows the second
# decimal of one split without its error should not be believed. What the gradient changed is the
# price: 65 penalties took as long as one. [Objectives](../objectives.md) has leave-one-out, SURE
# and evidence in place of the folds; [the experiment](../../experiments/sparse/README.md) does
# this on large sparse data.

# %% check
assert choice.strength == 0.0
assert abs(cv_error(lam)[0] + search.best_score_) < 1e-4
assert abs(net_error(lam_net)[0] + search_net.best_score_) < 1e-3
for each in squares.values():
    less = each - squares["ridge"]
    assert -less.std() / len(less) ** 0.5 <= less.mean() <= 0
