"""Converters: levels survive every way there and back, and no foreign file does anything but hold numbers."""

import collections
import contextlib
import copyreg
import errno
import io
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from semkit.__main__ import main
from semkit.protections.conversion import FORMATS, convert, read, write
from semkit.protections.noise import Noise, NoiseError, from_array, load, save

SHAPES = st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 5))
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
INT8 = hnp.arrays(np.int8, SHAPES)
EVERY_LEVEL = np.arange(-128, 128).astype(np.int8).reshape(4, 1, 8, 8).repeat(3, axis=1)


def noise_of(levels, **record):
    return Noise(torch.from_numpy(levels.copy()), int(np.abs(levels.astype(int)).max()), **record)


def named(folder, suffix):
    return Path(folder, f"noise{suffix}")


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
@settings(QUICK, max_examples=20)
@given(levels=INT8)
def test_levels_survive_every_format(suffix, levels):
    with tempfile.TemporaryDirectory() as folder:
        write(noise_of(levels), named(folder, suffix))
        back = read(named(folder, suffix))
    np.testing.assert_array_equal(back.levels.numpy(), levels)
    assert back.radius == np.abs(levels.astype(int)).max()


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_level_survives_every_format(suffix, tmp_path):
    save(noise_of(EVERY_LEVEL, classes=("a", "b")), tmp_path / "first.safetensors")
    convert(tmp_path / "first.safetensors", named(tmp_path, suffix))
    convert(named(tmp_path, suffix), tmp_path / "last.safetensors")
    np.testing.assert_array_equal(load(tmp_path / "last.safetensors").levels.numpy(), EVERY_LEVEL)


def test_safetensors_keep_the_record(tmp_path):
    noise = noise_of(EVERY_LEVEL, recipe={"steps": 3}, fingerprint="ab", classes=("a",), version="0.0.9")
    save(noise, tmp_path / "a.safetensors")
    back = convert(tmp_path / "a.safetensors", tmp_path / "new" / "b.SAFETENSORS")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "new" / "b.SAFETENSORS").read_bytes()
    assert back.recipe == noise.recipe


# ---- what others read: numpy, pickle, torch and Pillow as oracles ---------------------------------------------------


def test_others_read_what_is_written(tmp_path):
    for suffix in FORMATS:
        write(noise_of(EVERY_LEVEL), named(tmp_path, suffix))
    for suffix in (".pkl", ".pickle"):
        array = pickle.loads(named(tmp_path, suffix).read_bytes())
        assert array.dtype == np.int8
        np.testing.assert_array_equal(array, EVERY_LEVEL)
    np.testing.assert_array_equal(np.load(named(tmp_path, ".npy"), allow_pickle=False), EVERY_LEVEL)
    with np.load(named(tmp_path, ".npz"), allow_pickle=False) as held:
        assert held.files == ["noise"]
        np.testing.assert_array_equal(held["noise"], EVERY_LEVEL)
    tensor = torch.load(named(tmp_path, ".pt"), weights_only=True)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, torch.from_numpy(EVERY_LEVEL) / 255, rtol=0, atol=0)


def test_pickles_are_written_for_numpy_1_and_2(tmp_path):
    # The noise itself spells the name that is rewritten: the values must not change.
    text = np.frombuffer(b"cnumpy._core.multiarray\n", np.int8).reshape(1, 1, 4, 6)
    write(noise_of(text), tmp_path / "noise.pkl")
    data = (tmp_path / "noise.pkl").read_bytes()
    assert data.startswith(b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n")
    np.testing.assert_array_equal(pickle.loads(data), text)


def test_pngs_are_levels_plus_128(tmp_path):
    for channels in (1, 3):
        folder = tmp_path / str(channels)
        levels = np.random.default_rng(0).integers(-128, 128, (11, channels, 3, 5)).astype(np.int8)
        write(noise_of(levels), folder)
        assert sorted(os.listdir(folder)) == [f"{i:02d}.png" for i in range(11)]
        for i, one in enumerate(levels):
            with Image.open(folder / f"{i:02d}.png") as image:
                assert image.mode == ("RGB" if channels == 3 else "L") and image.size == (5, 3)
                pixels = np.asarray(image).astype(int).reshape(3, 5, channels)
            np.testing.assert_array_equal(pixels.transpose(2, 0, 1) - 128, one)


# ---- what others write ----------------------------------------------------------------------------------------------


LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "K": lambda a: np.ascontiguousarray(a.transpose(3, 1, 0, 2)).transpose(2, 1, 3, 0),
    "strided": lambda a: np.repeat(a, 2, axis=3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", range(6))
def test_pickled_arrays(tmp_path, protocol, layout):
    for dtype in ("i1", "<i2", ">i4", "<f2", ">f4", "f8"):
        data = pickle.dumps(LAYOUTS[layout](EVERY_LEVEL.astype(dtype)), protocol=protocol)
        names = (b"numpy._core.", b"numpy.core.") if protocol < 4 else (b"numpy._core.",)  # 4 and 5 count letters
        for name in names:
            (tmp_path / "noise.pkl").write_bytes(data.replace(b"numpy._core.", name, 1))
            np.testing.assert_array_equal(read(tmp_path / "noise.pkl").levels.numpy(), EVERY_LEVEL)


def test_pickles_of_numpy_1_in_protocol_4(tmp_path):
    data = pickle.dumps(EVERY_LEVEL, protocol=4)
    old, new = b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
    size = struct.unpack("<Q", data[3:11])[0]
    assert old in data and len(data) == size + 11  # one frame, whose length changes with the name
    data = data[:3] + struct.pack("<Q", size - 1) + data[11:].replace(old, new, 1)
    (tmp_path / "noise.pkl").write_bytes(data)
    np.testing.assert_array_equal(read(tmp_path / "noise.pkl").levels.numpy(), EVERY_LEVEL)


def test_pickles_of_python_2(tmp_path):
    raw = EVERY_LEVEL.tobytes()
    text = b"".join(b"\\x%02x" % byte for byte in raw)
    data = (  # what Python 2 wrote in protocol 0: the bytes as a quoted str
        b"cnumpy.core.multiarray\n_reconstruct\np0\n(cnumpy\nndarray\np1\n(I0\ntp2\nS'b'\np3\ntp4\nRp5\n(I1\n"
        b"(I4\nI3\nI8\nI8\ntp6\ncnumpy\ndtype\np7\n(S'i1'\np8\nI0\nI1\ntp9\nRp10\n(I3\nS'|'\np11\nNNNI-1\nI-1\nI0\n"
        b"tp12\nbI00\nS'" + text + b"'\np13\ntp14\nb."
    )
    np.testing.assert_array_equal(pickle.loads(data, encoding="latin1"), EVERY_LEVEL)
    (tmp_path / "noise.pkl").write_bytes(data)
    np.testing.assert_array_equal(read(tmp_path / "noise.pkl").levels.numpy(), EVERY_LEVEL)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_torch_floats_in_the_radius(tmp_path, dtype):
    exact = torch.from_numpy(EVERY_LEVEL)
    for held in (exact.to(dtype) / 255, {"noise": (exact.double() / 255).to(dtype), "epoch": 3}):
        torch.save(held, tmp_path / "noise.pt")
        back = read(tmp_path / "noise.pt")
        assert torch.equal(back.levels, exact)
        assert back.recipe == {"imported": {"file": "noise.pt", "layout": "NCHW", "unit": "fraction"}}


def test_other_torch_tensors(tmp_path):
    exact = torch.from_numpy(EVERY_LEVEL)
    for held in (exact, exact.long(), (exact / 255).requires_grad_(), exact.permute(0, 2, 3, 1).contiguous()):
        torch.save(held, tmp_path / "noise.pt", pickle_protocol=3)  # torch warns of it on reading
        assert torch.equal(read(tmp_path / "noise.pt").levels, exact)


@pytest.mark.parametrize("save_as", [np.save, np.savez, np.savez_compressed])
def test_numpy_files(tmp_path, save_as):
    suffix = ".npy" if save_as is np.save else ".npz"
    for array in (EVERY_LEVEL, EVERY_LEVEL.astype(">i2"), (EVERY_LEVEL / 255).astype(np.float32)):
        save_as(named(tmp_path, suffix), array)
        np.testing.assert_array_equal(read(named(tmp_path, suffix)).levels.numpy(), EVERY_LEVEL)


def test_channels_last_is_told_and_stated(tmp_path):
    np.save(tmp_path / "noise.npy", EVERY_LEVEL.transpose(0, 2, 3, 1))
    noise = read(tmp_path / "noise.npy")
    np.testing.assert_array_equal(noise.levels.numpy(), EVERY_LEVEL)
    assert noise.recipe["imported"]["layout"] == "NHWC"
    both = np.arange(18, dtype=np.int8).reshape(1, 3, 2, 3)  # three rows or three channels: N x C x H x W it is
    np.testing.assert_array_equal(from_array(both).levels.numpy(), both)


# ---- rounding and units ---------------------------------------------------------------------------------------------


@settings(QUICK, max_examples=50)
@given(hnp.arrays(np.float64, SHAPES, elements=st.floats(-127.4, 127.4)))
def test_fractions_are_rounded_to_the_nearest_level(levels):
    wanted = [[round(v) for v in levels.ravel()]]  # Python's own rounding: to the nearest, halves to even
    np.testing.assert_array_equal(from_array(levels, unit="levels").levels.numpy().reshape(1, -1), wanted)
    fraction = from_array(levels / 255, unit="fraction").levels.numpy().astype(float)
    assert np.abs(fraction - levels).max() <= 0.5 + 1e-9


def test_the_negative_half_survives():
    noise = from_array(np.array([-7.6, -0.6, 0.6, 7.6]).reshape(1, 1, 2, 2) / 255)
    assert noise.levels.flatten().tolist() == [-8, -1, 1, 8] and noise.radius == 8


def corner(value):
    array = np.zeros((1, 1, 2, 2))
    array[0, 0, 0, 0] = value
    return array


@pytest.mark.parametrize("sign", [1, -1])
def test_units_are_told_by_size(sign):
    assert from_array(corner(sign * 8 / 255)).radius == 8
    assert from_array(corner(sign * 127 / 255)).radius == 127
    assert from_array(corner(sign * 8.0)).radius == 8
    assert from_array(corner(0.0)).radius == 0
    for value in (0.51, 0.9, 1.0):
        with pytest.raises(NoiseError, match="may be levels or fractions of 1"):
            from_array(corner(sign * value))
    assert from_array(corner(sign * 1.0), unit="levels").radius == 1
    assert from_array(corner(sign * 1).astype(int)).radius == 1
    with pytest.raises(NoiseError, match="beyond -128 to 127"):
        from_array(corner(sign * 1.0), unit="fraction")
    with pytest.raises(NoiseError, match="unit must be one of"):
        from_array(corner(1.0), unit="pixels")


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (corner(np.nan), "not finite"),
        (corner(-np.inf), "not finite"),
        (corner(200.0), "beyond -128 to 127"),
        (corner(128).astype(np.int16), "beyond -128 to 127"),
        (corner(-129).astype(np.int64), "beyond -128 to 127"),
        (corner(8).astype(np.uint8), "uint8 values are no noise"),
        (corner(1).astype(bool), "bool values are no noise"),
        (corner(1).astype(complex), "complex128 values are no noise"),
        (corner(8)[0], "not noise N x C x H x W"),
        (corner(8)[:0], "not noise N x C x H x W"),
        (np.full((1, 5, 4, 2), 3), "C 1 or 3"),
    ],
)
def test_other_arrays_are_refused(array, says):
    with pytest.raises(NoiseError, match=says):
        from_array(array)


def test_out_of_range_is_seen_in_every_block():
    array = np.zeros((2049, 1, 1, 1), np.int16)
    array[-1] = 128
    with pytest.raises(NoiseError, match="beyond"):
        from_array(array)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_given_radius_is_held(tmp_path, suffix):
    write(noise_of(corner(-9).astype(np.int8)), named(tmp_path, suffix))
    assert read(named(tmp_path, suffix), radius=16).radius == 16
    assert convert(named(tmp_path, suffix), tmp_path / "fine.safetensors", radius=9).radius == 9
    for radius, says in ((8, "9 levels, its radius is 8"), (9 / 255, "write pixel levels")):
        with pytest.raises(NoiseError, match=says):
            convert(named(tmp_path, suffix), tmp_path / "beyond.safetensors", radius=radius)
    assert not (tmp_path / "beyond.safetensors").exists()


def test_class_wise_noise_is_kept_as_such(tmp_path):
    np.save(tmp_path / "noise.npy", EVERY_LEVEL)
    assert convert(tmp_path / "noise.npy", tmp_path / "noise.safetensors", class_wise=True).class_wise
    assert load(tmp_path / "noise.safetensors").class_wise


# ---- malicious files ------------------------------------------------------------------------------------------------


class Calls:
    """Pickles to a call of `function`: what an attacker writes."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args, self.state) if self.state is not None else (self.function, self.args)


def attacks(marker):
    """(name, pickled object, forbidden global): each creates `marker` when loaded by pickle."""
    command = f"touch {marker}"
    write_it = Calls(os.system, command)
    source = f"open({str(marker)!r}, 'w').close()"
    objects = np.empty((1, 1, 1, 1), dtype=object)
    objects[0, 0, 0, 0] = write_it
    inside = EVERY_LEVEL.__reduce__()[0]
    return [
        ("system", write_it, "system"),
        ("eval", Calls(eval, source), "eval"),
        ("exec", Calls(exec, source), "exec"),
        ("subprocess", Calls(subprocess.call, ["touch", str(marker)]), "subprocess|commands"),
        ("getattr", Calls(getattr, write_it, "x"), "getattr"),
        ("object array", objects, "system|more than one numpy array"),
        ("in a list", [EVERY_LEVEL, write_it], "system|more than one numpy array"),
        ("in a dict", {"noise": EVERY_LEVEL, "x": write_it}, "system|more than one numpy array"),
        ("as an argument", Calls(inside, np.ndarray, write_it, b"b"), "system"),
        ("as a state", Calls(inside, np.ndarray, (0,), b"b", state=(1, write_it)), "system"),
        ("as a dtype", Calls(np.dtype, write_it), "system"),
        ("nested", Calls(np.dtype, Calls(np.dtype, Calls(eval, source))), "eval"),
    ]


ATTACKS = [name for name, *_ in attacks("marker")]


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_pickle_is_run(tmp_path, attack, protocol):
    marker = tmp_path / "marker"
    _, thing, forbidden = next(a for a in attacks(marker) if a[0] == attack)
    (tmp_path / "noise.pkl").write_bytes(pickle.dumps(thing, protocol=protocol))
    with pytest.raises(NoiseError, match=forbidden) as caught:
        convert(tmp_path / "noise.pkl", tmp_path / "noise.safetensors")
    assert not marker.exists() and not (tmp_path / "noise.safetensors").exists()
    assert "\n" not in str(caught.value) and str(tmp_path / "noise.pkl") in str(caught.value)


VICTIM = """
import os, pickle, sys
for name in sys.argv[2:]:
    try:
        pickle.load(open(name, "rb"))
    except Exception:
        pass
    print(os.path.exists(sys.argv[1]))
    os.path.exists(sys.argv[1]) and os.unlink(sys.argv[1])
"""


def test_the_attacks_are_real(tmp_path):
    marker = tmp_path / "marker"
    for name, thing, _ in attacks(marker):
        (tmp_path / name).write_bytes(pickle.dumps(thing))
    command = [sys.executable, "-c", VICTIM, str(marker), *(str(tmp_path / name) for name in ATTACKS)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert dict(zip(ATTACKS, out.stdout.split(), strict=True)) == dict.fromkeys(ATTACKS, "True")


RAW = {
    "old and new names": b"cposix\nsystem\n(S'touch MARKER'\ntR.",
    "inst": b"(S'touch MARKER'\niposix\nsystem\n.",
    "obj": b"(cposix\nsystem\nS'touch MARKER'\no.",
    "python 2": b'c__builtin__\neval\n(S\'open("MARKER", "w")\'\ntR.',
    "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
    "dotted module": b"\x80\x04\x8c\x05numpy\x8c\x10_core.os.system_\x93.",
    "persistent id": b"Px\n.",
    "extension": b"\x80\x02\x82\x01.",
    "name with newline": b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.",
    "attributes of a stand-in": b"\x80\x04cnumpy\ndtype\n}\x8c\x04name\x8c\x01x\x86b.",
    "new instance of a stand-in": b"\x80\x04cnumpy\ndtype\n)\x81.",
    "array of records": pickle.dumps(np.zeros((1, 1, 1, 1), dtype="i1,O")),
    "huge memo": b"\x80\x04Nr\xff\xff\xff\xff.",
    "huge bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a number": pickle.dumps(3),
    "a list": pickle.dumps([EVERY_LEVEL]),
    "a dtype": pickle.dumps(np.dtype("i1")),
    "an ndarray type": pickle.dumps(np.ndarray),
    "array of objects": pickle.dumps(np.full((1, 1, 1, 1), None, dtype=object)),
    "array of text": pickle.dumps(np.full((1, 1, 1, 1), "x")),
    "a scalar": pickle.dumps(np.int8(3)),
    "an ordered dict": pickle.dumps(collections.OrderedDict()),
    "a reconstructor": pickle.dumps(copyreg._reconstructor),
    "another encoding": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x04\x00\x00\x00zlib\x86R.",
    "too few bytes": pickle.dumps(EVERY_LEVEL, protocol=2).replace(b"K\x08K\x08", b"K\x08K\x09", 1),
    "empty": b"",
    "text": b"hello\n",
    # Hashing such a key would visit 2**60 leaves.
    "nested tuples as a key": b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",
    "nested tuples as keys": b"\x80\x02}()" + b"2\x86" * 60 + b"Nu.",
    "nested tuples in a set": b"\x80\x04\x8f()" + b"2\x86" * 60 + b"\x90.",
    "nested tuples in a frozenset": b"\x80\x04()" + b"2\x86" * 60 + b"\x91.",
    "nested tuples as a shape": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01)"
    + b"q\x00h\x00\x86" * 60
    + b"cnumpy\ndtype\nX\x02\x00\x00\x00i1\x85R\x89X\x01\x00\x00\x00xtb.",
    "recursion": b"(" * 5000 + b"t" * 5000 + b".",
}


@pytest.mark.parametrize("name", RAW)
def test_odd_pickles_are_refused_in_one_line(tmp_path, name):
    marker = tmp_path / "marker"
    (tmp_path / "noise.pkl").write_bytes(RAW[name].replace(b"MARKER", os.fsencode(marker)))
    with pytest.raises(NoiseError) as caught:
        read(tmp_path / "noise.pkl")
    assert not marker.exists() and "\n" not in str(caught.value)


def test_the_stand_ins_learn_nothing(tmp_path):
    """A pickle cannot leave traces in the reader for the next one."""
    for name in ("attributes of a stand-in", "new instance of a stand-in"):
        (tmp_path / "noise.pkl").write_bytes(RAW[name])
        with pytest.raises(NoiseError):
            read(tmp_path / "noise.pkl")
    (tmp_path / "noise.pkl").write_bytes(pickle.dumps(EVERY_LEVEL))
    np.testing.assert_array_equal(read(tmp_path / "noise.pkl").levels.numpy(), EVERY_LEVEL)


def test_nothing_in_torch_and_numpy_files_is_run(tmp_path):
    marker = tmp_path / "marker"
    attack = Calls(os.system, f"touch {marker}")
    objects = np.empty((1, 1, 1, 1), dtype=object)
    objects[0, 0, 0, 0] = attack
    torch.save({"noise": torch.zeros(1, 1, 1, 1), "x": attack}, tmp_path / "zip.pt")
    torch.save(attack, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(attack))
    np.save(tmp_path / "objects.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "objects.npz", noise=objects)
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(attack))
    with zipfile.ZipFile(tmp_path / "bare.npz", "w") as archive:
        archive.writestr("noise.npy", pickle.dumps(attack))
    for name in ("zip.pt", "old.pt", "bare.pt", "objects.npy", "objects.npz", "bare.npy", "bare.npz"):
        with pytest.raises(NoiseError) as caught:
            read(tmp_path / name)
        assert not marker.exists() and "\n" not in str(caught.value), name
        assert "weights_only" not in str(caught.value), name  # torch's advice is to load it unsafely


# ---- damaged files --------------------------------------------------------------------------------------------------


FILES = [suffix for suffix in FORMATS if suffix]


@pytest.mark.parametrize("suffix", FILES)
def test_truncated_files_are_refused(tmp_path, suffix):
    path = named(tmp_path, suffix)
    write(noise_of(EVERY_LEVEL), path)
    data = path.read_bytes()
    for kept in (0, 1, 10, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:kept])
        with pytest.raises(NoiseError) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", FILES)
@settings(QUICK, max_examples=30)
@given(st.data())
def test_damaged_files_give_noise_or_one_line(suffix, data):
    with tempfile.TemporaryDirectory() as folder:
        path = named(folder, suffix)
        write(noise_of(EVERY_LEVEL), path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            noise = read(path)
        except NoiseError as error:
            assert "\n" not in str(error)
        else:
            assert noise.levels.dtype == torch.int8 and noise.levels.int().abs().max() <= noise.radius


@pytest.mark.parametrize("suffix", FILES)
def test_a_file_of_another_format_is_refused(tmp_path, suffix):
    path = named(tmp_path, suffix)
    Image.new("RGB", (2, 2)).save(path, "PNG")
    with pytest.raises(NoiseError):
        read(path)


def test_a_small_file_with_a_tensor_of_stride_0_is_refused_at_once(tmp_path):
    torch.save(torch.zeros(1, dtype=torch.int8).expand(10**9, 3, 32, 32), tmp_path / "noise.pt")
    with pytest.raises(NoiseError, match="larger than what the file holds"):
        convert(tmp_path / "noise.pt", tmp_path / "noise.npy")


def test_torch_files_of_other_kinds_get_no_advice_to_load_them_unsafely(tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # a TorchScript file, for all that torch looks at
        for name in ("constants.pkl", "data.pkl", "version"):
            archive.writestr(f"script/{name}", "3")
    with tarfile.open(tmp_path / "tar.pt", "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))
    for name in ("script.pt", "tar.pt"):
        with pytest.raises(NoiseError, match="damaged, or asks for more than tensors") as caught:
            read(tmp_path / name)
        assert "weights_only" not in str(caught.value)


def test_more_than_one_array_is_refused(tmp_path):
    np.savez(tmp_path / "two.npz", EVERY_LEVEL, EVERY_LEVEL)
    with pytest.raises(NoiseError, match="holds 2 arrays"):
        read(tmp_path / "two.npz")
    for held in ({"a": torch.zeros(1), "b": torch.zeros(1)}, {"epoch": 3}, 3, [torch.zeros(1), torch.zeros(1)]):
        torch.save(held, tmp_path / "many.pt")
        with pytest.raises(NoiseError, match="tensors: save the noise tensor alone"):
            read(tmp_path / "many.pt")


def test_folders_of_other_things_are_refused(tmp_path):
    folder = tmp_path / "noise"

    def refused(says):
        with pytest.raises(NoiseError, match=says) as caught:
            read(folder)
        assert "\n" not in str(caught.value)

    write(noise_of(EVERY_LEVEL), folder)
    (folder / ".hidden").touch()
    np.testing.assert_array_equal(read(folder).levels.numpy(), EVERY_LEVEL)
    (folder / "2.png").unlink()
    refused("lacks 2.png")
    (folder / "2.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "00.png").write_bytes((folder / "0.png").read_bytes())
    refused("lacks 1.png or holds it twice")
    (folder / "00.png").unlink()
    for name in ("4.jpg", "a.png", "4.PNG", "²"):
        (folder / name).touch()
        refused(re.escape(f"holds {name}"))
        (folder / name).unlink()
    for mode in ("RGBA", "P", "1", "I;16", "LA"):
        Image.new(mode, (8, 8)).save(folder / "3.png")
        refused("3.png is not 8-bit RGB or grey")
    for size in ((8, 7), (1, 1)):
        Image.new("RGB", size).save(folder / "3.png")
        refused("images of several sizes")
    for content in (b"", b"GIF89a"):
        (folder / "3.png").write_bytes(content)
        refused("3.png is damaged, or no PNG")
    (folder / "3.png").unlink()
    os.mkfifo(folder / "3.png")  # opening it would wait for ever
    refused("holds 3.png, not just noise")
    shutil.rmtree(folder)
    folder.mkdir()
    refused("the folder is empty")


def test_16_bit_rgb_is_not_cut_to_8(tmp_path):
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(7))) + chunk(b"IEND", b"")
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == "RGB"  # what Pillow makes of it
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "0.png").write_bytes(png)
    with pytest.raises(NoiseError, match="not 8-bit"):
        read(tmp_path / "noise")


# ---- destinations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_exists_is_replaced_only_on_request(tmp_path, suffix):
    source, target = tmp_path / "source.safetensors", named(tmp_path, suffix)
    save(noise_of(EVERY_LEVEL), source)
    write(noise_of(corner(3).astype(np.int8)), target)
    with pytest.raises(NoiseError, match="exists already"):
        convert(source, target)
    assert read(target).radius == 3
    convert(source, target, overwrite=True)
    np.testing.assert_array_equal(read(target).levels.numpy(), EVERY_LEVEL)
    assert sorted(os.listdir(tmp_path)) == sorted([source.name, target.name])


def test_a_folder_of_anything_else_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    save(noise_of(EVERY_LEVEL), tmp_path / "noise.safetensors")
    with pytest.raises(NoiseError, match=r"will not be replaced: it holds me\.jpg, which semkit"):
        convert(tmp_path / "noise.safetensors", tmp_path / "photos", overwrite=True)
    assert os.listdir(tmp_path / "photos") == ["me.jpg"]


@pytest.mark.parametrize("name", [".git/HEAD", ".env", "0.png/precious"])
def test_hidden_files_and_folders_named_like_noise_are_not_deleted(tmp_path, name):
    kept = tmp_path / "folder" / name
    kept.parent.mkdir(parents=True)
    kept.touch()
    save(noise_of(EVERY_LEVEL), tmp_path / "noise.safetensors")
    with pytest.raises(NoiseError, match=r"will not be replaced: it holds (\.git|\.env|0\.png), which semkit"):
        convert(tmp_path / "noise.safetensors", tmp_path / "folder", overwrite=True)
    assert kept.exists()


def test_photos_named_like_noise_are_not_replaced(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, size in enumerate([(40, 30), (30, 40)]):
        Image.new("RGB", size).save(photos / f"{i}.png")
    save(noise_of(EVERY_LEVEL), tmp_path / "noise.safetensors")
    for _ in range(2):
        with pytest.raises(NoiseError, match=r"will not be replaced: it holds 0\.png, which semkit convert did not"):
            convert(tmp_path / "noise.safetensors", photos, overwrite=True)
        Image.new("RGB", (30, 40)).save(photos / "0.png")  # now both have one size, as noise has
    shutil.rmtree(photos)
    write(noise_of(EVERY_LEVEL), photos)
    (photos / "1.png").write_bytes(b"a photo of another kind")
    with pytest.raises(NoiseError, match=r"will not be replaced: it holds 1\.png, which"):
        convert(tmp_path / "noise.safetensors", photos, overwrite=True)
    (photos / "1.png").unlink()
    (photos / "1.png").symlink_to("0.png")
    with pytest.raises(NoiseError, match=r"will not be replaced: it holds 1\.png, which"):
        convert(tmp_path / "noise.safetensors", photos, overwrite=True)
    assert len(os.listdir(photos)) == 4


@pytest.mark.parametrize("name", ["pipe", "pipe.npy"])
def test_what_is_neither_a_file_nor_a_folder_is_not_replaced(tmp_path, name):
    os.mkfifo(tmp_path / name)
    save(noise_of(EVERY_LEVEL), tmp_path / "noise.safetensors")
    with pytest.raises(NoiseError, match="will not be replaced: it is neither a file nor a folder"):
        convert(tmp_path / "noise.safetensors", tmp_path / name, overwrite=True)
    assert (tmp_path / name).is_fifo()


def test_a_folder_with_the_name_of_a_file_is_not_replaced(tmp_path):
    (tmp_path / "noise.npy").mkdir()
    save(noise_of(EVERY_LEVEL), tmp_path / "noise.safetensors")
    with pytest.raises(NoiseError, match="it is a folder, and the name is that of a file"):
        convert(tmp_path / "noise.safetensors", tmp_path / "noise.npy", overwrite=True)
    assert os.listdir(tmp_path / "noise.npy") == []


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(noise_of(EVERY_LEVEL), tmp_path / "noise.safetensors")
    for names in (("", "noise.npy"), ("noise.safetensors", "")):
        with pytest.raises(NoiseError, match="the name of a noise file is empty"):
            convert(*names, overwrite=True)
        with pytest.raises(SystemExit, match="2"):
            main(["convert", *names, "--overwrite"])
    assert os.listdir(tmp_path) == ["noise.safetensors"]


def test_unknown_suffixes_get_a_suggestion(tmp_path):
    save(noise_of(EVERY_LEVEL), tmp_path / "noise.safetensors")
    for name, says in (
        ("a.pth", "; did you mean .pt"),
        ("a.safetensor", "did you mean .safetensors"),
        ("a.mat", "known are .safetensors, .pkl, .pickle, .pt, .npy, .npz, a folder of PNGs"),
    ):
        for src, dst in (("noise.safetensors", name), (name, "new.safetensors")):
            with pytest.raises(NoiseError, match=says):
                convert(tmp_path / src, tmp_path / dst)
    assert os.listdir(tmp_path) == ["noise.safetensors"]


def test_a_file_that_may_not_be_read_is_not_said_to_be_missing(tmp_path):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        os.chmod(folder, 0o755)
        targets = [named(folder, suffix) for suffix in FORMATS if suffix]
        for target in targets:
            write(noise_of(EVERY_LEVEL), target)
            target.chmod(0)
        try:
            if user == 0:
                os.seteuid(65534)  # root may read everything
            for target in targets:
                with pytest.raises(NoiseError, match="Permission denied") as caught:
                    read(target)
                assert str(caught.value).startswith(f"{target}: ") and "damaged" not in str(caught.value)
        finally:
            os.seteuid(user)


def test_missing_sources(tmp_path):
    os.mkfifo(tmp_path / "pipe.pkl")  # reading it would wait for ever
    for name in ("a.pkl", "two\nlines.npy", "a.safetensors", "folder", "pipe.pkl"):
        with pytest.raises(NoiseError, match="no such file or folder") as caught:
            convert(tmp_path / name, tmp_path / "new.npy")
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["pipe.pkl"]


@contextlib.contextmanager
def full_disk(room=1000):
    """No file can grow beyond `room` bytes inside the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_noise_that_finds_no_room_names_its_file_and_the_reason(tmp_path):
    levels = np.zeros((40, 3, 32, 32), np.int8)
    with full_disk(), pytest.raises(OSError) as caught:
        save(noise_of(levels), tmp_path / "noise.safetensors")
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "noise.safetensors"))


def test_a_full_disk_leaves_what_was_there_or_nothing(tmp_path):
    levels = np.random.default_rng(0).integers(-8, 9, (40, 3, 32, 32)).astype(np.int8)
    save(noise_of(levels), tmp_path / "source.safetensors")
    old, new = (tmp_path / "old", tmp_path / "new")
    targets = [named(folder, suffix) for folder in (old, new) for suffix in FORMATS]
    for target in targets[: len(FORMATS)]:
        write(noise_of(EVERY_LEVEL), target)
    for target in targets:
        with full_disk(), pytest.raises(OSError) as caught:
            convert(tmp_path / "source.safetensors", target, overwrite=True)
        assert str(caught.value) == f"{target} could not be written: {os.strerror(errno.EFBIG)}"
    for suffix in FORMATS:
        np.testing.assert_array_equal(read(named(old, suffix)).levels.numpy(), EVERY_LEVEL)
    assert sorted(os.listdir(old)) == sorted(named(old, suffix).name for suffix in FORMATS)
    assert os.listdir(new) == []
