"""Policy transfer in continuous time: entropy-regularised LQR, and what starting from a source's policy buys.

After Guo and Liu
"""

import csv
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from datetime import datetime
from inspect import formatannotation
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from numpy import ndarray as Array
from scipy.integrate import solve_ivp
from scipy.linalg import LinAlgError, expm, solve_continuous_are, sqrtm
from scipy.sparse import csr_matrix, diags_array
from scipy.sparse.linalg import spsolve
from scipy.special import logsumexp
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

SCRIPT = Path(__file__).stem


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


class Stopped(KeyboardInterrupt):
    """A run that SIGINT or SIGTERM has ended in order."""


# --------------------------------------------------------------------------------- 1. the problem and its solution


class LQR(NamedTuple):
    A: Array
    B: Array
    C: Array
    D: Array
    S: Array
    Q: Array
    R: Array
    discount: float
    temperature: float


def check_problem(problem: LQR) -> None:
    A, B, C, D, S, Q, R, discount, temperature = problem
    n, m, j = len(A), B.shape[-1], len(C)
    shapes = {"A": (n, n), "B": (n, m), "C": (j, n, n), "D": (j, n, m), "S": (n, S.shape[-1]), "Q": (n, n), "R": (m, m)}
    for name, shape in shapes.items():
        ours = getattr(problem, name).shape
        if ours != shape:
            raise RunError(f"{name}: shape {ours} does not fit the others; it must be {shape}")
    for name, low in (("Q", -1e-12), ("R", 1e-12)):
        matrix = getattr(problem, name)
        least = np.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
        if not np.allclose(matrix, matrix.T) or least < low:
            raise RunError(f"{name}: its least eigenvalue is {least:.3g}; it must be symmetric and positive definite")
    if not (discount > 0 and temperature > 0):
        raise RunError("discount")


def hamiltonian(problem: LQR, P: Array) -> tuple[Array, Array]:
    """R~ [m, m] and G [m, n]"""
    A, B, C, D, S, Q, R, *_ = problem
    return R + (D.mT @ P @ D).sum(0), B.T @ P + (D.mT @ P @ C).sum(0)


def gain(problem: LQR, P: Array) -> Array:
    return np.linalg.solve(*hamiltonian(problem, P))


def covariance(problem: LQR, P: Array) -> Array:
    return problem.temperature / 2 * np.linalg.inv(hamiltonian(problem, P)[0])


def riccati_rate(problem: LQR, P: Array) -> Array:
    A, _, C, _, _, Q, *_ = problem
    drift = A - problem.discount / 2 * np.eye(len(A))
    R, G = hamiltonian(problem, P)
    return Q + drift.T @ P + P @ drift + (C.mT @ P @ C).sum(0) - G.T @ np.linalg.solve(R, G)


def riccati(problem: LQR) -> Array:
    check_problem(problem)
    A, B, C, D, _, Q, R, discount, _ = problem
    drift = A - discount / 2 * np.eye(len(A))
    for value in np.linalg.eigvals(drift):
        if value.real >= 0 and np.linalg.matrix_rank(np.hstack([drift - value * np.eye(len(A)), B])) < len(A):
            raise RunError(f"the system is not stabilisable: no control moves the eigenvalue {value:.3g} of A - discount / 2")
    P = np.zeros_like(A)
    try:
        for _ in range(500):
            before = P
            noise = [(X.mT @ P @ Y).sum(0) for X, Y in ((C, C), (D, D), (C, D))]
            P = solve_continuous_are(drift, B, Q + noise[0], R + noise[1], s=noise[2])
            if np.linalg.norm(P - before) <= 1e-4 * np.linalg.norm(P):
                break
        for _ in range(4):
            P = evaluate(problem, gain(problem, P))
    except (LinAlgError, RunError):
        raise RunError("noise") from None
    return P


def lyapunov_operator(problem: LQR, K: Array) -> Array:
    A, B, C, D, *_ = problem
    drift, eye = (A - B @ K).T - problem.discount / 2 * np.eye(len(A)), np.eye(len(A))
    return np.kron(drift, eye) + np.kron(eye, drift) + sum(np.kron(X.T, X.T) for X in C - D @ K)


def moments_of(operator: Array, *sources):
    n = len(sources[0])
    solved = np.linalg.solve(operator, -np.stack([x.ravel() for x in sources], 1)).T.reshape(-1, n, n)
    return (solved + solved.mT) / 2


def stabilises(problem: LQR, K: Array) -> bool:
    (P,) = moments_of(lyapunov_operator(problem, K), np.eye(len(problem.A)))
    return np.linalg.eigvalsh(P)[0] > 0


def evaluate(problem: LQR, K: Array) -> Array:
    operator = lyapunov_operator(problem, K)
    P, probe = moments_of(operator, problem.Q + K.T @ problem.R @ K, np.eye(len(problem.A)))
    if np.linalg.eigvalsh(probe)[0] <= 0:
        raise RunError(f"not stab {np.linalg.eigvals(operator).real.max():.3g}")
    return P


def random_system(n: int, rng, noise: float=0.2, discount=0.2, temperature=0.1) -> LQR:
    m, j = max(1, n // 2), 2
    draw = lambda *shape: rng.normal(size=shape)
    return LQR(draw(n, n)/n**.5, draw(n, m)/m**.5, noise * draw(j, n, n)/n**.5, noise * draw(j, n, m)/m**.5, np.eye(n), np.eye(n), np.eye(m), discount, temperature)


def random_start(problem, K, rng):
    direction = rng.normal(size=K.shape)
    direction *= 10 * np.linalg.norm(K) / np.linalg.norm(direction)
    while not stabilises(problem, K + direction):
        direction /= 2
    return K + direction
