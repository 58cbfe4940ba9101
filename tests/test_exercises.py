"""Every exercise: the starter is not attempted, typical mistakes are named, an error is told, the solution is right."""

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import ndtr

from semkit.analysis.statistics import interval
from semkit.countermeasures.registry import named
from semkit.images.pixels import LEVEL, box
from semkit.lessons import defences, exercises, latent, mixtures, pruning, savings, twopixels, undoing
from semkit.lessons.answers import checker
from semkit.lessons.surrogates import beats
from semkit.training.perturb import Uniform


def forgets(*asked):
    """Works, and returns nothing."""
    len(asked)


def noise_step_with(
    at=lambda x, delta: box(x + delta),
    direction=torch.sign,
    unit=LEVEL,
    end=lambda delta, radius: delta.clamp(-radius, radius),
):
    """The solution, or a twin of it with one part replaced."""

    def noise_step(gradient, x, delta, recipe):
        return end(delta - recipe.step_size * unit * direction(gradient(at(x, delta))), recipe.radius * LEVEL)

    return noise_step


right_noise_step = noise_step_with()
BROKEN_NOISE_STEP = {
    "0 times": lambda gradient, x, delta, recipe: delta,
    "2 times": lambda gradient, x, delta, recipe: right_noise_step(gradient, x, gradient(x), recipe),
    "was asked at": noise_step_with(at=lambda x, delta: box(x + delta)[0]),
    "is taken at x:": noise_step_with(at=lambda x, delta: x),
    "leaves .0, 1.": noise_step_with(at=lambda x, delta: x + delta),
    "is not taken at x . delta": noise_step_with(at=lambda x, delta: box(x - delta)),
    "returns nothing": noise_step_with(end=lambda delta, radius: None),
    "climbs": noise_step_with(unit=-LEVEL),
    "left the radius": noise_step_with(end=lambda delta, radius: delta),
    "slope.s sign": noise_step_with(direction=lambda slope: slope),
    "one level is 1/255": noise_step_with(unit=1, end=lambda delta, radius: delta.clamp(-8, 8)),
    "must move by step_size": noise_step_with(direction=lambda slope: 0.5 * slope.sign()),
}


def right_stability(loss, x, radius, draws):
    return -sum(loss(Uniform(radius)(None, x, None)) for _ in range(draws)) / draws


def with_u(u):
    """The solution, with u(x, radius) in place of the uniform draw."""
    return lambda loss, x, radius, draws: -sum(loss(u(x, radius)) for _ in range(draws)) / draws


def one_u(loss, x, radius, draws):
    a = Uniform(radius)(None, x, None)
    return -sum(loss(a) for _ in range(draws)) / draws


def one_number(loss, x, radius, draws):
    return -sum(loss(box(x + 0.9 * radius * LEVEL * (-1) ** draw)) for draw in range(draws)) / draws


BROKEN_STABILITY = {
    "1 times, and needs 5": lambda loss, x, radius, draws: -loss(Uniform(radius)(None, x, None)),
    "loss was asked at": with_u(lambda x, radius: Uniform(radius)(None, x, None)[0]),
    "clip them": with_u(lambda x, radius: x + radius * LEVEL * (2 * torch.rand_like(x) - 1)),
    "reaches 255 levels of 1/255": with_u(lambda x, radius: box(x + radius * (2 * torch.rand_like(x) - 1))),
    "both sides": with_u(lambda x, radius: box(x + radius * LEVEL * torch.rand_like(x))),
    "one sign only": with_u(lambda x, radius: box(x - radius * LEVEL * torch.rand_like(x))),
    "the same number for every pixel": one_number,
    "fresh u": one_u,
    "minus the mean": lambda *asked: -right_stability(*asked),
}


def right_choose(points, passes, budget):
    paid = [name for name in points if passes[name] <= budget]
    best = points[paid].mean().idxmax()
    return min((name for name in paid if not beats(points, best, name)), key=passes.get)


def by_overlap(points, passes, budget):
    """The cheapest affordable cell whose own interval overlaps that of the best: blind to pairing by seed."""
    paid = [name for name in points if passes[name] <= budget]
    low = interval(points[points[paid].mean().idxmax()])[1]
    return min((name for name in paid if interval(points[name])[2] > low), key=passes.get)


def most(points, paid):
    return points[paid].mean().idxmax()


BROKEN_CHOOSE = {
    "returns nothing": forgets,
    "'SEM' is none of A, B, C, D": lambda points, passes, budget: "SEM",
    "D costs 300 passes and the budget is 200": lambda points, passes, budget: points.mean().idxmax(),
    "B protects 7.0 points more than A, measurably": lambda points, passes, budget: min(passes, key=passes.get),
    "B protects 7.0 .*, and the budget pays for it": by_overlap,
    "B costs less than D": lambda points, passes, budget: most(points, [n for n in points if passes[n] <= budget]),
    "D protects 7.0 points more than C": lambda *asked: right_choose(*asked[:2], asked[2] - 1),
}


def without_line(v, z, degree=1):
    return v - np.polyval(np.polyfit(z, v, degree), z)


def right_partial(x, y, z):
    return np.corrcoef(without_line(x, z), without_line(y, z))[0, 1]


def through_the_origin(x, y, z):
    return np.corrcoef(*(v - z * (v @ z) / (z @ z) for v in (x, y)))[0, 1]


BROKEN_PARTIAL = {
    "returns a table": lambda x, y, z: np.corrcoef(without_line(x, z), without_line(y, z)),
    "returns nothing": forgets,
    "plain correlation": lambda x, y, z: np.corrcoef(x, y)[0, 1],
    "one of the two only": lambda x, y, z: np.corrcoef(without_line(x, z), y)[0, 1],
    "of the two only": lambda x, y, z: np.corrcoef(x, without_line(y, z))[0, 1],
    "has slope and": through_the_origin,
}


def right_points_lost(rows):
    rows = rows[rows["tested_on"] == "clean"].pivot(index="seed", columns="trained_on", values="right").dropna()
    return 100 * (rows["clean"] - rows["protected"]).mean()


def points_lost_of(tested_on):
    return lambda rows: right_points_lost(
        rows[rows["tested_on"] == tested_on].assign(tested_on="clean") if tested_on else rows.assign(tested_on="clean")
    )


def unpaired(rows):
    means = rows[rows["tested_on"] == "clean"].groupby("trained_on")["right"].mean()
    return 100 * (means["clean"] - means["protected"])


def relative(rows):
    clean = rows[(rows["tested_on"] == "clean") & (rows["trained_on"] == "clean") & (rows["seed"] < 2)]
    return right_points_lost(rows) / clean["right"].mean()


BROKEN_POINTS_LOST = {
    "returns nothing": forgets,
    "is of protected images": points_lost_of("protected"),
    "a gain": lambda rows: -right_points_lost(rows),
    "seed 2": unpaired,
    "is a share": lambda rows: right_points_lost(rows) / 100,
    "many numbers": lambda rows: rows["right"],
    "so 50, not": relative,
}


def sem_step_with(
    draw=lambda z, recipe: recipe.noise_side(None, z, None),
    direction=lambda slopes: torch.stack(slopes).sum(0).sign(),
    unit=LEVEL,
    start=lambda x, delta: box(x + delta),
    end=lambda delta, radius: delta.clamp(-radius, radius),
):
    """The solution, or a twin of it with one part replaced."""

    def sem_step(gradient, x, delta, recipe):
        z = start(x, delta)
        slopes = [gradient(draw(z, recipe)) for _ in range(recipe.samples)]
        return end(delta - recipe.step_size * unit * direction(slopes), recipe.radius * LEVEL)

    return sem_step


def one_draw(gradient, x, delta, recipe):
    a = recipe.noise_side(None, box(x + delta), None)
    return sem_step_with(draw=lambda z, _: a)(gradient, x, delta, recipe)


right_sem_step = sem_step_with()
BROKEN_SEM_STEP = {
    "1 times, and needs 3": lambda gradient, x, delta, recipe: right_sem_step(
        gradient, x, delta, replace(recipe, samples=1)
    ),
    "gradient was asked at": sem_step_with(start=lambda x, delta: box(x + delta)[0]),
    "leave .0, 1.": sem_step_with(draw=lambda z, recipe: z + 4 * LEVEL * (2 * torch.rand_like(z) - 1)),
    "take it around x . delta": sem_step_with(start=lambda x, delta: x),
    "u reaches .* radius is 4": sem_step_with(draw=lambda z, recipe: Uniform(recipe.radius)(None, z, None)),
    "reaches 0 levels only": sem_step_with(draw=lambda z, recipe: z),
    "fresh": one_draw,
    "returns nothing": sem_step_with(end=lambda delta, radius: None),
    "climbs": sem_step_with(unit=-LEVEL),
    "left the radius": sem_step_with(end=lambda delta, radius: delta),
    "the first draw": sem_step_with(direction=lambda slopes: slopes[0].sign()),
    "the last draw": sem_step_with(direction=lambda slopes: slopes[-1].sign()),
    "vote of the signs": sem_step_with(direction=lambda slopes: torch.stack(slopes).sign().sum(0).sign()),
    "one level is 1/255": sem_step_with(unit=1, end=lambda delta, radius: delta.clamp(-8, 8)),
    "must move by step_size": sem_step_with(direction=lambda slopes: torch.stack(slopes).sum(0)),
}


def rem_step_with(
    up=lambda z, slope, rho: box(z + rho * slope.sign()),
    down=lambda delta, slope, step: delta - step * slope.sign(),
    start=lambda x, delta: box(x + delta),
    end=lambda delta, radius: delta.clamp(-radius, radius),
):
    """The solution, or a twin of it with one part replaced."""

    def rem_step(gradient, x, delta, recipe):
        z = start(x, delta)
        slope = gradient(up(z, gradient(z), recipe.noise_side.radius * LEVEL))
        return end(down(delta, slope, recipe.step_size * LEVEL), recipe.radius * LEVEL)

    return rem_step


def first_slope(gradient, x, delta, recipe):
    slopes = []
    right_rem_step(lambda a: slopes.append(gradient(a)) or slopes[-1], x, delta, recipe)
    return (delta - recipe.step_size * LEVEL * slopes[0].sign()).clamp(-8 * LEVEL, 8 * LEVEL)


right_rem_step = rem_step_with()
BROKEN_REM_STEP = {
    "1 times: once to climb": lambda gradient, x, delta, recipe: delta - gradient(box(x + delta)),
    "first gradient is taken at": rem_step_with(start=lambda x, delta: x),
    "an attack climbs": rem_step_with(up=lambda z, slope, rho: box(z - rho * slope.sign())),
    "leave .0, 1.": rem_step_with(up=lambda z, slope, rho: z + rho * slope.sign()),
    "moves every value by rho": rem_step_with(up=lambda z, slope, rho: box(z + rho * slope)),
    "returns nothing": rem_step_with(end=lambda delta, radius: None),
    "gradient at x . delta": first_slope,
    "climbs the loss": rem_step_with(down=lambda delta, slope, step: delta + step * slope.sign()),
    "left the radius": rem_step_with(end=lambda delta, radius: delta),
}


def robust_accuracy_with(
    noise=lambda theta, W: np.linalg.norm(W.T @ theta), reach=lambda theta: np.linalg.norm(theta), end=ndtr
):
    """The solution, or a twin of it with one part replaced."""
    return lambda theta, W, mu, epsilon: end((theta @ W @ mu - epsilon * reach(theta)) / noise(theta, W))


right_robust_accuracy = robust_accuracy_with()
BROKEN_ROBUST_ACCURACY = {
    "returns nothing": forgets,
    "returns an array": lambda theta, W, mu, epsilon: ndtr(W @ mu),
    "not by .theta": robust_accuracy_with(noise=lambda theta, W: np.linalg.norm(theta)),
    "it divides by the variance": robust_accuracy_with(noise=lambda theta, W: ((W.T @ theta) ** 2).sum()),
    "without attack it is": robust_accuracy_with(end=lambda share: share),
    "takes from the score": robust_accuracy_with(reach=lambda theta: -np.linalg.norm(theta)),
    "times .theta": robust_accuracy_with(reach=lambda theta: 1),
    "as the score is": lambda theta, W, mu, epsilon: ndtr(theta @ W @ mu / np.linalg.norm(W.T @ theta) - epsilon),
    "this is the l1": robust_accuracy_with(reach=lambda theta: np.abs(theta).sum()),
    "with epsilon 0.8": robust_accuracy_with(reach=lambda theta: np.abs(theta).max()),
    "below 1/2": robust_accuracy_with(end=lambda share: max(0.5, ndtr(share))),
}


def kinds_with(
    sign=lambda p, y: torch.where(p.argmax(1) == y, 1.0, -1.0), of=lambda v: v, at=lambda average: 1 - average, axis=1
):
    """The solution, or a twin of it with one part replaced."""

    def kinds(p, y, average):
        v = sign(p, y) * p.std(axis, correction=0)
        return torch.where(v < 0, 0, torch.where(v > of(v).quantile(at(average)).clamp(min=0), 2, 1))

    return kinds


right_kinds = kinds_with()
BROKEN_KINDS = {
    "one kind for each": lambda p, y, average: right_kinds(p, y, average)[:, None],
    "other kinds than": lambda p, y, average: right_kinds(p, y, average) + 1,
    "is an outlier, however sure": kinds_with(sign=lambda p, y: 1.0),
    "is no outlier": kinds_with(sign=lambda p, y: torch.where(p[torch.arange(len(y)), y] > 0.5, 1.0, -1.0)),
    "of the images are robust": kinds_with(at=lambda average: average),
    "v of all images": kinds_with(of=lambda v: v[v >= 0]),
}


def right_straight_through(g, x):
    return x + (g(x) - x).detach()


def changes_x(g, x):
    value = right_straight_through(g, x)
    with torch.no_grad():
        x += 1
    return value


BROKEN_STRAIGHT_THROUGH = {
    "returns the shape": lambda g, x: g(x).sum(),
    "forwards it is not g": lambda g, x: x + 0 * g(x).detach(),
    "changes x in place": changes_x,
    "detach the difference g": lambda g, x: g(x).detach(),
    "add the detached": lambda g, x: g(x),
    "g's own gradient": lambda g, x: right_straight_through(g, x) + g(x) - g(x).detach(),
}


def masks_with(size=torch.abs, count=round, mask=lambda gone: 1 - gone.float()):
    """The solution, or a twin of it with one part replaced."""

    def masks(weights, share):
        sizes = torch.cat([size(w).flatten() for w in weights])
        gone = torch.zeros(len(sizes))
        gone[sizes.argsort(stable=True)[: count(share * len(sizes))]] = 1
        parts = gone.split([w.numel() for w in weights])
        return [mask(part).view_as(w) for part, w in zip(parts, weights, strict=True)]

    return masks


right_masks = masks_with()


def by_threshold(weights, share):
    threshold = torch.cat([w.abs().flatten() for w in weights]).quantile(share)
    return [(w.abs() > threshold).float() for w in weights]


BROKEN_MASKS = {
    "returns no list": lambda weights, share: right_masks(weights, share)[0],
    "masks have the shapes": lambda weights, share: [m.flatten() for m in right_masks(weights, share)],
    "yours hold other values": lambda weights, share: [
        w * m for w, m in zip(weights, right_masks(weights, share), strict=True)
    ],
    "1 is for weights that stay": masks_with(mask=lambda gone: gone),
    "the same share": lambda weights, share: [right_masks([w], share)[0] for w in weights],
    "sorted by w, not": masks_with(size=lambda w: w),
    "a smaller weight stays": masks_with(size=lambda w: -w.abs()),
    "with share 0.0 exactly 0": by_threshold,
    "with share 0.85 exactly": masks_with(count=lambda n: round(n) + (n > 100)),
}


def recovered_with(end=lambda found: found / found.max(), turn=lambda found: found.flip(0, 1), padding=1):
    """The solution, or a twin of it with one part replaced."""

    def recovered(original, copy):
        near = F.unfold(original[None].double(), 3, padding=padding).view(3, 9, -1).transpose(1, 2).reshape(-1, 9)
        if padding == 0:
            copy = copy[:, :-2, :-2]  # in place of 1:-1
        return end(turn(torch.linalg.lstsq(near, copy.reshape(-1, 1).double()).solution.view(3, 3)))

    return recovered


right_recovered = recovered_with()
turned_recovered = recovered_with(turn=lambda found: found)
BROKEN_RECOVERED = {
    "returns nothing": forgets,
    "not a tensor": lambda original, copy: right_recovered(original, copy).numpy(),
    "returns the shape": lambda original, copy: right_recovered(original, copy)[None],
    "returns torch.float32": recovered_with(end=lambda found: (found / found.max()).float()),
    "turned round": turned_recovered,
    "turned round,": recovered_with(end=lambda found: found, turn=lambda found: found),
    "lines and columns": recovered_with(turn=lambda found: found.flip(0, 1).T),
    "divide by max": recovered_with(end=lambda found: found),
    "off by up to": recovered_with(padding=0),
}


BROKEN_NOISE = {
    "it returns nothing": forgets,
    "the shape": lambda y, w, radius: radius * np.sign(w),
    "lowers every score": lambda y, w, radius: -twopixels.em_noise(y, w, radius),
    "lowers some scores": lambda y, w, radius: twopixels.em_noise(np.abs(y), w, radius),
    "moves a pixel by 15": lambda y, w, radius: radius * y[:, None] * w,
    "pixel 1 moves by less": lambda y, w, radius: radius * y[:, None] * w / np.abs(w).max(),
    "against its weight": lambda y, w, radius: twopixels.em_noise(y, np.abs(w), radius),
}


def luma_with(red=0.299, green=0.587, blue=0.114):
    """The solution, or a twin of it with other weights."""
    weights = torch.tensor([red, green, blue]).view(1, 3, 1, 1)
    return lambda noise: (weights * noise).sum(1, keepdim=True).expand_as(noise)


BROKEN_LUMA = {
    "the shape": lambda noise: luma_with()(noise)[:, :1],
    "in place": lambda noise: noise.copy_(luma_with()(noise)),
    "as it is": lambda noise: noise,
    "the channels differ": lambda noise: noise - noise.mean(1, keepdim=True),
    "the plain mean": lambda noise: noise.mean(1, keepdim=True).expand_as(noise),
    "red and blue": luma_with(0.114, 0.587, 0.299),
    "must be .299": luma_with(1, 1, 1),
}


def without_luma(images):
    x = images.float()
    return (x - x.mean(1, keepdim=True) + 128).clamp(0, 255).round().byte()


BROKEN_COUNTERMEASURE = {
    "returns torch.float32": lambda images: images / 255,
    "the shape": lambda images: images[:, :1],
    "in place": lambda images: images.copy_(without_luma(images)),
    "as they are": lambda images: images.clone(),
    "all values are alike": lambda images: images * 0,
    "100 % of the noise is left: at least half": named("grayscale").change,
}

CASES = [
    (exercises.check_noise_step, right_noise_step, BROKEN_NOISE_STEP),
    (exercises.check_stability, right_stability, BROKEN_STABILITY),
    (exercises.check_choose, right_choose, BROKEN_CHOOSE),
    (exercises.check_partial, right_partial, BROKEN_PARTIAL),
    (exercises.check_points_lost, right_points_lost, BROKEN_POINTS_LOST),
    (exercises.check_sem_step, right_sem_step, BROKEN_SEM_STEP),
    (exercises.check_rem_step, right_rem_step, BROKEN_REM_STEP),
    (latent.check_robust_accuracy, right_robust_accuracy, BROKEN_ROBUST_ACCURACY),
    (savings.check_kinds, right_kinds, BROKEN_KINDS),
    (defences.check_straight_through, right_straight_through, BROKEN_STRAIGHT_THROUGH),
    (pruning.check_masks, right_masks, BROKEN_MASKS),
    (mixtures.check_recovered, right_recovered, BROKEN_RECOVERED),
    (twopixels.check_noise, twopixels.em_noise, BROKEN_NOISE),
    (exercises.check_luma, luma_with(), BROKEN_LUMA),
    (undoing.check_countermeasure, without_luma, BROKEN_COUNTERMEASURE),
]
CHECKERS = {case[0].__name__: case for case in CASES}
SOLUTIONS = [(check, solution) for check, solution, _ in CASES]
WRONG = [(check, message, twin) for check, _, broken in CASES for message, twin in broken.items()]
for answers in (SOLUTIONS, WRONG):  # check_countermeasure trains learners of whatever is no plain mistake
    answers[-1] = pytest.param(*answers[-1], marks=pytest.mark.whole)


def starter(*asked): ...


def documented(*asked):
    """What it is for."""
    return ...


def not_written(*asked):
    raise NotImplementedError


def raising(*asked):
    return 1 / 0


@pytest.mark.parametrize("check, solution", SOLUTIONS)
def test_the_solution_is_right(check, solution):
    reply = check(solution)
    assert reply.kind == "right" and repr(reply).startswith("right: ")


@pytest.mark.parametrize("check, message, twin", WRONG)
def test_a_wrong_answer_is_not_yet_right_and_its_mistake_is_named(check, message, twin):
    reply = check(twin)
    assert reply.kind == "not yet" and re.match("not yet, because .*" + message, repr(reply)), reply
    assert "\n" not in repr(reply)


@pytest.mark.parametrize("answer", [starter, documented, not_written, None, ..., lambda x: ...])
@pytest.mark.parametrize("name", CHECKERS)
def test_a_starter_is_not_attempted_and_is_told_of_the_hints(name, answer):
    reply = CHECKERS[name][0](answer)
    assert reply.kind == "not attempted" and re.search(rf"; sk\.\w+\.{name}\.hint\(1\) is", repr(reply))


@pytest.mark.parametrize("name", CHECKERS)
def test_an_error_of_the_students_is_told_with_its_line(name):
    reply = CHECKERS[name][0](raising)
    assert reply.kind == "your code raised"
    assert re.fullmatch(r"your code raised ZeroDivisionError: division by zero, in line \d+: return 1 / 0", repr(reply))


@pytest.mark.parametrize("name", CHECKERS)
def test_what_is_no_function_is_not_yet_an_answer(name):
    assert repr(CHECKERS[name][0](5)).startswith("not yet, because what it gives cannot be used: TypeError")


@pytest.mark.parametrize("name", CHECKERS)
def test_an_exercise_has_three_mistakes_and_hints_that_end(name):
    check, _, broken = CHECKERS[name]
    assert len(broken) >= 3
    hints = [repr(check.hint(n)) for n in (1, 2, 3)]
    assert [hint.split(":")[0] for hint in hints] == ["hint 1 of 3", "hint 2 of 3", "hint 3 of 3, the last one"]
    for none in (0, 4):
        with pytest.raises(ValueError, match="there are 3 hints"):
            check.hint(none)


def test_every_checker_is_tested_here():
    folder = Path(exercises.__file__).parent
    found = {
        name
        for path in folder.glob("*.py")
        for name, value in vars(import_module(f"semkit.lessons.{path.stem}")).items()
        if hasattr(value, "hint")
    }
    assert found == set(CHECKERS)


def test_a_wrong_image_is_drawn_beside_the_one_asked_for():
    reply = mixtures.check_recovered(turned_recovered)
    assert [name.split("\n")[0] for name in reply.pictures] == ["target", "yours", "difference"]
    assert re.search(r'not yet, because .*</p><figure.*<img alt="target, yours, difference', reply._repr_html_())


def test_a_protected_set_may_be_attacked_by_a_name_of_the_registry():
    assert re.search("'jpg'.*jpeg", repr(undoing.check_countermeasure("jpg")))
    assert repr(undoing.check_countermeasure("bitdepth-8")).endswith("as they are, with all of the noise")


def test_a_reply_is_escaped():
    reply = checker("a hint")(lambda answer: f"{answer} <b>")(1)
    assert repr(reply) == "right: 1 <b>" and "right: 1 &lt;b&gt;</p>" in reply._repr_html_()


def test_an_assertion_of_the_students_own_is_an_error_of_theirs():
    def answer():
        assert 1 > 2, "own"

    @checker("a hint")
    def check_it(it):
        return it()

    assert check_it(answer).text.startswith("your code raised AssertionError: own")
