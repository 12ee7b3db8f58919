"""One folder for each experiment, run from a checkout with `python -m experiments`.

An experiment is a folder with `config.py` (a frozen dataclass `Config` and the functions `smoke`,
`cpu` and `paper`), `run.py` (`run(config, seed, out, resume)`, which writes records), `figure.py`
(`figures(out)`, made from saved records only), `expected.json` (the inequalities it must satisfy)
and a README. There is no list of experiments: a folder that holds `run.py` is one.
"""
