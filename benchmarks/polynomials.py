"""The polynomials of plugins/cpu/functions.h, by exchange (Remez): of least relative error of the functions.
Prints the errors and the coefficients, highest power first."""

from __future__ import annotations

from collections.abc import Callable

from mpmath import mp, mpf

mp.dps = 50
Real = Callable[[mpf], mpf]


def minimax(g: Real, weight: Real, low: mpf, high: mpf, degree: int) -> tuple[list[mpf], mpf]:
    """The p that minimises max |weight * (p - g)|: its coefficients, constant first, and that maximum."""
    grid = [(low + high) / 2 - (high - low) / 2 * mp.cos(mp.pi * i / 400) for i in range(401)]
    weights, values = [weight(x) for x in grid], [g(x) for x in grid]
    nodes = [round(400 * i / (degree + 1)) for i in range(degree + 2)]
    for _ in range(12):
        signs = [(-1) ** k / weights[i] for k, i in enumerate(nodes)]
        rows = [[grid[i] ** j for j in range(degree + 1)] + [s] for i, s in zip(nodes, signs, strict=True)]
        *c, _error = mp.lu_solve(mp.matrix(rows), mp.matrix([values[i] for i in nodes]))
        errors = [w * (mp.polyval(c[::-1], x) - y) for x, w, y in zip(grid, weights, values, strict=True)]
        # between sign changes the greatest error
        runs: list[list[int]] = [[0]]
        for i in range(1, len(grid)):
            if errors[i] * errors[i - 1] <= 0:
                runs.append([])
            runs[-1].append(i)
        found = [max(run, key=lambda i: abs(errors[i])) for run in runs]
        if len(found) < degree + 2:
            break
        while len(found) > degree + 2:
            del found[0 if abs(errors[found[0]]) < abs(errors[found[-1]]) else -1]
        nodes = found
    return c, max(map(abs, errors))


def exponential(r: mpf) -> mpf:
    return (mp.expm1(r) - r) / r**2


def artanh(z: mpf) -> mpf:
    s = mp.sqrt(z)
    return (3 * mp.atanh(s) / s - 3 - z) / z**2


def sine(z: mpf) -> mpf:
    r = mp.sqrt(z)
    return (mp.sin(r) / r - 1) / z


def cosine(z: mpf) -> mpf:
    return (mp.cos(mp.sqrt(z)) - 1 + z / 2) / z**2


A, B, C = mpf("0.348"), mpf("0.02945"), mpf("0.83") ** 2
TINY = mpf(10) ** -12
PARTS: list[tuple[str, Real, Real, mpf, mpf, tuple[int, int]]] = [
    ("EXPONENTIAL", exponential, lambda r: r**2 / mp.exp(r), -A, A + TINY, (4, 9)),
    ("ARTANH", artanh, lambda z: z**2 / 3, TINY, B, (2, 6)),
    ("SINE", sine, lambda z: z / (mp.sin(mp.sqrt(z)) / mp.sqrt(z)), TINY, C, (2, 5)),
    ("COSINE", cosine, lambda z: z**2 / mp.cos(mp.sqrt(z)), TINY, C, (2, 5)),
]

if __name__ == "__main__":
    for name, g, weight, low, high, degrees in PARTS:
        for kind, degree, digits in zip(("float", "double"), degrees, (9, 17), strict=True):
            c, error = minimax(g, weight, low, high, degree)
            print(f"{name} {kind}: error 2^{float(mp.log(error, 2)):.1f}")
            print("   ", ", ".join(mp.nstr(x, digits, min_fixed=-1, max_fixed=-1) for x in reversed(c)))
