"""Prints the lower bounds of pyproject.toml as constraints: "jax>=0.10" becomes "jax==0.10.*"."""

import re
import tomllib

with open("pyproject.toml", "rb") as file:
    for line in tomllib.load(file)["project"]["dependencies"]:
        match = re.fullmatch(r"([\w-]+)>=([\d.]+)", line)
        if match is None:
            raise SystemExit(f"not a plain lower bound: {line}")
        print(f"{match[1]}=={match[2]}.*")
