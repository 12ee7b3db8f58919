"""The floors of the house, and ``bilevel/README.md`` as they make it.

``python tests/floor_plan.py`` writes the page anew; ``test_floors.py`` holds it to the modules.
"""

import ast
import re
from pathlib import Path

LIBRARY = Path(__file__).parent.parent / "bilevel"

# One ordered list of all modules: each may import only from those above it here.
FLOORS = {
    "ground": [
        "ground",
        "ground.aliases",
        "ground.settings",
        "ground.tree",
        "ground.leaves",
        "ground.status",
        "ground.traced",
        "ground.loops",
        "ground.factor",
        "ground.keys",
        "ground.batches",
        "ground.linear_map",
        "ground.cost",
    ],
    "problem: two losses and their products": [
        "problem.conditions",
        "problem.two_losses",
        "problem.knots",
        "problem",
        "problem.validate",
        "problem.microbatches",
        "problem.layers.program",
        "problem.layers.find",
        "problem.layers.dual",
        "problem.layers.outputs",
        "problem.layers.groups",
        "problem.layers.kronecker",
        "problem.layers",
        "problem.operators.base",
        "problem.operators.stored",
        "problem.operators.hessian",
        "problem.operators.jacobian",
        "problem.operators.composite",
        "problem.operators.linear_model",
        "problem.operators.gauss_newton",
        "problem.operators",
    ],
    "space: where hyperparameters may lie": [
        "space.bounds",
        "space.space",
        "space",
    ],
    "regularizers: what users tune": [
        "regularizers.strength",
        "regularizers.activations",
        "regularizers.color",
        "regularizers.cutout",
        "regularizers.dropout",
        "regularizers.mixup",
        "regularizers.noise",
        "regularizers.penalties",
        "regularizers.prox",
        "regularizers",
    ],
    "inner: how w follows the hyperparameters forward": [
        "inner.mixed",
        "inner.roots",
        "inner.optimizer",
        "inner.reversal",
        "inner.rerun",
        "inner.descend",
        "inner.train",
        "inner.searches",
        "inner.optimistix",
        "inner.minimize",
        "inner.groups",
        "inner.network",
        "inner.recurrence",
        "inner.layers",
        "inner.hypernetwork",
        "inner",
    ],
    "linear: H q = g, seeing only a function": [
        "linear.base",
        "linear.precondition",
        "linear.identity",
        "linear.dense",
        "linear.cg",
        "linear.dual_cg",
        "linear.neumann",
        "linear.stochastic",
        "linear.nystrom",
        "linear.kronecker",
        "linear.woodbury",
        "linear.lineax",
        "linear.lanczos",
        "linear.dynamic_lanczos",
        "linear",
    ],
    "hypergradient: responses, and the transforms that use them": [
        "hypergradient.base",
        "hypergradient.judge",
        "hypergradient.implicit",
        "hypergradient.reach",
        "hypergradient.forward",
        "hypergradient.unroll",
        "hypergradient.unroll_map",
        "hypergradient.evolution",
        "hypergradient.finite_difference",
        "hypergradient.best_response",
        "hypergradient.solve",
        "hypergradient.transform",
        "hypergradient.rules",
        "hypergradient.attach",
        "hypergradient.with_response",
        "hypergradient",
    ],
    "objectives: what the outer problem can be": [
        "objectives.folds",
        "objectives.held_out",
        "objectives.cross_validation",
        "objectives.sensitivity",
        "objectives.sure",
        "objectives.leave_one_out",
        "objectives.fine_tuned",
        "objectives.kernel",
        "objectives.evidence",
        "objectives.elbo",
        "objectives.hyper_prior",
        "objectives.strength",
        "objectives",
    ],
    "outer: how the hyperparameters move": [
        "outer.base",
        "outer.variable",
        "outer.frozen",
        "outer.schedule",
        "outer.whole_run",
        "outer.alternation",
        "outer.alternate",
        "outer.self_tuning.state",
        "outer.self_tuning.losses",
        "outer.self_tuning.cycle",
        "outer.self_tuning.loop",
        "outer.self_tuning",
        "outer.single_loop.base",
        "outer.single_loop.adjoint",
        "outer.single_loop.series",
        "outer.single_loop.memory",
        "outer.single_loop.recursion",
        "outer.single_loop.step",
        "outer.single_loop.loop",
        "outer.single_loop.soba",
        "outer.single_loop.saba",
        "outer.single_loop.fsla",
        "outer.single_loop.mrbo",
        "outer.single_loop.srba",
        "outer.single_loop.spaba",
        "outer.single_loop.stocbio",
        "outer.single_loop.amigo",
        "outer.single_loop",
        "outer.global_response",
        "outer.inexact.solves",
        "outer.inexact.tolerance",
        "outer.inexact.hoag",
        "outer.inexact.certificate",
        "outer.inexact.certified",
        "outer.inexact.maid",
        "outer.inexact.bo_rep",
        "outer.inexact",
        "outer.optimizers.alignment",
        "outer.optimizers.descent",
        "outer.optimizers.fedhyper",
        "outer.optimizers.complex_momentum",
        "outer.optimizers.gauss_newton",
        "outer.optimizers",
        "outer.penalty.difference",
        "outer.penalty.loop",
        "outer.penalty.f2sa",
        "outer.penalty.pbgd",
        "outer.penalty.bome",
        "outer.penalty",
        "outer",
    ],
    "roof: drivers and tools for people": [
        "run.interrupt",
        "run.lock",
        "run.processes",
        "run.arguments",
        "run.data",
        "run.checkpoint",
        "run.record",
        "run.packed",
        "run.log",
        "run.display",
        "run.trust",
        "run.best",
        "run.step",
        "run.report",
        "run.result",
        "run.loop",
        "run.driver",
        "run.segments",
        "run.passes",
        "run.replay",
        "run",
        "tools.models",
        "tools.diagnosis",
        "tools.differences",
        "tools.memory",
        "tools.attribution",
        "tools.datamodels",
        "tools.smoothness",
        "tools",
        "plot.canvas",
        "plot.records",
        "plot.runs",
        "plot.arrays",
        "plot.costs",
        "plot",
        "testing.case",
        "testing.linear_models",
        "testing.other_models",
        "testing.conditions",
        "testing.cases",
        "testing.methods",
        "testing.wrong",
        "testing.recorded",
        "testing.loops",
        "testing",
    ],
}

HEAD = """# The floor plan

Imports go down only: a module may import from those named before it, never from those after
it. `tests/floor_plan.py` holds this order and writes this page. `linear` sees only a function
`v -> A v`, never a problem; `hypergradient` receives problem and solver as values; so no cycle can
appear.
"""


def module_file(name):
    """The file of a module, named from ``bilevel`` on."""
    path = LIBRARY / f"{name.replace('.', '/')}.py"
    return path if path.exists() else LIBRARY / name.replace(".", "/") / "__init__.py"


def first_sentence(path):
    """What a file says it is, as Markdown."""
    paragraph = ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0].replace("\n", " ")
    text = re.split(r"(?<=[.?])\s", paragraph)[0]
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")
    return text if text.endswith((".", "?")) else text + "."


def plan():
    """The page."""
    floors = {floor: [module_file(name) for name in names] for floor, names in FLOORS.items()}
    floors["the door"] = [LIBRARY / "__init__.py"]
    parts = [HEAD]
    for floor, files in floors.items():
        rows = [f"| `{p.relative_to(LIBRARY)}` | {first_sentence(p)} |" for p in files]
        title = floor[0].upper() + floor[1:]
        parts.append(
            "\n".join([f"## {title}", "", "| file | what it is |", "|---|---|", *rows, ""])
        )
    return "\n".join(parts)


if __name__ == "__main__":
    (LIBRARY / "README.md").write_text(plan())
