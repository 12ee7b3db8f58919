"""Linear games, and what complex momentum does to them by the eigenvalues of its update."""

import numpy as np

# Momentum of each method: magnitude, and angle in units of pi.
METHODS = {
    "plain": (0.0, 0.0),
    "positive": (0.9, 0.0),
    "negative": (0.9, 1.0),
    "complex_eighth": (0.9, 1 / 8),
    "complex_quarter": (0.9, 1 / 4),
    "complex_half": (0.9, 1 / 2),
    "complex_paper": (abs(0.8 + 0.3j), float(np.angle(0.8 + 0.3j) / np.pi)),
}
ROTATION = np.array([[0.0, 1.0], [-1.0, 0.0]])  # the gradients of x y for x, and of -x y for y


def mixed() -> np.ndarray:
    """A game of two players with the eigenvalues 0.3, 1, +-0.3i and +-1i, in a turned basis."""
    blocks = np.zeros((6, 6))
    blocks[0, 0], blocks[1, 1] = 0.3, 1.0
    blocks[2:4, 2:4], blocks[4:, 4:] = 0.3 * ROTATION, ROTATION
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    return basis @ blocks @ basis.T


def update(momentum: tuple[float, float], rate: float, eigenvalue: complex) -> np.ndarray:
    """One update along an eigenvector of the game, in (real part, imaginary part, parameter)."""
    b = momentum[0] * np.exp(1j * np.pi * momentum[1])
    return np.array(
        [
            [b.real, -b.imag, -eigenvalue],
            [b.imag, b.real, 0.0],
            [rate * b.real, -rate * b.imag, 1.0 - rate * eigenvalue],
        ],
        complex,
    )


def radius(momentum: tuple[float, float], rate: float, jacobian: np.ndarray) -> float:
    """The largest modulus of an eigenvalue of the update: below one, the game is solved."""
    return max(
        float(np.max(np.abs(np.linalg.eigvals(update(momentum, rate, eigenvalue)))))
        for eigenvalue in np.linalg.eigvals(jacobian)
    )
