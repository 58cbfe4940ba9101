"""The checkers of the notebooks from 10 on; each helper function is a solution, or one part of it replaced."""

import numpy as np
import pytest
from checks import names_what_is_wrong, passes, twins
from scipy.special import ndtr

from semkit import exercises_extensions


def robust_accuracy_with(
    noise=lambda theta, W: np.linalg.norm(W.T @ theta), reach=lambda theta: np.linalg.norm(theta), end=ndtr
):
    """The solution, or a twin of it with one part replaced."""
    return lambda theta, W, mu, epsilon: end((theta @ W @ mu - epsilon * reach(theta)) / noise(theta, W))


right_robust_accuracy = robust_accuracy_with()
BROKEN_ROBUST_ACCURACY = {
    "one number": lambda *asked: None,
    "not by .theta": robust_accuracy_with(noise=lambda theta, W: np.linalg.norm(theta)),
    "not by the variance": robust_accuracy_with(noise=lambda theta, W: ((W.T @ theta) ** 2).sum()),
    "without attack it is": robust_accuracy_with(end=lambda share: share),
    "takes from the score": robust_accuracy_with(reach=lambda theta: -np.linalg.norm(theta)),
    "times .theta": robust_accuracy_with(reach=lambda theta: 1),
    "as the score is": lambda theta, W, mu, epsilon: ndtr(theta @ W @ mu / np.linalg.norm(W.T @ theta) - epsilon),
    "not the l1": robust_accuracy_with(reach=lambda theta: np.abs(theta).sum()),
    "with epsilon 0.8": robust_accuracy_with(reach=lambda theta: np.abs(theta).max()),
    "below 1/2": robust_accuracy_with(end=lambda share: max(0.5, ndtr(share))),
}

CASES = [(exercises_extensions.check_robust_accuracy, right_robust_accuracy, BROKEN_ROBUST_ACCURACY)]


@pytest.mark.parametrize("check, solution", [case[:2] for case in CASES])
def test_a_checker_passes_the_solution(check, solution, capsys):
    passes(check, solution, capsys)


@pytest.mark.parametrize("check, message, broken", twins(CASES))
def test_a_checker_says_what_is_wrong(check, message, broken, capsys):
    names_what_is_wrong(check, message, broken, capsys)
