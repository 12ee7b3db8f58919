"""``python tests/odd_inputs``: every case, the table, and what is not as it should be.

Options: ``--area NAME`` (several), ``--only WORD`` (in the label), ``--sample N``, ``--all`` (show
the good ones too), ``--write-known`` (see
``known.py``). Exit status 1 if anything is bad and not in the list of known failures.
"""

import argparse
import collections
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)

from odd_inputs.case import GOOD  # noqa: E402
from odd_inputs.known import write  # noqa: E402
from odd_inputs.run import AREAS, Row, all_cases, run, sample, table  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge odd inputs over the whole public face.")
    parser.add_argument("--area", action="append", choices=AREAS)
    parser.add_argument("--only", default="")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--write-known", action="store_true")
    options = parser.parse_args()
    cases = [c for c in all_cases(options.area or AREAS) if options.only in c.label]
    repeated = [n for n, k in collections.Counter(c.label for c in cases).items() if k > 1]
    if repeated:
        sys.stdout.write(f"labels that are not unique: {repeated[:5]}\n")
        return 1
    if options.sample:
        cases = sample(cases, options.sample)

    def tell(row: Row) -> None:
        if options.all or row.verdict.what not in GOOD:
            mark = "known" if row.known else ""
            text = " ".join(row.verdict.text.split())[:150]
            sys.stdout.write(f"{row.verdict.what:<8} {mark:<5} {row.case.label:<55} {text}\n")
            sys.stdout.flush()

    rows = run(cases, tell)
    sys.stdout.write(table(rows) + "\n")
    if options.write_known:
        bad = [row for row in rows if row.verdict.what not in GOOD]
        write(
            [row.case.label for row in rows],
            [(row.case.area, row.case.label, row.verdict.what) for row in bad],
        )
    return int(any(row.verdict.what not in GOOD and not row.known for row in rows))


if __name__ == "__main__":
    sys.exit(main())
