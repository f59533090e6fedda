"""Binary programmes by HiGHS: constraints row by row, and columns that cannot be in an optimum fixed beforehand."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

_GAP = 1e-3  # relative, at which a solution counts as optimal: scores are known far less well
_NODES = 2000  # of the search tree; a limit in time would not give the same solution twice


class Rows:
    """Linear constraints low <= sum of factor * column <= high over V columns."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._rows: list[tuple[NDArray[np.intp], NDArray[np.float64], float, float]] = []

    def add(self, columns: NDArray[np.intp], factors: NDArray[np.float64] | float, low: float, high: float) -> None:
        spread = np.broadcast_to(np.asarray(factors, dtype=np.float64), columns.shape)
        self._rows.append((columns, spread, low, high))

    def constraint(self) -> LinearConstraint:
        columns, factors, low, high = zip(*self._rows, strict=True)
        ends = np.cumsum([0, *map(len, columns)])
        shape = len(self._rows), self._columns
        matrix = csr_array((np.concatenate(factors), np.concatenate(columns), ends), shape=shape)
        return LinearConstraint(matrix, np.array(low), np.array(high))


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS 1.12 prints a line of its developers' on standard output whatever `disp` says (jump-dev/HiGHS.jl issue
    312), where it would stand in the JSON of a command; inside, what C code prints goes nowhere.
    """
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
        ctypes.CDLL(None).fflush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def minimise(objective: NDArray[np.float64], rows: Rows, limit: float) -> NDArray[np.intp] | None:
    """Columns that are 1 in the binary solution of least `objective` (`[V]`, >= 0), or None when none is found.

    limit: value of a solution that is known. The linear relaxation gives a bound and reduced costs; a column whose
    reduced cost exceeds the distance from bound to limit is in no better solution and is fixed at 0 (Nemhauser &
    Wolsey 1988, II.5). That makes a search of seconds one of tenths.
    """
    scaled = objective * (100 / max(limit, 1e-12))  # HiGHS's tolerances are absolute
    constraint = rows.constraint()
    equal = constraint.lb == constraint.ub
    relaxed = linprog(
        scaled,
        A_ub=constraint.A[~equal],
        b_ub=constraint.ub[~equal],
        A_eq=constraint.A[equal],
        b_eq=constraint.ub[equal],
        bounds=(0, 1),
        method="highs-ds",
    )
    if relaxed.status != 0:
        return None
    useful = np.flatnonzero(relaxed.lower.marginals <= 100 * (1 + 1e-6) - relaxed.fun)
    if not len(useful):
        return None
    with _quiet():
        solved = milp(
            scaled[useful],
            integrality=np.ones(len(useful)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(constraint.A[:, useful], constraint.lb, constraint.ub),
            options={"mip_rel_gap": _GAP, "node_limit": _NODES},
        )
    return None if solved.x is None else useful[solved.x > 0.5]
