"""predict.py: geometry, cines, other scanners, names, faults, kills, --time, --onnx."""
import errno
import gzip
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import DATABASE, ROOT, needs_acdc, no_room, one_line, python, read_csv
from scipy import ndimage
from test_evaluate import heart, painted, save, train_student

import evaluate
import models
import predict
import scans
from models import PIXEL, UNet, load_model, segment_volume, turn

SCRIPT = ROOT / "predict.py"
FRAME, TRUTH = heart(28, "ED")
RESULTS = {f"_{k}" for k in ("seg.nii.gz", "overlay.png", "volumes.csv")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.pt"
    student = train_student()
    torch.manual_seed(1)
    coteacher = UNet(2, 8)
    coteacher.load_state_dict({k: v + 0.02 * torch.randn_like(v) if v.is_floating_point() else v
                               for k, v in student.state_dict().items()})
    save(path, dict(student=student, coteacher=coteacher))
    return path


@pytest.fixture(autouse=True)
def unsure(monkeypatch):
    """The student of these tests has learnt for seconds: its entropy is high everywhere."""
    monkeypatch.setattr(predict, "ENTROPY", 20)


def run(capsys, *args):
    """-> exit code, stdout, stderr of predict.py in this process."""
    code = predict.main([str(a) for a in args])
    return code, *capsys.readouterr()


def refused(capsys, *args):
    """-> the one line of a call that does nothing else."""
    code, stdout, stderr = run(capsys, *args)
    assert (code, stdout) == (2, "")
    one_line(stderr, "predict.py: ")
    return stderr


def write_nifti(path, array, spacing=(8, PIXEL, PIXEL), dtype=np.float32, slope=None, order="<", kind=nib.Nifti1Image):
    """(Z, Y, X) or (T, Z, Y, X) in 0..1 -> a file as ACDC's: zooms in the header, a sform that says 1 mm."""
    scale = 1 if np.dtype(dtype).kind == "f" else 250
    array = np.rint(array * scale) if scale > 1 else array
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    image = kind(np.asfortranarray(array.T.astype(dtype)), None, header)
    image.header.set_zooms((*spacing[::-1], 0.04)[:array.ndim])
    image.header.set_sform(np.array([[-1, 0, 0, 3], [0, -1, 0, 5], [0, 0, 1, 7], [0, 0, 0, 1]]), 2)
    image.header["descrip"] = b"a scanner"
    image.header["cal_max"] = 99
    if slope:
        image.header.set_slope_inter(*slope)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def voxels(path):
    """(Z, Y, X) or (T, Z, Y, X) of a file as written."""
    return np.asanyarray(nib.load(path).dataobj).T


def names(*paths):
    return [p.as_posix() for p in predict.find_images(paths).values()]


def cine(radii=(0.9, 1.0, 0.8, 0.6, 0.5, 0.7)):
    """(T, Z, Y, X): one heart whose cavity and wall grow and shrink about its middle; ED is frame 2, ES frame 5."""
    z, y, x = np.mgrid[:6, :44, :48].astype(float)
    frames = [ndimage.map_coordinates(FRAME, [z, 22 + (y - 22) / r, 26 + (x - 26) / r], order=1, mode="nearest")
              for r in radii]
    return np.array(frames, np.float32)


def results(out):
    """{name of a result: suffixes there}, hidden files too."""
    found = {}
    for p in sorted(Path(out).rglob("*")):
        if p.is_file() and p.name != "predictions.csv":
            stem, _, suffix = p.relative_to(out).as_posix().rpartition("_")
            found.setdefault(stem, set()).add(f"_{suffix}")
    return found


# --------------------------------------------------------------------------------------------------------- geometry

def lies_alike(path, source):
    """Shape, zooms, both forms and their codes are the source's, for nibabel and for the reader of ITK."""
    after, before = nib.load(path), nib.load(source)
    assert after.shape == before.shape
    assert after.header.get_zooms() == before.header.get_zooms()
    np.testing.assert_array_equal(after.affine, before.affine)
    for key in ("sform_code", "qform_code", "srow_x", "quatern_b", "qoffset_x", "xyzt_units", "pixdim", "dim"):
        np.testing.assert_array_equal(after.header[key], before.header[key])
    if isinstance(before, nib.Nifti2Image):                                             # ITK's build may lack it
        return
    sitk = pytest.importorskip("SimpleITK", reason="pip install SimpleITK")
    a, b = (sitk.ReadImage(str(p)) for p in (path, source))
    assert a.GetSize() == b.GetSize()
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(a, get)() == pytest.approx(getattr(b, get)())


@pytest.mark.usefixtures("no_pictures")
def test_geometry_survives_on_every_dtype(capsys, tmp_path, checkpoint):
    """Shape, zooms, both forms, their codes, spacing and origin of SimpleITK: as the source has them, whatever its
    dtype, byte order, slope, compression or dimension; and the labels are those of segment_volume."""
    variants = {f"{np.dtype(d)}": dict(dtype=d) for d in (np.uint8, np.int16, np.uint16, np.int32, np.float64)}
    variants |= {"float32": {}, "big": dict(dtype=np.int16, order=">"), "slope": dict(dtype=np.int16, slope=(0.5, -3)),
                 "nan": dict(dtype=np.float32, slope=(np.nan, np.nan)), "nifti2": dict(kind=nib.Nifti2Image)}
    spacing = (8, 1.5, 1.3)
    for name, more in variants.items():
        suffix = ".nii" if name in ("big", "uint8") else ".nii.gz"
        write_nifti(tmp_path / "in" / (name + suffix), FRAME, spacing, **more)
        write_nifti(tmp_path / "in" / (name + "_4d" + suffix), cine()[:2], spacing, **more)
    code, _, stderr = run(capsys, checkpoint, tmp_path / "in", "--out", tmp_path / "out", "--entropy")
    assert (code, stderr) == (0, "")
    sources = sorted((tmp_path / "in").iterdir())
    net, content = load_model(checkpoint)
    expected = {}
    for ndim, frames in ((3, FRAME[None]), (4, cine()[:2])):
        slices, few = predict.asked_slices(frames)
        position = models.find_position(net, slices, spacing, few=few, **content["inference"])
        image, mm = turn(frames[0], position), spacing if position % 2 == 0 else (8, 1.3, 1.5)
        focus = models.find_heart(net, image, mm, **content["inference"])
        labels = models.largest_component(segment_volume(net, image, **content["inference"], **focus))
        expected[ndim] = turn(labels, position, back=True)
    assert evaluate.dice(expected[3], TRUTH).mean() > 0.8                               # a prediction worth a look
    for source in sources:
        stem = tmp_path / "out" / source.name.split(".nii")[0]
        for kind, dtype in (("seg", np.uint8), ("entropy", np.float32)):
            path = stem.with_name(f"{stem.name}_{kind}.nii.gz")
            lies_alike(path, source)
            header = nib.load(path).header
            assert header.get_data_dtype().newbyteorder("=") == dtype
            assert header.get_zooms()[:3] == pytest.approx(spacing[::-1])
            assert header["cal_max"] == 0
        labels = voxels(f"{stem}_seg.nii.gz")
        entropy = voxels(f"{stem}_entropy.nii.gz")
        same = (labels if labels.ndim == 3 else labels[0]) == expected[labels.ndim]
        assert same.mean() > (0.99999 if source.name.startswith(("float32", "nan")) else 0.99)   # others are rounded
        assert 0 <= entropy.min() < 0.05
        assert 0.3 < entropy.max() <= 1


@pytest.mark.usefixtures("no_pictures")
def test_time_as_the_fifth_axis(capsys, tmp_path, checkpoint):
    """(x, y, z, 1, t) is the cine that (x, y, z, t) is; its label map has the source's shape."""
    four = nib.load(write_nifti(tmp_path / "four.nii", cine()[:2]))
    five = nib.Nifti1Image(np.asarray(four.dataobj)[:, :, :, None], None)
    five.header.set_zooms((PIXEL, PIXEL, 8, 1, 0.04))
    nib.save(five, tmp_path / "five.nii")
    code, _, _ = run(capsys, checkpoint, tmp_path / "four.nii", tmp_path / "five.nii", "--out", tmp_path / "out")
    assert code == 0
    got, expected = (nib.load(tmp_path / "out" / f"{n}_seg.nii.gz").get_fdata() for n in ("five", "four"))
    assert got.shape == (48, 44, 6, 1, 2)
    np.testing.assert_array_equal(got[:, :, :, 0], expected)
    assert expected.max() == 3


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_label_map_tells_nothing_about_a_person(tmp_path, kind):
    source = nib.load(write_nifti(tmp_path / "scan.nii", FRAME, kind=kind))
    person = b"Jane Doe 1970"
    for key in {"descrip", "db_name", "aux_file", "intent_name", "data_type"} & set(source.header.keys()):
        source.header[key] = person[:10]
    source.header.extensions.extend(nib.nifti1.Nifti1Extension(kind, person) for kind in ("comment", "ignore"))
    nib.save(source, tmp_path / "person.nii")
    source = nib.load(tmp_path / "person.nii")
    assert len(source.header.extensions) == 2
    predict.save_like(source, TRUTH.T.astype(np.uint8), tmp_path / "person_seg.nii")
    assert b"Jane" not in (tmp_path / "person_seg.nii").read_bytes()
    np.testing.assert_array_equal(voxels(tmp_path / "person_seg.nii"), TRUTH)
    assert len(source.header.extensions) == 2
    lies_alike(tmp_path / "person_seg.nii", tmp_path / "person.nii")


@needs_acdc
@pytest.mark.usefixtures("no_pictures")
def test_real_cine_and_official_patients(capsys, tmp_path, checkpoint):
    sources = [DATABASE / "training" / "patient090" / "patient090_4d.nii.gz", DATABASE / "testing"]
    code, stdout, _ = run(capsys, checkpoint, *sources, "--out", tmp_path)
    assert code == 0
    assert "5 of 5 files" in stdout                                                     # no _gt among them
    for path, source in (("patient090_4d", sources[0].parent), ("patient101/patient101_frame01", sources[1])):
        lies_alike(tmp_path / f"{path}_seg.nii.gz", source / f"{path}.nii.gz")


# ------------------------------------------------------------------------------------------------------------ cines

def test_cine(capsys, tmp_path, checkpoint):
    """Volumes, ED, ES, EF and mass from the label maps that were written; curve and overlay; predictions.csv."""
    source = write_nifti(tmp_path / "in" / "cine.nii.gz", cine())
    code, stdout, _ = run(capsys, checkpoint, source, "--out", tmp_path / "out")
    assert code == 0
    assert results(tmp_path / "out") == {"cine": RESULTS | {"_volumes.png"}}
    labels = voxels(tmp_path / "out" / "cine_seg.nii.gz")
    rows = read_csv(tmp_path / "out" / "cine_volumes.csv")
    ml = np.array([[np.count_nonzero(f == k) * 8 * PIXEL**2 / 1000 for k in (1, 2, 3)] for f in labels])
    got = [[float(r[f"{c}_ml"]) for c in ("rv", "myo", "lv")] for r in rows]
    np.testing.assert_allclose(got, ml, rtol=1e-5)
    assert [r["phase"] for r in rows] == ["", "ED", "", "", "ES", ""]
    assert [r["frame"] for r in rows] == list("123456")
    row, = read_csv(tmp_path / "out" / "predictions.csv")
    assert (row["file"], row["frames"], row["ED"], row["ES"], row["error"]) == (str(source), "6", "2", "5", "")
    ef = 100 * (ml[1] - ml[4]) / ml[1]
    assert ef[2] > 50
    expected = dict(lv_edv=ml[1, 2], lv_esv=ml[4, 2], lv_ef=ef[2], rv_edv=ml[1, 0], rv_esv=ml[4, 0], rv_ef=ef[0],
                    myo_mass=1.05 * ml[1, 1])
    np.testing.assert_allclose([float(row[k]) for k in expected], list(expected.values()), rtol=1e-5)
    assert f"LV EF {ef[2]:.1f} %" in stdout
    assert f"mass {1.05 * ml[1, 1]:.1f} g" in stdout
    for name, colors in (("overlay", evaluate.COLORS.values()), ("volumes", (evaluate.COLORS["LV"],))):
        for color in colors:
            assert painted(tmp_path / "out" / f"cine_{name}.png", color) > 300, (name, color)


def test_a_frame_without_a_cavity_is_not_systole():
    """An ejection fraction of 100 % from one failed frame would look like a result."""
    ml = np.array([[9, 9, lv] for lv in (30, 50, 0, 20, 25)])
    assert predict.find_phases(ml) == {"ED": 1, "ES": 3}
    assert predict.find_phases(ml[2:4]) == {}


def test_nothing_found(capsys, tmp_path, checkpoint):
    """No heart: empty label maps, no phases, no EF, and every file all the same; a cine of one frame is no cine."""
    write_nifti(tmp_path / "in" / "flat.nii", np.zeros((2, 3, 40, 40), np.float32))
    write_nifti(tmp_path / "in" / "single.nii", cine()[:1])
    code, _, stderr = run(capsys, checkpoint, tmp_path / "in", "--out", tmp_path / "out")
    assert (code, stderr) == (0, f"predict.py: {tmp_path}/in/flat.nii: no heart found\n")
    assert results(tmp_path / "out") == {"flat": RESULTS | {"_volumes.png"}, "single": RESULTS}
    flat, single = read_csv(tmp_path / "out" / "predictions.csv")
    labels = np.asanyarray(nib.load(tmp_path / "out" / "flat_seg.nii.gz").dataobj)
    if not (labels == 3).any():
        assert (flat["ED"], flat["lv_ef"]) == ("", "")
    assert single["ED"] == ""
    assert nib.load(tmp_path / "out" / "single_seg.nii.gz").shape == (48, 44, 6, 1)


@pytest.mark.usefixtures("no_pictures")
def test_uncertainty(capsys, tmp_path, checkpoint):
    """Disagreement and entropy by hand; without a second network no column, without --entropy no map."""
    source = write_nifti(tmp_path / "scan.nii", FRAME)
    args = [source, "--out", tmp_path / "out", "--no-find-heart", "--no-largest-component"]
    assert run(capsys, checkpoint, *args, "--entropy")[0] == 0
    row = read_csv(tmp_path / "out" / "scan_volumes.csv")[0]
    (student, content), (coteacher, _) = (load_model(checkpoint, which=w) for w in ("student", "coteacher"))
    labels, probs = segment_volume(student, FRAME, **content["inference"], return_probs=True)
    other = segment_volume(coteacher, FRAME, **content["inference"])
    expected = 1 - np.mean([2 * ((labels == k) & (other == k)).sum() / ((labels == k).sum() + (other == k).sum())
                            for k in (1, 2, 3)])
    assert 0.001 < expected < 0.9
    assert float(row["disagreement"]) == pytest.approx(expected, rel=1e-4)
    entropy = sum(-p * np.log(p + 1e-30) for p in probs.astype(float).transpose(1, 0, 2, 3)) / math.log(4)
    assert float(row["entropy"]) == pytest.approx(entropy[labels > 0].mean(), rel=1e-3)
    written = voxels(tmp_path / "out" / "scan_entropy.nii.gz")
    np.testing.assert_allclose(written, entropy, atol=1e-5)

    save(tmp_path / "alone.pt", dict(student=student))
    assert run(capsys, tmp_path / "alone.pt", *args)[0] == 0
    assert "disagreement" not in read_csv(tmp_path / "out" / "scan_volumes.csv")[0]
    assert read_csv(tmp_path / "out" / "predictions.csv")[0]["disagreement"] == ""
    assert not (tmp_path / "out" / "scan_entropy.nii.gz").exists()                      # of the run before
    assert run(capsys, checkpoint, *args, "--which", "coteacher")[0] == 0
    np.testing.assert_array_equal(voxels(tmp_path / "out" / "scan_seg.nii.gz"), other)


def test_marks_of_a_late_frame_stay_inside_the_curve(drawn, tmp_path):
    predict.draw_volumes(tmp_path / "x.png", "title", np.full((12, 3), 50.0), {"ED": 11, "ES": 0}, {})
    (ax,) = drawn[0].axes
    inside = ax.get_window_extent()
    assert (len(ax.texts), drawn[0].legends[0].get_title().get_text()) == (2, evaluate.NOTICE)
    assert all(inside.x0 <= t.get_window_extent().x0 and t.get_window_extent().x1 <= inside.x1 for t in ax.texts)


# ---------------------------------------------------------------------------------------- other scanners, components

@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("spacing", "corner"), [(0.7, (0, 0)), (1.4, (0, 70)), (1.4, (70, 0)), (0.7, (60, 60))])
def test_another_scanner(capsys, tmp_path, checkpoint, spacing, corner):
    """Half the pixel size, a heart in a corner of the slice: found and resampled unless asked not to."""
    shift = [(0, 0), *((c, 70 - c) for c in corner)]
    arrays = [np.pad(a, shift) for a in heart(28, "ED")]
    noise = np.random.default_rng(0).normal(0.12, 0.02, arrays[0].shape).astype(np.float32)
    arrays[0] = np.where(arrays[0] == 0, noise, arrays[0])
    if spacing != PIXEL:
        arrays = [np.repeat(np.repeat(a, 2, 1), 2, 2) for a in arrays]
    source = write_nifti(tmp_path / "scan.nii", arrays[0], (8, spacing, spacing))
    scores = {}
    for option in ("--find-heart", "--no-find-heart"):
        assert run(capsys, checkpoint, source, "--out", tmp_path / option, option)[0] == 0
        labels = voxels(tmp_path / option / "scan_seg.nii.gz")
        scores[option] = evaluate.dice(labels, arrays[1]).mean()
    assert scores["--find-heart"] > 0.75
    assert scores["--find-heart"] > scores["--no-find-heart"] + 0.2


# ------------------------------------------------------------------------------------------------------------- names

def test_names(monkeypatch, tmp_path):
    """Spaces, other alphabets, the same name in two folders or with two endings: a result each. Annotations and
    earlier predictions in a folder are left alone, a file given twice is done once. Two drives; no right to read."""
    inside = tmp_path / "Zoë's scans"
    for name in ("ward 1/séance один.nii.gz", "ward 2/séance один.nii.gz", "ward 2/other.nii", "ward 2/other_gt.nii",
                 "ward 2/other_seg.nii.gz", "ward 2/.other.nii", "ward 2/other_entropy.nii.gz", "notes.txt"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_bytes(b"")
    one, two = (inside / f"ward {i}" / "séance один.nii.gz" for i in (1, 2))
    assert names(inside, one) == ["ward 1/séance один", "ward 2/other", "ward 2/séance один"]
    assert names(one, two) == ["ward 1/séance один", "ward 2/séance один"]
    assert names(two) == ["séance один"]
    (inside / "ward 2" / "other.nii.gz").write_bytes(b"")
    assert names(inside / "ward 2") == ["other.nii", "other.nii.gz", "séance один.nii.gz"]

    def two_drives(_):
        raise ValueError("Paths don't have the same drive")

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
    monkeypatch.setattr(os.path, "commonpath", two_drives)
    assert names(one) == ["séance один"]
    assert names(one, two) == [f"{inside.as_posix()[1:]}/ward {i}/séance один" for i in (1, 2)]
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(predict.DataError, match="Permission denied; give yourself the right to read it"):
        names(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8 want Linux")
def test_names_that_are_no_text_or_look_like_formulas(tmp_path, checkpoint):
    scans = [write_nifti(tmp_path / name, np.stack([FRAME, FRAME])) for name in ("a$b_$c^.nii", "plain.nii")]
    latin = os.fsencode(tmp_path) + b"/Zo\xeb.nii"
    shutil.copy(scans[1], latin)
    done = python(SCRIPT, checkpoint, "--cpu", "--out", tmp_path / "o", latin, *scans,
                  env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert "Zo\\udceb.nii: 2 frames" in done.stdout
    assert len(list((tmp_path / "o").glob("*_volumes.png"))) == 3
    assert (tmp_path / "o" / "predictions.csv").read_text(encoding="utf-8").count("\n") == 4


def test_label_maps_hidden_and_linked_folders(capsys, tmp_path):
    """What other tools name label maps is left out of a folder, and counted; what is hidden too; links are followed."""
    labels = ("label_sa_ED.nii.gz", "labelsTr/case_001.nii.gz", "seg.nii", "x-mask.nii", "a/masks/b/c.NII", "x_GT.nii")
    scans = ("imagesTr/case_001_0000.nii.gz", "sa_ED.nii.gz", "UPPER.NII.GZ", "p1.nii/inner.nii", "segovia.nii")
    for name in (*labels, *scans, ".hidden/x.nii", ".Trash/a/y.nii.gz"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "linked.nii").write_bytes(b"")
    os.symlink(tmp_path / "far", tmp_path / "in" / "link")
    os.symlink(tmp_path / "in", tmp_path / "in" / "loop")
    expected = sorted(("UPPER", "imagesTr/case_001_0000", "link/linked", "p1.nii/inner", "sa_ED", "segovia"))
    assert sorted(names(tmp_path / "in")) == expected
    assert capsys.readouterr().out == f"{tmp_path}/in: label maps left out, by their names: 6\n"
    assert names(tmp_path / "in" / "p1.nii") == ["inner"]
    assert names(tmp_path / "in" / "x-mask.nii") == ["x-mask"]                       # asked for by name
    with pytest.raises(predict.DataError, match="but label maps by their names, 1; rename"):
        predict.find_images([tmp_path / "in" / "a"])


@pytest.mark.usefixtures("no_pictures")
def test_a_label_map_by_any_name_is_refused_by_content(capsys, tmp_path, checkpoint):
    """Four values or a mask's two, whole or float; an image of one value is no label map."""
    write_nifti(tmp_path / "in" / "heart.nii.gz", TRUTH.astype(np.float32))
    nib.save(nib.Nifti1Image((TRUTH == 3).T.astype(np.uint8), np.eye(4)), tmp_path / "in" / "cavity.nii")
    for paths in ([tmp_path / "in"], sorted((tmp_path / "in").iterdir())):
        code, _, stderr = run(capsys, checkpoint, *paths, "--out", tmp_path / "out")
        assert (code, stderr.count("\n")) == (1, 2)
        assert "cavity.nii: holds only 2 whole numbers, as a label map does; give the scan itself" in stderr
        assert "heart.nii.gz: holds only 4 whole numbers" in stderr
    assert results(tmp_path / "out") == {}
    scans.refuse_labels("x", np.zeros((3, 40, 40)))
    assert scans.FEW_VALUES == 16


@pytest.mark.usefixtures("no_pictures")
def test_long_names(capsys, tmp_path, checkpoint):
    """A name that leaves no room for a suffix, in bytes: results under a shorter one, the others are done."""
    for name in ("a" * 243 + ".nii.gz", "a" * 242 + "b.nii.gz", "я" * 124 + ".nii", "short.nii"):
        write_nifti(tmp_path / "in" / name, FRAME)
    args = (checkpoint, tmp_path / "in", "--out", tmp_path / "out", "--entropy", "--no-find-heart")
    assert run(capsys, *args)[0] == 0
    found = results(tmp_path / "out")
    assert len(found) == 4
    assert all(suffixes == RESULTS | {"_entropy.nii.gz"} for suffixes in found.values())
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert {r["name"] for r in rows} == set(found)
    assert {r["name"][:9] for r in rows} == {"a" * 9, "я" * 9, "short"}


@pytest.mark.usefixtures("no_pictures")
def test_calls_into_one_folder_add_to_one_table(capsys, monkeypatch, tmp_path, checkpoint):
    """Rows of other files stay, a file's own is replaced, whatever way leads to it; a file of the same name from
    another folder is refused by its name, before anything is written."""
    one, two, other = (write_nifti(tmp_path / n, FRAME) for n in ("w1/scan.nii", "w1/two.nii", "w2/scan.nii"))
    out = ("--out", tmp_path / "out", "--no-find-heart")
    assert run(capsys, checkpoint, one, *out)[0] == 0
    assert run(capsys, checkpoint, two, *out)[0] == 0
    monkeypatch.chdir(tmp_path / "w1")
    assert run(capsys, checkpoint, "scan.nii", *out)[0] == 0
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert [(r["file"], r["name"], r["error"]) for r in rows] == [(str(two), "two", ""), (str(one), "scan", "")]
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    monkeypatch.chdir(tmp_path / "w2")
    told = f"scan_seg.nii.gz there is of {one}, not of scan.nii; give another --out"
    assert told in refused(capsys, checkpoint, "scan.nii", *out)
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    other.write_bytes(b"")
    (tmp_path / "out" / "scan_seg.nii.gz").unlink()                                     # taken away: free again
    assert run(capsys, checkpoint, other, *out)[0] == 1
    errors = {r["file"]: r["error"] for r in read_csv(tmp_path / "out" / "predictions.csv")}
    assert (list(errors), errors[str(one)]) == ([str(two), str(one), str(other)], "")
    assert "cannot be read" in errors[str(other)]
    (tmp_path / "out" / "predictions.csv").write_text("a;b\n1;2\n")
    assert "predictions.csv: cannot be read ('file'); move it away" in refused(capsys, checkpoint, two, *out)


def test_a_warning_of_a_file_is_told_and_listed(capsys, monkeypatch, tmp_path):
    row = dict(frames=1, axes="LPS", rv_ml=97.7, warning="look at the base")
    monkeypatch.setattr(predict, "predict_file", lambda nets, source, *_, **__: [dict(file=str(source)) | row])
    source = tmp_path / "scan.nii"
    source.write_bytes(b"")
    assert predict.predict([], {}, [source], tmp_path / "out") == 0
    assert capsys.readouterr().err == f"predict.py: {source}: look at the base\n"
    got, = read_csv(tmp_path / "out" / "predictions.csv")
    assert (got["rv_ml"], got["warning"], got["name"]) == ("97.7", "look at the base", "scan")
    assert {"position", "myo_ml", "lv_ml"} <= set(got)


# ------------------------------------------------------------------------------------------------------------ faults

def damage(folder):
    """Bad files of every kind -> {name: what its line must say}."""
    write_nifti(folder / "whole.nii.gz", FRAME)
    bytes_ = (folder / "whole.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(bytes_[:len(bytes_) // 2])
    (folder / "text.nii").write_text("not an image")
    (folder / "empty.nii.gz").write_bytes(b"")
    holes = FRAME.copy()
    holes[1, 2, 3] = np.nan
    write_nifti(folder / "holes.nii", holes)
    nib.save(nib.Nifti1Image(np.ones((50, 60), np.float32), np.eye(4)), folder / "flat.nii")
    nib.save(nib.Nifti1Image(np.ones((9, 9, 2, 2, 2), np.float32), np.eye(4)), folder / "five.nii")
    raw = bytearray(gzip.decompress(bytes_))
    raw[80:84] = bytes(4)                                                               # pixdim[1] = 0
    (folder / "zero.nii").write_bytes(raw)
    write_nifti(folder / "metres.nii", FRAME, (0.008, 0.0014, 0.0014))
    os.mkfifo(folder / "pipe.nii")                                                      # waited for, it never ends
    os.symlink("loop.nii", folder / "loop.nii")
    return {"truncated": "cannot be read", "text": "cannot be read", "empty": "cannot be read", "holes": "NaN",
            "flat": "not a 3D or 4D image", "five": "not a 3D or 4D image", "zero": "spacing",
            "metres": "give the true --spacing Z Y X in mm", "pipe": "not a NIfTI file",
            "loop": "not a NIfTI file"}


@pytest.mark.usefixtures("no_pictures")
def test_bad_files_among_good_ones(capsys, tmp_path, checkpoint):
    expected = damage(tmp_path / "in")
    write_nifti(tmp_path / "in" / "zz last.nii", FRAME)
    code, stdout, stderr = run(capsys, checkpoint, tmp_path / "in", "--out", tmp_path / "out")
    assert code == 1
    assert "2 of 12 files segmented" in stdout
    lines = stderr.splitlines()
    assert len(lines) == len(expected)
    table = {Path(r["file"]).name.split(".")[0]: r for r in read_csv(tmp_path / "out" / "predictions.csv")}
    for name, text in expected.items():
        told = [line for line in lines if f"{name}.nii" in line]
        assert len(told) == 1
        assert told[0].startswith("predict.py: ")
        assert text in told[0]
        assert text in table[name]["error"]
    assert results(tmp_path / "out") == {"whole": RESULTS, "zz last": RESULTS}
    code, _, stderr = run(capsys, checkpoint, tmp_path / "in" / "flat.nii", "--out", tmp_path / "none")
    assert (code, stderr.count("\n")) == (1, 1)
    assert results(tmp_path / "none") == {}


def test_wrong_use(capsys, tmp_path, checkpoint):
    """One line, exit 2, nothing written: absent, empty or own folder, foreign checkpoint, no such device, full disk."""
    source = write_nifti(tmp_path / "in" / "scan.nii", FRAME)
    (tmp_path / "bare").mkdir()
    os.symlink("loop", tmp_path / "loop")
    (tmp_path / "in" / ".nii.gz").write_bytes(b"")
    save(tmp_path / "binary.pt", dict(student=UNet(2, 4, num_classes=2)))
    for told, *args in (("absent.nii: no such file", source, tmp_path / "absent.nii"), ("x: no such file", "x" * 300),
                        ("bare: holds no .nii", tmp_path / "bare"), ("--gpu 99", source, "--gpu", "99"),
                        ("give a folder apart", source, "--out", tmp_path / "in"),
                        ("scan.nii/out: Not a directory", source, "--out", source / "out"),
                        ("loop: ", source, "--out", tmp_path / "loop"), ("loop/x: ", "--onnx", tmp_path / "loop" / "x"),
                        *[("/proc/out: ", source, "--out", "/proc/out")] * Path("/proc").is_dir()):
        assert told in refused(capsys, checkpoint, "--out", tmp_path / "out", *args)
    assert "1 channels to 2 classes" in refused(capsys, tmp_path / "binary.pt", "--onnx", tmp_path / "out")
    assert run(capsys, checkpoint, tmp_path / "in" / ".nii.gz", "--out", tmp_path / "out")[0] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "binary.pt", "in", "loop", "out"]
    assert [p.name for p in (tmp_path / "in").iterdir()] == [".nii.gz", "scan.nii"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("owner", "name", "per_file"), [(nib, "save", 1), (predict, "write_csv", 1), (os, "fsync", 3)])
def test_full_disk(capsys, monkeypatch, tmp_path, checkpoint, owner, name, per_file):
    """The second file finds no room: the first one's results stay whole, nothing of the second."""
    for file in ("a.nii", "b.nii"):
        write_nifti(tmp_path / "in" / file, FRAME)
    real, calls = getattr(owner, name), []

    def full(*args):
        calls.append(args)
        return (no_room if len(calls) > per_file else real)(*args)
    monkeypatch.setattr(owner, name, full)
    code, _, stderr = run(capsys, checkpoint, tmp_path / "in", "--out", tmp_path / "out")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "out: No space left on device" in stderr
    assert results(tmp_path / "out") == {"a": RESULTS}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed(tmp_path, checkpoint, number):
    """Whatever is there under its name is whole; after SIGTERM listed too, and no temporary folder."""
    for i in range(40):
        write_nifti(tmp_path / "in" / f"{i:02d}.nii", FRAME)
    command = [sys.executable, SCRIPT, checkpoint, tmp_path / "in", "--out", tmp_path / "out", "--cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*_seg.nii.gz"))) < 2 or not list((tmp_path / "out").glob(".*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "Traceback" not in stderr
    done = {p.name for p in (tmp_path / "out").glob("*_seg.nii.gz")}
    if number == signal.SIGKILL:                                                # the next prediction clears up after it
        assert predict.main([str(checkpoint), str(tmp_path / "in" / "00.nii"), "--out", str(tmp_path / "out")]) == 0
        assert not list((tmp_path / "out").glob(".*"))
    assert 2 <= len(done) < 40
    for name in done:
        assert nib.load(tmp_path / "out" / name).get_fdata().max() == 3
        stem = name.removesuffix("_seg.nii.gz")
        assert all((tmp_path / "out" / f"{stem}_{k}").stat().st_size for k in ("overlay.png", "volumes.csv"))
    if number == signal.SIGTERM:
        assert not [p for p in tmp_path.rglob(".*")]
        listed = {f"{Path(r['file']).stem}_seg.nii.gz" for r in read_csv(tmp_path / "out" / "predictions.csv")}
        assert listed <= done
        assert len(done - listed) <= 1                                           # one may end before it is listed


# ----------------------------------------------------------------------------------------------------- time, onnx

@pytest.mark.parametrize("pays", [True, False])
def test_time(capsys, monkeypatch, checkpoint, pays):
    monkeypatch.setattr(predict.models, "bf16_pays", lambda device: pays)                     # emulated: not offered
    real = predict.time_inference
    monkeypatch.setattr(predict, "time_inference", lambda *a: real(*a, slices=1, frames=2))
    code, stdout, _ = run(capsys, checkpoint, "--time", "--cpu")
    assert code == 0
    rows = re.findall(r"^(.+?) +([\d.]+) ms per slice \(fastest [\d.]+\) +([\d.]+) s per cine", stdout, re.M)
    assert [r[0] for r in rows if r[0] != "onnxruntime"] == ["torch fp32"] + ["torch bf16"] * pays
    assert all(float(r[1]) > 0 and float(r[2]) >= 0 for r in rows)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A student of the real size, untrained, as checkpoint and as ONNX."""
    pytest.importorskip("onnxscript", reason="pip install onnxscript")
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    net = UNet(4, 16)
    for _ in range(3):                                              # statistics of batch norm that are not 0 and 1
        net(torch.randn(2, 1, 64, 64) * 2)
    save(folder / "best.pt", dict(student=net), inference=dict(view="heart", size=144))
    assert predict.main([str(folder / "best.pt"), "--onnx", str(folder / "net.onnx"), "--cpu"]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["best.pt", "net.onnx"]
    return folder


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1, 144, 144), (3, 1, 70, 51), (2, 1, 9, 200), (1, 1, 1, 1)])
def test_onnx_of_any_size(exported, shape):
    net, _ = load_model(exported / "best.pt")
    x = np.random.default_rng(0).normal(300, 90, shape).astype(np.float32)
    import onnxruntime
    session = onnxruntime.InferenceSession(exported / "net.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {"slices": x})[0]
    expected = net(models.standardize(torch.from_numpy(x))).numpy()
    assert got.shape == (shape[0], 4, *shape[2:])
    assert np.abs(got - expected).max() < 1e-4
    assert expected.std() > 0.01 or shape == (1, 1, 1, 1)
    meta = session.get_modelmeta().custom_metadata_map
    assert meta["classes"] == "background,RV,MYO,LV"
    assert (meta["size"], meta["view"]) == ("144", "heart")
    assert "standardises each slice" in meta["preprocessing"]


def test_example_runs_without_torch(exported, tmp_path):
    """The lines of SCANS.md as they stand, torch and this repository out of reach, give segment_volume's labels."""
    page = (ROOT / "results" / "SCANS.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    code = next(b for b in blocks if "onnxruntime" in b)
    assert len(code.splitlines()) <= 22
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.M)) == {"numpy", "nibabel", "onnxruntime"}
    shutil.copy(exported / "net.onnx", tmp_path / "student.onnx")
    image = np.random.default_rng(0).random((7, 200, 130)).astype(np.float32)
    write_nifti(tmp_path / "scan.nii.gz", image)
    (tmp_path / "torch.py").write_text("raise ImportError('torch is out of reach')")
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    done = python("example.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    net, content = load_model(exported / "best.pt")
    expected = segment_volume(net, image, **content["inference"])
    written = nib.load(tmp_path / "scan_seg.nii.gz")
    assert written.header.get_zooms() == nib.load(tmp_path / "scan.nii.gz").header.get_zooms()
    got = np.asanyarray(written.dataobj).T
    assert len(np.unique(expected)) > 1
    assert (got == expected).mean() > 0.9999


def test_onnx_faults(capsys, monkeypatch, tmp_path, checkpoint):
    """No exporter; then one that stands aside, and what it saves finds no room: what was there stays."""
    model = SimpleNamespace(metadata_props={}, opset_imports={"": 20})
    program = SimpleNamespace(model=model, save=lambda path: path.write_text("half"))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)
    monkeypatch.setattr(os, "fsync", no_room)
    (tmp_path / "net.onnx").write_text("before")
    full = f"{tmp_path}/net.onnx: No space left on device; choose another FILE or free some space"
    for installed, words in ((None, "--onnx wants the package onnxscript: pip install onnxscript"), (True, full)):
        monkeypatch.setattr(predict.importlib.util, "find_spec", lambda name, installed=installed: installed)
        assert run(capsys, checkpoint, "--onnx", tmp_path / "net.onnx") == (2, "", f"predict.py: {words}\n")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("net.onnx", "before")]
