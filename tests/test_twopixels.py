"""Two pixels and a landscape: printed digits, closed forms against simulation, brute force and integrals; no torch."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, optimize

from semkit.analysis.canvas import styles
from semkit.lessons import twopixels
from semkit.lessons.twopixels import (
    PIT,
    VALLEY,
    accuracy,
    chosen,
    compared,
    crafted,
    draw,
    em_noise,
    fitted,
    landscape,
    over_window,
    right,
    sampled,
    weights,
)

ROOT = Path(__file__).parents[1]
CORNERS = np.array(list(itertools.product((-1, 1), repeat=3)))


@pytest.fixture(scope="module")
def rows():
    return compared({"clean": (0, 1), "one": (0.5, 1), "four": (0.5, 4), "twenty": (0.5, 20)})


def robust_loss(w, x, y, rho):
    """The logistic loss under the worst move of each image, found among the corners of the box."""
    scores = [y * ((x + rho * corner) @ w) for corner in CORNERS]
    return np.logaddexp(0, -np.min(scores, axis=0))


def test_the_digits_that_the_lesson_prints():
    rhos = 0, 0.1, 0.2, 0.3, 0.4, 0.5
    assert [f"{accuracy(rho):.3f}" for rho in rhos] == ["0.613", "0.629", "0.655", "0.697", "0.770", "0.841"]
    assert {f"{accuracy(rho, radius=0):.3f}" for rho in rhos} == {"0.841"}
    assert [f"{100 * accuracy(0, quiet=quiet):.1f}" for quiet in (1, 4, 20)] == ["61.3", "55.9", "52.7"]
    assert weights(0) == pytest.approx([1.5, 50])


def test_closed_form_and_monte_carlo_agree(rows):
    assert ((rows["sampled"] - rows["exact"]).abs() < 3 * rows["error"]).all()
    assert rows["error"].max() < 0.004 and len(rows) == 24


def test_monte_carlo_would_see_another_radius():
    share, error = sampled(weights(0.3))
    assert all(abs(share - accuracy(rho)) > 3 * error for rho in (0.2, 0.4))


def test_robust_logistic_regression_finds_the_closed_form(rows):
    assert (rows["regression"] - rows["exact"]).abs().max() < 0.01


def test_regression_minimises_the_loss_under_the_worst_corner():
    """A general optimiser of the same loss, whose inner maximum is searched, finds no lower one."""
    x, y = draw(400, quiet=2)
    x += em_noise(y, np.array([1, 1, -1]))
    spread = (y[:, None] * x).std(0)
    for rho in (0, 0.2, 0.45):

        def loss(v, rho=rho):
            return robust_loss(v / spread, x, y, rho).mean() + twopixels.DECAY / 2 * v @ v

        mine = loss(fitted(x, y, rho) * spread)
        other = optimize.minimize(loss, np.ones(3), method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-7})
        assert mine <= other.fun + 1e-5


def test_no_noise_within_the_radius_has_a_lower_loss():
    x, y = draw(50, quiet=2)
    w, rng = np.array([1.5, -0.02, 0.7]), np.random.default_rng(0)
    least = np.logaddexp(0, -y * ((x + em_noise(y, w, 0.3)) @ w))
    for other in (0.3 * rng.uniform(-1, 1, x.shape) for _ in range(100)):
        assert (least <= np.logaddexp(0, -y * ((x + other) @ w))).all()
    assert np.allclose(least, np.min([np.logaddexp(0, -y * ((x + 0.3 * c) @ w)) for c in CORNERS], axis=0))


def test_adversarial_training_wins_from_rho_equal_to_the_radius_on():
    for radius, quiet in itertools.product((0.1, 0.5), (1, 20)):
        clean = accuracy(0, radius=0)
        assert accuracy(radius / 2, radius, quiet) < clean - 0.02
        assert [accuracy(rho, radius, quiet) for rho in (radius, radius + 0.2)] == pytest.approx([clean, clean])


def test_em_writes_on_the_quiet_pixel_and_a_robust_surrogate_does_not():
    x, y = draw(20_000)
    em, robust = crafted(x, y), crafted(x, y, rho=0.25)
    assert np.allclose(np.abs(em), 0.5) and np.allclose(em[:, 0], 0.5 * y)
    assert np.ptp(em[:, 1] * y) == 0  # one sign for each class
    assert np.allclose(robust, np.c_[0.5 * y, 0 * y])
    for rho in (0, 0.25):
        assert right(fitted(x + em, y, rho)) == pytest.approx(accuracy(rho), abs=0.01)
        assert right(fitted(x + robust, y, rho)) == pytest.approx(accuracy(0, radius=0), abs=0.001)


def test_noise_on_the_content_alone_helps_the_learner():
    assert right(np.array([1, 50])) < accuracy(0) < right(np.array([1.5, 0]))


def test_noise_against_the_content_costs_more_than_ems_and_adversarial_training_does_not_change_it():
    x, y = draw(20_000)
    for rho in (0, 0.2, 0.4):
        assert right(fitted(x + 0.5 * y[:, None] * (-1, 1), y, rho)) == pytest.approx(0.54, abs=0.015)


def test_a_model_that_looks_at_nothing_guesses():
    assert accuracy(2) == 0.5


@pytest.mark.parametrize("asked", [(-0.1, 0.5), (0, -1)])
def test_a_negative_radius_is_refused(asked):
    with pytest.raises(ValueError, match="rho and radius must be >= 0, got"):
        accuracy(*asked)


def test_at_window_half_em_and_sem_take_the_pit_and_rem_the_valley_and_at_one_sem_moves_too():
    places = {"pit": PIT[0], "valley": VALLEY[0]}
    first = {0: "pit pit pit", 0.3: "pit pit pit", 0.35: "pit pit valley", 0.5: "pit pit valley"}
    then = {0.65: "pit pit valley", 0.7: "pit valley valley", 1: "pit valley valley", 1.5: "pit valley valley"}
    for window, wanted in (first | then).items():
        assert list(chosen(window).values()) == pytest.approx([places[place] for place in wanted.split()], abs=0.05)
    assert landscape(np.array(PIT[0])) < landscape(np.array(VALLEY[0])) - 0.2


@pytest.mark.parametrize("window", [0.2, 1])
def test_the_mean_and_the_maximum_over_a_window_are_those_of_the_curve(window):
    for d in (-1.3, -1, 0.2, 1):
        ends = d - window / 2, d + window / 2
        assert over_window(d, window) == pytest.approx(integrate.quad(landscape, *ends)[0] / window, abs=2e-3)
        top = -optimize.minimize_scalar(lambda u: -landscape(u), bounds=ends, method="bounded").fun
        assert over_window(d, window, np.max) == pytest.approx(max(top, *landscape(np.array(ends))), abs=1e-4)
    assert over_window(0.3, 0) == over_window(0.3, 0, np.max) == landscape(0.3)


def test_methods_look_as_in_all_other_figures():
    shared = styles(["em", "sem", "rem"]).values()
    assert [look[:2] for look in twopixels.LOOK.values()] == [(look["color"], look["marker"]) for look in shared]


def test_figures_tell_in_words_what_they_show(rows):
    assert "61.3 % right" in twopixels.draw_world(0.5, 0)[1] and "84.1 % right" in twopixels.draw_world(0.5, 0.5)[1]
    assert "four: from 56 to 84 %" in twopixels.draw_compared(rows)[1]
    told = twopixels.draw_landscape(0.5, 1)[2]
    assert (
        told
        == "Window 0.5: EM the pit, SEM the pit, REM the valley. Window 1: EM the pit, SEM the valley, REM the valley."
    )


@pytest.mark.whole
def test_the_lesson_takes_no_torch():
    code = f"""import sys, nbformat
for cell in nbformat.read({str(ROOT / "notebooks" / "01_two_pixels.ipynb")!r}, 4).cells:
    if cell.cell_type == "code":
        exec(cell.source)
sys.exit("torch" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
