"""The transform and its attacks: what g does, whose gradient an attack climbs, what is said without an external net."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import collisions, error_bars
from nets import batch
from photos import image_set

from semkit.analysis.statistics import interval
from semkit.analysis.study import learned_net, learned_row
from semkit.countermeasures.registry import counter
from semkit.countermeasures.transform import Behind, Transform, transformed
from semkit.images.imageset import Split
from semkit.images.pixels import LEVEL
from semkit.lessons.defences import (
    ATTACKS,
    attacked_rows,
    defence_rows,
    defences_figure,
    defences_table,
    survived,
    transform_attacks,
)
from semkit.nets import models
from semkit.nets.engine import Engine, count_passes, input_gradient, predict
from semkit.nets.lab import Lab
from semkit.nets.models import load_net, save_net
from semkit.training.learning import fit
from semkit.training.perturb import EOT, PGD
from semkit.training.recipes import SGD, LearnRecipe

ENGINE = Engine("cpu", "float32")
LEARN = LearnRecipe(model="tiny", sgd=SGD(steps=30, batch=16), evaluations=1)
FEW = replace(LEARN, sgd=SGD(steps=3, batch=16))


@pytest.fixture(scope="module")
def split():
    return Split(image_set(24, 16), image_set(12, 16, seed=1))


@pytest.fixture(scope="module")
def external(tmp_path_factory, split):
    """The file of a net that was trained on the photos."""
    path = tmp_path_factory.mktemp("nets") / "external.safetensors"
    learned_net(split.test, split.train, LEARN, file=path, lab=Lab(ENGINE))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, split):
    return learned_net(split.train, split.test, LEARN, lab=Lab(ENGINE, tmp_path_factory.mktemp("runs")))[1]


def floats(images):
    return ENGINE.images(images.images), images.labels


def test_a_net_comes_back_from_its_file_as_it_was(tmp_path):
    model = ENGINE.prepare(models.build("tiny", 4)).eval()
    save_net(model, tmp_path / "net.safetensors", net="tiny", classes=tuple("abcd"), size=8)
    again = load_net(tmp_path / "net.safetensors", ENGINE)
    x, _ = batch()
    assert torch.equal(predict(again, x), predict(model, x))
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_what_is_no_net_is_said_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"gone.safetensors: no such net; semkit learn IMAGES --save .* makes one"):
        Transform(tmp_path / "gone.safetensors")
    (tmp_path / "text").write_text("no net")
    torch.save({}, tmp_path / "torch")
    for name in ("text", "torch"):
        with pytest.raises(ValueError, match=f"{name} is no net that semkit can read: ") as said:
            load_net(tmp_path / name, ENGINE)
        assert "\n" not in str(said.value)


def test_g_is_pgd_on_the_external_net_away_from_its_own_answer(external, split, trained):
    x, y = floats(split.train)
    transform, answers = Transform(external), load_net(external, ENGINE)
    moved = transform(trained, x, y)
    guess = predict(answers, x).argmax(1)
    assert torch.equal(moved, PGD(51, 13, random_start=False)(answers, x, guess))
    assert (moved - x).abs().max() <= 51.001 * LEVEL and 0 <= moved.min() and moved.max() <= 1
    assert (predict(answers, moved).argmax(1) != guess).float().mean() > 0.9


def test_g_looks_at_no_label_draws_nothing_and_counts_its_passes(external, split, trained):
    x, y = floats(split.train)
    transform = Transform(external)
    with count_passes() as passes:
        moved = transform(trained, x, y, torch.Generator().manual_seed(1))
    assert passes.input_gradient == transform.passes * len(x) == 13 * len(x)
    assert torch.equal(moved, transform(trained, x, 1 - y, torch.Generator().manual_seed(2)))
    twin = Transform(external, random_start=True)
    first, second = (twin(trained, x, y, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert not torch.equal(first, second)


def test_radius_0_and_no_steps_change_nothing(external, split, trained):
    x, y = floats(split.train)
    assert torch.equal(Transform(external, 0)(trained, x, y), x)
    assert torch.equal(Transform(external, 51, 0)(trained, x, y), x)
    with pytest.raises(ValueError, match="write pixel levels"):
        Transform(external, 8 / 255)


def test_another_net_in_the_same_file_is_another_transform(tmp_path, external):
    path = tmp_path / "external.safetensors"
    path.write_bytes(external.read_bytes())
    before = Transform(path)
    save_net(models.build("tiny", 2, seed=5), path, net="tiny", classes=("a", "b"), size=16)
    after = Transform(path)
    assert before != after and repr(before) != repr(after) and after.net(ENGINE)
    with pytest.raises(ValueError, match="holds another net than when this transform was made"):
        before.net(ENGINE)


def test_behind_g_the_answer_is_that_at_g_and_the_gradient_that_at_g_taken_for_one_at_x(external, split, trained):
    x, y = floats(split.train)
    transform = Transform(external)
    moved, behind = transform(trained, x), Behind(trained, transform)
    assert torch.equal(predict(behind, x), predict(trained, moved))
    assert torch.equal(input_gradient(behind, x, y), input_gradient(trained, moved, y))
    assert not torch.equal(input_gradient(trained, x, y), input_gradient(trained, moved, y))  # the naive twin


def test_a_g_that_does_nothing_makes_every_attack_the_naive_one(external, split, trained):
    x, y = floats(split.train)
    behind = Behind(trained, Transform(external, 0))
    attack, seeded = PGD(8, 3), lambda: torch.Generator().manual_seed(0)
    assert torch.equal(attack(behind, x, y, seeded()), attack(trained, x, y, seeded()))


def test_eot_averages_over_the_starts_of_a_random_g(external, split, trained):
    x, y = floats(split.train)
    twin = Transform(external, 51, 2, random_start=True)
    drawn = Behind(trained, twin, seed=3)
    mean = sum(input_gradient(drawn, x, y) for _ in range(3)) / 3
    assert torch.equal(EOT(8, 1, draws=3).gradient(Behind(trained, twin, seed=3), x, y), mean)
    assert not torch.equal(input_gradient(Behind(trained, twin, seed=3), x, y), mean)


def test_attacks_climb_the_net_that_they_name(external, split, trained):
    attacks = transform_attacks(trained, Transform(external), 40)
    assert list(attacks) == ["none", "naive", "external", "BPDA", "BPDA+EOT"]
    x, y = floats(split.test)
    climbed, pgd = attacks["external"]
    x_adv = pgd(climbed, x, y, torch.Generator().manual_seed(0))
    right = lambda images: (predict(load_net(external, ENGINE), images).argmax(1) == y).sum()  # noqa: E731
    assert right(x_adv) < right(x) and (x_adv - x).abs().max() <= 40.001 * LEVEL
    assert attacks["BPDA"][0].transform == Transform(external)
    assert attacks["BPDA+EOT"][0].transform == Transform(external, random_start=True)


@pytest.mark.whole
def test_the_worst_of_the_attacks_is_the_worst_for_every_image(external, split, trained):
    transform = Transform(external, 51, 2)
    attacks, judge, few = transform_attacks(trained, transform, 8), Behind(trained, transform), split.test.limit(6)
    rows = attacked_rows(judge, attacks, few, seed=1)
    attacks = transform_attacks(trained, transform, 8)  # those whose g draws have drawn
    right = torch.stack([survived(judge, attack, few, seed=1) for attack in attacks.values()])
    assert list(rows["accuracy"]) == pytest.approx(
        [*right.float().mean(1).tolist(), right.all(0).float().mean().item()]
    )
    assert rows["attack"].iloc[-1] == "worst of these" and rows["accuracy"].iloc[-1] == rows["accuracy"].min()
    assert list(rows["attack_passes"][:-1]) == [2, 12, 12, 32, 122]  # the judge's own g: 2 of each


@pytest.mark.whole
def test_the_rows_of_the_defences_say_what_they_cost(external, split, tmp_path):
    learners = {0: FEW, 4: replace(FEW, perturbation=PGD(4, 1))}
    how = dict(radius=8, attacked=6, lab=Lab(ENGINE, tmp_path))
    rows = defence_rows(split, Transform(external, 51, 2), learners, **how)
    assert rows.equals(defence_rows(split, Transform(external, 51, 2), learners, **how))
    assert list(rows["attack"][rows["defence"] == "ERM"]) == ["none", "naive", "worst of these"]
    costs = rows.groupby("defence")["training_passes"].first().to_dict()
    assert costs == {"ERM": 48, "AT 4": 96, "transform": 48 + 2 * 24}
    assert set(rows["n"]) == {6}


def test_a_purifier_changes_the_training_images_and_needs_its_net(external, split):
    name = f"purifier={external}"
    train, recipe = counter(split.train, LEARN, [name])
    assert torch.equal(train.images, transformed(split.train.images, Transform(external))) and recipe == LEARN
    apart = (train.images.int() - split.train.images.int()).abs()
    assert apart.max() <= 51 and apart.float().mean() > 10
    with pytest.raises(ValueError, match="a purifier needs an external net: purifier=FILE"):
        counter(split.train, LEARN, ["purifier"])
    with pytest.raises(ValueError, match="nowhere: no such net"):
        counter(split.train, LEARN, ["purifier=nowhere"])


def test_a_purifiers_net_runs_on_the_engine_that_was_asked_for(external, split):
    name, exact = f"purifier={external}", Engine("cpu", "float64")
    train, _ = counter(split.train, LEARN, [name], exact)
    assert torch.equal(train.images, transformed(split.train.images, Transform(external), exact))
    row = learned_row(split.train, split.test, FEW, countermeasures=[name], lab=Lab(exact))
    done = fit(train, split.test, FEW, lab=Lab(exact))
    assert row["curve"] == [list(point) for point in done.curve]
    assert not torch.equal(train.images, counter(split.train, LEARN, [name], Engine("cpu", "bfloat16"))[0].images)


# --- figures

DEFENCES = {
    "ERM": ("none", "naive", "worst of these"),
    "AT 4": ("none", "naive", "worst of these"),
    "transform": ATTACKS,
}
ATTACKED = [
    {"defence": d, "attack": a, "seed": s, "accuracy": 0.9 - 0.1 * i - 0.05 * j - 0.03 * s}
    for j, (d, attacks) in enumerate(DEFENCES.items())
    for i, a in enumerate(attacks)
    for s in range(3)
]


def test_every_attack_has_its_place_and_a_defence_without_a_transform_is_said_to_lack_some():
    figure = defences_figure(ATTACKED, chance=0.1, title="Defences")
    (axes,) = figure.axes
    assert collisions(figure) == ([], []) and len(axes.get_xticklabels()) == len(ATTACKS) == 6
    assert [text.get_text() for text in axes.texts] == ["not applicable:\nERM\nAT 4"] * 3
    (_, (at, _), (transform, ends)) = error_bars(axes, 3)
    assert np.isfinite(at[:, 1]).tolist() == [True, True, False, False, False, True]
    mean, low, high = interval([r["accuracy"] for r in ATTACKED if r["attack"] == "BPDA"])
    assert transform[3, 1] == pytest.approx(100 * mean) and ends[3] == pytest.approx([100 * low, 100 * high])


def test_the_table_of_defences_has_a_column_an_attack_in_the_order_of_what_they_know():
    rows = [{**row, "training_passes": 12_000} for row in reversed(ATTACKED)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in defences_table(rows).splitlines()]
    assert lines[0] == ["classifier", *ATTACKS, "passes of training"]
    assert lines[2][0] == "transform" and lines[2][-1] == "12,000" and lines[4][3:6] == ["-"] * 3
