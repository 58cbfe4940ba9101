"""The names of files that are found and written, and files that are written whole or not at all."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from semkit.images import files

PICTURE = Image.new("RGB", (4, 3))


def test_odd_names_are_shown_in_one_printable_line():
    assert files.shown("größe/日本.png") == "größe/日本.png"
    assert files.shown("a\nb\x1b") == r"a\nb\x1b"
    assert files.shown(os.fsdecode(b"caf\xe9.png")) == r"caf\xe9.png"


def test_listing_agrees_with_what_was_written_and_with_image_folder(hostile_folder):
    folder, names = hostile_folder
    images, loose, ignored = files.find_images(folder)
    assert [n for of_class in images.values() for n in of_class] == names and len(names) >= 200
    assert ignored == ["cats/notes.txt"] and loose == []
    theirs = ImageFolder(folder)
    assert list(images) == theirs.classes
    theirs = [Path(path).relative_to(folder).as_posix() for path, _ in theirs.samples]
    ours = [n for n in names if not n.endswith(".gif")]
    assert sorted(n for n in theirs if not Path(n).name.startswith(".")) == ours


def test_links_are_followed_but_not_round_in_circles(tmp_path):
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        PICTURE.save(tmp_path / "set" / name / "1.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    PICTURE.save(elsewhere / "2.png")
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/a/self").symlink_to(tmp_path / "set/a")
    (tmp_path / "set/b/more").symlink_to(elsewhere)
    (tmp_path / "set/c").symlink_to(elsewhere)
    images, _, ignored = files.find_images(tmp_path / "set")
    assert images == {"a": ("a/1.png",), "b": ("b/1.png", "b/more/2.png"), "c": ("c/2.png",)}
    assert ignored == ["a/self/", "a/up/"]


def test_output_names_by_example():
    names = ["c/a.jpg", "c/b.jpg", "c/b.PNG", "c/B.tif", "d/b.jpg", "c/x.y.gif", "e/t.jpg", "e/t.png", "e/t.jpg.jpg"]
    assert files.output_names(names) == {
        "c/a.jpg": "c/a.png",
        "c/b.jpg": "c/b.jpg.png",
        "c/b.PNG": "c/b.PNG.png",
        "c/B.tif": "c/B.tif.png",
        "d/b.jpg": "d/b.png",
        "c/x.y.gif": "c/x.y.png",
        "e/t.jpg": "e/t.jpg.png",
        "e/t.png": "e/t.png.png",
        "e/t.jpg.jpg": "e/t.jpg.jpg.png",
    }
    assert files.output_names(["a.png/1.jpg", "a.jpg"]) == {"a.png/1.jpg": "a.png/1.png", "a.jpg": "a.jpg.png"}
    with pytest.raises(ValueError, match=r"no name for the PNG of a\.jpg: a\.jpg\.png is a folder"):
        files.output_names(["a.png/1.jpg", "a.jpg.png/1.jpg", "a.jpg"])


def test_a_name_that_would_be_too_long_is_refused():
    longest = ["c/" + "ä" * 125 + end for end in (".jpg", ".tif")]  # 254 bytes
    with pytest.raises(ValueError, match=r"no name for the PNG of c/ä+\.jpg: with \.png after it, it is too long; ren"):
        files.output_names(longest)
    assert len(files.output_names(longest[:1])) == 1  # alone it stays as long as it is
    fits = [name.replace("ää", "", 1) for name in longest]  # 254 with .png, and folders do not count
    assert files.output_names(fits) == {name: name + ".png" for name in fits}


part = st.text("abAB.é", min_size=1, max_size=4).filter(lambda s: s.strip("."))
name = st.tuples(st.sampled_from(["", "c/", "C/", "d/e/"]), part, st.sampled_from([".png", ".jpg", ".PNG", ".jpg.png"]))


@settings(deadline=None)
@given(st.lists(name.map("".join), unique=True, max_size=12))
def test_output_names_never_meet(names):
    outputs = files.output_names(names)
    assert list(outputs) == names
    assert len(set(outputs.values())) == len(names)
    for original, output in outputs.items():
        stem, _ = os.path.splitext(original)
        assert output in (stem + ".png", original + ".png")
        twins = [n for n in names if n != original and os.path.splitext(n)[0].casefold() == stem.casefold()]
        assert not twins or output == original + ".png"


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / ("long" * 60 + ".json")
    files.atomic_write(path, b"first")
    old = os.umask(0)
    os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o666 & ~old

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.atomic_write(path, fail)
    files.atomic_write(path.with_name("second"), lambda file: file.write(b"second"))
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == {path.name: b"first", "second": b"second"}


def check_writers(write, folder):
    """Fails unless three threads that write to one path, half by half in step, leave the whole of one and no more.

    The first of them writes its first half after the others', the second one is the longest: in one file they must mix.
    """
    path, step = folder / "one", threading.Barrier(3, timeout=20)
    contents = [letter * size for letter, size in ((b"a", 50_000), (b"b", 60_000), (b"c", 40_000))]

    def halves(content, file):
        last = content is contents[0]
        for half in (content[:20_000] * (not last), content[:20_000] * last, content[20_000:]):
            step.wait()
            file.write(half)
            file.flush()

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(write, path, partial(halves, content)) for content in contents]
    assert [run.exception() for run in runs] == [None] * 3
    assert path.read_bytes() in contents and os.listdir(folder) == ["one"]


def shared_name(path, content):
    """The broken twin of atomic_write: all writers of a path have one temporary file."""
    temporary = path.with_name(".one.tmp")
    with open(temporary, "wb") as file:
        content(file)
    with suppress(FileNotFoundError):
        os.replace(temporary, path)


def test_writers_of_one_path_do_not_mix(tmp_path):
    check_writers(files.atomic_write, tmp_path)


def test_writers_that_mix_would_be_seen(tmp_path):
    with pytest.raises(AssertionError, match="read_bytes"):
        check_writers(shared_name, tmp_path)


KILLED = "import os, sys; from semkit.images.files import *; atomic_write(sys.argv[1], lambda file: os._exit(9))"


@pytest.mark.whole
def test_what_killed_writers_leave_is_removed_and_nothing_else(tmp_path):
    names = lambda: sorted(path.name for path in tmp_path.rglob("*") if path.is_file())  # noqa: E731
    for name in ("image.png", "below/image.png"):
        assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], check=False).returncode == 9
    (tmp_path / "below/.mine.tmp").touch()
    assert len(names()) == 3

    def write(file):  # a writer that is alive
        file.write(b"whole")
        files.remove_leftovers(tmp_path, age=60)  # a file of this minute may be about to be locked
        assert len(names()) == 4
        files.remove_leftovers(tmp_path, age=0)

    files.atomic_write(tmp_path / "new.png", write)
    assert names() == [".mine.tmp", "new.png"] and (tmp_path / "new.png").read_bytes() == b"whole"
