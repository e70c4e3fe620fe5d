"""Score a checkpoint on a prepared split: the one place with metrics. (predict.py segments NIfTI files with it.)

    python evaluate.py runs/act-7-seed0/best.pt                                  # the test split of the run's data
    python evaluate.py runs/act-7-seed0/best.pt --data data/ACDC --split val --which student --out scores

Per volume on its native grid, for RV, MYO and LV (p predicted, y annotated, S their surfaces, d Euclidean):
    Dice = 2 |p & y| / (|p| + |y|)          Jaccard = |p & y| / |p | y|
    HD95 = 95th percentile of d(s, S_y) for s in S_p and d(s, S_p) for s in S_y, pooled
    ASD  = mean of d(s, S_y) for s in S_p: directed, prediction to annotation
as medpy.metric.binary's dc, jc, hd95 and asd, which this literature reports. Distances in voxels (neighbouring slices
are 1 apart) and, where the spacing is known, in mm. Both empty: Dice 1, distances 0. One empty: Dice 0, distances = the
volume's diagonal; such cases are counted. A class's figure is the mean over volumes, the last line the mean of the
three; deviations are over volumes, with n - 1.

Clinical indices per patient (Bernard et al., IEEE TMI 37(11), 2018): volumes at end-diastole (EDV) and end-systole
(ESV) in ml, ejection fraction EF = 100 (EDV - ESV) / EDV in %, mass of the myocardium at ED in g, at 1.05 g/ml.

Uncertainty, 0 sure to 1: entropy = -sum p log p / log C per voxel, and its mean over what is predicted as a class;
disagreement = 1 - Dice between the student's and the co-teacher's label maps.

OUT, by default <checkpoint's folder>/<split>, receives
    metrics.csv     one row per volume and class: pandas.read_csv(f).groupby("class").mean(numeric_only=True)
    clinical.csv    one row per patient and index; clinical.png: correlation and Bland-Altman plots; both absent where
                    the data hold no spacing
    overlay_*.png   the best, median and worst patient by mean Dice: end-diastole and end-systole; base, middle, apex
    report.html     tables and pictures in one file
    summary.json    everything that is printed
A volume without annotation is predicted (its ml are in metrics.csv) and not scored; a line says how many there are.
"""
import argparse
import base64
import csv
import html
import json
import math
import os
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

import data_prep
import models
from data_prep import CLASSES, PHASES, DataError
from models import CheckpointError, DeviceError, find_heart, largest_component, load_model, pick_device, segment_volume

SPLITS = ("val", "test", "official")
METRICS = {"dice": "Dice", "jaccard": "Jaccard", "hd95_voxel": "HD95 voxels", "asd_voxel": "ASD voxels",
           "hd95_mm": "HD95 mm", "asd_mm": "ASD mm"}
INDICES = {"lv_edv": "ml", "lv_esv": "ml", "lv_ef": "%", "rv_edv": "ml", "rv_esv": "ml", "rv_ef": "%", "myo_mass": "g"}
DENSITY = 1.05                                                     # of myocardium, g/ml
COLORS = {"RV": "#35c9ff", "MYO": "#ffd23f", "LV": "#ff4d6d"}
PICTURES = ("best", "worst", "median")                             # in the order of their claim on a patient
RESULTS = ("metrics.csv", "clinical.csv", "clinical.png", *(f"overlay_{k}.png" for k in PICTURES), "report.html",
           "summary.json")


# ---------------------------------------------------------------------------------------------------------- metrics

def dice(pred, label):
    """Two label maps of one shape -> Dice of RV, MYO, LV, (3,) float64; both empty 1, one empty 0."""
    scores = []
    for k in range(1, len(CLASSES) + 1):
        p, y = pred == k, label == k
        total = np.count_nonzero(p) + np.count_nonzero(y)
        scores.append(2 * np.count_nonzero(p & y) / total if total else 1.0)
    return np.array(scores)


def surface_metrics(p, y, spacing=(1.0, 1.0, 1.0)):
    """Two boolean masks (Z, Y, X) -> (HD95, ASD) in the unit of `spacing` (z, y, x); ASD from p to y.

    The surface of a mask: its voxels with one of six neighbours outside it, as in medpy.
    """
    if not (p.any() and y.any()):
        distance = float(np.linalg.norm(np.multiply(p.shape, spacing))) if p.any() or y.any() else 0.0
        return distance, distance
    # Nothing of either mask lies outside the box and erosion takes what is beyond an array for background, so the
    # crop needs no margin: the same surfaces, the same distances, a tenth of the time.
    box = ndimage.find_objects((p | y).astype(np.uint8))[0]
    p, y = (m[box] & ~ndimage.binary_erosion(m[box]) for m in (p, y))
    there = ndimage.distance_transform_edt(~y, sampling=spacing)[p]
    back = ndimage.distance_transform_edt(~p, sampling=spacing)[y]
    return float(np.percentile(np.concatenate((there, back)), 95)), float(there.mean())


def case_metrics(pred, label, spacing=None):
    """Two label maps (Z, Y, X), spacing (z, y, x) in mm or None -> {metric: (3,) float64 for RV, MYO, LV}.

    The keys of METRICS, those in mm NaN without spacing, and `one_empty`: bool, exactly one of the two is empty.
    """
    overlap, masks = dice(pred, label), [(pred == k, label == k) for k in range(1, len(CLASSES) + 1)]
    voxels = np.transpose([surface_metrics(p, y) for p, y in masks])                            # (2, 3): HD95, ASD
    mm = np.transpose([surface_metrics(*m, spacing) for m in masks]) if spacing is not None else voxels * np.nan
    return dict(zip(METRICS, (overlap, overlap / (2 - overlap), *voxels, *mm), strict=True),
                one_empty=np.array([p.any() != y.any() for p, y in masks]))


def volumes_ml(labels, spacing):
    """Label map, spacing in mm or None -> ml of RV, MYO, LV, (3,) float64; NaN without spacing."""
    counts = np.array([np.count_nonzero(labels == k) for k in range(1, len(CLASSES) + 1)])
    return counts * (math.prod(spacing) / 1000 if spacing is not None else np.nan)


def clinical_indices(ed, es):
    """ml of RV, MYO, LV at end-diastole and end-systole -> {index: value} in the units of INDICES; an EF of an empty
    ventricle is NaN."""
    lv, rv = ((ed[i], es[i], 100 * (ed[i] - es[i]) / ed[i] if ed[i] else np.nan) for i in (2, 0))
    return dict(zip(INDICES, map(float, (*lv, *rv, DENSITY * ed[1])), strict=True))


def agreement(prediction, annotation):
    """Pairs of values, those with a NaN left out -> n, bias (mean of prediction - annotation), its SD, Pearson's r."""
    x, y = np.array([prediction, annotation], float).reshape(2, -1)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    related = len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    return dict(n=len(x), bias=mean(x - y), sd=_sd(x - y), r=float(np.corrcoef(x, y)[0, 1]) if related else np.nan)


def aggregate(cases):
    """case_metrics of each volume -> {metric: {RV | MYO | LV | mean: {n, mean, sd}}}; n counts volumes."""
    table = {}
    for metric in METRICS:
        values = np.array([c[metric] for c in cases]).reshape(-1, len(CLASSES))                    # (volumes, 3)
        values = values[np.isfinite(values).all(1)]
        columns = zip((*CLASSES, "mean"), (*values.T, values.mean(1)), strict=True)
        table[metric] = {c: dict(n=len(v), mean=mean(v), sd=_sd(v)) for c, v in columns}
    return table


def mean(x):
    return float(np.mean(x)) if len(x) else np.nan


def _sd(x):
    return float(np.std(x, ddof=1)) if len(x) > 1 else np.nan


# -------------------------------------------------------------------------------------------------------- inference

class Segmentation(NamedTuple):
    labels: np.ndarray          # (Z, Y, X) uint8
    entropy: np.ndarray         # (Z, Y, X) float32, 0..1
    disagreement: np.ndarray    # (3,) float64 for RV, MYO, LV: 1 - Dice of the two networks; NaN with one
    seconds: float              # of the first network


def segment(nets, image, inference, component=False):
    """Segment (Z, Y, X) with the first of `nets`; the second, if there is one, is asked whether it agrees."""
    began = time.perf_counter()
    labels, probs = segment_volume(nets[0], image, **inference, return_probs=True)
    seconds = time.perf_counter() - began
    entropy = -(probs * np.log(np.maximum(probs, 1e-12))).sum(1) / math.log(probs.shape[1])
    maps = [labels, *(segment_volume(n, image, **inference) for n in nets[1:])]
    if component:
        maps = [largest_component(m) for m in maps]
    disagreement = 1 - dice(*maps) if len(maps) > 1 else np.full(len(CLASSES), np.nan)
    return Segmentation(maps[0], entropy, disagreement, seconds)


def load_networks(path, device="cpu", which=None):
    """-> ([network, the other one of student and co-teacher if the checkpoint has it], checkpoint). CheckpointError
    as of load_model, and where the network's classes are not ACDC's."""
    net, checkpoint = load_model(path, device, which)
    arch = net.architecture
    if (arch["in_channels"], arch["num_classes"]) != (1, len(CLASSES) + 1):
        raise CheckpointError(f"{path}: maps {arch['in_channels']} channels to {arch['num_classes']} classes, but ACDC "
                              f"has 1 and {len(CLASSES) + 1} with background; train on this data")
    others = {"student", "coteacher"} & set(checkpoint["networks"]) - {which or checkpoint["better"]}
    return [net, *(load_model(path, device, other)[0] for other in others)], checkpoint


# --------------------------------------------------------------------------------------------------------- pictures

def three_slices(mask):
    """(Z, Y, X) bool -> its most basal, middle and most apical slice; the base is where the heart is wider."""
    area = mask.sum((1, 2))
    z = np.flatnonzero(area) if area.any() else np.arange(len(area))
    half = (len(z) + 1) // 2
    z = z if area[z[:half]].sum() >= area[z[-half:]].sum() else z[::-1]
    return [int(z[round(f * (len(z) - 1))]) for f in (0, 0.5, 1)]


def draw_overlay(path, title, frames):
    """frames: [(phase, Volume, pred (Z, Y, X)), ...] -> a PNG: a row per level, a column per frame, of image,
    annotation (where there is one) and prediction."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    annotated = all(v.label is not None for _, v, _ in frames)
    panels = ["image"] + ["annotation"] * annotated + ["prediction"]
    columns = len(frames) * len(panels)
    figure = Figure(figsize=(2.1 * columns, 7.2), facecolor="black", layout="constrained")
    figure.suptitle(title, color="white", fontsize=15)
    blocks = figure.subfigures(1, len(frames), wspace=0.02, squeeze=False)[0]
    for block, (phase, v, pred) in zip(blocks, frames, strict=True):
        truth = pred if v.label is None else v.label
        heading = phase
        if v.label is not None:
            heading += ", Dice " + "  ".join(f"{c} {d:.3f}" for c, d in zip(CLASSES, dice(pred, truth), strict=True))
        block.set_facecolor("black")
        block.suptitle(heading, color="white", fontsize=12)
        ys, xs = np.nonzero(truth.any(0)) if truth.any() else [(0, n) for n in truth.shape[1:]]
        center, half = ((min(ys) + max(ys)) / 2, (min(xs) + max(xs)) / 2), max(np.ptp(ys), np.ptp(xs)) / 2 + 10
        axes = block.subplots(3, len(panels), squeeze=False)
        heart = (truth > 0) | (pred > 0)                                      # errors lie at its ends
        for row, z, level in zip(axes, three_slices(heart), ("basal", "mid", "apical"), strict=True):
            window = tuple(slice(max(0, int(c - half)), int(c + half) + 1) for c in center)
            low, high = np.percentile(v.image[z][window], (1, 99.5))
            for ax, panel in zip(row, panels, strict=True):
                ax.imshow(v.image[z], cmap="gray", vmin=low, vmax=high, interpolation="bicubic")
                labels = {"image": None, "annotation": v.label, "prediction": pred}[panel]
                if labels is not None:
                    for k, name in enumerate(CLASSES, 1):
                        if (mask := labels[z] == k).any() and not mask.all():
                            ax.contour(mask, [0.5], colors=COLORS[name], linewidths=1.6)
                    if beyond := np.count_nonzero(labels[z]) - np.count_nonzero(labels[z][window]):
                        ax.text(0.03, 0.03, f"{beyond} pixels outside", color="white", transform=ax.transAxes)
                ax.set(xlim=(center[1] - half, center[1] + half), ylim=(center[0] + half, center[0] - half),
                       xticks=[], yticks=[])
                ax.set_facecolor("black")
                if level == "basal":
                    ax.set_title(panel, color="0.8", fontsize=10)
            row[0].set_ylabel(f"{level}, slice {z + 1}", color="0.8", fontsize=10)
    handles = [Patch(facecolor="none", edgecolor=COLORS[c], linewidth=2, label=c) for c in CLASSES]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, labelcolor="white", fontsize=12)
    figure.savefig(path)


def draw_agreement(path, rows):
    """Rows of clinical.csv -> a PNG: per index the prediction against the annotation, and their difference against
    their mean with bias and bias +- 1.96 SD (Bland and Altman, Lancet 1986)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(2.6 * len(INDICES), 5.4), layout="constrained")
    axes = figure.subplots(2, len(INDICES))
    for (above, below), (index, unit) in zip(axes.T, INDICES.items(), strict=True):
        x, y = np.array([(r["prediction"], r["annotation"]) for r in rows if r["index"] == index]).T
        a = agreement(x, y)
        above.plot(y, x, "o", color="#2a6fb0", alpha=0.7)
        middle = np.nan_to_num(mean(y[np.isfinite(y)]))
        above.axline((middle, middle), slope=1, color="0.5", linewidth=1)
        above.set(title=f"{index_name(index)}, r {format_number(3, a['r'])}", xlabel=f"annotation, {unit}")
        below.plot((x + y) / 2, x - y, "o", color="#2a6fb0", alpha=0.7)
        for level, style in ((a["bias"], "-"), (a["bias"] - 1.96 * a["sd"], "--"), (a["bias"] + 1.96 * a["sd"], "--")):
            if np.isfinite(level):
                below.axhline(level, color="#c23b4b", linestyle=style, linewidth=1)
        below.set(title=f"bias {format_number(1, a['bias'], a['sd'])} {unit}", xlabel=f"mean, {unit}")
        for ax in (above, below):
            ax.grid(alpha=0.25)
    axes[0, 0].set_ylabel("prediction")
    axes[1, 0].set_ylabel("prediction - annotation")
    figure.savefig(path, dpi=90)


# ------------------------------------------------------------------------------------------------------- evaluation

def evaluate_checkpoint(path, out, data=None, split="test", which=None, device="cpu", find=False, component=False):
    """Predict and score a split, write the files that the head of this file names into `out`, return the summary.

    `which`: "student" or "coteacher", by default the better on val. `find`: look where find_heart says. `component`:
    keep the largest_component. Raises CheckpointError, DataError or OSError, and then `out` is as it was.
    """
    nets, checkpoint = load_networks(path, device, which)
    net, inference = nets[0], checkpoint["inference"]
    config = checkpoint.get("config")
    trained_on = str(config.get("data") or "") if isinstance(config, dict) else ""
    root = Path(data or (trained_on if trained_on and Path(trained_on).is_dir() else "data/ACDC"))
    names = _names(root, split, config.get("labeled") if isinstance(config, dict) else None)
    with staging(Path(out), RESULTS) as folder:
        rows, cases, preds, seconds = [], [], {}, []
        for name in tqdm(names, desc=f"{split} of {root}", unit="volume", disable=None, leave=False):
            v = data_prep.read_volume(root, name)
            began = time.perf_counter()
            focus = find_heart(net, v.image, v.spacing, **inference) if find else {}
            found = time.perf_counter() - began
            result = segment(nets, v.image, inference | focus, component)
            preds[name] = result.labels
            seconds.append((found + result.seconds, len(result.labels)))
            scores = {} if v.label is None else case_metrics(result.labels, v.label, v.spacing)
            cases += [scores] if scores else []
            rows += _case_rows(v, result, scores)
        clinical = _clinical_rows(rows)
        columns = {k: [[r[c] for r in clinical if r["index"] == k] for c in ("prediction", "annotation")]
                   for k in INDICES}
        overlays = _draw_cases(folder, root, split, rows, preds)
        timed = seconds[1:] or seconds                                                    # the first one warms up
        summary = dict(
            checkpoint=str(path), network=which or checkpoint["better"], step=checkpoint.get("step"),
            architecture=net.architecture, inference=inference, find_heart=find, largest_component=component,
            parameters=models.count_parameters(net), macs_per_slice=models.count_macs(net, inference["size"]),
            checkpoint_bytes=Path(path).stat().st_size,
            ms_per_slice=1000 * sum(s for s, _ in timed) / sum(n for _, n in timed),
            device=models.describe_device(device),
            data=str(root), split=split, volumes=len(names), scored=len(cases),
            with_spacing=sum(bool(np.isfinite(r["volume_ml"])) for r in rows) // len(CLASSES),
            one_empty={c: int(sum(s["one_empty"][i] for s in cases)) for i, c in enumerate(CLASSES)},
            metrics=aggregate(cases), overlays=overlays,
            clinical={k: {"unit": INDICES[k], **agreement(*columns[k])} for k in INDICES} if clinical else None,
            uncertainty={k: {x: agreement(*_case_means(rows, k, "dice"))[x] for x in ("n", "r")}
                         for k in ("entropy", "disagreement")})
        summary = plain(summary)
        write_csv(folder / "metrics.csv", rows)
        if clinical:
            write_csv(folder / "clinical.csv", clinical)
            if cases:
                draw_agreement(folder / "clinical.png", clinical)
        write_report(folder, summary, config)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return {**summary, "out": str(out)}


def _names(root, split, labeled):
    """The volumes of a split, all of them there; otherwise DataError. unlabeled: train without its first patients."""
    source = "train" if split == "unlabeled" else split
    names = data_prep.read_list(root, source)
    if split == "unlabeled":
        slices = data_prep.read_list(root, "train_slices", data_prep.SLICE)
        known = set(data_prep.first_patients(slices, labeled)) if type(labeled) is int else {n[:10] for n in names}
        names = [n for n in names if n[:10] not in known]
        if not names:
            raise DataError(f"--split unlabeled: the checkpoint was trained with {labeled} labelled patients, so that "
                            f"none in {root}/train.list is known to be without; choose another --split")
    if not names:
        others = [s for s in SPLITS if (root / f"{s}.list").is_file() and data_prep.read_list(root, s)]
        choice = f"choose --split {' or '.join(others)}" if others else "choose another --data"
        raise DataError(f"{root / split}.list: empty; prepare the {split} patients with data_prep.py, or {choice}")
    absent = [p for p in (data_prep.volume_paths(root, n)[0] for n in names) if not p.is_file()]
    if absent:
        raise DataError(f"{root}: {len(absent)} of the {len(names)} volumes of {source}.list are absent, first "
                        f"{absent[0].relative_to(root)}; prepare the data again")
    return names


def _case_rows(v, result, scores):
    """The rows of metrics.csv of one volume; without annotation `scores` is empty."""
    patient, frame = v.name.split("_frame")
    phase = dict(zip(("01", "02"), PHASES, strict=True)).get(frame, frame)
    ml = [np.full(len(CLASSES), np.nan) if a is None else volumes_ml(a, v.spacing) for a in (result.labels, v.label)]
    return [{"case": v.name, "patient": patient, "phase": phase, "group": v.group, "class": c,
             **{m: scores[m][i] if scores else np.nan for m in METRICS},
             "one_empty": int(scores["one_empty"][i]) if scores else None,
             "volume_ml": ml[0][i], "annotation_ml": ml[1][i],
             "entropy": mean(result.entropy[result.labels == i + 1]), "disagreement": result.disagreement[i]}
            for i, c in enumerate(CLASSES)]


def _case_means(rows, *keys):
    """Per key the volumes' means over the classes that have a value."""
    volumes = [rows[i:i + len(CLASSES)] for i in range(0, len(rows), len(CLASSES))]
    return [[mean([r[key] for r in volume if np.isfinite(r[key])]) for volume in volumes] for key in keys]


def _clinical_rows(rows):
    """The rows of metrics.csv -> one per patient and index, for patients whose ED and ES have a spacing."""
    ml = {(r["patient"], r["phase"], r["class"]): r for r in rows if np.isfinite(r["volume_ml"])}
    table = []
    for patient in dict.fromkeys(p for p, _, _ in ml):
        if not all((patient, phase, CLASSES[0]) in ml for phase in PHASES):
            continue
        prediction, annotation = (
            clinical_indices(*([ml[patient, phase, c][key] for c in CLASSES] for phase in PHASES))
            for key in ("volume_ml", "annotation_ml"))
        group = ml[patient, PHASES[0], CLASSES[0]]["group"]
        table += [dict(patient=patient, group=group, index=k, unit=INDICES[k], prediction=prediction[k],
                       annotation=annotation[k]) for k in INDICES]
    return table


def _draw_cases(folder, root, split, rows, preds):
    """Overlays of the best, median and worst patient -> {"best": "patient028", ...}. Where none is scored the first
    of the split is drawn in the best one's place."""
    patients = {r["patient"]: [x for x in rows if x["patient"] == r["patient"]] for r in rows}
    dices = {p: [r["dice"] for r in of if np.isfinite(r["dice"])] for p, of in patients.items()}
    scores = {p: mean(s) for p, s in dices.items() if s}
    order = sorted(scores, key=scores.get, reverse=True) or list(patients)[:1]
    drawn = {}
    for kind, i in zip(PICTURES, (0, len(order) - 1, (len(order) - 1) // 2), strict=True):
        if (patient := order[i]) in drawn.values():
            continue
        drawn[kind] = patient
        volumes = [(r["phase"], data_prep.read_volume(root, r["case"]), preds[r["case"]])
                   for r in patients[patient][::len(CLASSES)]]
        group = f" ({volumes[0][1].group})" if volumes[0][1].group else ""
        score = f", {kind} of {len(order)} in {split}: mean Dice {scores[patient]:.3f}" if scores else ", no annotation"
        draw_overlay(folder / f"overlay_{kind}.png", patient + group + score, volumes)
    return drawn


# ----------------------------------------------------------------------------------------------------------- output

@contextmanager
def staging(out, names):
    """A temporary folder whose files `names` move into `out` on success; after an error `out` is as it was."""
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    with tempfile.TemporaryDirectory(dir=parent, prefix=".evaluate-") as temporary:
        yield Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        for name in names:                                       # the last one last: where it stands, the rest does
            fresh = Path(temporary) / name
            if not fresh.exists():
                (out / name).unlink(missing_ok=True)             # of an earlier evaluation
                continue
            with open(fresh, "r+b") as f:
                os.fsync(f.fileno())
            os.replace(fresh, out / name)


def plain(x):
    """Numpy numbers to Python's, NaN to None: strict JSON."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (float, np.floating)):
        return float(x) if np.isfinite(x) else None
    return x


def write_csv(path, rows):
    """A float with six digits, NaN and None as an empty cell."""
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as f:             # a file's odd name
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        for row in rows:
            row = {k: plain(v) for k, v in row.items()}
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def index_name(index):
    return index.upper().replace("_", " ").replace("MYO MASS", "mass")


def tables(s):
    """The summary's tables as text: [[header, row, ...], ...], without what cannot be told."""
    found = []
    if s["scored"]:
        shown = [m for m in METRICS if s["metrics"][m]["mean"]["n"]]
        found.append([["", *(METRICS[m] for m in shown)]])
        for c in (*CLASSES, "mean"):
            cells = [(2 if "_" in m else 4, s["metrics"][m][c]) for m in shown]       # voxels and mm want two digits
            found[-1].append([c, *(format_number(d, x["mean"], x["sd"]) for d, x in cells)])
    if s["clinical"] and s["scored"]:
        found.append([["clinical", "unit", "bias ± SD", "r", "n"]])
        for k, x in s["clinical"].items():
            bias = format_number(1, x["bias"], x["sd"])
            found[-1].append([index_name(k), x["unit"], bias, format_number(3, x["r"]), str(x["n"])])
    return found


def sentences(s):
    """What else the summary says: (before, after the tables), lists of lines."""
    depth, base = s["architecture"]["depth"], s["architecture"]["base"]
    extras = [text for text, on in (("heart found and resampled", s["find_heart"]),
                                    ("largest component per class", s["largest_component"])) if on]
    before = [f"{s['checkpoint']}: {s['network']} of step {s['step']}, U-Net[{depth}, {base}], "
              f"{s['parameters'] / 1e6:.2f} M parameters, {s['macs_per_slice'] / 1e9:.2f} G MACs per slice, "
              f"{s['checkpoint_bytes'] / 1e6:.1f} MB on disk, {s['ms_per_slice']:.1f} ms per slice ({s['device']})",
              f"{s['data']}, {s['split']}: {s['scored']} volumes scored, " + ", ".join(
                  ["native grid", *extras, "mean ± standard deviation"])]
    after = []
    if s["scored"]:
        empty = ", ".join(f"{c} {n}" for c, n in s["one_empty"].items())
        after.append(f"one empty, the other not (Dice 0, distances = the volume's diagonal): {empty}")
        for k, x in s["uncertainty"].items():
            if x["n"] > 2:
                after.append(f"{k} against Dice, {x['n']} volumes: r {format_number(3, x['r'])}")
    if s["with_spacing"] < s["volumes"]:
        after.append(f"{s['volumes'] - s['with_spacing']} volumes carry no spacing (the community's copy has none): "
                     "their distances are in voxels only, and clinical indices leave them out; data_prep.py writes the "
                     "spacing")
    elif not s["clinical"]:
        after.append("no clinical indices: they want ED and ES of a patient in one split")
    return before, after


def print_table(s):
    """The summary for people."""
    before, after = sentences(s)
    print(*before, sep="\n")
    for table in tables(s):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for first, *cells in table:
            print(first.ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths[1:], strict=True)))
    print(*after, sep="\n", end="\n" if after else "")
    print(f"{s['out']}: metrics.csv, {'clinical.csv, ' if s['clinical'] else ''}summary.json, report.html, "
          + ", ".join(f"overlay_{k}.png ({p})" for k, p in s["overlays"].items()))


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1b2733}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;text-align:right;
border-bottom:1px solid #d5dde5;font-variant-numeric:tabular-nums}td:first-child{text-align:left}
img{max-width:100%;margin:.5rem 0}
pre{background:#f3f6f9;padding:1rem;overflow:auto;font-size:12px}h2{margin-top:2rem}"""


def write_report(folder, summary, config):
    """report.html of the summary and the pictures in `folder`: one file that needs no other."""
    def table(rows):
        lines = ["".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row)
                 for row, tag in zip(rows, ["th"] + ["td"] * len(rows), strict=False)]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"

    def picture(name, caption):
        data = base64.b64encode((folder / name).read_bytes()).decode()
        return f'<h2>{html.escape(caption)}</h2><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
    before, after = ([f"<p>{html.escape(line)}</p>" for line in part] for part in sentences(summary))
    pictures = [("clinical.png", "Clinical indices: correlation and Bland-Altman")]
    pictures += [(f"overlay_{k}.png", f"{k}: {p}" if summary["scored"] else p)
                 for k, p in sorted(summary["overlays"].items())]                    # best, median, worst
    shown = ("checkpoint", "network", "step", "architecture", "inference", "find_heart", "largest_component", "data",
             "split", "device")
    settings = json.dumps({"evaluation": {k: summary[k] for k in shown}, "training": config}, indent=1, default=str)
    title = html.escape(f"{summary['split']} of {summary['data']}")
    (folder / "report.html").write_text("\n".join([
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>',
        f"<h1>{title}</h1>", *before, *map(table, tables(summary)), *after,
        *(picture(*p) for p in pictures if (folder / p[0]).exists()),
        f"<h2>Configuration</h2><pre>{html.escape(settings)}</pre></html>\n"]), encoding="utf-8",
        errors="backslashreplace")


def format_number(digits, *values):
    """Mean and deviation, or one value; "-" for what is undefined."""
    return " ± ".join("-" if plain(x) is None else f"{x:.{digits}f}" for x in values)


# ------------------------------------------------------------------------------------------------------------- main

def add_network_options(parser, on):
    """--which, --gpu, --cpu, and --find-heart and --largest-component, which are `on` by default or not."""
    default = "[on]" if on else "[off; predict.py: on]"
    group = parser.add_argument_group("network")
    group.add_argument("--which", choices=("student", "coteacher"), help="[the better one on val]")
    group.add_argument("--find-heart", action=argparse.BooleanOptionalAction, default=on,
                       help=f"any spacing, a heart off the centre {default}")
    group.add_argument("--largest-component", action=argparse.BooleanOptionalAction, default=on,
                       help=f"of each class, nothing else {default}")
    device = parser.add_argument_group("device").add_mutually_exclusive_group()
    device.add_argument("--gpu", type=int, metavar="N", help="CUDA device [the first, if any]")
    device.add_argument("--cpu", action="store_true", help="run on the CPU")


@contextmanager
def names_target(target, option="--out"):
    """An OSError within becomes the DataError that names what could not be written, and the remedy."""
    try:
        yield
    except OSError as e:
        raise DataError(f"{target}: {e.strerror or e}; choose another {option} or free some space") from None


def parse(argv):
    parser = data_prep.Parser(prog="evaluate.py", description=__doc__.splitlines()[0],
                              usage="%(prog)s CHECKPOINT [options]")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt of a run")
    moved = ("--predict", "--onnx", "--time", "--entropy")
    parser.add_argument(*moved, dest="moved", nargs="*", help=argparse.SUPPRESS)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--data", type=Path, help="prepared folder [the one trained on if it is there, or data/ACDC]")
    group.add_argument("--split", choices=(*SPLITS, "unlabeled"), default="test",
                       help="[test]; unlabeled: the train patients whose labels the run did not get")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder for the results [CHECKPOINT's folder/SPLIT]")
    add_network_options(parser, on=False)
    args = parser.parse_args(argv)
    if args.moved is not None:
        parser.error("predict.py does this: python predict.py CKPT PATH...")
    return args


def work(args):
    """What the command line asks for."""
    out = args.out or args.checkpoint.parent / args.split
    with names_target(out):
        device = pick_device(args.gpu, args.cpu)
        torch.backends.cudnn.allow_tf32 = False                                        # a GPU's scores as a CPU's
        summary = evaluate_checkpoint(args.checkpoint, out, args.data, args.split, args.which, device, args.find_heart,
                                      args.largest_component)
    print_table(summary)
    unscored = summary["volumes"] - summary["scored"]
    if unscored:
        print(f"evaluate.py: {unscored} of {summary['volumes']} volumes have no annotation: predicted, not scored",
              file=sys.stderr)


def main(argv=None):
    """The command line -> exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    args = parse(argv)
    return data_prep.exit_code("evaluate.py", lambda: work(args), (CheckpointError, DeviceError), "nothing was written",
                               "--cpu may have more")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                         # so that temporary folders go
    sys.exit(main())
