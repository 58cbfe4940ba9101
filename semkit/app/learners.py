"""The commands that train learners: semkit learn, sweep (demo is one) and transform."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from semkit.analysis.cost import passes_of, seconds_of
from semkit.analysis.designs import DESIGNS, LEARNERS, METHODS, learners_after, loss_rows, noise_rows, reference_recipe
from semkit.analysis.report import as_objects, table, write_report, write_rows
from semkit.analysis.statistics import interval
from semkit.analysis.study import crafted_noise, grid, grid_recipes, learned_net, learned_row
from semkit.app.inputs import engine_of, split_of
from semkit.app.outputs import check_place, claim
from semkit.app.progress import progress
from semkit.app.telling import FINE, announce, duration, print_json, tell
from semkit.countermeasures.registry import counter
from semkit.countermeasures.transform import Transform
from semkit.images.files import shown
from semkit.images.imageset import Split, limit_test
from semkit.lessons.transform import defence_rows, defences_figure, defences_table
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.protections import registry
from semkit.protections.protection import Recipe
from semkit.protections.registry import sweep_recipes
from semkit.training.learning import LearnRecipe
from semkit.training.presets import lasting, learn_recipe


def _seeds(options) -> range:
    return range(options.seed, options.seed + options.seeds)


def learn(options) -> int:
    """semkit learn: fresh learners on images, protected or not; reports their accuracy on clean test images."""
    engine, radius = engine_of(options), options.perturbation_radius
    recipe = learn_recipe(
        options.preset, perturbation_radius=radius, norm=options.norm, learner=options.learner, size=options.size
    )
    if options.save and options.seeds > 1:
        raise ValueError("one net can be saved: --seeds 1")
    if options.save and options.save.exists():
        raise ValueError(f"{shown(options.save)} exists already")
    with progress() as on_step:
        split = limit_test(split_of(options, on_step, options.without), options.test_limit)
        train, recipe = counter(split.train, recipe, options.countermeasure, engine, split.spare)
        split = replace(split, train=train)
        kind = f"AT {radius:g} ({options.norm})" if radius else "ERM"
        cost = _cost([recipe], train, engine, options.seeds)
        announce(f"{options.seeds} x {kind}: {recipe.model} on {train!r}, {cost}")
        rows = list(_learner_rows(options, split, recipe, engine, on_step))
    return _report_learners(options, split, recipe, rows)


def _cost(recipes, train, engine, seeds: int) -> str:
    n, classes, size = len(train), len(train.classes), train.images.shape[-1]
    seconds = seeds * seconds_of(recipes, n, classes, size, engine)
    return f"{seeds * passes_of(recipes, n).total:,} passes on {engine.device}, at most about {duration(seconds)}"


def _learner_rows(options, split, recipe, engine, on_step) -> Iterator[dict]:
    for seed in _seeds(options):
        how = dict(seed=seed, lab=Lab(engine, options.cache, on_step, f"training, seed {seed}"))
        if options.save:
            row, _ = learned_net(split.train, split.test, recipe, file=options.save, **how)
        else:
            row = learned_row(split.train, split.test, recipe, **how)
        tell(options, f"seed {seed}: clean test accuracy last {row['last']:.3f}, best {row['best']:.3f}")
        yield {"seed": seed, **row}


def _report_learners(options, split, recipe, rows) -> int:
    mean, low, high = interval([row["last"] for row in rows])
    last = {"mean": mean, "low": low, "high": high} if len(rows) > 1 else {"mean": mean}
    print_json(options, {
        "images": repr(split.train), "test_images": len(split.test), "recipe": repr(recipe), "last": last,
        "rows": rows, "countermeasures": list(options.countermeasure), "skipped": list(split.skipped),
        "ignored": list(split.ignored),
    })  # fmt: skip
    if len(rows) > 1:
        tell(options, f"last, mean of {len(rows)} seeds: {mean:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    return FINE


def _claim(options, split, engine: Engine, *names: str, **more) -> None:
    """Leaves rows, table and figure of other images, recipe or engine alone; some settings may grow."""
    told = {name: getattr(options, name) for name in ("command", "preset", "learner_steps", *names)}
    told["engine"] = engine.settings()
    claim(options.out, {**told, **more, "fingerprint": [split.train.fingerprint, split.test.fingerprint]})


def _settle(options) -> None:
    """Methods and radii that were not given; raises ValueError for those that a design leaves no room for."""
    if options.design and options.methods:
        raise ValueError(f"--design {options.design} has methods of its own: leave --methods out")
    if options.design in LEARNERS and options.radii:
        raise ValueError(f"--design {options.design} has learners of its own: leave --radii out")
    options.methods, options.radii = options.methods or METHODS, options.radii or (0, 4)


@dataclass(frozen=True)
class _Runs:
    """The runs of a sweep, as study.grid takes them."""

    split: Split
    crafts: Mapping[str, Recipe | None]
    learners: Mapping[float | str, LearnRecipe]
    countermeasures: Sequence[str]
    seeds: Sequence[int]

    def recipes(self) -> list[Recipe | LearnRecipe]:
        """What they run for each seed. Raises ValueError for a countermeasure that cannot be applied."""
        return grid_recipes(self.split, self.crafts, self.learners, self.countermeasures)

    def told(self, recipes: Sequence[Recipe | LearnRecipe], engine: Engine) -> str:
        """How many they are and what they take."""
        train, seeds = self.split.train, len(self.seeds)
        times = f"{len(self.countermeasures)} countermeasures x " if self.countermeasures else ""
        return (
            f"{train!r}, {len(self.split.test)} test images: {len(self.crafts)} methods x {times}{len(self.learners)} "
            f"ways x {seeds} seeds in {engine.precision}, {_cost(recipes, train, engine, seeds)}"
        )

    def rows(self, lab: Lab) -> pd.DataFrame:
        """Their rows."""
        how = dict(countermeasures=self.countermeasures, seeds=self.seeds, lab=lab)
        return grid(self.split, self.crafts, self.learners, **how)


def sweep(options) -> int:
    """semkit sweep and demo: learners over methods, training radii and seeds; rows, a table and a figure."""
    check_place(options.images, options.out)
    engine, preset, steps = engine_of(options), options.preset, options.learner_steps
    _settle(options)
    crafts, learners = sweep_recipes(options.methods, options.radii, preset, size=options.size)
    if options.design:
        crafts = DESIGNS[options.design](preset, options.size)
    if options.measure_noise and not any(recipe and recipe.net for recipe in crafts.values()):
        raise ValueError("none of these methods adds noise that could be measured: leave --measure-noise out")
    learners = {r: lasting(recipe, steps) if steps else recipe for r, recipe in learners.items()}
    with progress() as on_step:
        split = limit_test(split_of(options, on_step), options.test_limit)
        if options.design in LEARNERS:
            learners = learners_after(LEARNERS[options.design], preset, options.size, split, steps)
            if not split.spare:
                announce("no fine-tuned learners: they begin with the test images that --test-limit N leaves over")
        runs = _Runs(split, crafts, learners, options.countermeasures, _seeds(options))
        recipes = runs.recipes()  # raises before the folder is claimed
        _claim(options, split, engine, "methods", "design", "radii", "countermeasures")
        announce(runs.told(recipes, engine))
        lab = Lab(engine, options.out / "runs", on_step, workers=options.workers, scheduler=options.scheduler)
        rows = _of_preset(options, runs.rows(lab))
        text = table(rows)
        write_report(options.out, rows, text, _figure(runs, rows, lab))
        if options.measure_noise:
            _write_measures(options, runs, lab)
    print_json(options, as_objects(rows))
    tell(options, text)
    return FINE


def _of_preset(options, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the preset that they were made with as their first column."""
    steps = f", {options.learner_steps} learner steps" if options.learner_steps else ""
    rows.insert(0, "preset", options.preset + steps)
    return rows


def _write_measures(options, runs: _Runs, lab: Lab) -> None:
    """noise.csv and losses.csv of every noise, held against SEM's of the same preset and seed."""
    reference, how = reference_recipe(options.preset, options.size), dict(seeds=runs.seeds, lab=lab)
    noises = noise_rows(runs.split, runs.crafts, reference=reference, **how)
    write_rows(_of_preset(options, noises), options.out / "noise.csv")
    losses = loss_rows(runs.split, runs.crafts, **how)
    write_rows(_of_preset(options, losses), options.out / "losses.csv")


def _figure(runs: _Runs, rows: pd.DataFrame, lab: Lab):
    """The Figure of a sweep of countermeasures or of named methods that add noise; None for any other."""
    from semkit.analysis import figures  # matplotlib takes a second that the other commands need not pay

    train = runs.split.train
    seeds = f"{len(runs.seeds)} seed" + "s" * (len(runs.seeds) > 1)
    title = f"{train.name}: {len(train)} training images, {rows['preset'][0]} preset, {seeds}"
    about = dict(title=title, chance=1 / len(train.classes))
    if runs.countermeasures:
        return figures.countermeasures_figure(rows, **about)
    filtered = [name for name, recipe in runs.crafts.items() if recipe and recipe.radius is None]
    if filtered or not runs.crafts.keys() <= registry.METHODS.keys():
        return None
    place = [train.labels.tolist().index(k) for k in range(min(6, len(train.classes)))]
    made = {
        method: crafted_noise(train, recipe, seed=runs.seeds[0], lab=lab)[0].levels[place]
        for method, recipe in runs.crafts.items() if recipe
    }  # fmt: skip
    return figures.protection_figure(rows, train.images[place], made, radius=8, **about)


def transform(options) -> int:
    """semkit transform: a classifier behind an adversarial-example transform under attacks, ERM and AT beside it."""
    check_place(options.images, options.out)
    engine = engine_of(options)
    _, learners = sweep_recipes((), (0, options.radius), options.preset, size=options.size)
    if options.learner_steps:
        learners[0] = lasting(learners[0], options.learner_steps)
    with progress() as on_step:
        split = limit_test(split_of(options, on_step), options.test_limit)
        behind = Transform(options.net)
        _claim(options, split, engine, "radius", "attacked", net=behind.content)
        trained = [*learners.values(), learners[0]]
        announce(
            f"{options.seeds * len(trained)} learners on {split.train!r}, "
            f"{_cost(trained, split.train, engine, options.seeds)}; then "
            f"{options.attacked} test images are attacked"
        )
        how = dict(radius=options.radius, attacked=options.attacked, seeds=_seeds(options))
        rows = defence_rows(split, behind, learners, **how, lab=Lab(engine, options.out / "runs", on_step))
        text = defences_table(rows)
        about = f"{len(split.train)} training images, {rows['n'][0]} attacked at {options.radius:g}/255"
        figure = defences_figure(rows, chance=1 / len(split.train.classes), title=f"{split.train.name}: {about}")
        write_report(options.out, rows, text, figure)
    print_json(options, as_objects(rows))
    tell(options, text)
    return FINE
