"""Checkers of the exercises in the notebooks that go beyond SEM, 10 and on; made as those in `exercises` are."""

from collections.abc import Callable

import numpy as np
from scipy.special import ndtr

from semkit.exercises import checker
from semkit.latent import accuracy, latent, rule


@checker
def check_robust_accuracy(robust_accuracy: Callable) -> None:
    """Tells whether robust_accuracy(theta, W, mu, epsilon) is that of sign(theta'x) on the mixture x = W z.

        Phi((theta'W mu - epsilon |theta|) / |W'theta|),   z ~ N(y mu, I), x moved by a length of epsilon

    theta [d], W [d,k], mu [k]. Raises AssertionError if not.
    """
    made = latent(12, 4, norm=1.5, seed=1)
    W, mu, theta = made.W, made.mu, 3 * rule(made, 5.0)
    mine = {epsilon: robust_accuracy(theta.copy(), W.copy(), mu.copy(), epsilon) for epsilon in (0, 0.8, 9)}
    wanted = {epsilon: accuracy(made, theta, epsilon) for epsilon in mine}
    assert all(np.ndim(value) == 0 and value is not None for value in mine.values()), "return one number"
    noise, length = np.linalg.norm(W.T @ theta), np.linalg.norm(theta)
    score = theta @ W @ mu

    def is_mine(epsilon: float, share: float) -> bool:
        return abs(mine[epsilon] - ndtr(share)) < 1e-6

    assert not is_mine(0, score / length), "theta'x varies by |W'theta| about its mean, not by |theta|"
    assert not is_mine(0, score / noise**2), "divide by the standard deviation |W'theta|, not by the variance"
    assert abs(mine[0] - wanted[0]) < 1e-6, f"without attack it is Phi(theta'W mu / |W'theta|) = {wanted[0]:.3f}"
    assert mine[0.8] < mine[0] - 1e-9, "an attack lowers the accuracy: it takes from the score"
    assert not is_mine(0.8, (score - 0.8) / noise), "a move of length epsilon changes theta'x by epsilon times |theta|"
    assert not is_mine(0.8, score / noise - 0.8), "the attack's reach is divided by |W'theta| as the score is"
    assert not is_mine(0.8, (score - 0.8 * np.abs(theta).sum()) / noise), "|theta| is the l2 length, not the l1 one"
    assert abs(mine[0.8] - wanted[0.8]) < 1e-6, f"with epsilon 0.8 it is {wanted[0.8]:.3f}, not {mine[0.8]:.3f}"
    assert abs(mine[9] - wanted[9]) < 1e-6, "a long attack turns nearly every answer round: below 1/2 is no mistake"
    print("right: what the factors add up to, less what the attack reaches, both in units of the spread")
