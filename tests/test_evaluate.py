"""evaluate.py: metrics against hand-made values and medpy, figures of a whole evaluation against an oracle, faults."""
import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import CHROMIUM, ROOT, SHARED, needs_acdc, no_room, one_line, python, read_csv
from medpy.metric import binary
from PIL import Image

import data_prep
import evaluate
from models import UNet, largest_component, load_model, save_checkpoint, segment_volume

SCRIPT = ROOT / "evaluate.py"
SPACING = (8.0, 1.5, 1.25)                                         # z, y, x in mm


# -------------------------------------------------------------------------------------------------- synthetic hearts

def heart(seed, phase):
    """(image float32 0..1, label uint8), (6, 44, 48): cavity in a ring, crescent to its left, smaller towards z = 5."""
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[:6, :44, :48].astype(float)
    r = np.hypot(y - 22 - rng.uniform(-2, 2), x - 26 - rng.uniform(-2, 2))
    s = np.hypot(y - 22, x - 17)
    radius = (9 - z) * (1 if phase == "ED" else 0.75)
    label = np.select([r < radius, r < radius + 3, s < radius], [3, 2, 1], 0).astype(np.uint8)
    image = np.choose(label, [0.1, 0.6, 0.3, 1.0]) + rng.normal(0, 0.02, label.shape)
    image -= image.min()
    return (image / image.max()).astype(np.float32), label


def write_root(root, splits, attributes=True, unlabeled=()):
    (root / "data").mkdir(parents=True)
    for split, patients in splits.items():
        names = [f"{p}_frame{f:02d}" for p in patients for f in (1, 2)]
        (root / f"{split}.list").write_text("".join(f"{n}\n" for n in names))
        for name in names:
            image, label = heart(int(name[7:10]), "ED" if name.endswith("01") else "ES")
            with h5py.File(root / "data" / f"{name}.h5", "w") as h:
                h.create_dataset("image", data=image, compression="gzip")
                if name[:10] not in unlabeled:
                    h.create_dataset("label", data=label, compression="gzip")
                if attributes:
                    h.attrs.update(spacing=SPACING, group="NOR", source=name)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_root(tmp_path_factory.mktemp("data") / "prepared", {
        "val": ["patient028", "patient085", "patient082"], "test": [], "official": ["patient101", "patient102"]},
        unlabeled=["patient102"])


def train_student():
    """A student that has learnt these hearts, also amid a larger background, for a few seconds."""
    torch.manual_seed(0)
    student = UNet(2, 8)
    images, labels = zip(*(heart(seed, phase) for seed in (1, 2) for phase in ("ED", "ES")), strict=True)
    x, y = torch.from_numpy(np.concatenate(images))[:, None], torch.from_numpy(np.concatenate(labels)).long()
    wide = torch.nn.functional.pad(x, (35, 35, 35, 35), mode="replicate")
    x, y = torch.cat([(x - of.mean((-2, -1), keepdim=True)) / of.std((-2, -1), keepdim=True) for of in (x, wide)]), \
        torch.cat([y, y])
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(student(x), y).backward()
        optimizer.step()
    return student


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, root):
    """The student has learnt, the co-teacher has not."""
    path = tmp_path_factory.mktemp("run") / "best.pt"
    save(path, dict(student=train_student(), coteacher=UNet(2, 8)), config=dict(data=str(root)))
    return path


def save(path, networks, **more):
    content = dict(networks={k: n.state_dict() for k, n in networks.items()}, better="student", step=40, val={},
                   architecture=networks["student"].architecture, inference=dict(view="heart", size=48), config={})
    save_checkpoint(path, content | more)


def run(capsys, *args):
    """-> exit code, stdout, stderr of main in this process."""
    code = evaluate.main([str(a) for a in args])
    return code, *capsys.readouterr()


def refused(capsys, *args):
    """-> the one line of an evaluation that ends with it."""
    code, stdout, stderr = run(capsys, *args)
    assert (code, stdout) == (2, "")
    one_line(stderr, "evaluate.py: ")
    return stderr


def summary_of(out):
    return json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)                 # NaN: no JSON


def painted(path, color, within=60):
    """How many pixels of a picture are near a colour like #35c9ff."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.count_nonzero(np.abs(pixels - [int(color[i:i + 2], 16) for i in (1, 3, 5)]).sum(-1) < within)


def medpy_metrics(p, y, spacing):
    """Dice, Jaccard, HD95 and ASD in voxels and mm, by medpy on the whole arrays, and the rules for empty ones."""
    if p.any() and y.any():
        return [binary.dc(p, y), binary.jc(p, y), binary.hd95(p, y), binary.asd(p, y), binary.hd95(p, y, spacing),
                binary.asd(p, y, spacing)]
    if not (p.any() or y.any()):
        return [1, 1, 0, 0, 0, 0]
    voxels, mm = (math.sqrt(sum((n * s) ** 2 for n, s in zip(p.shape, k, strict=True))) for k in ((1, 1, 1), spacing))
    return [0, 0, voxels, voxels, mm, mm]


def figures(pred, label, spacing, k):
    scores = evaluate.case_metrics(pred, label, spacing)
    return [scores[m][k - 1] for m in evaluate.METRICS]


# ---------------------------------------------------------------------------------------------------------- metrics

def test_shifted_row():
    """20 voxels shifted along themselves by 3: distances 17 zeros, 1, 2, 3 each way. Pooled and sorted, the 95th
    percentile lies at 0.95 * 39 = 37.05, between the second 2 and the first 3."""
    pred, label = np.zeros((2, 5, 5, 30), np.uint8)
    pred[2, 2, 5:25], label[2, 2, 2:22] = 2, 2
    expected = [17 / 20, 17 / 23, 2.05, 6 / 20, 2.05 * 1.25, 6 / 20 * 1.25]
    np.testing.assert_allclose(figures(pred, label, SPACING, 2), expected, rtol=1e-12)


def test_asd_is_directed_and_hd95_pooled():
    short, long = np.zeros((2, 3, 3, 30), np.uint8)
    short[1, 1, :10], long[1, 1, :20] = 1, 1
    assert figures(short, long, None, 1)[3] == 0
    assert figures(long, short, None, 1)[3] == sum(range(1, 11)) / 20
    # HD95 pools both: 20 zeros and 1 to 10, of which 0.95 * 29 = 27.55 lies between 8 and 9. The larger of the two
    # directions' percentiles would be 9.05.
    assert figures(short, long, None, 1)[2] == figures(long, short, None, 1)[2] == pytest.approx(8.55)


def test_empty_masks():
    pred, label = np.zeros((2, 3, 4, 12), np.uint8)
    pred[1, 1, 1] = label[2, 2, 2] = 3                            # RV in neither, MYO in pred, LV in both
    pred[0, 0, 0] = 2
    scores = evaluate.case_metrics(pred, label, (4, 3, 1))
    assert evaluate.dice(pred, label).tolist() == [1, 0, 0]
    assert scores["one_empty"].tolist() == [False, True, False]
    assert [scores[m][0] for m in evaluate.METRICS] == [1, 1, 0, 0, 0, 0]
    assert [scores[m][1] for m in evaluate.METRICS] == [0, 0, 13, 13, math.sqrt(288 + 144), math.sqrt(288 + 144)]
    swapped = evaluate.case_metrics(label, pred, (4, 3, 1))
    assert [swapped[m][1] for m in evaluate.METRICS] == [scores[m][1] for m in evaluate.METRICS]


def agrees_with_medpy(pred, label, spacing):
    for k in (1, 2, 3):
        expected = medpy_metrics(pred == k, label == k, spacing)
        np.testing.assert_allclose(figures(pred, label, spacing, k), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(24))
def test_random_masks_agree_with_medpy_uncropped(seed):
    """Sparse and dense, somewhere inside or touching the border, single slices and rows."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 14, 3)) if seed % 4 else (1, 17, 1)
    pred, label = np.zeros((2, *shape), np.uint8)
    for labels in (pred, label):
        low = rng.integers(0, shape)
        part = labels[tuple(slice(a, a + n) for a, n in zip(low * (seed % 3 > 0), rng.integers(1, 14, 3), strict=True))]
        part[...] = rng.integers(1, 4, part.shape) * (rng.random(part.shape) < rng.choice([0.05, 0.5, 1]))
    agrees_with_medpy(pred, label, tuple(rng.uniform(0.5, 10, 3)))


@needs_acdc
def test_real_annotations_agree_with_medpy_uncropped():
    """The annotation of ES against ED: real shapes that differ by centimetres."""
    published = SHARED / "acdc" / "published_h5"
    ed, es = (data_prep.read_volume(published, f"patient028_frame{f}").label for f in ("01", "02"))
    agrees_with_medpy(es, ed, (10.0, 1.5625, 1.5625))


def test_aggregate_two_cases_by_hand():
    cases = [{m: np.array(v, float) for m in evaluate.METRICS} for v in ([0.5, 0.7, 0.9], [0.9, 0.8, 0.7])]
    cases[1]["hd95_mm"][:] = np.nan
    table = evaluate.aggregate(cases)
    means, sds = ([table["dice"][c][k] for c in ("RV", "MYO", "LV", "mean")] for k in ("mean", "sd"))
    # Deviation with n - 1 of two values = their difference / sqrt(2); the volumes' means are 0.7 and 0.8.
    np.testing.assert_allclose(means, [0.7, 0.75, 0.8, 0.75])
    np.testing.assert_allclose(sds, np.array([0.4, 0.1, 0.2, 0.1]) / math.sqrt(2))
    assert table["hd95_mm"]["LV"] == dict(n=1, mean=0.9, sd=pytest.approx(math.nan, nan_ok=True))
    assert table["asd_mm"]["LV"]["n"] == 2


def test_clinical_indices_by_hand():
    labels = np.zeros((2, 10, 10), np.uint8)
    labels[0, :4, :5], labels[1] = 3, 2                            # 20 voxels LV, 100 MYO, none RV
    ed = evaluate.volumes_ml(labels, (10, 2, 1.5))                                              # 0.03 ml per voxel
    np.testing.assert_allclose(ed, [0, 3, 0.6])
    got = evaluate.clinical_indices(ed, [0.1, 3, 0.15])
    expected = dict(lv_edv=0.6, lv_esv=0.15, lv_ef=75, rv_edv=0, rv_esv=0.1, rv_ef=np.nan, myo_mass=3.15)
    assert list(got) == list(evaluate.INDICES)
    np.testing.assert_allclose([got[k] for k in expected], list(expected.values()))


def test_agreement_by_hand():
    got = evaluate.agreement([1, 2, 4, np.nan], [1, 1, 1.5, 7])           # differences 0, 1, 2.5
    assert got["n"] == 3
    np.testing.assert_allclose(got["bias"], 3.5 / 3)
    np.testing.assert_allclose(got["sd"], math.sqrt((7.25 - 3.5**2 / 3) / 2))
    np.testing.assert_allclose(got["r"], (9 - 7 * 3.5 / 3) / math.sqrt((21 - 49 / 3) * (4.25 - 3.5**2 / 3)))
    assert math.isnan(evaluate.agreement([1, 2, 3], [5, 5, 5])["r"])


def test_three_slices_from_base_to_apex():
    area = [0, 9, 8, 7, 6, 5, 4, 3, 0]
    mask = np.arange(10)[None, None] < np.array(area)[:, None, None]
    assert evaluate.three_slices(mask) == [1, 4, 7]
    assert evaluate.three_slices(mask[::-1]) == [7, 4, 1]
    assert evaluate.three_slices(mask[:2]) == [1, 1, 1]
    assert len(evaluate.three_slices(mask[:1])) == 3                                            # nothing annotated


def test_an_overlay_names_its_panels_and_shows_both_ends(drawn, tmp_path):
    """What a reader sees: which panel is which, and the most basal slice, where only the prediction has a heart."""
    label, pred = np.zeros((2, 7, 40, 40), np.uint8)
    label[2:5, 15:25, 15:25], pred[1:5, 15:25, 15:25] = 3, 3
    image = np.random.default_rng(0).random(label.shape, np.float32)
    v = data_prep.Volume("patient028_frame01", image, label, None, None)
    evaluate.draw_overlay(tmp_path / "x.png", "title", [("ED", v, pred)])
    axes = [ax for block in drawn[0].subfigs for ax in block.axes]
    assert [ax.get_title() for ax in axes] == ["image", "annotation", "prediction"] + [""] * 6
    assert [ax.get_ylabel() for ax in axes[::3]] == ["basal, slice 2", "mid, slice 4", "apical, slice 5"]
    assert drawn[0].legends[0].get_title().get_text() == evaluate.NOTICE


def test_largest_component_by_hand():
    labels = np.zeros((3, 6, 8), np.uint8)
    labels[0, :2, :2] = labels[1, 0, 0] = 1                         # 5 voxels, over two slices
    labels[0, 4, 4:7] = 1                                          # 3: goes
    labels[2, 2, 2], labels[2, 3, 3] = 3, 3                        # joined by a corner only: one of them goes
    kept = largest_component(labels)
    assert (kept == 1).sum() == 5
    assert (kept[0, 4] == 0).all()
    assert (kept == 3).sum() == 1
    assert kept.dtype == np.uint8
    assert (largest_component(np.zeros((2, 3, 3), np.uint8)) == 0).all()


def test_clinical_plots_have_four_columns_and_equal_axes(drawn, tmp_path):
    pairs = np.random.default_rng(0).random((9, 2))
    rows = [dict(index=k, prediction=50 * a, annotation=60 * b) for k in evaluate.INDICES for a, b in pairs]
    rows += [dict(index=k, prediction=5.0, annotation=math.nan) for k in evaluate.INDICES]
    evaluate.draw_agreement(tmp_path / "x.png", rows)
    titles = [ax.get_title().split(",")[0] for ax in drawn[0].axes]
    assert titles[:4] + titles[8:11] == ["LV EDV", "LV ESV", "LV EF", "mass", "RV EDV", "RV ESV", "RV EF"]
    assert drawn[0].axes[0].get_gridspec().ncols == 4
    assert drawn[0].get_supxlabel() == evaluate.NOTICE
    for ax in drawn[0].axes[:4] + drawn[0].axes[8:11]:
        box = ax.get_window_extent()
        assert ax.get_xlim() == ax.get_ylim()
        assert box.width == pytest.approx(box.height)


# --------------------------------------------------------------------------------------------------- while training

def test_validation_table():
    assert evaluate.validation_table([("student", "last", 300, dict(dice=[0.5, 0.75, 1.0], hd95_voxel=[1, 2, 3.5])),
                                      ("coteacher", "best", 20000, dict(dice=[0, 0, 0.01], hd95_voxel=[9, 9, 90.0]))]
                                     ).splitlines() == [
        "on val, Dice                RV     MYO      LV    mean   HD95 in voxels, mean",
        "student   last     300   0.5000  0.7500  1.0000  0.7500   2.17",
        "coteacher best   20000   0.0000  0.0000  0.0100  0.0033   36.00"]


def test_curves_mark_each_stage_after_the_first(drawn, tmp_path):
    rows = ["step,stage,dice,kd,val_student", "10,1,0.9,0.0,", "20,1,0.8,0.0,0.0", "30,2,0.7,0.0,", "40,3,0.6,0.4,0.7"]
    for text in ("\n".join(rows), "step,dice,val_student\n10,0.9,\n20,0.8,0.5\n"):             # then: without stages
        (tmp_path / "log.csv").write_text(text)
        evaluate.draw_curves(tmp_path / "log.csv", tmp_path / "curves.png")
        assert Image.open(tmp_path / "curves.png").size == (990, 360)
    left, right = drawn[0].axes
    assert [line.get_xydata().tolist() for line in left.lines[:2] + right.lines[:1]] == [
        [[10, 0.9], [20, 0.8], [30, 0.7], [40, 0.6]], [[40, 0.4]], [[20, 0], [40, 0.7]]]
    for ax in drawn[0].axes:
        assert [(t.get_position()[0], t.get_text().strip()) for t in ax.texts] == [(30, "2"), (40, "3")]
    assert [len(ax.lines) for ax in (*drawn[0].axes, *drawn[1].axes)] == [4, 3, 1, 1]


# ------------------------------------------------------------------------------------------------------ command line

def test_command_line(checkpoint, root):
    """Table, CSV and JSON of a real process, and a validation while training, equal medpy on the uncropped
    predictions; pictures hold the contours."""
    done = python(SCRIPT, checkpoint, "--split", "val", "--cpu")
    assert (done.returncode, done.stderr) == (0, "")
    out = checkpoint.parent / "val"
    assert sorted(p.name for p in out.iterdir()) == [
        "clinical.csv", "clinical.png", "metrics.csv", "overlay_best.png", "overlay_median.png", "overlay_worst.png",
        "report.html", "summary.json"]
    assert not list(checkpoint.parent.glob(".*"))

    net, content = load_model(checkpoint)
    names = [f"patient{p}_frame{f}" for p in ("028", "085", "082") for f in ("01", "02")]
    volumes = [data_prep.read_volume(root, n) for n in names]
    preds = [segment_volume(net, v.image, **content["inference"]) for v in volumes]
    oracle = np.array([[medpy_metrics(p == k, v.label == k, SPACING) for k in (1, 2, 3)]
                       for p, v in zip(preds, volumes, strict=True)])                           # (6, 3, 6)
    assert 0.7 < oracle[..., 0].mean() < 1                       # a prediction worth scoring
    training = evaluate.validate(net, volumes, content["inference"])
    dices = [evaluate.dice(p, v.label) for p, v in zip(preds, volumes, strict=True)]
    assert json.loads(json.dumps(training))["dice"] == np.mean(dices, axis=0).tolist()
    np.testing.assert_allclose(training["hd95_voxel"], oracle[..., 2].mean(0))

    rows = read_csv(out / "metrics.csv")
    assert [(r["case"], r["class"]) for r in rows] == [(n, c) for n in names for c in ("RV", "MYO", "LV")]
    assert {(r["patient"], r["phase"], r["group"]) for r in rows[:6]} == {("patient028", "ED", "NOR"),
                                                                          ("patient028", "ES", "NOR")}
    got = np.array([[float(r[m]) for m in evaluate.METRICS] for r in rows]).reshape(oracle.shape)
    np.testing.assert_allclose(got, oracle, rtol=1e-5)
    ml = [np.count_nonzero(a == k) * 0.015 for p, v in zip(preds, volumes, strict=True) for k in (1, 2, 3)
          for a in (p, v.label)]
    np.testing.assert_allclose([float(r[c]) for r in rows for c in ("volume_ml", "annotation_ml")], ml, rtol=1e-5)
    summary = summary_of(out)
    assert (summary["network"], summary["scored"]) == ("student", 6)
    assert summary["parameters"] == 680 + 3520 + 520 + 1760 + 36                  # two levels down, up, merge, head
    for i, metric in enumerate(evaluate.METRICS):
        per_class = oracle[:, :, i].mean(0)
        for j, c in enumerate(("RV", "MYO", "LV")):
            assert summary["metrics"][metric][c]["mean"] == pytest.approx(per_class[j], rel=1e-9)
            assert summary["metrics"][metric][c]["sd"] == pytest.approx(oracle[:, j, i].std(ddof=1), rel=1e-9)
        assert summary["metrics"][metric]["mean"]["mean"] == pytest.approx(per_class.mean(), rel=1e-9)

    clinical = read_csv(out / "clinical.csv")
    assert len(clinical) == 3 * 7
    edv = [r for r in clinical if r["index"] == "lv_edv"]
    bias = np.mean([float(r["prediction"]) - float(r["annotation"]) for r in edv])
    assert summary["clinical"]["lv_edv"]["bias"] == pytest.approx(bias, rel=1e-3)

    mean = oracle[..., 0].mean(0).mean()
    assert re.search(rf"^mean +{mean:.4f} ± ", done.stdout, re.M)
    assert "HD95 mm" in done.stdout
    assert "student of step 40, U-Net[2, 8], 0.01 M parameters" in done.stdout

    by_patient = oracle[..., 0].reshape(3, 6).mean(1)            # ED and ES, three classes
    patients = ["patient028", "patient085", "patient082"]
    assert summary["overlays"]["best"] == patients[by_patient.argmax()]
    assert summary["overlays"]["worst"] == patients[by_patient.argmin()]
    for kind in ("best", "median", "worst"):
        for color in evaluate.COLORS.values():
            assert painted(out / f"overlay_{kind}.png", color) > 1000, (kind, color)


def test_unlabeled_are_the_train_patients_after_the_labeled(capsys, tmp_path, checkpoint):
    """From slices, whatever their order in the list, or from a train volume where a copy of the data holds one."""
    root = write_root(tmp_path / "root", {"train": ["patient038", "patient099", "patient050"]})
    slices = ["patient038_frame01_slice_1"]                                        # 038 has the labels
    for name in (root / "train.list").read_text().split()[2:]:
        v = data_prep.read_volume(root, name)
        for z in range(6):
            with h5py.File(root / "data" / f"{name}_slice_{z + 1}.h5", "w") as h:
                h["image"], h["label"], h.attrs["spacing"] = v.image[z], v.label[z], v.spacing
        slices += [f"{name}_slice_{z + 1}" for z in (3, 0, 5, 1, 4, 2)]
    (root / "train_slices.list").write_text("\n".join(slices))
    torch.save(torch.load(checkpoint) | {"config": dict(labeled=1)}, tmp_path / "best.pt")
    args, tables = [tmp_path / "best.pt", "--data", root, "--split", "unlabeled", "--out", tmp_path / "out"], []
    for _ in range(2):
        assert run(capsys, *args)[::2] == (0, "")
        tables.append([{k: v for k, v in r.items() if k != "group"} for r in read_csv(tmp_path / "out/metrics.csv")])
        (root / "data" / "patient099_frame01.h5").unlink(missing_ok=True)                     # then: from its slices
    assert tables[0] == tables[1]
    assert {f"{r['patient']} {r['phase']}" for r in tables[0]} == {
        "patient099 ED", "patient099 ES", "patient050 ED", "patient050 ES"}
    for labeled in (3, 7, None, "7"):
        with pytest.raises(data_prep.DataError, match="unlabeled: "):
            evaluate.find_volumes(root, "unlabeled", labeled)
    (root / "train_slices.list").write_text("\n".join(n for n in slices if n != "patient099_frame01_slice_2"))
    assert "lacks slices of patient099_frame01" in refused(capsys, *args)


def test_too_little_memory_is_one_line(capsys, root, checkpoint, tmp_path, monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()):
        monkeypatch.setattr(evaluate, "segment_volume", lambda *a, e=error, **k: (_ for _ in ()).throw(e))
        assert "out of memory" in refused(capsys, checkpoint, "--split", "val", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_community_layout_says_voxels(capsys, tmp_path, checkpoint):
    """No attributes: no mm, no clinical indices, and the table says why. An older clinical.csv does not stay."""
    flat, out = write_root(tmp_path / "flat", {"val": ["patient028"]}, attributes=False), tmp_path / "out"
    out.mkdir()
    for name in ("clinical.csv", "clinical.png", "notes.txt"):
        (out / name).write_text("stale, or mine")
    code, stdout, stderr = run(capsys, checkpoint, "--data", flat, "--split", "val", "--out", out)
    assert (code, stderr) == (0, "")
    assert "HD95 voxels" in stdout
    assert " mm" not in stdout
    assert "2 volumes carry no spacing" in stdout
    assert sorted(p.name for p in out.iterdir()) == [
        "metrics.csv", "notes.txt", "overlay_best.png", "report.html", "summary.json"]
    rows = read_csv(out / "metrics.csv")
    assert all(r["hd95_voxel"] and not r["hd95_mm"] and not r["volume_ml"] and not r["group"] for r in rows)
    summary = summary_of(out)
    assert summary["clinical"] is None
    assert summary["metrics"]["asd_mm"]["mean"] == dict(n=0, mean=None, sd=None)


@pytest.mark.usefixtures("no_pictures")
def test_which_network(capsys, tmp_path, checkpoint, root):
    """--which takes one of two; where there is one only, no column and no line tells of disagreement."""
    save(tmp_path / "alone.pt", dict(student=load_model(checkpoint)[0]))
    scores = []
    for path, which in ((checkpoint, "student"), (checkpoint, "coteacher"), (tmp_path / "alone.pt", "student")):
        code, stdout, _ = run(capsys, path, "--data", root, "--split", "val", "--which", which, "--out", tmp_path / "o")
        assert code == 0
        assert f".pt: {which} of step 40" in stdout
        summary = summary_of(tmp_path / "o")
        scores.append(summary["metrics"]["dice"]["mean"]["mean"])
        told = ["disagreement"] * (path == checkpoint)
        assert list(summary["uncertainty"]) == ["entropy", *told]
        assert list(read_csv(tmp_path / "o" / "metrics.csv")[0])[-1] == (told or ["entropy"])[0]
    assert scores[0] == scores[2] > scores[1] + 0.2


@pytest.mark.usefixtures("no_pictures")
def test_one_empty_is_counted(capsys, monkeypatch, tmp_path, checkpoint, root):
    """A network that never finds the RV: Dice 0, the diagonal as distance, and the count in table and summary."""
    truth = {n: data_prep.read_volume(root, n).label for n in data_prep.read_list(root, "val")}
    answers = iter([np.where(label == 1, 0, label).astype(np.uint8) for label in truth.values()])

    def segment(nets, image, *_):
        return evaluate.Segmentation(next(answers), np.zeros(image.shape), np.zeros(3), 1.0)
    monkeypatch.setattr(evaluate, "segment", segment)
    code, stdout, _ = run(capsys, checkpoint, "--split", "val", "--out", tmp_path)
    assert code == 0
    assert "RV 6, MYO 0, LV 0" in stdout
    metrics = summary_of(tmp_path)["metrics"]
    assert [metrics["dice"][c]["mean"] for c in ("RV", "MYO", "LV")] == [0, 1, 1]
    assert metrics["dice"]["mean"]["mean"] == pytest.approx(2 / 3)
    assert metrics["hd95_voxel"]["RV"]["mean"] == pytest.approx(math.sqrt(6**2 + 44**2 + 48**2))


def test_unlabelled_volumes_are_predicted_not_scored(capsys, tmp_path, checkpoint, root):
    code, stdout, stderr = run(capsys, checkpoint, "--split", "official", "--out", tmp_path / "some")
    assert (code, stderr) == (0, "evaluate.py: 2 of 4 volumes have no annotation: predicted, not scored\n")
    rows = read_csv(tmp_path / "some" / "metrics.csv")
    assert [bool(r["dice"]) for r in rows] == [True] * 6 + [False] * 6
    assert all(float(r["volume_ml"]) > 0 for r in rows)
    summary = summary_of(tmp_path / "some")
    assert (summary["volumes"], summary["scored"], summary["clinical"]["lv_ef"]["n"]) == (4, 2, 1)
    assert summary["overlays"] == {"best": "patient101"}

    bare = write_root(tmp_path / "bare", {"official": ["patient103"]}, unlabeled=["patient103"])
    code, stdout, stderr = run(capsys, checkpoint, "--data", bare, "--split", "official", "--out", tmp_path / "none")
    assert (code, stderr) == (0, "evaluate.py: 2 of 2 volumes have no annotation: predicted, not scored\n")
    assert "Dice" not in stdout
    assert "0 volumes scored" in stdout
    assert summary_of(tmp_path / "none")["overlays"] == {"best": "patient103"}
    ef = [r for r in read_csv(tmp_path / "none" / "clinical.csv") if r["index"] == "lv_ef"]
    assert 20 < float(ef[0]["prediction"]) < 80
    assert ef[0]["annotation"] == ""


# ------------------------------------------------------------------------------------------------------------ faults


@pytest.fixture
def folder(tmp_path, root):
    """A prepared folder that a test may damage, and where no results may appear."""
    copy = write_root(tmp_path / "prepared", {"val": ["patient028"], "test": []})
    yield copy
    left = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")]
    assert not [p for p in left if "evaluate-" in p or "metrics" in p or "summary" in p or "overlay" in p], left


def test_faults_of_checkpoint_and_data(capsys, tmp_path, checkpoint, folder):
    def tell(path, *more):
        return refused(capsys, path, "--data", folder, "--out", tmp_path / "out", *more)
    (tmp_path / "text.pt").write_text("weights")
    save(tmp_path / "rgb.pt", dict(student=UNet(2, 4, in_channels=3)))
    save(tmp_path / "binary.pt", dict(student=UNet(2, 4, num_classes=2)))
    save(tmp_path / "alone.pt", dict(student=UNet(2, 4)))
    for name, words in (("absent", "no such checkpoint"), ("text", "text.pt: damaged"), ("alone", "coteacher"),
                        ("rgb", "rgb.pt: maps 3 channels to 4 classes"), ("binary", "maps 1 channels to 2 classes")):
        assert words in tell(tmp_path / f"{name}.pt", "--split", "val", *["--which", "coteacher"] * (name == "alone"))
    assert "nowhere/test.list" in tell(checkpoint, "--data", tmp_path / "nowhere")
    assert re.search(r"test.list: empty; .*--split val", tell(checkpoint))
    volume = folder / "data" / "patient028_frame02.h5"
    volume.write_bytes(volume.read_bytes()[:5000])
    assert "patient028_frame02.h5" in tell(checkpoint, "--split", "val")
    volume.unlink()
    assert "1 of the 2 volumes of val.list are absent, first data/patient" in tell(checkpoint, "--split", "val")
    assert not (tmp_path / "out").exists()


def test_faults_of_options_and_disk(capsys, monkeypatch, tmp_path, checkpoint, folder):
    args = [checkpoint, "--data", folder, "--split", "val"]
    assert "--gpu 99: this machine has" in refused(capsys, *args, "--gpu", 99)
    (tmp_path / "file").write_text("")
    assert "file/out: Not a directory" in refused(capsys, *args, "--out", tmp_path / "file" / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("kept")
    monkeypatch.setattr(evaluate, "write_csv", no_room)
    assert "out: No space left" in refused(capsys, *args, "--out", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["note"]


def blob(net, volume, *args, real=segment_volume, **kwargs):
    """segment_volume, with a second blob of LV in the first slice's corner."""
    answer = real(net, volume, *args, **kwargs)
    (answer[0] if isinstance(answer, tuple) else answer)[0, :3, :3] = 3
    return answer


@pytest.mark.usefixtures("no_pictures")
def test_the_largest_component_is_told_beside_or_taken(capsys, monkeypatch, tmp_path, checkpoint, root):
    """Plain by default, with the largest component's Dice and HD95 in a table of their own; asked for, it is all."""
    monkeypatch.setattr(evaluate, "segment_volume", blob)
    monkeypatch.setattr(evaluate, "find_heart", lambda *a, **k: asked.append("find") or {})
    summaries, asked = [], []
    for options in ([], ["--find-heart", "--largest-component"]):
        code, stdout, _ = run(capsys, checkpoint, "--data", root, "--split", "val", "--out", tmp_path / "o", *options)
        assert (code, len(asked)) == (0, 6 if options else 0)
        assert ("heart found and resampled, largest component per class" in stdout) == bool(options)
        assert ("\nlargest component " in stdout) != bool(options)
        summaries.append(summary_of(tmp_path / "o"))
    beside, taken = summaries
    assert [s["largest_component"] for s in summaries] == [s["find_heart"] for s in summaries] == [False, True]
    assert taken["largest_component_metrics"] is None
    assert beside["largest_component_metrics"] == {m: taken["metrics"][m] for m in ("dice", "hd95_voxel")}
    assert beside["metrics"]["dice"]["LV"]["mean"] < taken["metrics"]["dice"]["LV"]["mean"]


def test_hidden_folders_of_killed_processes_go(tmp_path):
    """Where the results go and, before that folder is there, beside it; those of a running process stay."""
    code = "import evaluate, pathlib, sys, time\nwith evaluate.staging(pathlib.Path(sys.argv[1]), []) as f:\n" \
        "    (f / 'half').write_text('x'); print(f, flush=True); time.sleep(60)"
    (tmp_path / "there").mkdir()
    children = [subprocess.Popen([sys.executable, "-c", code, tmp_path / out], stdout=subprocess.PIPE, text=True,
                                 cwd=ROOT) for out in ("there", "new", "new")]
    dead, fresh, alive = (Path(c.stdout.readline().strip()) for c in children)
    for child in children[:2]:
        child.kill()
        child.wait()
    assert [p.exists() for p in (dead, fresh, alive / "half")] == [True, True, True]
    for out in (tmp_path / "there", tmp_path / "new"):
        with evaluate.staging(out, ["a"]) as folder:
            (folder / "a").write_text("whole")
    assert [p.exists() for p in (dead, fresh, alive / "half")] == [False, False, True]
    children[2].terminate()
    children[2].wait()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and evaluate.HIDDEN not in str(p)] == ["a", "a"]


def browse(tmp_path, page, *args):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    return subprocess.run([CHROMIUM, *flags, *args, page.as_uri()], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium")
def test_report_in_a_browser(capsys, tmp_path, checkpoint):
    """The summary's figures, every picture inside and painted, markup in a name as text; no overflow when narrow."""
    root = write_root(tmp_path / "a <b>&", {"val": ["patient028", "patient085", "patient082"]})
    out = tmp_path / "out"
    assert run(capsys, checkpoint, "--data", root, "--split", "val", "--out", out)[0] == 0
    summary = summary_of(out)
    alone = tmp_path / "elsewhere.html"
    shutil.move(out / "report.html", alone)
    shutil.rmtree(out)
    dom = browse(tmp_path, alone, "--dump-dom").stdout
    dice = summary["metrics"]["dice"]["mean"]
    assert f"<td>{dice['mean']:.4f} ± {dice['sd']:.4f}</td>" in dom
    assert f"<td>{summary['clinical']['lv_ef']['r']:.3f}</td>" in dom
    assert "a &lt;b&gt;&amp;" in dom
    assert f"<h1>ACT-Net student on val: Dice {dice['mean']:.3f}</h1>" in dom
    assert evaluate.NOTICE in dom
    cells = re.findall(r"<td>(patient\d+)</td><td>NOR</td><td>(E[DS])</td>" + r"<td>([\d.]+)</td>" * 4, dom)
    means = [float(c[-1]) for c in cells]
    assert (len(cells), means) == (6, sorted(means))
    assert np.mean(means) == pytest.approx(dice["mean"], abs=1e-3)
    assert "<b>" not in dom
    assert "largest_component" in dom                                                   # the configuration
    pictures = re.findall(r'<img[^>]* src="([^"]*)"', dom)
    assert len(pictures) == 4
    assert not re.search(r'(src|href)="(?!data:)', dom)
    shot = tmp_path / "shot.png"
    browse(tmp_path, alone, f"--screenshot={shot}", "--window-size=1200,6000")
    for color in (*evaluate.COLORS.values(), "#2a6fb0", "#c23b4b"):                      # contours, dots, bias
        assert painted(shot, color, 90) > 200, color
    sizes = [Image.open(io.BytesIO(base64.b64decode(p.partition(",")[2]))).size for p in pictures]
    assert painted(shot, "#000000") > 0.1 * sum(w * h for w, h in sizes[1:])            # the overlays' background
    narrow = tmp_path / "narrow.html"
    script = "document.title = [innerWidth, document.documentElement.scrollWidth, document.querySelector('table')" \
        ".scrollWidth]"
    narrow.write_text(f"{alone.read_text()}<script>{script}</script>")
    dom = browse(tmp_path, narrow, "--dump-dom", "--window-size=390,900").stdout
    window, page, table = map(int, re.search(r"<title>(.*?)</title>", dom)[1].split(","))
    assert page <= window < table
