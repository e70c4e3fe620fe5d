"""Scans from anywhere: axes, spacing, position, bad frames, odd intensities and absurd results, on real files."""
import re

import nibabel as nib
import numpy as np
import pytest
from conftest import DATABASE, SHARED, STUDENT, needs_acdc, read_csv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

import data_prep
import evaluate
import models
import predict
import scans
from data_prep import DataError
from models import find_position, load_model, segment_volume, turn
from scans import read_scan

ACDC = DATABASE / "training"
LYING = np.diag([-1.0, -1, 1, 1])                                                       # ACDC's sform
needs_field = pytest.mark.skipif(not (SHARED / "field").is_dir(), reason="no files in ../shared/field")
few = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=40)


def write(path, array, zooms, sform=LYING, dtype=None, units=None):
    """An array in the file's order of axes, zooms along them -> NIfTI; sform None: not given."""
    image = nib.Nifti1Image(np.asfortranarray(array.astype(dtype or array.dtype)), None)
    image.header.set_zooms(zooms)
    if sform is not None:
        image.header.set_sform(sform, 2)
    if units:
        image.header.set_xyzt_units(*units)
    nib.save(image, path)
    return path


def stack(shape=(60, 50, 6), seed=0):
    """(x, y, z) of smooth noise, each slice its own."""
    noise = np.random.default_rng(seed).normal(0, 1, shape)
    return (1000 + 9000 * ndimage.gaussian_filter(noise, (4, 4, 0))).astype(np.int16)


def moving(array, frames=12):
    """(x, y, z) -> a cine (x, y, z, t) that changes a little over time, to and fro."""
    change = 0.3 * np.sin(np.arange(frames) / frames * np.pi)
    return np.stack([array + c * (array[::-1] - 1000) for c in change], -1).astype(np.int16)


def lies_as_the_file(scan, array):
    np.testing.assert_array_equal(scan.back(scan.frames), array)


@pytest.fixture(scope="module")
def student():
    net, content = load_model(STUDENT)
    return net, content["inference"]


@pytest.fixture(scope="module")
def patient002():
    """-> (frame (Z, Y, X), annotation, spacing) of ED, cut to 150 x 150 pixels around the heart."""
    frame, spacing, _ = data_prep.load_nifti(ACDC / "patient002" / "patient002_frame01.nii.gz")
    label, _, _ = data_prep.load_nifti(ACDC / "patient002" / "patient002_frame01_gt.nii.gz")
    y, x = (int(i.mean()) - 75 for i in np.nonzero(label)[1:])
    return *(a[:, y:y + 150, x:x + 150] for a in (frame, label)), spacing


@pytest.fixture(scope="module")
def patient090():
    """-> (cine (x, y, z, t), zooms), cut to the heart's surroundings."""
    cine = nib.load(ACDC / "patient090" / "patient090_4d.nii.gz")
    return np.asarray(cine.dataobj)[20:135, 40:165], tuple(float(z) for z in cine.header.get_zooms())


def answer(student, source, folder, **options):
    """predict_file without pictures -> its row, its label map in the file's order of axes."""
    net, inference = student
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((evaluate, "draw_overlay"), (predict, "draw_volumes")):
            patch.setattr(owner, name, lambda path, *_: path.write_text("drawn"))
        row, *_ = predict.predict_file([net], source, folder / "out", inference, **options)
    return row, np.asarray(nib.load(folder / "out_seg.nii.gz").dataobj)


@pytest.fixture(scope="module")
def base(student, patient002, tmp_path_factory):
    """-> (row, label map (Z, Y, X)) of patient002 as ACDC's file lies."""
    folder = tmp_path_factory.mktemp("base")
    frame, label, spacing = patient002
    row, labels = answer(student, write(folder / "scan.nii", frame.transpose(2, 1, 0), spacing[::-1]), folder)
    assert min(evaluate.dice(labels.T, label)) > 0.85
    annotation = [np.count_nonzero(label == k) * np.prod(spacing) / 1000 for k in (1, 2, 3)]
    assert [row[k] for k in ("rv_ml", "myo_ml", "lv_ml")] == pytest.approx(annotation, rel=0.1)
    assert (row["position"], row["warning"]) == ("as ACDC", "")
    return row, labels.T


# --------------------------------------------------------------------------------------------------------- geometry

@given(st.permutations("xyz"), st.sampled_from(["zooms", "affine", "left behind"]), st.floats(4, 12), st.booleans())
@many
def test_any_order_of_three_axes(tmp_path_factory, order, told, gap, flip):
    """Slices along any axis, told by zooms, by the affine alone, or by a header that was left as it was."""
    base = stack()[::-1] if flip else stack()
    array = base.transpose(["xyz".index(c) for c in order])
    zooms = [dict(x=1.5, y=1.5, z=gap)[c] for c in order]
    path = tmp_path_factory.mktemp("any") / "scan.nii"
    if told == "affine":
        turned = np.array([[0, -1, 0, 3], [1, 0, 0, 4], [0, 0, 1, 5], [0, 0, 0, 1]])
        write(path, array, (1, 1, 1), np.diag([*zooms, 1]) @ (turned if zooms[0] == zooms[1] else np.eye(4)))
    else:
        write(path, array, zooms if told == "zooms" else (1.5, 1.5, gap))
    scan = read_scan(path)
    assert scan.spacing == pytest.approx((gap, 1.5, 1.5), rel=1e-5)
    assert scan.axes.index("z") == order.index("z")
    expected = base.transpose(2, 1, 0)
    if order.index("y") < order.index("x"):
        expected = expected.swapaxes(1, 2)
    np.testing.assert_array_equal(scan.frames[0], expected)
    lies_as_the_file(scan, array)
    assert bool(scan.warnings) == (told == "left behind" and order.index("z") < 2)


@given(st.permutations("xyzt"), st.booleans())
@many
def test_any_order_of_four_axes(tmp_path_factory, order, told):
    """Time by the header, or by what the frames show where the header was left behind."""
    base = moving(stack())
    array = base.transpose(["xyzt".index(c) for c in order])
    mm = dict(x=1.5, y=1.5, z=8, t=1)
    path = write(tmp_path_factory.mktemp("any") / "cine.nii", array, [mm[c] for c in (order if told else "xyzt")])
    scan = read_scan(path)
    assert (scan.frames.shape[:2], scan.spacing) == ((12, 6), (8, 1.5, 1.5))
    expected = base.transpose(3, 2, 1, 0)
    if order.index("y") < order.index("x"):
        expected = expected.swapaxes(2, 3)
    np.testing.assert_array_equal(scan.frames, expected)
    lies_as_the_file(scan, array)


@given(st.integers(2, 8), st.integers(6, 14), st.booleans())
@settings(many, max_examples=15)
def test_a_cine_in_one_row_of_images(tmp_path_factory, slices, frames, by_frame):
    """(x, y, n) of frames and slices, either running first: told by the images, and turned back to (x, y, n)."""
    base = moving(stack((60, 50, slices)), frames)
    array = (base.transpose(0, 1, 3, 2) if by_frame else base).reshape(60, 50, -1)
    path = write(tmp_path_factory.mktemp("row") / "cine.nii", array, (1.5, 1.5, 10))
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.frames, base.transpose(3, 2, 1, 0))
    assert f"{frames} frames of {slices} slices" in scan.warnings[0]
    lies_as_the_file(scan, array)


@needs_acdc
def test_real_cine_in_every_order(tmp_path, patient090):
    cine, zooms = patient090
    expected = cine.transpose(3, 2, 1, 0)
    ways = {"xytz": cine.transpose(0, 1, 3, 2), "txyz": cine.transpose(3, 0, 1, 2), "zxyt": cine.transpose(2, 0, 1, 3),
            "xyzt": cine, "slices first": cine.transpose(0, 1, 3, 2).reshape(*cine.shape[:2], -1),
            "frames first": cine.reshape(*cine.shape[:2], -1)}
    for name, array in ways.items():
        scan = read_scan(write(tmp_path / f"{name}.nii", array, zooms[:array.ndim]))
        np.testing.assert_array_equal(scan.frames, expected, name)
        lies_as_the_file(scan, array)
        assert bool(scan.warnings) == (name != "xyzt")
    with pytest.raises(DataError, match="its 12 slices are as alike as the frames of a cine; give --axes xyt"):
        read_scan(write(tmp_path / "one.nii", cine[:, :, 3], zooms[:3]))
    scan = read_scan(tmp_path / "one.nii", axes="xyt")
    np.testing.assert_array_equal(scan.frames, expected[:, 3:4])
    lies_as_the_file(scan, cine[:, :, 3])


@pytest.mark.parametrize(("zooms", "sform", "words"), [
    ((1.4, 1.4, 8), np.diag([-1.4, -1.4, 10, 1]), "zooms say 1.4 x 1.4 x 8 mm, the affine 1.4 x 1.4 x 10"),
    ((1.4, 1.4, 1000), LYING, "spacing 1000 x 1.4 x 1.4 mm"), ((1.4, 1.4, 1.4), LYING, "spacing 1.4 x 1.4 x 1.4 mm"),
    ((1, 1, 1), None, "spacing 1 x 1 x 1 mm"), ((1.4, 1.4, 1), LYING, "slices lie 3 to 20 mm apart"),
    ((0.0014, 0.0014, 0.008), LYING, "cannot be a chest"), ((9, 1.4, 9), LYING, "cannot be a chest")])
def test_what_no_stack_can_be_is_refused(tmp_path, zooms, sform, words):
    """Both numbers and the option are named; --spacing settles it, whatever the header says."""
    path = write(tmp_path / "scan.nii", stack(), zooms, sform)
    with pytest.raises(DataError) as error:
        read_scan(path)
    assert words in str(error.value)
    assert "--spacing Z Y X" in str(error.value)
    assert str(error.value).startswith(str(path))
    scan = read_scan(path, spacing=(8, 1.4, 1.4))
    assert (scan.spacing, scan.axes, scan.warnings) == ((8, 1.4, 1.4), "xyz", [])


def test_what_the_user_says_holds(tmp_path):
    path = write(tmp_path / "scan.nii", stack().transpose(2, 1, 0), (1, 1, 1), None)
    assert read_scan(path, spacing=(8, 1.4, 1.5)).axes == "zxy"
    scan = read_scan(path, spacing=(8, 1.4, 1.5), axes="zyx")
    assert (scan.spacing, scan.frames.shape) == ((8, 1.4, 1.5), (1, 6, 50, 60))
    thin = read_scan(path, spacing=(2, 1.4, 1.5), axes="zyx")
    assert "slices lie 3 to 20 mm apart" in thin.warnings[0]
    assert read_scan(path, spacing=(8, 1.4, 1.5), axes="zyxt").axes == "zyx"
    path = write(tmp_path / "thin.nii", stack(), (1.4, 1.4, 1.5))
    with pytest.raises(DataError, match="--spacing Z Y X"):
        read_scan(path)
    scan = read_scan(path, spacing=(1.5, 1.4, 1.4))                     # may be true: the remedy named must work
    assert scan.spacing == (1.5, 1.4, 1.4)
    assert "coarser than their pixels" in scan.warnings[0]
    cine = write(tmp_path / "cine.nii", moving(stack()), (1.4, 1.4, 8, 1))
    with pytest.raises(DataError, match="has 4 axes, --axes xyz names 3"):
        read_scan(cine, axes="xyz")
    for wrong in ("--axes xyy", "--axes xy", "--spacing 0 1 1", "--spacing nan 1 1"):
        with pytest.raises(SystemExit) as leaving:
            predict.main([str(STUDENT), str(path), *wrong.split()])
        assert leaving.value.code == 2


@needs_acdc
@given(st.permutations("xyz"), st.integers(0, 7))
@few
def test_one_answer_however_a_file_lies(tmp_path_factory, student, patient002, base, order, position):
    """Axes and position at once: the label map lies as the file does, with the volumes of the original."""
    frame, _, spacing = patient002
    lying = turn(frame, position, back=True)
    array = lying.transpose(["zyx".index(c) for c in order])
    folder = tmp_path_factory.mktemp("lies")
    zooms = dict(zip("zyx", spacing, strict=True))
    row, labels = answer(student, write(folder / "scan.nii", array, [zooms[c] for c in order]), folder)
    assert labels.shape == array.shape
    np.testing.assert_array_equal(turn(labels.transpose([order.index(c) for c in "zyx"]), position), base[1])
    assert all(row[k] == pytest.approx(base[0][k], rel=1e-6) for k in ("rv_ml", "myo_ml", "lv_ml"))
    assert row["warning"] == ""


# --------------------------------------------------------------------------------------------------------- position

def test_spacing_turns_with_the_array():
    """Pixels that are not square: each axis keeps its own, in all eight positions."""
    told = {2: 9.0, 50: 1.2, 70: 1.5}
    for position in range(8):
        shape = turn(np.zeros(tuple(told)), position).shape
        assert models.turn_spacing(tuple(told.values()), position) == tuple(told[n] for n in shape)


def test_positions_are_what_their_names_say():
    acdc = np.array([[1, 2, 3], [4, 5, 6]])
    lies = {"as ACDC": acdc, "turned 90 clockwise": np.array([[4, 1], [5, 2], [6, 3]]),
            "turned 180": np.array([[6, 5, 4], [3, 2, 1]]),
            "turned 90 counter-clockwise": np.array([[3, 6], [2, 5], [1, 4]]),
            "mirrored left-right": np.array([[3, 2, 1], [6, 5, 4]]), "transposed": acdc.T,
            "mirrored up-down": np.array([[4, 5, 6], [1, 2, 3]]),
            "transposed and turned 180": np.array([[6, 3], [5, 2], [4, 1]])}
    assert tuple(lies) == models.POSITIONS
    for position, array in enumerate(lies.values()):
        np.testing.assert_array_equal(turn(array, position), acdc)
        np.testing.assert_array_equal(turn(acdc, position, back=True), array)


@needs_acdc
def test_eight_positions_one_segmentation(student, patient002):
    """Bit by bit, chosen among the eight and turned back; a flat image, all ties, too."""
    net, inference = student
    frame, label, spacing = patient002
    slices, truth = (a[3:5, 25:125, 25:130] for a in (frame, label))

    def ask(image, position):
        lying = turn(image, position, back=True)
        chosen = find_position(net, lying, models.turn_spacing(spacing, position), **inference)
        labels = turn(segment_volume(net, turn(lying, chosen), **inference), chosen, back=True)
        return turn(labels, position)
    for image in (slices, np.zeros((1, 50, 50))):
        answers = [ask(image, position) for position in range(8)]
        assert image.max() == 0 or evaluate.dice(answers[0], truth).mean() > 0.9
        for got in answers:
            np.testing.assert_array_equal(got, answers[0])


@needs_acdc
def test_ties_do_not_depend_on_how_a_scan_lies(monkeypatch, patient002):
    """A network that is as sure everywhere: the array decides, the same one for all eight."""
    monkeypatch.setattr(models, "segment_volume", lambda net, volume, *_, **__: (
        np.zeros(volume.shape, np.uint8), np.full((len(volume), 4, *volume.shape[1:]), 0.25, np.float32)))
    slices = patient002[0][4:5, :40, :50]
    seen = set()
    for position in range(8):
        lying = turn(slices, position, back=True)
        seen.add(turn(lying, find_position(None, lying, (8, 1.4, 1.4), 144)).tobytes())
    assert len(seen) == 1


def test_close_positions_are_asked_about_all_slices(monkeypatch):
    """How many pixels of each class the network is sure of, by four slices and by all eight: position 3 is close to 0
    and surer by all; 6 would be the surest, but is not close."""
    sure = {0: (400, 100), 3: (380, 500), 6: (200, 590)}
    slices, few = np.random.default_rng(0).normal(0, 1, (8, 20, 30)), [1, 3, 4, 6]
    known = {turn(s, p).tobytes(): (p, i) for i, s in enumerate((slices[few], slices)) for p in range(8)}
    asked = []

    def segment(net, volume, *_, **__):
        position, whole = known[volume.tobytes()]
        asked.append((position, whole))
        labels, n = np.zeros(volume.shape, np.uint8), sure.get(position, (30, 30))[whole]
        labels.reshape(-1)[:3 * n] = np.repeat([1, 2, 3], n)
        return labels, np.eye(4)[labels].transpose(0, 3, 1, 2)
    monkeypatch.setattr(models, "segment_volume", segment)
    assert find_position(None, slices, (8, 1.4, 1.4), 144, few=few) == 3
    assert asked == [(p, 0) for p in range(8)] + [(0, 1), (3, 1)]


@needs_acdc
def test_a_stack_of_dcm2niix(tmp_path, student, patient002, base):
    """It writes rows from below, nibabel's LAS where ACDC has LPS: mirrored up-down."""
    frame, _, spacing = patient002
    array, mm = frame[:, ::-1].transpose(2, 1, 0), spacing[::-1]
    path = write(tmp_path / "dicom.nii", array, mm, np.diag([-mm[0], mm[1], mm[2], 1]), units=("mm", "sec"))
    row, labels = answer(student, path, tmp_path)
    assert (row["position"], row["warning"]) == ("mirrored up-down", "")
    np.testing.assert_array_equal(labels.T[:, ::-1], base[1])


# ------------------------------------------------------------------------------------------------------------ cines

KINDS = {"noise": lambda x, rng: rng.uniform(0, x.max(), x.shape), "absent": lambda x, rng: 0 * x,
         "another scan": lambda x, rng: x[::-1, ::-1], "flat": lambda x, rng: 0 * x + 300}


@needs_acdc
@given(st.sampled_from(sorted(KINDS)), st.sets(st.integers(0, 11), min_size=1, max_size=3),
       st.sets(st.integers(0, 6), min_size=1), st.integers(0, 99))
@settings(many, max_examples=25)
def test_odd_frames_are_named(patient090, kind, bad, slices, seed):
    frames = patient090[0].transpose(3, 2, 1, 0).copy()
    for t in bad:
        for z in slices:
            frames[t, z] = KINDS[kind](frames[t, z], np.random.default_rng(seed + t))
    assert set(np.flatnonzero(predict.odd_images(frames))) == bad


@pytest.fixture(scope="module")
def sound(student, patient090, tmp_path_factory):
    """The row of patient090's cine, cut; its annotation has an RV of 217.8 and an LV of 77.6 ml at ED."""
    folder = tmp_path_factory.mktemp("sound")
    row, _ = answer(student, write(folder / "cine.nii", *patient090), folder)
    assert (row["rv_edv"], row["lv_edv"]) == (pytest.approx(217.8, rel=0.1), pytest.approx(77.6, rel=0.1))
    assert row["warning"] == ""
    return row


@needs_acdc
@pytest.mark.parametrize("case", ["noise in frame 8", "noise in frame 3 of 6", "slices absent at the end",
                                  "first frame empty, heart aside"])
def test_bad_frames_decide_nothing(tmp_path, student, patient090, sound, case):
    """EF within 3 points, the frames named, entropy still a mean of the sound ones."""
    cine, zooms = patient090[0].copy(), patient090[1]
    if case.startswith("noise"):
        cine = cine if case.endswith("8") else cine[..., ::2]
        named = case.split()[3]
        bad = cine[:, :, 1:5, int(named) - 1]
        bad[...] = np.random.default_rng(0).uniform(0, cine.max(), bad.shape)
    elif case.startswith("slices"):
        cine[:, :, :4, -2:] = 0
        named = "11, 12"
    else:
        cine[..., 0] = 0
        cine, named = np.pad(cine, ((100, 0), (60, 0), (0, 0), (0, 0))), "1"
    row, _ = answer(student, write(tmp_path / "cine.nii", cine, zooms), tmp_path)
    assert row["lv_ef"] == pytest.approx(sound["lv_ef"], abs=3)
    assert row["warning"].endswith(f"left out of ED, ES and means: {named}")
    assert row["entropy"] == pytest.approx(sound["entropy"], abs=0.02)


def test_a_volume_far_from_its_neighbours_is_odd():
    t = np.arange(25)
    lv = 100 - 50 * np.sin(np.pi * t / 25) ** 2
    ml = np.stack([lv, 0 * lv + 90, lv], 1)
    none = np.zeros(25, bool)
    assert not predict.odd_volumes(ml, none).any()
    ml[7, 2], ml[20, 0] = 0, 190
    assert list(np.flatnonzero(predict.odd_volumes(ml, none))) == [7, 20]
    assert not predict.odd_volumes(ml[:6], none[:6]).any()


@needs_acdc
def test_few_frames_in_one_row_are_refused(tmp_path, patient002, patient090):
    """ED and ES as one stack, one after the other or slice by slice: nearly twice the volume, if read as slices."""
    ed = patient002[0]
    es = data_prep.load_nifti(ACDC / "patient002" / "patient002_frame12.nii.gz")[0]
    whole = data_prep.load_nifti(ACDC / "patient002" / "patient002_frame01.nii.gz")[0]
    rows = [np.concatenate([whole, es]), np.stack([whole, es], 1).reshape(-1, *whole.shape[1:]),
            patient090[0][..., ::4].transpose(3, 2, 1, 0).reshape(-1, *patient090[0].shape[1::-1])]
    for i, row in enumerate(rows):
        path = write(tmp_path / f"{i}.nii", row.transpose(2, 1, 0), (1.4, 1.4, 8))
        with pytest.raises(DataError, match="holds slices several times"):
            read_scan(path)
        assert read_scan(path, axes="xyz").frames.shape == (1, *row.shape)
    assert not scans.repeats(ed)


@needs_acdc
def test_no_sound_stack_is_taken_for_several():
    for path in sorted(ACDC.glob("patient0[0-3]*/*_frame??.nii.gz")):
        assert not scans.repeats(data_prep.load_nifti(path)[0]), path


def test_axes_of_one(tmp_path):
    """A time of one changes nothing; of one slice the thickness must be told, or the volumes are for 1 mm."""
    base, one = stack(), moving(stack()[..., :1])[:, :, 0]
    scan = read_scan(write(tmp_path / "one.nii", base[..., None], (1.5, 1.5, 8, 1)))
    assert (scan.axes, scan.frames.shape) == ("xyz", (1, 6, 50, 60))
    np.testing.assert_array_equal(scan.back(scan.frames), base[..., None])
    assert read_scan(tmp_path / "one.nii", axes="xyz").frames.shape == (1, 6, 50, 60)
    held = scan.frames
    while held is not None:                                                       # a mapped file could not be removed
        assert not isinstance(held, np.memmap)
        held = getattr(held, "base", None)
    with pytest.raises(DataError, match="--axes xyt and --spacing"):
        read_scan(write(tmp_path / "still.nii", one[..., None], (1.5, 1.5, 8, 1)))
    path = write(tmp_path / "still.nii", one, (1.5, 1.5, 8))
    assert "volumes and mass are for 1 mm" in read_scan(path, axes="xyt").warnings[0]
    scan = read_scan(path, axes="xyt", spacing=(8, 1.5, 1.5))
    assert (scan.spacing, scan.warnings) == ((8, 1.5, 1.5), [])


@needs_acdc
def test_a_bad_slice_in_each_frame_is_told(tmp_path, student, patient090):
    cine, zooms = patient090[0].copy(), patient090[1]
    for t in range(cine.shape[3]):
        cine[:, :, t % 7, t] = np.random.default_rng(t).uniform(0, cine.max(), cine.shape[:2])
    row, _ = answer(student, write(tmp_path / "cine.nii", cine, zooms), tmp_path)
    assert "each frame has a slice unlike the others'" in row["warning"]


@given(st.integers(30, 60), st.integers(30, 60), st.integers(0, 7), st.integers(0, 99))
@many
def test_likeness_does_not_depend_on_how_a_slice_lies(height, width, position, seed):
    images = np.random.default_rng(seed).normal(0, 1, (5, height, width))
    np.testing.assert_allclose(scans.likeness(turn(images, position)), scans.likeness(images), atol=1e-9)


def test_what_are_no_real_numbers_says_so(tmp_path):
    nib.save(nib.Nifti1Image(np.ones((60, 60, 5), np.complex64), np.eye(4)), tmp_path / "k.nii")
    with pytest.raises(DataError, match="holds complex64, not real numbers; save the magnitude"):
        read_scan(tmp_path / "k.nii")


def test_a_header_without_a_usable_affine_ends_no_batch(tmp_path, capsys):
    """NaN in the forms: nibabel cannot write them again; the next file is done."""
    for name in "ab":
        write(tmp_path / f"{name}.nii", stack((80, 80, 6)), (1.5, 1.5, 8))
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[280:284] = np.float32(np.nan).tobytes()                                                           # srow_x[0]
    (tmp_path / "a.nii").write_bytes(raw)
    predict.main([str(STUDENT), str(tmp_path / "a.nii"), str(tmp_path / "b.nii"), "--out", str(tmp_path / "out"),
                  "--cpu", "--spacing", "8", "1.5", "1.5"])
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert [row["error"] for row in rows] == ["", ""]
    assert nib.load(tmp_path / "out" / "a_seg.nii.gz").shape == (80, 80, 6)


@needs_acdc
def test_signed_data_over_their_full_range(tmp_path, student, patient002, base):
    """The image of the overlay, by which contrast is judged, does not overflow."""
    frame, _, spacing = patient002
    array = np.clip(frame / np.quantile(frame, 0.995) * 255 - 128, -128, 127).astype(np.int8).transpose(2, 1, 0)
    row, _ = answer(student, write(tmp_path / "int8.nii", array, spacing[::-1]), tmp_path)
    assert (row["lv_ml"], row["warning"]) == (pytest.approx(base[0]["lv_ml"], rel=0.03), "")


# -------------------------------------------------------------------------------------------------------- intensity

@needs_acdc
@given(st.integers(1, 9), st.sampled_from([32767, 8000, -32768, 1e9, -1e6]), st.sampled_from([0, 1e10, -1e9]))
@settings(few, max_examples=4)
def test_extremes_and_offsets_change_nothing(student, patient002, count, value, offset):
    """Dice within 0.01 of the base: a few pixels per slice far outside, numbers that fp32 cannot hold."""
    net, inference = student
    frame, label, _ = patient002
    image, rng = frame[2:7].astype(np.float64), np.random.default_rng(count)
    base = evaluate.dice(segment_volume(net, image, **inference), label[2:7])
    for z in image:
        z[tuple(rng.integers(0, 150, (2, count)))] = value
    got = evaluate.dice(segment_volume(net, image + offset, **inference), label[2:7])
    assert got == pytest.approx(base, abs=0.01)


@needs_acdc
def test_sound_images_are_scaled_as_ever(patient002):
    """Bit by bit by minimum and maximum: no tissue is taken for an outlier."""
    image = patient002[0].astype(np.float32)
    expected = (image - image.min()) / (image.max() - image.min())
    np.testing.assert_array_equal(models.rescale(image).numpy(), expected)
    np.testing.assert_array_equal(models.rescale(image[::-1].astype(">i2")).numpy(), expected[::-1])


# --------------------------------------------------------------------------------------------------------- warnings

@needs_acdc
@given(st.sampled_from(["noise", "inverted", "smooth", "flat"]), st.integers(0, 9))
@settings(few, max_examples=4)
def test_absurd_images_are_warned_about(tmp_path_factory, student, patient002, kind, seed):
    frame, _, spacing = patient002
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("absurd")
    noise = rng.normal(300, 90, frame.shape)
    image = {"noise": noise, "inverted": frame.max() - frame, "smooth": ndimage.gaussian_filter(noise, (0, 7, 7)),
             "flat": 0 * noise}[kind]
    row, _ = answer(student, write(folder / "scan.nii", image.T, spacing[::-1], dtype=np.float32), folder)
    assert re.search("no heart found|fewer than|entropy 0|RV/LV|darker", row["warning"])


def test_each_doubt_has_its_words():
    labels = np.zeros((6, 9, 9), np.uint8)
    labels[:, :2], labels[:, 3:6], labels[:, 7:] = 1, 2, 3
    image = np.where(labels == 3, 200.0, 100.0)
    sound = dict(phase="ED", rv_ml=90, myo_ml=120, lv_ml=100, lv_enclosed=1.0, entropy=0.04)

    def tell(labels=labels, image=image, usual=predict.USUAL, **changes):
        return " ".join(predict.odd_result(labels, image, sound | changes, usual))
    assert tell() == ""
    assert tell(0 * labels) == "no heart found"
    assert "entropy 0.20, usual is 0.0" in tell(entropy=0.2)
    assert tell(entropy=0.2, usual=0.1) == ""
    assert "RV/LV 0.20" in tell(rv_ml=20)
    assert tell(rv_ml=20, phase="ES") == ""
    assert "myocardium around 43% of what was taken for LV" in tell(lv_enclosed=0.434)
    assert "blood darker than muscle" in tell(image=-image)
    lost = labels.copy()
    lost[1:][lost[1:] == 1] = 0
    assert "RV on fewer than 25%" in tell(lost)


def test_the_part_inside_the_myocardium_is_the_lv():
    """A ring with its cavity, and beside it an RV half of which was taken for LV: the larger part goes, by hand."""
    labels = np.zeros((2, 12, 20), np.uint8)
    labels[:, 2:7, 13:18] = 2
    labels[:, 3:6, 14:17] = 3                                                    # 9 pixels, their border of 12 enclosed
    labels[:, 10:12, 18:] = 3                                                               # apart: it does not count
    assert predict.enclosed(labels) == 1
    labels[:, 2:10, 2:7] = 1
    labels[:, 4:10, 2:7] = 3                                            # 30 pixels, 22 sides: 5 face the RV, 17 nothing
    assert predict.enclosed(labels) == 0                                    # these are the largest heart, of 40 pixels
    labels[:, 3, 7:13] = 1                                                                # in touch with the ring
    assert predict.enclosed(labels) == pytest.approx(12 / 34)
    assert models.largest_component(labels)[0, 4, 15] == 0
    kept = predict.keep_parts(labels)
    assert ((kept == 3).sum(), kept[0, 4, 15], kept[0, 8, 4]) == (18, 3, 0)
    assert ((kept == 2) == (labels == 2)).all()
    assert ((kept == 1) == (labels == 1)).all()
    labels[labels == 2] = 0                                                          # no myocardium: the largest again
    assert predict.keep_parts(labels)[0, 4, 15] == 0


@needs_acdc
def test_an_rv_taken_for_lv_is_told_of(tmp_path, student, patient002, monkeypatch):
    """As a network does where the RV is far wider than the LV: patient086 at ES."""
    frame, label, spacing = patient002
    frame, label = frame[1:8], label[1:8]
    path = write(tmp_path / "scan.nii", frame.transpose(2, 1, 0), spacing[::-1])

    def tell(said):
        entropy = np.full(said.shape, 0.05, np.float32)
        monkeypatch.setattr(evaluate, "segment", lambda *_: evaluate.Segmentation(said, entropy, None, 1.0))
        row, labels = answer(student, path, tmp_path)
        return row["warning"], labels.T, float(read_csv(tmp_path / "out_volumes.csv")[0]["lv_enclosed"])
    assert tell(label)[0] == ""
    said = label.copy()
    said[ndimage.binary_dilation(label == 1, np.ones((1, 3, 3)), 16) & (label < 2)] = 3
    warning, labels, enclosed = tell(said)
    assert (models.largest_component(said) == 3)[label == 3].sum() == 0                           # of LV the RV is more
    assert f"myocardium around {enclosed:.0%} of what was taken for LV" in warning
    np.testing.assert_array_equal(labels == 3, label == 3)


@needs_field
def test_scans_of_other_hospitals(tmp_path, student):
    """The short-axis stack lies as ACDC's and is not warned about; the four-chamber view is."""
    row, _ = answer(student, SHARED / "field" / "mnms2_lax_4c_ed.nii.gz", tmp_path)
    assert "is it a short-axis view" in row["warning"]
    row, labels = answer(student, SHARED / "field" / "mnms_sax_ed.nii.gz", tmp_path)
    assert (row["warning"], row["position"], labels.shape) == ("", "as ACDC", (192, 192, 14))
    assert 100 < row["lv_ml"] < 250
