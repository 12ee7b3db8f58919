r"""Steps run backwards from few kept states: which to keep, and which to compute again.

The derivative of T steps needs their states in reverse order. With s states kept beside the
first, and every step taken at most r times before it is pulled back, the longest run is

.. math:: T = \binom{s + r + 1}{r},

reached by one recursion: advance to a state, keep it, reverse what lies behind it with one
place less, then what lies before it with one round less. So r = 2 needs about
:math:`\sqrt{2T}` states, and :math:`log_2 T` states need few rounds.

Reference: Griewank, Walther, "Algorithm 799: revolve", ACM TOMS 2000; Engstrom et al.,
"Optimizing ML training with metagradient descent", 2025.
"""

import functools
import math
from typing import NamedTuple


class Phase(NamedTuple):
    """What leads to one state: take one from a place, advance, keep some on the way.

    ``runs`` are pairs: so many steps, then keep the state in that place. After ``tail`` more
    steps the state is the one whose step is pulled back. Place 0 holds the first state.
    """

    place: int
    first: int
    runs: tuple[tuple[int, int], ...]
    tail: int


class Reversal(NamedTuple):
    """How T steps are run and pulled back: ``forward`` are the runs of the forward pass."""

    forward: tuple[tuple[int, int], ...]
    phases: tuple[Phase, ...]


def longest(places: int, rounds: int) -> int:
    """Steps that can be reversed, each taken at most ``rounds`` times, with states kept."""
    return math.comb(places + rounds + 1, places + 1) if rounds >= 0 else 0


def places_for(steps: int, remat: str) -> int:
    """States to keep beside the first: ``"sqrt"`` takes each step twice, ``"log"`` keeps log2."""
    if remat == "log":
        return max(1, math.ceil(math.log2(steps))) if steps > 1 else 1
    return next(s for s in range(steps + 1) if longest(s, 2) >= steps)


def _split(steps: int, places: int) -> int:
    """Where to keep the next state: the least recomputation of all choices."""
    rounds = next(r for r in range(steps) if longest(places, r) >= steps)
    return min(longest(places, rounds - 1), steps - longest(places - 1, rounds - 1))


@functools.lru_cache(maxsize=64)
def plan(steps: int, places: int) -> Reversal:
    """The schedule for ``steps`` steps that keeps ``places`` states beside the first."""
    phases: list[Phase] = []
    runs: list[tuple[int, int]] = []
    begun: list[tuple[int, int]] = []  # place and step where the runs set out; at most one

    def emit(tail: int) -> None:
        phases.append(Phase(*begun.pop(), tuple(runs), tail))
        runs.clear()

    # Intervals still to be reversed, the last one first: their first step and number of steps, the
    # place of their first state, and the next free place.
    waiting = [(0, steps, 0, 1)]
    while waiting:
        first, count, place, free = waiting.pop()
        if not begun:
            begun.append((place, first))
        left = places + 1 - free
        step = _split(count, left) if left and count > 1 else count - 1
        if step:
            waiting.append((first, step, place, free))
        if not left or count - step == 1:
            emit(step)  # the last state is used where it arises, and never kept
        else:
            runs.append((step, free))
            waiting.append((first + step, count - step, free, free + 1))
    # What the first phase keeps is kept by the forward pass.
    start = phases[0]
    place, first = start.place, start.first
    for count, kept in start.runs:
        place, first = kept, first + count
    phases[0] = Phase(place, first, (), start.tail)
    return Reversal(start.runs, tuple(phases))


def recomputed(reversal: Reversal) -> int:
    """Steps taken again by the backward pass, without those it pulls back."""
    return sum(sum(n for n, _ in phase.runs) + phase.tail for phase in reversal.phases)
