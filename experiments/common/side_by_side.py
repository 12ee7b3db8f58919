"""Seeds side by side: a process for each share of them, on a machine with idle cores.

Most experiments keep one core busy. Each process writes into a folder of its own below the output
folder; when all have ended, their records are put together in the order of the seeds, so that the
result is the same as that of one process.
"""

import multiprocessing
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common import outputs, record
from experiments.common.catalog import part
from experiments.common.outputs import RunnerError

FOLDER = "jobs"


def run(
    name: str, config: Any, out: Path, told: dict[str, Any], package: str, jobs: int
) -> dict[str, Any]:
    """Runs what is left of the seeds of `told`, the content of `run.json`; returns its new content.

    Raises:
      RunnerError: if a process failed, or a run of more processes is resumed.
    """
    folders = [out / FOLDER / str(job) for job in range(jobs)]
    started = [path for path in (out / FOLDER).glob("*") if (path / outputs.FILE).exists()]
    if len(started) > jobs:
        raise RunnerError(f"`--jobs {jobs}`: {out} was started with {len(started)}; give as many")
    shares = _shares(told, folders)
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would not have
    workers = []
    for folder, seeds in zip(folders, shares, strict=True):
        outputs.save(folder, {**_told(folder, told), "seeds": seeds})
        if seeds:
            workers.append(context.Process(target=_worker, args=(name, config, folder, package)))
            workers[-1].start()
    for worker in workers:
        worker.join()
    failed = [worker for worker in workers if worker.exitcode]
    if failed:
        raise RunnerError(
            f"{len(failed)} of {len(workers)} processes failed, see above; what is done is kept in "
            f"{out}: continue with --resume"
        )
    return _together(out, folders, told)


def seeds_of(module: Any, config: Any, out: Path, told: dict[str, Any], resume: bool) -> None:
    """Runs the seeds of `told` that are not done, one after the other, and keeps `run.json`."""
    for seed in told["seeds"]:
        if seed in told["done"]:
            continue
        begun = seed in told["begun"]
        if not begun:
            told["begun"].append(seed)
            outputs.save(out, told)
        start, used = time.monotonic(), time.process_time()
        chosen = {"methods": tuple(told["methods"])} if told.get("methods") else {}
        module.run(config, seed, out, resume and begun, **chosen)
        told["done"].append(seed)
        told["minutes"] += (time.monotonic() - start) / 60
        # Of all cores: unlike the minutes, it hardly depends on what else the machine does.
        told["cpu_minutes"] = told.get("cpu_minutes", 0.0) + (time.process_time() - used) / 60
        outputs.save(out, told)


def _told(folder: Path, told: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` of a process says: its own, if it was begun."""
    path = folder / outputs.FILE
    if path.exists():
        return record.read_json(path)
    return {**told, "minutes": 0.0, "cpu_minutes": 0.0, "begun": [], "done": []}


def _shares(told: dict[str, Any], folders: Sequence[Path]) -> list[list[int]]:
    """Seeds for each process: those that it had begun, and every n-th of the others."""
    shares = [[*_told(folder, told)["begun"]] for folder in folders]
    taken = {*told["done"], *(seed for share in shares for seed in share)}
    for seed in told["seeds"]:
        if seed not in taken:
            min(shares, key=len).append(seed)
    return shares


def _worker(name: str, config: Any, folder: Path, package: str) -> None:
    told = record.read_json(folder / outputs.FILE)
    seeds_of(part(package, name, "run"), config, folder, told, resume=True)


def _together(out: Path, folders: Sequence[Path], told: dict[str, Any]) -> dict[str, Any]:
    """Puts the records and files of all processes into the output folder."""
    ran = [record.read_json(folder / outputs.FILE) for folder in folders]
    rows = [row for folder in folders for row in record.read(folder)]
    for seed in sorted({row.seed for row in rows}):
        into = record.Records(out, seed)
        into.rewind()
        for row in rows:
            if row.seed == seed:
                into.append(row.method, row.step, row.cost, **row.metrics)
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            target = out / path.relative_to(folder)
            if path.is_file() and path.name not in (outputs.FILE, record.FILE):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    shutil.rmtree(out / FOLDER)
    done = sorted({*told["done"], *(seed for one in ran for seed in one["done"])})
    spent = told.get("cpu_minutes", 0.0) + sum(one["cpu_minutes"] for one in ran)
    return {**told, "begun": done, "done": done, "cpu_minutes": spent}
