"""data_prep.py against real ACDC files, the community's copy, damaged input, kills and a full disk."""

import ctypes
import errno
import functools
import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import nibabel as nib
import numpy as np
import pytest
from conftest import DATABASE, ROOT, SHARED, files, needs_acdc, one_line, python

import data_prep
import phantom
from data_prep import SPLIT, DataError

SCRIPT = ROOT / "data_prep.py"
PUBLISHED = SHARED / "acdc" / "published_h5"
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and locks")


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom") / "out"
    phantom.make_phantom(out / "raw", patients=6, workers=2)
    data_prep.convert(out / "raw", out, allow_missing=True, workers=2)
    return out


@pytest.fixture
def raw(cohort, tmp_path):
    """One raw patient of val, to be damaged."""
    shutil.copytree(cohort / "raw/training/patient028", tmp_path / "raw/training/patient028")
    return tmp_path / "raw"


@pytest.fixture
def prepared(cohort, tmp_path):
    out = tmp_path / "prepared"
    shutil.copytree(cohort, out, ignore=shutil.ignore_patterns("raw"))
    return out


# ----------------------------------------------------------------------------------------------------- split, real data

def test_split():
    assert [len(SPLIT[s]) for s in ("train", "val", "test", "official")] == [70, 10, 20, 50]
    assert sorted(itertools.chain(*SPLIT.values())) == [f"patient{n:03d}" for n in range(1, 151)]
    assert SPLIT["train"][:3] == ("patient099", "patient038", "patient050")


@needs_acdc
def test_labeled_patients_have_the_published_number_of_slices():
    names = (PUBLISHED / "train_slices.list").read_text().split()
    order = list(dict.fromkeys(name[:10] for name in names))
    assert tuple(order) == SPLIT["train"]
    wanted = {1: 32, 3: 68, 7: 136, 14: 256, 21: 396, 28: 512, 35: 664, 70: 1312}
    assert {k: sum(name[:10] in order[:k] for name in names) for k in wanted} == wanted


@needs_acdc
def test_equals_the_published_files_bit_for_bit(tmp_path):
    patients, out = ("patient099", "patient090", "patient028", "patient085"), tmp_path / "out"
    (tmp_path / "raw/training").mkdir(parents=True)
    for p in patients:
        os.symlink(DATABASE / "training" / p, tmp_path / "raw/training" / p)
    manifest = data_prep.convert(tmp_path / "raw", out, allow_missing=True)
    theirs = sorted(PUBLISHED.rglob("*.h5"))
    assert len(theirs) == 50
    for path in theirs:
        with h5py.File(path) as a, h5py.File(out / path.relative_to(PUBLISHED)) as b:
            for key in ("image", "label"):
                assert a[key].dtype == b[key].dtype
                assert a[key][()].tobytes() == b[key][()].tobytes(), path
    for name in ("train", "val", "train_slices"):
        names = [n for n in (PUBLISHED / f"{name}.list").read_text().split() if n[:10] in patients]
        ours = (out / f"{name}.list").read_text().split()
        if name == "train_slices":  # volumes in their order, slices ascending
            volumes = [key for key, _ in itertools.groupby(names, lambda n: n[:18])]
            assert [key for key, _ in itertools.groupby(ours, lambda n: n[:18])] == volumes
            names, ours = sorted(names), sorted(ours)
        assert ours == names
    assert manifest["counts"]["train"] == {"patients": 2, "volumes": 4, "slices": 46}

    for phase, frame in ((1, 4), (2, 11)):
        with h5py.File(out / f"data/slices/patient090_frame0{phase}_slice_1.h5") as h:
            assert h.attrs["source"] == f"patient090/patient090_frame{frame:02d}.nii.gz"
    volume = data_prep.read_volume(out, "patient085_frame02")
    assert volume.group == data_prep.read_info(DATABASE / "training/patient085")["Group"]
    assert volume.spacing == pytest.approx((5.0, 1.21528, 1.21528), abs=1e-4)
    for i, (image, label, attrs) in enumerate(data_prep.read_patient(DATABASE / "training/patient090", True), 1):
        stacked = data_prep.read_volume(out, f"patient090_frame{i:02d}")  # of train: from its slices
        assert np.array_equal(stacked.image, image)
        assert np.array_equal(stacked.label, label)
        assert stacked.spacing == attrs["spacing"]
    assert data_prep.check(out) == []


@needs_acdc
def test_spacing_is_the_zooms_and_not_the_affine():
    folder = DATABASE / "training/patient090"
    assert (data_prep.read_info(folder)["ED"], data_prep.read_info(folder)["ES"]) == (4, 11)
    array, spacing, image = data_prep.load_nifti(folder / "patient090_frame04.nii.gz")
    assert array.shape == (7, 224, 154)
    assert spacing == pytest.approx((10.0, 1.78571, 1.78571), abs=1e-4)
    assert np.abs(np.diag(image.affine)).tolist() == [1, 1, 1, 1]  # the lie
    cine, spacing, _ = data_prep.load_nifti(folder / "patient090_4d.nii.gz")
    assert cine.shape == (12, 7, 224, 154)
    assert spacing == pytest.approx((10.0, 1.78571, 1.78571), abs=1e-4)
    assert np.array_equal(cine[3], array)  # frame 04


# -------------------------------------------------------------------------------------------------------------- phantom

def test_phantom_has_as_many_patients_as_asked(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(phantom, "run_parallel", lambda work, jobs, *_: made.append(len({job[0] for job in jobs})))
    for n in (6, 20, 69, 70, 75, 80):
        phantom.make_phantom(tmp_path / str(n), n)
    assert made == [6, 20, 69, 70, 75, 80]


def test_phantom_same_seed_same_bytes(cohort, tmp_path):
    done = python(ROOT / "phantom.py", tmp_path / "a", "--patients", 6, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "a") == files(cohort / "raw")
    phantom.make_phantom(tmp_path / "b", patients=6, seed=1)
    frame = "training/patient028/patient028_frame01.nii.gz"
    assert (tmp_path / "b" / frame).read_bytes() != (cohort / "raw" / frame).read_bytes()


def test_phantom_has_a_heart(cohort):
    ed, es = (data_prep.read_volume(cohort, f"patient028_frame{n:02d}") for n in (1, 2))
    for label in (ed.label, es.label):
        areas = np.array([[(z == k).sum() for k in (1, 2, 3)] for z in label])  # (Z, class)
        assert (areas[1] > 0).all()
        assert areas[-1, 0] == 0  # no right ventricle at the apex
        assert areas[1, 2] > 2 * areas[-1, 2]  # the left one narrows
        middle = np.argwhere(label[1] > 0).mean(0) / label[1].shape
        assert (abs(middle - 0.5) < 0.2).all()
        rv, lv = (np.argwhere(label[1] == k).mean(0) for k in (1, 3))
        assert rv[1] < lv[1]  # on the left of the picture
    assert (ed.label == 3).sum() > 1.2 * (es.label == 3).sum()
    assert (ed.label == 1).sum() > 1.1 * (es.label == 1).sum()
    outside, muscle, blood = (ed.image[1][ed.label[1] == k] for k in (0, 2, 3))
    assert np.median(blood) > np.median(muscle) + 0.15
    assert np.quantile(outside, 0.9) > np.median(blood) * 0.6  # intensity alone does not separate
    assert data_prep.read_info(cohort / "raw/training/patient090")["ED"] == 4
    kinds = {nib.load(p).get_data_dtype().name for p in cohort.glob("raw/*/*/*_frame??.nii.gz")}
    assert kinds == {"float32", "int16", "uint8"}
    _, spacing, image = data_prep.load_nifti(next(cohort.glob("raw/training/*/*_frame01.nii.gz")))
    assert spacing[0] >= 8 > 1.8 > spacing[1] > 1.3
    assert np.isnan(image.header["scl_slope"]) or image.header["scl_slope"] == 0
    assert abs(image.affine[0, 0]) == 1


def test_phantom_refuses_a_folder_with_other_data(cohort, prepared, capfd):
    (prepared / "manifest.json").unlink()  # as in the community's copy
    before, raw = files(prepared), files(cohort / "raw")
    for call, folder in ((lambda: phantom.prepare_demo(prepared), prepared),
                         (lambda: phantom.main([str(prepared)]), prepared),
                         (lambda: phantom.main([str(cohort / "raw"), "--patients", "7"]), "raw")):  # fmt: skip
        assert call() == 2
        one_line(capfd.readouterr().err, folder, "other data")
    assert (files(prepared), files(cohort / "raw")) == (before, raw)


def test_reading_back(cohort):
    assert data_prep.read_list(cohort, "val") == ["patient028_frame01", "patient028_frame02"]
    official = data_prep.read_volume(cohort, data_prep.read_list(cohort, "official")[0])
    assert official.label is None
    assert official.image.dtype == np.float32
    slices = list(data_prep.read_slices(cohort))
    assert [s[0] for s in slices] == (cohort / "train_slices.list").read_text().split()
    patients = list(dict.fromkeys(name[:10] for name, _, _ in slices))
    assert patients == [p for p in SPLIT["train"] if p in patients]
    assert [int(name.rsplit("_", 1)[1]) for name, _, _ in slices[:3]] == [1, 2, 3]
    whole = data_prep.read_patient(cohort / "raw/training" / patients[0], True)[0]
    assert np.array_equal(slices[2][1], whole[0][2])
    assert np.array_equal(slices[2][2], whole[1][2])
    assert (slices[0][1].dtype, slices[0][2].dtype) == (np.float32, np.uint8)
    with pytest.raises(DataError, match="absent"):
        data_prep.read_volume(cohort, "patient019_frame01")


# ------------------------------------------------------------------------------------------------------------ bad input

def _edit(path, change):
    """Rewrite a NIfTI file with change(array in file order) -> array."""
    array = change(np.asarray(nib.load(path).dataobj))
    phantom.write_nifti(path, array.T, (1.5, 1.5, 10.0, 1.0, 1.0)[: array.ndim])


def _header(path, offset, values, dtype):
    data = bytearray(gzip.decompress(path.read_bytes()))
    packed = np.array(values, dtype).tobytes()
    data[offset : offset + len(packed)] = packed
    path.write_bytes(gzip.compress(bytes(data)))


def _info(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _save(path, change, axis=None):
    """Rewrite an annotation with change(array in file order), its header kept; mirrored with `axis` of its affine."""
    image = nib.load(path)
    affine = image.affine.copy()
    if axis is not None:
        affine[:, 3] += affine[:, axis] * (image.shape[axis] - 1)
        affine[:, axis] *= -1
    new = nib.Nifti1Image(change(np.asarray(image.dataobj)), affine, image.header)
    new.header.set_zooms(image.header.get_zooms())  # which a new affine makes 1 mm
    path.write_bytes(gzip.compress(new.to_bytes()))


def _exchange(*classes):
    """A function that gives 0, 1, 2, 3 other classes."""
    return lambda a: np.array((0, *classes), np.uint8)[a]


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FRAME, TRUTH, INFO = "patient028_frame01.nii.gz", "patient028_frame01_gt.nii.gz", "Info.cfg"
BAD_INPUT = {
    "truncated": (FRAME, _truncate, "fetch"),
    "empty": (FRAME, lambda p: p.write_bytes(b""), "fetch"),
    "not gzip": (FRAME, lambda p: p.write_bytes(b"hello" * 200), "fetch"),
    "label truncated": (TRUTH, _truncate, "fetch"),
    "label shape": (TRUTH, lambda p: _edit(p, lambda a: a[1:]), "shape"),
    "label 4": (TRUTH, lambda p: _edit(p, lambda a: a + 2), "0..3"),
    "label 1.5": (TRUTH, lambda p: _edit(p, lambda a: a * np.float32(0.5)), "0..3"),
    "label absent": (TRUTH, lambda p: p.unlink(), "fetch"),
    "no ED": (INFO, lambda p: _info(p, "ED:", "XX:"), "ED"),
    "no ES": (INFO, lambda p: _info(p, "ES: ", "ES: x"), "ES"),
    "frame absent": ("patient028_frame07.nii.gz", lambda p: _info(p.parent / INFO, "ED: 1", "ED: 7"), "ED: 7"),
    "no Info.cfg": (INFO, lambda p: p.unlink(), "absent"),
    "binary Info.cfg": (INFO, lambda p: p.write_bytes(bytes(range(256)) * 9), "ED"),
    "constant": (FRAME, lambda p: _edit(p, np.ones_like), "every voxel"),
    "4D": (FRAME, lambda p: _edit(p, lambda a: np.stack([a, a], 3)), "4D"),
    "2D": (FRAME, lambda p: _edit(p, lambda a: a[:, :, 0]), "3D"),
    "NaN": (FRAME, lambda p: _edit(p, lambda a: np.where(a > a.mean(), np.float32(np.nan), a)), "numpy.nan_to_num"),
    "complex": (FRAME, lambda p: _edit(p, lambda a: a.astype(np.complex64)), "complex"),
    "no spacing": (FRAME, lambda p: _header(p, 80, [0, 0, 0], "<f4"), "zooms"),
    "huge": (FRAME, lambda p: _header(p, 42, [32767, 32767, 32767], "<i2"), "claims"),
    "negative size": (FRAME, lambda p: _header(p, 42, [-5], "<i2"), "fetch"),
    "five axes": (FRAME, lambda p: _edit(p, lambda a: np.stack([np.stack([a, a], 3)] * 2, 4)), "or (x, y, z, t)"),
    "label mirrored with its affine": (TRUTH, lambda p: _save(p, lambda a: a[:, ::-1], 1), "mirrored, turned"),
    "label mirrored left to right": (TRUTH, lambda p: _save(p, lambda a: a[::-1]), "mm from the RV's centre"),
    "label zooms": (TRUTH, lambda p: _header(p, 80, [1.1, 1.1], "<f4"), "zooms"),
    "ES zooms": (FRAME.replace("01", "11"), lambda p: [_header(q, 80, [3, 3], "<f4") for q in (p, _truth(p))], "at ED"),
    "LV and RV exchanged": (TRUTH, lambda p: _save(p, _exchange(3, 2, 1)), "1 RV, 2 MYO, 3 LV"),
    "LV and MYO exchanged": (TRUTH, lambda p: _save(p, _exchange(1, 3, 2)), "1 RV, 2 MYO, 3 LV"),
    "RV and MYO exchanged": (TRUTH, lambda p: _save(p, _exchange(2, 1, 3)), "1 RV, 2 MYO, 3 LV"),
    "classes turned": (TRUTH, lambda p: _save(p, _exchange(2, 3, 1)), "1 RV, 2 MYO, 3 LV"),
    "classes turned back": (TRUTH, lambda p: _save(p, _exchange(3, 1, 2)), "1 RV, 2 MYO, 3 LV"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(raw, tmp_path, capfd, name):
    file, damage, word = BAD_INPUT[name]
    damage(raw / "training/patient028" / file)
    assert data_prep.main([str(raw), str(tmp_path / "new/out"), "--allow-missing"]) == 2
    one_line(capfd.readouterr().err.replace(str(tmp_path), ""), file, word)  # the words, not the test's name
    assert not (tmp_path / "new").exists()


def _truth(path):
    return path.with_name(path.name.replace(".nii", "_gt.nii"))


def _no_affine(path):
    image = nib.load(path)
    path.write_bytes(gzip.compress(nib.Nifti1Image(np.asarray(image.dataobj), np.eye(4)).to_bytes()))
    _header(path, 80, image.header.get_zooms(), "<f4")


LACKING = {
    "no RV": lambda f: [_save(f / n, _exchange(0, 2, 3)) for n in (TRUTH, TRUTH.replace("01", "11"))],
    "LV alone": lambda f: _save(f / TRUTH, _exchange(0, 0, 3)),
    "nothing": lambda f: _save(f / TRUTH, np.zeros_like),
    "a few pixels": lambda f: _save(f / TRUTH, lambda a: np.where(np.cumsum(a == 3).reshape(a.shape) < 9, a == 3, 0)),
    "no affine": lambda f: _no_affine(f / TRUTH),
    "no affine of the image": lambda f: _no_affine(f / TRUTH.replace("_gt", "")),
    "no forms": lambda f: _header(f / TRUTH, 252, [0, 0], "<i2"),
    "not compressed": lambda f: [_unpack(p) for p in sorted(f.glob("*.nii.gz"))],
    "one not compressed": lambda f: _unpack(f / TRUTH),
    "byte-order mark": lambda f: (f / INFO).write_bytes(b"\xef\xbb\xbf" + (f / INFO).read_bytes()),
    "UTF-16": lambda f: (f / INFO).write_bytes((f / INFO).read_text().replace("\n", "\r\n").encode("utf-16")),
}


def _unpack(path):
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


@pytest.mark.parametrize("name", LACKING)
def test_what_a_release_may_lack(raw, tmp_path, capfd, name):
    """Other rules of annotation, headers that say nothing, other endings and texts: prepared without a word."""
    LACKING[name](raw / "training/patient028")
    assert data_prep.main([str(raw), str(tmp_path / "out"), "--allow-missing"]) == 0
    assert data_prep.check(tmp_path / "out") == []
    assert capfd.readouterr().err == ""


def test_an_odd_annotation_is_told_and_prepared(raw, tmp_path, capfd):
    """The annotation 12 pixels beside its heart: a warning each in preparation and --check, exit 0."""
    _save(raw / "training/patient028" / TRUTH, lambda a: np.roll(a, 12, 1))
    assert data_prep.main([str(raw), str(tmp_path / "out"), "--allow-missing"]) == 0
    one_line(capfd.readouterr().err, TRUTH, "standard deviations", "usual is 0.8", "is the annotation mirrored")
    assert data_prep.main(["--check", str(tmp_path / "out")]) == 0
    out, err = capfd.readouterr()
    one_line(err, "patient028_frame01.h5", "standard deviations")
    assert "no faults" in out


def test_measures_by_hand():
    """A cavity of 2 x 2 with a wall of one pixel, an RV of 2 x 2 that touches it with one side; two slices add up."""
    label = np.zeros((1, 6, 9), np.uint8)
    label[0, 1:5, 3:7], label[0, 2:4, 4:6], label[0, 2:4, 1:3] = 2, 3, 1
    image = np.where(label == 3, 0.75, 0.25)
    rows = data_prep.measure(image, label)
    assert (rows[3, 2], rows[3, :3].sum()) == (8, 8)
    assert (rows[1, 2], rows[1, [0, 2, 3]].sum()) == (2, 8)
    np.testing.assert_array_equal(rows[4:], [[4, 6, 1, 0.25], [12, 54, 3, 0.75], [4, 18, 3, 2.25]])
    np.testing.assert_array_equal(data_prep.measure(np.tile(image, (8, 1, 1)), np.tile(label, (8, 1, 1))), 8 * rows)
    assert data_prep.judge("x", rows, None) == []                      # few pixels
    told = data_prep.judge("x", 8 * rows, (8, 0.5, 0.5))               # centres 3 pixels apart
    assert [t.split()[1] for t in told] == ["1.50"]
    assert data_prep.judge("x", 8 * rows, (8, 2, 2)) == []
    with pytest.raises(DataError, match=r"x: -6.00 mm from the RV's centre right to the LV's"):
        data_prep.judge("x", 8 * data_prep.measure(image[..., ::-1], label[..., ::-1]), (8, 2, 2))


@needs_acdc
def test_the_release_raises_no_alarm():
    told = []
    for folder in data_prep.find_patients(DATABASE).values():
        data_prep.read_patient(folder, True, told)
    assert told == []


def test_bad_input_leaves_an_earlier_preparation_alone(raw, cohort, tmp_path):
    out = tmp_path / "out"
    data_prep.convert(raw, out, allow_missing=True)
    before = files(out)
    shutil.copytree(cohort / "raw/training/patient099", raw / "training/patient099")  # good, and converted first
    shutil.copytree(raw / "training/patient028", raw / "training/patient085")
    with pytest.raises(DataError, match=r"patient085_frame01\.nii\.gz"):
        data_prep.convert(raw, out, allow_missing=True)
    assert files(out) == before


def test_cli_errors_are_one_line(raw, tmp_path):
    (raw / "other/patient151").mkdir(parents=True)
    for args, words in {
        (raw, "--check", raw): ("give one of",),
        ("--phantom", tmp_path / "out", "--patients", "6"): ("phantom.py", "data_prep.py data/phantom/raw"),
        (raw, tmp_path / "out"): ("lacks 149 of 150", "patient099", "--allow-missing"),
        (tmp_path / "nothing",): ("nothing", "training/"),
        (raw / "other", "--allow-missing"): ("none of ACDC's 150 patients",),
        ("--check", tmp_path / "nothing"): ("nothing", "no such folder"),
        (raw, raw / "training/patient028/Info.cfg", "--allow-missing"): ("Info.cfg", "choose another OUT"),
        (raw, "--workers", "0"): ("--workers",),
    }.items():
        done = python(SCRIPT, *args, cwd=tmp_path)
        assert done.returncode == 2, done
        one_line(done.stderr, *words)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


def test_stray_files_and_odd_names(raw, tmp_path):
    clean = data_prep.convert(raw, tmp_path / "clean", allow_missing=True)
    patient = raw / "training/patient028"
    for p in (raw, patient.parent, patient):
        (p / ".DS_Store").write_bytes(b"\0\1")
        (p / "MANDATORY_CITATION.md").write_text("cite")
    (patient / "patient028_frame01 (1).nii.gz").write_bytes(b"copy")
    (patient / "._patient028_frame01.nii.gz").write_bytes(b"resource fork")
    shutil.copytree(patient, patient.parent / "patient028 copy")
    (patient.parent / "patient085").write_text("a file, no folder")
    os.symlink("patient082", patient.parent / "patient082")  # a loop
    assert list(data_prep.find_patients(raw)) == ["patient028"]
    odd = tmp_path / "données ✓ 心"
    raw.rename(odd)
    done = python(SCRIPT, odd, odd / "out put", "--allow-missing")
    assert done.returncode == 0, done.stderr
    assert json.loads((odd / "out put/manifest.json").read_text()) == clean
    assert files(odd / "out put") == files(tmp_path / "clean")


def test_database_its_parent_and_a_folder_of_patients_are_the_same(raw, tmp_path):
    os.mkdir(tmp_path / "parent")
    os.symlink(raw, tmp_path / "parent/database")
    for folder in (raw, tmp_path / "parent", raw / "training"):
        found = {p: f.resolve() for p, f in data_prep.find_patients(folder).items()}
        assert found == {"patient028": raw / "training/patient028"}


@pytest.fixture
def small(tmp_path):
    """A compressed 3D image of noise -> (its path, its array, the NIfTI's bytes)."""
    path, array = tmp_path / "image.nii.gz", np.random.default_rng(0).integers(0, 400, (12, 10, 4)).astype(np.int16)
    data = nib.Nifti1Image(array, np.eye(4)).to_bytes()
    path.write_bytes(gzip.compress(data, mtime=0))
    return path, array.T, data


def test_a_flipped_bit_in_a_compressed_image_is_refused_or_harmless(small):
    path, expected, _ = small
    good, rng, refused = path.read_bytes(), np.random.default_rng(1), 0
    for bit in rng.choice(np.arange(80, 8 * len(good)), 60, replace=False):  # behind gzip's header of 10 bytes
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            array = data_prep.load_nifti(path)[0]
        except DataError as e:
            one_line(str(e), path, "fetch the file again")
            refused += 1
        else:
            np.testing.assert_array_equal(array, expected, f"bit {bit}")
    assert refused > 50


def test_limits_of_one_image(small, monkeypatch):
    """Bytes behind the voxels, an ending that lies, our own limit, rights: at the limit read, beyond it one line."""
    path, expected, data = small

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    def reads(path=path):
        return np.array_equal(data_prep.load_nifti(path)[0], expected)

    def refused(words, path=path):
        with pytest.raises(DataError, match=words):
            data_prep.load_nifti(path)

    monkeypatch.setattr(data_prep, "MAX_VOXELS", expected.size)
    assert reads()
    monkeypatch.setattr(data_prep, "MAX_VOXELS", expected.size - 1)
    refused("above the limit of 479 voxels that is ours; cut it to the heart or into")
    monkeypatch.undo()
    path.write_bytes(gzip.compress(data + bytes(data_prep.MAX_TAIL)))
    assert reads()
    path.write_bytes(gzip.compress(data + bytes(data_prep.MAX_TAIL + 1)))
    refused(r"image\.nii\.gz: goes on for more than")
    path.write_bytes(data)
    refused(r"image\.nii\.gz: not compressed; rename it to \.nii")
    plain = path.rename(path.with_suffix(""))
    assert reads(plain)
    monkeypatch.setattr(nib, "load", denied)
    refused("Permission denied.*; give yourself the right to read it", plain)


@posix
def test_a_prepared_file_that_another_process_has_open(prepared):
    hold = f"f = h5py.File({str(prepared / VALUE)!r}, 'r+')"
    code = f"import h5py, sys; {hold}; print('open', flush=True); sys.stdin.read()"
    env = os.environ | {"HDF5_USE_FILE_LOCKING": "TRUE"}
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    assert other.stdout.readline() == b"open\n"
    try:
        with pytest.raises(DataError, match=f"{VALUE}: .*; another process has it open: close it there and run again"):
            data_prep.read_volume(prepared, "patient028_frame01")
    finally:
        other.communicate()
    assert data_prep.read_volume(prepared, "patient028_frame01").label.max() == 3


# --------------------------------------------------------------------------------------------------- disk, kills, locks

@posix
@pytest.mark.parametrize("room", [100, 8_000, 20_000, 40_000])
def test_a_write_that_fails_at_some_byte(raw, tmp_path, room):
    """One line, nothing left."""
    import resource  # Windows has none

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    done = python(SCRIPT, raw, tmp_path / "out", "--allow-missing", preexec_fn=limit)
    assert done.returncode == 2
    one_line(done.stderr, ".h5", "File too large", "free some space")
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "a.list"
    data_prep.write_atomic(file, b"old")
    data_prep.write_atomic(tmp_path / "new/b.list", b"made with its folder")
    seen = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(os.listdir(tmp_path)) or os.close(-1))  # EBADF
    with pytest.raises(DataError, match=r"a\.list"):
        data_prep.write_atomic(file, b"new")
    assert len(seen[0]) == 3  # it was written beside the old one
    assert files(tmp_path) == {"a.list": b"old", "new/b.list": b"made with its folder"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_full_disk_for_real(raw, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", disk]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        done = python(SCRIPT, raw, disk / "out", "--allow-missing")
        assert done.returncode == 2
        one_line(done.stderr, str(disk), "No space left", "free some space")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="drops a Linux capability")
def test_no_write_permission(raw, tmp_path):
    """As root, without the capability that lets root write anywhere."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    drop = (lambda: ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)) if os.geteuid() == 0 else None  # CAP_DAC_OVERRIDE
    done = python(SCRIPT, raw, locked / "out", "--allow-missing", preexec_fn=drop)
    assert done.returncode == 2
    one_line(done.stderr, locked, "Permission denied")
    assert list(locked.iterdir()) == []


@posix
@pytest.mark.parametrize(("there", "sig"), [(1, signal.SIGKILL), (9, signal.SIGKILL), (30, signal.SIGKILL),
                                            (5, signal.SIGINT)])  # fmt: skip
def test_killed_and_run_again(cohort, tmp_path, there, sig):
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), str(cohort / "raw"), str(out), "--allow-missing", "--workers", "2"]
    # where the suite runs in the background of a shell, SIGINT is ignored, and children inherit that
    hear = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=hear)
    deadline = time.monotonic() + 60
    while len(list(out.glob("data/**/*.h5"))) < there and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(sig)
    _, err = process.communicate(timeout=60)
    if sig == signal.SIGINT:
        assert process.returncode == 130
        one_line(err, "interrupted", "run it again")
    else:
        assert process.returncode == -sig
    assert not (out / "manifest.json").exists(), "it was over before the signal"
    done = {p: p.stat().st_mtime_ns for p in out.glob("data/**/patient*.h5")}
    assert len(done) >= there

    again = python(*command[1:])
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in done} == done  # finished files were not written again
    unbroken = {k: v for k, v in files(cohort).items() if not k.startswith("raw/")}
    assert files(out) == unbroken


def test_a_damaged_file_of_an_earlier_run_is_made_again(prepared, cohort):
    good = files(prepared)
    _truncate(prepared / "data/patient028_frame01.h5")
    (prepared / "data/.patient028_frame02.h5.4711.part").write_bytes(b"half")
    data_prep.convert(cohort / "raw", prepared, allow_missing=True)
    assert files(prepared) == good


@posix
def test_a_second_preparation_says_who_holds_the_folder(raw, tmp_path):
    out = tmp_path / "out"
    with data_prep.locked_folder(out):
        done = python(SCRIPT, raw, out, "--allow-missing")
        assert done.returncode == 2
        one_line(done.stderr, out, f"process {os.getpid()} ")
        assert [p.name for p in out.iterdir()] == [".lock"]
    assert not out.exists()
    out.mkdir()
    (out / ".lock").write_text("process 1 on a machine")  # as a kill leaves it
    assert data_prep.main([str(raw), str(out), "--allow-missing"]) == 0
    assert not (out / ".lock").exists()


# ---------------------------------------------------------------------------------------------------------------- check

def _flat_copy(root, out):
    """The community's layout: all files in data/, no attributes, no manifest, slices in no order."""
    (out / "data").mkdir(parents=True)
    for path in root.glob("data/**/*.h5"):
        with h5py.File(path) as a, h5py.File(out / "data" / path.name, "w") as b:
            for key in a:
                b.create_dataset(key, data=a[key][()], compression="gzip")
    for name in ("train", "val", "test"):
        shutil.copy(root / f"{name}.list", out)
    lines = (root / "train_slices.list").read_text().split()
    groups = [list(g)[::-1] for _, g in itertools.groupby(lines, lambda n: n[:18])]
    (out / "train_slices.list").write_text("\n".join(itertools.chain(*groups)))
    return out


def test_check_passes_on_ours_and_on_the_communitys_layout(cohort, tmp_path):
    done = python(SCRIPT, "--check", cohort)
    assert (done.returncode, done.stdout) == (0, f"{cohort}: no faults\n")
    flat = _flat_copy(cohort, tmp_path / "flat")
    assert data_prep.check(flat) == []
    volume = data_prep.read_volume(flat, "patient028_frame02")
    assert (volume.spacing, volume.group) == (None, None)
    ours, theirs = ({name: (x.tobytes(), y.tobytes()) for name, x, y in data_prep.read_slices(root)}
                    for root in (cohort, flat))  # fmt: skip
    assert theirs == ours


def _h5(file, change):
    def fault(root):
        with h5py.File(root / file, "r+") as h:
            change(h)
        return file

    return fault


def _list(file, change):
    def fault(root):
        lines = (root / file).read_text().split()
        (root / file).write_text("\n".join(change(lines)) + "\n")
        return file

    return fault


def _unlisted(plant):
    """Without a manifest, as in the community's copy."""
    return lambda root: (root / "manifest.json").unlink() or plant(root)


def _replace(key, change):
    def replaced(h):
        array = change(h[key][()])
        del h[key]
        h[key] = array

    return replaced


def _swap(lines):
    p = lines[0][:10]
    return [n for n in lines if n[:10] != p] + [n for n in lines if n[:10] == p]


VALUE, SLICE_FILE = "data/patient028_frame01.h5", "data/slices/patient099_frame01_slice_2.h5"
FAULTS = {
    "file absent": (lambda root: (root / VALUE).unlink() or VALUE, "absent"),
    "file truncated": (lambda root: _truncate(root / VALUE) or VALUE, "cannot be read"),
    "shapes differ": (_h5(VALUE, _replace("label", lambda a: a[1:])), "but image"),
    "label 4": (_h5(VALUE, _replace("label", lambda a: a + 4)), "0..3"),
    "image above 1": (_h5(SLICE_FILE, _replace("image", lambda a: a + 2)), "0..1"),
    "NaN": (_h5(SLICE_FILE, _replace("image", lambda a: a * np.nan)), "0..1"),
    "no label": (_h5(SLICE_FILE, lambda h: h.__delitem__("label")), "no label"),
    "no image": (_h5(VALUE, lambda h: h.__delitem__("image")), "no image"),
    "volume where a slice belongs": (_h5(SLICE_FILE, _replace("image", lambda a: a[None])), "2D"),
    "text": (_h5(VALUE, _replace("image", lambda a: "hello")), "3D"),
    "bad spacing": (_h5(VALUE, lambda h: h.attrs.__setitem__("spacing", [1.0, 0.0, 1.0])), "spacing"),
    "other content": (_h5(SLICE_FILE, _replace("image", lambda a: a[::-1])), "manifest"),
    "list absent": (lambda root: (root / "val.list").unlink() or "val.list", "absent"),
    "list not text": (lambda root: (root / "val.list").write_bytes(b"\xff\xfe\0") and "val.list", "cannot be read"),
    "path in a list": (_list("val.list", lambda n: n + ["../../etc/passwd"]), "not a name"),
    "entry twice": (_list("val.list", lambda n: n + n[-1:]), "2 times"),
    "frame not listed": (_list("val.list", lambda n: n[1:]), "lacks patient028_frame01"),
    "patient in two splits": (_list("test.list", lambda n: n + [f"patient028_frame0{k}" for k in "12"]), "also in"),
    "slice not listed": (_list("train_slices.list", lambda n: n[:1] + n[2:]), "has slices"),
    "last slice not listed": (_list("train_slices.list", lambda n: n[:-1]), "manifest"),
    "slice of no volume": (_list("train_slices.list", lambda n: n + ["patient001_frame01_slice_1"]), "not in train"),
    "other order": (_list("train_slices.list", _swap), "order"),
    "mirrored": (_unlisted(_h5(VALUE, _replace("label", lambda a: a[..., ::-1]))), "RV's centre"),
    "LV and RV exchanged": (_unlisted(_h5(VALUE, _replace("label", _exchange(3, 2, 1)))), "1 RV, 2 MYO, 3 LV"),
    "ES spacing": (_h5("data/patient028_frame02.h5", lambda h: h.attrs.update(spacing=[10, 1, 1.1])), "first is"),
    "a slice's spacing": (_h5(SLICE_FILE, lambda h: h.attrs.update(spacing=[10, 3, 3])), "first is"),
    "manifest damaged": (lambda root: (root / "manifest.json").write_text("[1") and "manifest.json", "cannot be read"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_check_reports_a_planted_fault_in_one_line(prepared, name, capfd):
    plant, word = FAULTS[name]
    file = plant(prepared)
    assert data_prep.main(["--check", str(prepared)]) == 1
    lines = [line for line in capfd.readouterr().out.splitlines() if "patient001_frame01_slice_1.h5" not in line]
    assert len(lines) == 1, lines
    assert word in lines[0], lines
    assert file in lines[0] or word == "manifest"


def test_hdf5_that_points_elsewhere_or_lies_is_refused(tmp_path):
    secret, path = tmp_path / "secret.h5", tmp_path / "data/patient001_frame01.h5"
    with h5py.File(secret, "w") as h:
        h["image"] = np.zeros((2, 4, 4), np.float32)
        h["label"] = np.zeros((2, 4, 4), np.uint8)
    np.zeros(32, np.float32).tofile(tmp_path / "secret.bin")
    path.parent.mkdir()
    layout = h5py.VirtualLayout((2, 4, 4), np.float32)
    layout[:] = h5py.VirtualSource(secret, "image", (2, 4, 4))
    outside = dict(shape=(2, 4, 4), dtype=np.float32, external=[(str(tmp_path / "secret.bin"), 0, 128)])
    huge = dict(shape=(10000,) * 3, dtype=np.float32, chunks=(1, 100, 100), compression="gzip")  # 4 TB in 2 kB
    elsewhere = "not in the file itself"
    for make, words in (
        (lambda h: h.__setitem__("image", h5py.ExternalLink(str(secret), "image")), elsewhere),
        (lambda h: h.__setitem__("image", h5py.SoftLink("/other")), elsewhere),
        (lambda h: h.create_virtual_dataset("image", layout), elsewhere),
        (lambda h: h.create_dataset("image", **outside), elsewhere),
        (lambda h: h.create_group("image"), elsewhere),
        (lambda h: h.create_dataset("image", **huge), "more than the file can hold"),
    ):
        with h5py.File(path, "w") as h:
            make(h)
        with pytest.raises(DataError, match=words):
            data_prep.read_volume(tmp_path, "patient001_frame01")


def test_works_when_copied_alone(raw, tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(SCRIPT, folder)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONDONTWRITEBYTECODE": "1"}
    code = "import data_prep, os, sys; print(os.listdir(), {'models', 'evaluate', 'torch'} & set(sys.modules))"
    done = python("-c", code, cwd=folder, env=env)
    assert (done.stdout, done.stderr) == ("['data_prep.py'] set()\n", "")
    done = python("data_prep.py", raw, "--allow-missing", cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in folder.iterdir()) == ["data", "data_prep.py"]
    assert data_prep.check(folder / "data/ACDC") == []
