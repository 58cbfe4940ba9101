"""Sets that are streamed from disk: the same bytes as in memory, memory that does not grow with them, no room left."""

import errno
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage  # noqa: F401, for the processes that may not take the memory of its import
import torch
from forked import finish
from pages import fresh_pages
from photos import contents, image_set, make_photos
from PIL import Image

from semkit.app.checking import protected_split
from semkit.countermeasures.registry import counter
from semkit.images import imageset
from semkit.images.corruptions import corrupted
from semkit.images.files import out_of_memory, read_tensors, write_tensors
from semkit.images.imageset import Storage, zeros
from semkit.images.loading import load
from semkit.images.picture import BYTES_PER_PIXEL, Quality, apply_noise, difference, read_image, write_png
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.protections.crafting import CraftRecipe, Interrupted, craft
from semkit.protections.noise import (
    Noise,
    clipped,
    save,
)
from semkit.protections.noise import load as load_noise
from semkit.training.learning import accuracy, fit
from semkit.training.perturb import PGD, Uniform
from semkit.training.recipes import SGD, LearnRecipe

ENGINE = Engine("cpu", "float32")
RECIPE = CraftRecipe(Uniform(4), PGD(4, 1), steps=1, samples=1, surrogate="tiny", sgd=SGD(steps=5, batch=4))
MIB = 1 << 20


def streamed(images, folder):
    """The same set, mapped from a file in `folder`."""
    mapped = zeros(images.images.shape, torch.uint8, folder)
    mapped.copy_(images.images)
    return replace(images, images=mapped, scratch=folder)


@pytest.fixture
def both(tmp_path, monkeypatch):
    """(a set in memory, the same streamed in blocks of 3 images)."""
    images = image_set(20, classes=3)
    monkeypatch.setattr(imageset, "BLOCK", 3 * images.images[0].nbytes + 1)
    return images, streamed(images, tmp_path)


# -- where a set goes --------------------------------------------------------------------------------------------------


def test_large_sets_go_to_disk_and_small_ones_to_memory(tmp_path):
    free = imageset.free_memory()
    auto = Storage(folder=tmp_path)
    assert auto.scratch(free // 100) is None and auto.scratch(free // 2) == tmp_path
    assert Storage("memory").scratch(100 * free) is None
    assert Storage("disk", tmp_path).scratch(1) == tmp_path
    assert Storage("disk", tmp_path / "not" / "there yet").scratch(1) == tmp_path
    with pytest.raises(ValueError, match="unknown storage 'ram'; known are auto, memory, disk"):
        Storage("ram")


def test_a_control_group_has_left_what_it_and_those_above_it_have_not_used(tmp_path):
    groups = {"": ("max", 70, 1), "job": ("1000\n", 700, 100), "job/step": ("900", 500, 250), "other": ("5", 1, 0)}
    for name, (limit, used, cached) in groups.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "memory.max").write_text(limit)
        (tmp_path / name / "memory.current").write_text(f"{used}\n")
        (tmp_path / name / "memory.stat").write_text(f"anon 3\ninactive_file {cached}\nactive_file 7\n")
    assert imageset.left_in_groups(tmp_path, "job/step") == [650, 400]
    assert imageset.left_in_groups(tmp_path, "job/gone") == [400] and imageset.left_in_groups(tmp_path, "") == []


def test_free_memory_is_between_nothing_and_all():
    assert 0 < imageset.free_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("reserve", ["by the system", "by writing"])
def test_a_mapped_tensor_has_its_room_and_leaves_no_file(tmp_path, monkeypatch, reserve):
    if reserve == "by writing":
        monkeypatch.delattr(os, "posix_fallocate")
    room = os.statvfs(tmp_path)
    mapped = zeros((2000, 3, 32, 32), torch.int8, tmp_path)
    taken = (room.f_bavail - os.statvfs(tmp_path).f_bavail) * room.f_frsize
    assert not mapped.any() and mapped.is_contiguous() and os.listdir(tmp_path) == []
    mapped[7] = -3
    assert int(mapped.sum(dtype=torch.int64)) == -3 * 3072
    assert taken > mapped.nbytes / 2  # others use this disk too
    assert zeros((0, 3, 8, 8), torch.uint8, tmp_path).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_blocks_are_all_rows_once(monkeypatch, n):
    values = torch.arange(7 * 4, dtype=torch.uint8).view(7, 4)
    monkeypatch.setattr(imageset, "BLOCK", 4 * n)
    parts = [values[part] for part in imageset.blocks(values)]
    assert torch.cat(parts).equal(values) and max(map(len, parts)) == n
    monkeypatch.setattr(imageset, "BLOCK", 1)  # less than a row
    assert [len(values[part]) for part in imageset.blocks(values)] == [1] * 7


# -- the same results --------------------------------------------------------------------------------------------------


def parts_of(images):
    noise = torch.randint(-8, 9, images.images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    return {
        "itself": images, "taken": images.take([5, 3, 19]), "masked": images.take(images.labels == 1),
        "limited": images.limit(7), "protected": images.with_noise(noise), "all": images.take(torch.arange(20)),
        "compressed": counter(images, LearnRecipe(), ["grayscale", "jpeg"])[0], "fogged": corrupted(images, "fog", 2),
    }  # fmt: skip


def test_parts_of_a_streamed_set_are_those_of_a_resident_one_and_streamed(both):
    resident, mapped = both
    for name, part in parts_of(resident).items():
        other = parts_of(mapped)[name]
        assert other.fingerprint == part.fingerprint and other.files == part.files, name
        assert (part.held, other.held) == ("resident", "streamed")
        assert repr(other) == repr(part).replace("classes)", "classes, streamed)")
    assert parts_of(mapped)["all"] is mapped


@pytest.mark.parametrize("hold", ["memory", "disk"])
def test_a_folder_is_read_to_where_it_is_to_be_held(tmp_path, hold):
    photos = make_photos(tmp_path / "photos", 12)
    (photos / "a" / "broken.png").write_bytes(b"broken")
    here = Storage(hold, tmp_path)
    found = load(photos, size=16, skip_unreadable=True, storage=here)
    plain = load(photos, size=16, skip_unreadable=True)
    assert [s.fingerprint for s in (found.train, found.test)] == [s.fingerprint for s in (plain.train, plain.test)]
    assert found.train.held == ("streamed" if hold == "disk" else "resident") and len(found.skipped) == 1
    shapes = load("shapes", size=12, limit=20, storage=here)
    assert shapes.train.held == found.train.held and shapes.train.images.shape == (20, 3, 12, 12)


VARIANTS = {
    "random": {"start": "random"},
    "warm": {"start": "warm"},
    "class-wise": {"start": "warm", "class_wise": True},
}


def trace(crafted):
    weights = [value.numpy().tobytes() for value in crafted.surrogate.state_dict().values()]
    return crafted.noise.numpy().tobytes(), weights, crafted.losses, crafted.passes


@pytest.mark.whole
@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_noise_is_resident_noise_also_after_stops_on_either_side(both, tmp_path, variant):
    recipe, state, turn = replace(RECIPE, **VARIANTS[variant]), tmp_path / "state", 0
    whole = craft(both[0], recipe, lab=Lab(ENGINE))
    assert trace(craft(both[1], recipe, lab=Lab(ENGINE))) == trace(whole)
    while True:
        try:
            pieced = craft(both[turn % 2], recipe, lab=Lab(ENGINE, on_step=lambda *_: True), checkpoint=state)
            break
        except Interrupted:
            turn += 1
    assert turn == (5 if recipe.class_wise else 10)
    assert trace(pieced) == trace(whole)


def test_a_state_is_not_moved_by_the_noise_that_is_made_after_it(both, tmp_path):
    """Warm noise on disk is newer than the state when a run is killed: it must not be gone on with."""
    recipe, state = replace(RECIPE, start="warm"), tmp_path / "state"

    def die(what, step, *_):
        if step == 8:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        craft(both[1], recipe, lab=Lab(ENGINE, on_step=die, checkpoint_every=0), checkpoint=state)
    assert trace(craft(both[1], recipe, lab=Lab(ENGINE), checkpoint=state)) == trace(
        craft(both[0], recipe, lab=Lab(ENGINE))
    )


def test_a_learner_of_a_streamed_set_is_that_of_a_resident_one(both):
    recipe = LearnRecipe(PGD(4, 1), "tiny", SGD(steps=4, batch=8), evaluations=2)
    resident, mapped = (fit(images, images, recipe, lab=Lab(ENGINE)) for images in both)
    assert resident.losses == mapped.losses and resident.curve == mapped.curve
    assert accuracy(mapped.model, both[1], batch=7) == accuracy(resident.model, both[0])


def test_noise_is_measured_in_blocks_as_at_once(both):
    levels = torch.full_like(both[0].images, 8, dtype=torch.int8)
    left = torch.minimum(levels.int(), 255 - both[0].images.int())
    wanted = {"clipped_fraction": round(float((left != 8).double().mean()), 4)}
    wanted["mean_effective_noise"] = round(float(left.double().mean()), 3)
    assert clipped(Noise(levels, 8), both[1].images) == wanted


@pytest.mark.whole
def test_protecting_on_disk_writes_the_bytes_of_memory(tmp_path):
    photos, found = make_photos(tmp_path / "photos", 24), {}
    for hold in ("memory", "disk"):
        out, log = tmp_path / hold, tmp_path / "log"
        more = ["--preset", "quick", "--size", "16", "--fraction", "0.5", "--hold", hold]
        assert finish(["protect", str(photos), str(out), *more], log) == 0, log.read_text()
        assert log.read_text().rstrip().endswith({"memory": "images resident", "disk": "images streamed"}[hold])
        found[hold] = contents(out)
        assert (b'"held": "resident"' if hold == "memory" else b'"held": "streamed"') in found[hold].pop("report.json")
    assert found["disk"] == found["memory"]
    splits = [load(photos, size=16, storage=Storage(hold, tmp_path)) for hold in ("memory", "disk")]
    resident, mapped = (protected_split(split, str(photos), tmp_path / "disk").train for split in splits)
    assert (resident.held, mapped.held) == ("resident", "streamed") and resident.fingerprint == mapped.fingerprint
    assert resident.fingerprint != splits[0].train.fingerprint


# -- memory ------------------------------------------------------------------------------------------------------------


def use_a_set(hold, folder, n):
    """All that is done with a set of n images of 64 px and its noise, for a process that may not hold them."""
    images = image_set(12, size=64)
    scratch = Storage(hold, folder).scratch(n * images.images[0].nbytes)
    pixels = zeros((n, *images.images.shape[1:]), torch.uint8, scratch)
    pixels[:: n // 12][:12] = images.images
    images = replace(images, images=pixels, labels=torch.arange(n) % 2, scratch=scratch)
    recipe = replace(RECIPE, sgd=SGD(steps=2, batch=8))
    with pytest.raises(Interrupted):
        lab = Lab(ENGINE, on_step=lambda what, step, *_: step == 4)
        craft(images, recipe, lab=lab, checkpoint=Path(folder) / "state")
    levels = zeros(images.images.shape, torch.int8, scratch)
    levels[::2] = 8
    noise = Noise(levels, 8, fingerprint=images.fingerprint)
    save(noise, Path(folder) / "noise.safetensors")
    assert clipped(noise, images.images)["mean_effective_noise"] > 0
    protected = images.with_noise(noise.levels)
    fit(protected, protected.take(slice(16)), LearnRecipe(model="tiny", sgd=SGD(2, 8), evaluations=1), lab=Lab(ENGINE))
    assert len(protected.limit(n // 2)) == n // 2


def fits_in_memory(hold, folder, n):
    """Exit code 0 if all that was possible, 3 if there was no memory for it."""
    try:
        use_a_set(hold, folder, n)
    except (MemoryError, RuntimeError) as error:
        print(error)
        return 3 if out_of_memory(error) else 1


@pytest.mark.whole
@pytest.mark.parametrize(("hold", "code"), [("disk", 0), ("memory", 3)])
def test_a_set_larger_than_memory(tmp_path, hold, code):
    """120 MiB of images and as much noise, in a process that may hold 200 MiB more than it does."""
    n, log = 120 * MIB // (3 * 64 * 64), tmp_path / "log"
    assert finish(partial(fits_in_memory, hold, tmp_path, n), log, more_memory=200 * MIB) == code, log.read_text()


def held():
    """Bytes that this process holds in memory of its own, files that it maps not among them."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.whole
def test_noise_and_states_are_mapped_from_their_files(tmp_path):
    levels = zeros((64 * MIB // 3072, 3, 32, 32), torch.int8, tmp_path)
    levels[5] = 7
    before = held()
    save(Noise(levels, 8), tmp_path / "noise.safetensors")
    loaded = load_noise(tmp_path / "noise.safetensors").levels
    write_tensors(tmp_path / "state", {"noise": levels}, {})
    state, _ = read_tensors(tmp_path / "state", ())
    assert held() - before < 8 * MIB
    assert loaded.equal(levels) and state["noise"].equal(levels)
    # A copy would be seen; from the kernel, since a clone may lie in memory that an earlier test has freed.
    copy = fresh_pages(levels.nbytes)
    assert held() - before > 0.9 * len(copy)


# -- no room left ------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_no_room_on_disk_for_the_images_is_one_line_and_nothing_is_left(tmp_path):
    photos, out, log = make_photos(tmp_path / "photos", 36), tmp_path / "out", tmp_path / "log"
    before = sorted(os.listdir(tmp_path))
    command = ["protect", str(photos), str(out), "--preset", "quick", "--hold", "disk"]
    assert finish(command, log, largest_file=36 * 3 * 32 * 32 - 1) == 2
    (line,) = log.read_text().splitlines()
    what = "36 images of 32 x 32 pixels take 0.000111 GB"
    assert line == f"semkit: {tmp_path}: File too large: {what}; a smaller size takes less"  # nothing was begun
    assert sorted(os.listdir(tmp_path)) == [*before[:0], "log", *before] and not out.exists()


def ask_for_a_whole_disk(folder):
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        zeros((shutil.disk_usage(folder).total, 2), torch.int8, folder)


@pytest.mark.whole
def test_room_that_a_disk_does_not_have_is_not_taken_for_a_moment(tmp_path):
    # A file that began to grow would meet the limit: "File too large".
    assert finish(partial(ask_for_a_whole_disk, tmp_path), tmp_path / "log", largest_file=MIB) == 0


@pytest.mark.whole
def test_a_photo_too_large_for_memory_is_named_before_the_crafting(tmp_path):
    photos, log = make_photos(tmp_path / "photos"), tmp_path / "log"
    Image.new("1", (4000, 5000)).save(photos / "a" / "big.png")
    command = ["protect", str(photos), str(tmp_path / "out"), "--preset", "quick"]
    assert finish(command, log, more_memory=200 * MIB) == 2
    *_, line = log.read_text().splitlines()
    assert line.startswith("semkit: a/big.png of 4000 x 5000 pixels takes 0.3 GB of memory to protect, ")
    assert not (tmp_path / "out").exists()


def protect_a_photo(folder):
    image = read_image(folder / "big.png")
    noisy = apply_noise(image, np.full((3, 32, 32), 8, np.int8), 8)
    write_png(noisy, folder / "noisy.png")
    Quality(1).add(image, noisy)
    return difference(image, noisy) - 8


@pytest.mark.whole
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_large_photo_takes_16_bytes_a_pixel_to_protect(tmp_path, mode):
    Image.new(mode, (4000, 5000)).save(tmp_path / "big.png")
    memory = 4000 * 5000 * BYTES_PER_PIXEL + 20 * MIB
    code = finish(partial(protect_a_photo, tmp_path), tmp_path / "log", more_memory=memory)
    assert code == 0, (tmp_path / "log").read_text()


@pytest.mark.whole
@pytest.mark.parametrize("more", [1, 12])
def test_no_memory_is_one_line(tmp_path, more):
    photos, log = make_photos(tmp_path / "photos", 36), tmp_path / "log"
    command = ["protect", str(photos), str(tmp_path / "out"), "--preset", "quick", "--hold", "memory"]
    assert finish(command, log, more_memory=more * MIB) == 2, log.read_text()
    *_, line = log.read_text().splitlines()
    assert line.startswith("semkit: out of memory (") and "--hold disk" in line and "--resume" in line
    assert not contents(tmp_path / "out")


def test_after_no_memory_a_run_goes_on_from_its_state(both, tmp_path):
    def die(what, step, *_):
        if step == 4:
            torch.empty(1 << 50)

    with pytest.raises(RuntimeError) as said:
        craft(both[0], RECIPE, lab=Lab(ENGINE, on_step=die, checkpoint_every=0), checkpoint=tmp_path / "state")
    assert out_of_memory(said.value)
    taken = []
    watch = lambda what, step, *_: taken.append(step) or False  # noqa: E731
    gone_on = craft(both[0], RECIPE, lab=Lab(ENGINE, on_step=watch), checkpoint=tmp_path / "state")
    assert taken[0] == 4 and trace(gone_on) == trace(craft(both[0], RECIPE, lab=Lab(ENGINE)))


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("could not create a primitive"), True), (RuntimeError("the net forgot its memory"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_what_counts_as_no_memory(error, is_it):
    assert out_of_memory(error) is is_it
