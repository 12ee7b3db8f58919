"""Does the suite notice a mistake? ``python tests/mutants.py`` makes them one at a time.

Each mutant of ``tests/mutations/`` is put into a copy of the library, and the tests that should
notice run on the copy. A mutant is *killed* by the first test that fails (named in the report), or
*survives*. Exit status 1: some mutant survived without an explanation, was expected to survive and
did not, or does not apply any more; or a test fails on the library as it is.

    python tests/mutants.py                     # all of them: tens of minutes on two cores
    python tests/mutants.py --list
    python tests/mutants.py --only neumann      # those with this in their name or file
    python tests/mutants.py --jobs 2 --no-baseline
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from mutations import ROOT, Mutant, all_mutants, path_of  # noqa: E402

COPIED = ("bilevel", "tests", "docs", "pyproject.toml", "README.md", "experiments")


class Outcome(NamedTuple):
    """What became of a mutant: ``killed``, ``survived``, ``does not apply`` or ``no such test``."""

    mutant: Mutant
    verdict: str
    by: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether that is what was expected."""
        return self.verdict == ("killed" if self.mutant.survives is None else "survived")


def copy_tree(root: Path, into: Path) -> None:
    """What the tests read, without results and caches."""
    ignore = shutil.ignore_patterns("__pycache__", "results", "*.png", "*.svg")
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, into / name, ignore=ignore)
        elif (root / name).exists():
            shutil.copy2(root / name, into / name)


def run_tests(where: Path, tests: tuple[str, ...], limit: float) -> tuple[int, str]:
    """Exit status of pytest in the copy ``where``, and the first test that failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "--tb=no", "-rfE", "-m", ""]
    command += ["-p", "no:cacheprovider", *(path_of(test, where) for test in tests)]
    # The copy stands first on the path, before any installed `bilevel`.
    env = {**os.environ, "PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=where, env=env, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return 1, f"no end after {limit:.0f} s"
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/\w+/)?(\S+.*?)(?: - .*)?$", done.stdout, re.M)
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    return done.returncode, found[1] if found else "".join(last)


def judge(mutant: Mutant, root: Path = ROOT, limit: float = 600.0) -> Outcome:
    """Put one mutant into a copy of the library and run the tests that should notice."""
    began = time.perf_counter()
    source = root / "bilevel" / mutant.file
    try:
        text = mutant.apply(source.read_text())
    except (ValueError, OSError) as error:
        return Outcome(mutant, "does not apply", str(error), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        copy_tree(root, where)
        (where / "bilevel" / mutant.file).write_text(text)
        status, by = run_tests(where, mutant.tests, limit)
    # 1: tests failed; 2: a test file could not be imported; 0: all passed; others: none was run.
    verdict = {0: "survived", 1: "killed", 2: "killed"}.get(status, "no such test")
    return Outcome(
        mutant, verdict, by if verdict != "survived" else "", time.perf_counter() - began
    )


def baseline(mutants: list[Mutant], root: Path = ROOT, limit: float = 3600.0) -> str | None:
    """The first of the named tests that fails without any mutant, or None."""
    named = sorted({test for mutant in mutants for test in mutant.tests})
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(root, Path(folder))
        status, by = run_tests(Path(folder), tuple(named), limit)
    return None if status == 0 else by


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run the tests on mutants of the library.")
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    parser.add_argument(
        "--only", metavar="WORD", nargs="+", help="those with one of these in their name or file"
    )
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one mutant")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass")
    options = parser.parse_args(arguments)
    mutants = all_mutants()
    if options.only:
        mutants = [m for m in mutants if any(w in m.name or w in m.file for w in options.only)]
    if options.list or not mutants:
        for m in mutants:
            sys.stdout.write(f"{m.name:<40} {m.file}: {m.means}\n")
        return 0 if mutants else 1
    if not options.no_baseline:
        failing = baseline(mutants)
        if failing is not None:
            sys.stdout.write(f"fails without any mutant: {failing}\n")
            return 1
    outcomes = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(judge, m, ROOT, options.limit) for m in mutants]
        for job in concurrent.futures.as_completed(jobs):
            outcome = job.result()
            outcomes.append(outcome)
            mark = " " if outcome.good else "!"
            reason = outcome.mutant.survives if outcome.verdict == "survived" else outcome.by
            sys.stdout.write(
                f"{mark} {outcome.mutant.name:<40} {outcome.verdict:<14} {outcome.seconds:5.0f} s  "
                f"{reason or outcome.mutant.means}\n"
            )
            sys.stdout.flush()
    killed = sum(o.verdict == "killed" for o in outcomes)
    bad = [o.mutant.name for o in outcomes if not o.good]
    sys.stdout.write(
        f"{killed} of {len(outcomes)} mutants killed"
        + (f"; look at: {', '.join(bad)}" if bad else "")
        + "\n"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
