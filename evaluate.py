"""Score a checkpoint on a prepared split: the one place with metrics. (predict.py segments NIfTI files.)

    python evaluate.py runs/act-7-seed0/best.pt                                  # the test split of the run's data
    python evaluate.py runs/act-7-seed0/best.pt --data data/ACDC --split val --which student --out scores

Per volume on its native grid, for RV, MYO and LV (p predicted, y annotated, S their surfaces, d Euclidean):
    Dice = 2 |p & y| / (|p| + |y|)          Jaccard = |p & y| / |p | y|
    HD95 = 95th percentile of d(s, S_y) for s in S_p and d(s, S_p) for s in S_y, pooled
    ASD  = mean of d(s, S_y) for s in S_p: directed, prediction to annotation
as medpy.metric.binary's dc, jc, hd95 and asd, which this literature reports. Distances in voxels (neighbouring slices
are 1 apart) and, where the spacing is known, in mm. Both empty: Dice 1, distances 0. One empty: Dice 0, distances = the
volume's diagonal; such cases are counted. A class's figure is the mean over volumes, the last line the mean of the
three; deviations are over volumes, with n - 1. Beside the answers as they are, Dice and HD95 of their largest
components are told; with --largest-component, everything is of these.

Clinical indices per patient (Bernard et al., IEEE TMI 37(11), 2018): volumes at end-diastole (EDV) and end-systole
(ESV) in ml, ejection fraction EF = 100 (EDV - ESV) / EDV in %, mass of the myocardium at ED in g, at 1.05 g/ml.

Uncertainty, 0 sure to 1: entropy = -sum p log p / log C per voxel, and its mean over what is predicted as a class;
disagreement = 1 - Dice between the student's and the co-teacher's label maps, where a checkpoint holds both.

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
import io
import json
import math
import os
import shutil
import signal
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":     # before torch starts its threads: one that spins while it waits takes the core of those
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")       # that it waits for, where other work runs beside

import numpy as np
from scipy import ndimage
from tqdm import tqdm

import data_prep
import models
from data_prep import CLASSES, PHASES, DataError, fcntl
from models import CheckpointError, DeviceError, find_heart, largest_component, load_model, pick_device, segment_volume

SPLITS = ("val", "test", "official")
METRICS = {"dice": "Dice", "jaccard": "Jaccard", "hd95_voxel": "HD95 voxels", "asd_voxel": "ASD voxels",
           "hd95_mm": "HD95 mm", "asd_mm": "ASD mm"}
BRIEF = ("dice", "hd95_voxel")                                     # of largest components, and while training
INDICES = {"lv_edv": "ml", "lv_esv": "ml", "lv_ef": "%", "rv_edv": "ml", "rv_esv": "ml", "rv_ef": "%", "myo_mass": "g"}
DENSITY = 1.05                                                     # of myocardium, g/ml
COLORS = {"RV": "#35c9ff", "MYO": "#ffd23f", "LV": "#ff4d6d"}
PICTURES = ("best", "worst", "median")                             # in the order of their claim on a patient
RESULTS = ("metrics.csv", "clinical.csv", "clinical.png", *(f"overlay_{k}.png" for k in PICTURES), "report.html",
           "summary.json")
NOTICE = "For research, not for diagnosis."
HIDDEN = ".evaluate-"                                              # how the names of temporary folders begin


# ---------------------------------------------------------------------------------------------------------- metrics

def count(labels):
    """Label map -> voxels of RV, MYO, LV, (3,) int."""
    return np.bincount(labels.ravel(), minlength=len(CLASSES) + 1)[1:]


def dice(pred, label):
    """Two label maps of one shape -> Dice of RV, MYO, LV, (3,) float64; both empty 1, one empty 0."""
    total = count(pred) + count(label)
    return np.where(total, 2 * count(pred[pred == label]) / np.maximum(total, 1), 1.0)


def surface_metrics(p, y, spacing=(1.0, 1.0, 1.0)):
    """Two boolean masks (Z, Y, X) -> (HD95, ASD) in the unit of `spacing` (z, y, x); ASD from p to y.

    The surface of a mask: its voxels with one of six neighbours outside it, as in medpy.
    """
    if not (p.any() or y.any()):
        return 0.0, 0.0
    if not (p.any() and y.any()):
        diagonal = float(np.linalg.norm(np.multiply(p.shape, spacing)))
        return diagonal, diagonal
    # Nothing of either mask lies outside the box and erosion takes what is beyond an array for background, so the
    # crop needs no margin: the same surfaces, the same distances, a tenth of the time.
    box = ndimage.find_objects((p | y).astype(np.uint8))[0]
    p, y = (m[box] & ~ndimage.binary_erosion(m[box]) for m in (p, y))
    there = ndimage.distance_transform_edt(~y, sampling=spacing)[p]
    back = ndimage.distance_transform_edt(~p, sampling=spacing)[y]
    return float(np.percentile(np.concatenate((there, back)), 95)), float(there.mean())


def case_metrics(pred, label, spacing=None):
    """Two label maps (Z, Y, X), spacing (z, y, x) in mm or None -> {metric: (3,) float64 for RV, MYO, LV}.

    The keys of METRICS, those in mm NaN without spacing, and `one_empty`, (3,) bool: exactly one of the two is empty.
    """
    masks = [(pred == k, label == k) for k in range(1, len(CLASSES) + 1)]
    overlap = dice(pred, label)
    voxels = np.array([surface_metrics(p, y) for p, y in masks])                                # (3, 2): HD95, ASD
    mm = voxels * np.nan if spacing is None else np.array([surface_metrics(p, y, spacing) for p, y in masks])
    scores = dict(zip(METRICS, (overlap, overlap / (2 - overlap), *voxels.T, *mm.T), strict=True))
    return scores | {"one_empty": (count(pred) > 0) != (count(label) > 0)}


def volumes_ml(labels, spacing):
    """Label map, spacing in mm or None -> ml of RV, MYO, LV, (3,) float64; NaN without spacing."""
    return count(labels) * (math.prod(spacing) / 1000 if spacing is not None else np.nan)


def clinical_indices(ed, es):
    """ml of RV, MYO, LV at end-diastole and end-systole -> {index: value} in the units of INDICES; an EF of an empty
    ventricle is NaN."""
    indices = {}
    for name, i in (("lv", 2), ("rv", 0)):
        ef = 100 * (ed[i] - es[i]) / ed[i] if ed[i] else np.nan
        indices |= {f"{name}_edv": float(ed[i]), f"{name}_esv": float(es[i]), f"{name}_ef": float(ef)}
    return indices | {"myo_mass": float(DENSITY * ed[1])}


def agreement(prediction, annotation):
    """Pairs of values, those with a NaN left out -> n, bias (mean of prediction - annotation), its SD, Pearson's r."""
    pairs = np.array([prediction, annotation], float)
    x, y = pairs[:, np.isfinite(pairs).all(0)]
    related = len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    r = float(np.corrcoef(x, y)[0, 1]) if related else np.nan
    return dict(n=len(x), bias=mean(x - y), sd=deviation(x - y), r=r)


def aggregate(cases, metrics=tuple(METRICS)):
    """case_metrics of each volume -> {metric: {RV | MYO | LV | mean: {n, mean, sd}}}; n counts volumes."""
    table = {}
    for metric in metrics:
        values = np.array([c[metric] for c in cases]).reshape(-1, len(CLASSES))                    # (volumes, 3)
        values = values[np.isfinite(values).all(1)]
        columns = zip((*CLASSES, "mean"), (*values.T, values.mean(1)), strict=True)
        table[metric] = {c: dict(n=len(v), mean=mean(v), sd=deviation(v)) for c, v in columns}
    return table


def mean(x):
    return float(np.mean(x)) if len(x) else np.nan


def deviation(x):
    return float(np.std(x, ddof=1)) if len(x) > 1 else np.nan


# -------------------------------------------------------------------------------------------------------- inference

class Segmentation(NamedTuple):
    labels: np.ndarray                 # (Z, Y, X) uint8
    entropy: np.ndarray                # (Z, Y, X) float32, 0..1
    disagreement: np.ndarray | None    # (3,) float64 for RV, MYO, LV: 1 - Dice of the two networks; None with one
    seconds: float                     # of the first network


def segment(nets, image, inference, component=False):
    """Segment (Z, Y, X) with the first of `nets`; the second, if there is one, is asked whether it agrees.
    `inference`: options of segment_volume. `component`: the largest_component of each map; the entropy is of all."""
    began = time.perf_counter()
    labels, probs = segment_volume(nets[0], image, **inference, return_probs=True)
    seconds = time.perf_counter() - began
    entropy = -(probs * np.log(np.maximum(probs, 1e-12))).sum(1) / math.log(probs.shape[1])
    maps = [labels, *(segment_volume(n, image, **inference) for n in nets[1:])]
    if component:
        maps = [largest_component(m) for m in maps]
    return Segmentation(maps[0], entropy, 1 - dice(*maps) if len(maps) > 1 else None, seconds)


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


# ---------------------------------------------------------------------------------------------------- while training

def validate(net, volumes, inference):
    """[data_prep.Volume, ...] with labels -> {"dice": [RV, MYO, LV], "hd95_voxel": [RV, MYO, LV], "entropy": of what
    is predicted}: floats, case_metrics of segment_volume's answer on the native grid, mean over the volumes."""
    results = [segment([net], v.image, inference) for v in volumes]
    cases = [case_metrics(result.labels, v.label) for result, v in zip(results, volumes, strict=True)]
    scores = {metric: np.mean([c[metric] for c in cases], axis=0).tolist() for metric in BRIEF}
    entropies = [mean(r.entropy[r.labels > 0]) for r in results if r.labels.any()]
    return scores | {"entropy": mean(entropies) if entropies else 1.0}


def validation_table(rows):
    """[(network, "last" or "best", step, scores as of validate), ...] -> the lines that close a training run."""
    lines = [f"{'on val, Dice':23}     RV     MYO      LV    mean   HD95 in voxels, mean"]
    for network, when, step, scores in rows:
        cells = " ".join(f"{x:7.4f}" for x in (*scores["dice"], np.mean(scores["dice"])))
        lines.append(f"{network:9} {when:4} {step:7}  {cells}   {np.mean(scores['hd95_voxel']):.2f}")
    return "\n".join(lines)


def draw_curves(log, png):
    """log.csv of a run -> a PNG, whole or not at all: training losses and Dice on val against the step. Where the log
    tells stages, a line with its number stands where each but the first begins."""
    from matplotlib.figure import Figure
    with open(log, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    starts = {}
    for row in rows:
        starts.setdefault(row.get("stage"), int(row["step"]))
    panels = {"training losses": ("dice", "ce", "kd", "co", "teacher"),
              "mean Dice on val": ("val_teacher", "val_student", "val_coteacher")}
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, (title, columns) in zip(axes, panels.items(), strict=True):
        for column in columns:
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            points = [p for p in points if p[1] or column.startswith("val")]                # a loss of 0 is none
            if points:
                ax.plot(*zip(*points, strict=True), label=column, linewidth=1)
        if ax.lines:
            ax.legend()
        for stage, step in list(starts.items())[1:]:
            ax.axvline(step, color="0.6", linestyle="--", linewidth=1)
            ax.text(step, 0.99, f" {stage}", transform=ax.get_xaxis_transform(), va="top", color="0.35")
        ax.set(xlabel="step", title=title)
    axes[0].set_yscale("log")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    data_prep.write_atomic(Path(png), buffer.getvalue())


# --------------------------------------------------------------------------------------------------------- pictures

def three_slices(mask):
    """(Z, Y, X) bool -> its most basal, middle and most apical slice; the base is where the heart is wider."""
    area = mask.sum((1, 2))
    z = np.flatnonzero(area) if area.any() else np.arange(len(area))
    half = (len(z) + 1) // 2
    if area[z[:half]].sum() < area[z[-half:]].sum():
        z = z[::-1]
    return [int(z[round(f * (len(z) - 1))]) for f in (0, 0.5, 1)]


def draw_overlay(path, title, frames):
    """frames: [(phase, Volume, pred (Z, Y, X)), ...] -> a PNG: a row per level, a column per frame, of image,
    annotation (where there is one) and prediction."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    annotated = all(v.label is not None for _, v, _ in frames)
    panels = ["image", "annotation", "prediction"] if annotated else ["image", "prediction"]
    figure = Figure(figsize=(2.1 * len(frames) * len(panels), 7.4), facecolor="black", layout="constrained")
    figure.suptitle(title, color="white", fontsize=15)
    blocks = figure.subfigures(1, len(frames), wspace=0.02, squeeze=False)[0]
    for block, (phase, v, pred) in zip(blocks, frames, strict=True):
        heading = phase
        if v.label is not None:
            heading += ", Dice " + "  ".join(f"{c} {d:.3f}" for c, d in zip(CLASSES, dice(pred, v.label), strict=True))
        block.set_facecolor("black")
        block.suptitle(heading, color="white", fontsize=12)
        draw_levels(block, v, pred, panels)
    handles = [Patch(facecolor="none", edgecolor=COLORS[c], linewidth=2, label=c) for c in CLASSES]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, labelcolor="white",
                           fontsize=12, title=NOTICE, title_fontsize=8)
    legend.get_title().set_color("0.6")
    figure.savefig(path)


def draw_levels(block, v, pred, panels):
    """Base, middle and apex of one frame, cropped to the heart, into a subfigure."""
    truth = pred if v.label is None else v.label
    ys, xs = np.nonzero(truth.any(0)) if truth.any() else [(0, n) for n in truth.shape[1:]]
    y, x = (min(ys) + max(ys)) / 2, (min(xs) + max(xs)) / 2
    half = max(np.ptp(ys), np.ptp(xs)) / 2 + 10
    window = tuple(slice(max(0, int(c - half)), int(c + half) + 1) for c in (y, x))
    maps = {"image": None, "annotation": v.label, "prediction": pred}
    axes = block.subplots(3, len(panels), squeeze=False)
    heart = (truth > 0) | (pred > 0)                                          # errors lie at its ends
    for row, z, level in zip(axes, three_slices(heart), ("basal", "mid", "apical"), strict=True):
        low, high = np.percentile(v.image[z][window], (1, 99.5))
        for ax, panel in zip(row, panels, strict=True):
            ax.imshow(v.image[z], cmap="gray", vmin=low, vmax=high, interpolation="bicubic")
            if maps[panel] is not None:
                draw_contours(ax, maps[panel][z], window)
            ax.set(xlim=(x - half, x + half), ylim=(y + half, y - half), xticks=[], yticks=[])
            ax.set_facecolor("black")
        row[0].set_ylabel(f"{level}, slice {z + 1}", color="0.8", fontsize=10)
    for ax, panel in zip(axes[0], panels, strict=True):
        ax.set_title(panel, color="0.8", fontsize=10)


def draw_contours(ax, labels, window):
    """(Y, X) -> the outline of each class, and how many labelled pixels lie outside the window."""
    for k, name in enumerate(CLASSES, 1):
        mask = labels == k
        if mask.any() and not mask.all():
            ax.contour(mask, [0.5], colors=COLORS[name], linewidths=1.6)
    beyond = np.count_nonzero(labels) - np.count_nonzero(labels[window])
    if beyond:
        ax.text(0.03, 0.03, f"{beyond} pixels outside", color="white", transform=ax.transAxes)


def draw_slice(frames, labels, spacing, t, z, outline=True, whole=False):
    """(T, Z, Y, X) images and labels, spacing (z, y, x) -> the Figure of slice z of frame t, both from 0, around the
    heart or whole, with the outline of each class or without; grey levels are the same for all frames."""
    from matplotlib.figure import Figure
    heart = labels.any((0, 1))
    if whole or not heart.any():
        heart[:] = True
    y, x = ((places.min() - 15, places.max() + 16) for places in np.nonzero(heart))         # beyond the image, perhaps
    aspect = spacing[1] / spacing[2]
    figure = Figure(figsize=(6.4, 6.4 * aspect * np.ptp(y) / np.ptp(x)), facecolor="black")
    ax = figure.add_axes((0, 0, 1, 1), facecolor="black")
    low, high = np.percentile(frames[:, z, max(y[0], 0):y[1], max(x[0], 0):x[1]], (1, 99.5))
    ax.imshow(frames[t, z], "gray", vmin=low, vmax=high, interpolation="bicubic", aspect=aspect)
    if outline:
        draw_contours(ax, labels[t, z], ...)
    for i, (name, color) in enumerate(COLORS.items()):
        ax.text(0.02 + 0.1 * i, 0.02, name, color=color, transform=ax.transAxes, weight="bold")
    ax.set(xlim=x, ylim=y[::-1])
    return figure


def draw_agreement(path, rows):
    """Rows of clinical.csv -> a PNG, 4 columns wide. Per index the prediction against the annotation, and below it
    their difference against their mean with bias and bias +- 1.96 SD (Bland and Altman, Lancet 1986)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 13), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    axes = figure.subplots(4, 4)
    pairs = [*axes[:2].T, *axes[2:].T]                                          # (above, below): the LV, then the RV
    order = ("lv_edv", "lv_esv", "lv_ef", "myo_mass", "rv_edv", "rv_esv", "rv_ef")
    for (above, below), index in zip(pairs, order, strict=False):
        prediction, annotation = np.array([(r["prediction"], r["annotation"]) for r in rows if r["index"] == index]).T
        a, unit = agreement(prediction, annotation), INDICES[index]
        values = [v for v in (*prediction, *annotation) if np.isfinite(v)] or [0]
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 1
        limits = low - margin, high + margin
        above.plot(annotation, prediction, "o", color="#2a6fb0", alpha=0.7)
        above.axline((low, low), slope=1, color="0.5", linewidth=1)
        above.set(title=f"{index_name(index)}, r {format_number(3, a['r'])}", xlabel=f"annotation, {unit}",
                  aspect="equal", xlim=limits, ylim=limits)
        above.locator_params(nbins=5)
        above.grid(alpha=0.25)
        below.plot((prediction + annotation) / 2, prediction - annotation, "o", color="#2a6fb0", alpha=0.7)
        for level, style in ((a["bias"], "-"), (a["bias"] - 1.96 * a["sd"], "--"), (a["bias"] + 1.96 * a["sd"], "--")):
            below.axhline(level, color="#c23b4b", linestyle=style, linewidth=1)
        below.set(title=f"bias {format_number(1, a['bias'], a['sd'])} {unit}", xlabel=f"mean, {unit}")
        below.grid(alpha=0.25)
    for row, label in zip(axes, ("prediction", "prediction - annotation") * 2, strict=True):
        row[0].set_ylabel(label)
    pairs[-1][0].axis("off")                                                    # seven indices, eight places
    pairs[-1][1].axis("off")
    figure.supxlabel(NOTICE, fontsize=9, color="0.4")
    figure.savefig(path, dpi=100)


# ------------------------------------------------------------------------------------------------------- evaluation

def evaluate_checkpoint(path, out, data=None, split="test", which=None, device="cpu", find=False, component=False):
    """Predict and score a split, write the files that the head of this file names into `out`, return the summary.

    `which`: "student" or "coteacher", by default the better on val. `find`: look where find_heart says. `component`:
    keep the largest_component. Raises CheckpointError, DataError or OSError, and then `out` is as it was.
    """
    nets, checkpoint = load_networks(path, device, which)
    net, inference = nets[0], checkpoint["inference"]
    config = checkpoint.get("config") if isinstance(checkpoint.get("config"), dict) else {}
    trained_on = str(config.get("data") or "")
    root = Path(data or (trained_on if os.path.isdir(trained_on) else "data/ACDC"))
    names = find_volumes(root, split, config.get("labeled"))
    with staging(Path(out), RESULTS) as folder:
        bar = tqdm(names, desc=f"{split} of {root}", unit="volume", disable=None, leave=False)
        scored = [score_volume(nets, data_prep.read_volume(root, n), inference, find, component) for n in bar]
        clinical, overlays = clinical_rows(scored), draw_cases(folder, root, split, scored)
        timed = scored[1:] or scored                                                      # the first one warms up
        summary = plain(dict(
            checkpoint=str(path), network=which or checkpoint["better"], step=checkpoint.get("step"),
            architecture=net.architecture, inference=inference, find_heart=find, largest_component=component,
            parameters=models.count_parameters(net), macs_per_slice=models.count_macs(net, inference["size"]),
            checkpoint_bytes=Path(path).stat().st_size,
            ms_per_slice=1000 * sum(s.seconds for s in timed) / sum(len(s.pred) for s in timed),
            device=models.describe_device(device), data=str(root), split=split, volumes=len(names),
            **summarize(scored, clinical), overlays=overlays))
        write_csv(folder / "metrics.csv", [row for s in scored for row in s.rows])
        if clinical:
            write_csv(folder / "clinical.csv", clinical)
        if clinical and summary["scored"]:
            draw_agreement(folder / "clinical.png", clinical)
        write_report(folder, summary, scored, config)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return {**summary, "out": str(out)}


def find_volumes(root, split, labeled):
    """The volumes of a split, all of them there; otherwise DataError. unlabeled: train without its first patients."""
    source = "train" if split == "unlabeled" else split
    names = data_prep.read_list(root, source)
    if split == "unlabeled":
        slices = data_prep.read_list(root, "train_slices", data_prep.SLICE)
        known = data_prep.list_patients(slices)                                         # the first of them had labels
        known = known[:labeled] if type(labeled) is int else data_prep.list_patients(names)
        names = [n for n in names if n[:10] not in known]
        data_prep.require(names, "--split unlabeled", f"the checkpoint was trained with {labeled} labelled patients: "
                          f"none in {root}/train.list is known to be without", "choose another --split")
    if not names:
        others = [s for s in SPLITS if (root / f"{s}.list").is_file() and data_prep.read_list(root, s)]
        choice = f"choose --split {' or '.join(others)}" if others else "choose another --data"
        raise DataError(f"{root / split}.list: empty; prepare the {split} patients with data_prep.py, or {choice}")
    paths = [data_prep.volume_paths(root, n)[0] for n in names]
    absent = [p for p in paths if not os.path.isfile(p)]                 # Path.is_file raises where it may not look
    if absent:
        raise DataError(f"{root}: {len(absent)} of the {len(names)} volumes of {source}.list are absent, first "
                        f"{absent[0].relative_to(root)}; prepare the data again")
    return names


class Scored(NamedTuple):
    """A volume, segmented and, where it is annotated, scored."""
    rows: list                         # of metrics.csv: RV, MYO, LV of one case, patient, phase and group
    scores: dict | None                # case_metrics
    component: dict | None             # the same, in voxels, of the largest components; None with --largest-component
    pred: np.ndarray                   # (Z, Y, X) uint8
    seconds: float                     # of the first network and of finding the heart

    @property
    def dice(self):
        return mean([r["dice"] for r in self.rows])


def score_volume(nets, v, inference, find, component):
    """data_prep.Volume -> Scored."""
    began = time.perf_counter()
    focus = find_heart(nets[0], v.image, v.spacing, **inference) if find else {}
    found = time.perf_counter() - began
    result = segment(nets, v.image, inference | focus, component)
    scores, beside = None, None
    if v.label is not None:
        scores = case_metrics(result.labels, v.label, v.spacing)
    if scores and not component:
        kept = largest_component(result.labels)
        beside = scores if np.array_equal(kept, result.labels) else case_metrics(kept, v.label)
    return Scored(case_rows(v, result, scores), scores, beside, result.labels, found + result.seconds)


def case_rows(v, result, scores):
    """The rows of metrics.csv of one volume; without annotation `scores` is None."""
    patient, frame = v.name.split("_frame")
    phase = {"01": PHASES[0], "02": PHASES[1]}.get(frame, frame)
    predicted = volumes_ml(result.labels, v.spacing)
    annotated = volumes_ml(v.label, v.spacing) if scores else np.full(len(CLASSES), np.nan)
    rows = []
    for i, c in enumerate(CLASSES):
        row = {"case": v.name, "patient": patient, "phase": phase, "group": v.group, "class": c}
        row |= {m: scores[m][i] if scores else np.nan for m in METRICS}
        row["one_empty"] = int(scores["one_empty"][i]) if scores else None
        row |= {"volume_ml": predicted[i], "annotation_ml": annotated[i]}
        row["entropy"] = mean(result.entropy[result.labels == i + 1])
        if result.disagreement is not None:
            row["disagreement"] = result.disagreement[i]
        rows.append(row)
    return rows


def by_patient(scored):
    """-> {patient: {"ED": Scored, "ES": Scored}}."""
    patients = {}
    for s in scored:
        patients.setdefault(s.rows[0]["patient"], {})[s.rows[0]["phase"]] = s
    return patients


def clinical_rows(scored):
    """-> the rows of clinical.csv, one per patient and index, for patients whose ED and ES have a spacing."""
    table = []
    for patient, phases in by_patient(scored).items():
        pair = [phases[p].rows for p in PHASES if p in phases]
        if len(pair) < 2 or not all(np.isfinite(rows[0]["volume_ml"]) for rows in pair):
            continue
        prediction = clinical_indices(*([r["volume_ml"] for r in rows] for rows in pair))
        annotation = clinical_indices(*([r["annotation_ml"] for r in rows] for rows in pair))
        table += [dict(patient=patient, group=pair[0][0]["group"], index=k, unit=unit, prediction=prediction[k],
                       annotation=annotation[k]) for k, unit in INDICES.items()]
    return table


def summarize(scored, clinical):
    """[Scored, ...], rows of clinical.csv -> what summary.json says of them."""
    annotated = [s for s in scored if s.scores]
    beside = [s.component for s in annotated if s.component]
    uncertainty = {}
    for key in ("entropy", "disagreement"):
        if key in scored[0].rows[0]:
            values = [mean([r[key] for r in s.rows if np.isfinite(r[key])]) for s in scored]
            found = agreement(values, [s.dice for s in scored])
            uncertainty[key] = {"n": found["n"], "r": found["r"]}
    indices = {}
    for k, unit in INDICES.items():
        values = [[r[column] for r in clinical if r["index"] == k] for column in ("prediction", "annotation")]
        indices[k] = {"unit": unit, **agreement(*values)}
    return dict(
        scored=len(annotated), with_spacing=sum(math.isfinite(s.rows[0]["volume_ml"]) for s in scored),
        one_empty={c: int(sum(s.scores["one_empty"][i] for s in annotated)) for i, c in enumerate(CLASSES)},
        metrics=aggregate([s.scores for s in annotated]),
        largest_component_metrics=aggregate(beside, BRIEF) if beside else None,
        clinical=indices if clinical else None, uncertainty=uncertainty)


def draw_cases(folder, root, split, scored):
    """Overlays of the best, median and worst patient -> {"best": "patient028", ...}. Where none is scored the first
    of the split is drawn in the best one's place."""
    patients, drawn = by_patient(scored), {}
    scores = {p: mean([s.dice for s in phases.values() if s.scores]) for p, phases in patients.items()}
    order = sorted((p for p in patients if np.isfinite(scores[p])), key=scores.get, reverse=True) or list(patients)[:1]
    for kind, patient in zip(PICTURES, (order[0], order[-1], order[(len(order) - 1) // 2]), strict=True):
        if patient in drawn.values():
            continue
        drawn[kind] = patient
        frames = [(phase, data_prep.read_volume(root, s.rows[0]["case"]), s.pred)
                  for phase, s in patients[patient].items()]
        group = f" ({frames[0][1].group})" if frames[0][1].group else ""
        score = f", {kind} of {len(order)} in {split}: mean Dice {scores[patient]:.3f}"
        caption = score if np.isfinite(scores[patient]) else ", no annotation"
        draw_overlay(folder / f"overlay_{kind}.png", patient + group + caption, frames)
    return drawn


# ----------------------------------------------------------------------------------------------------------- output

@contextmanager
def staging(out, names):
    """A hidden folder whose files `names` move into `out` on success; after an error `out` is as it was. Removes those
    of killed processes: the file beside each is locked as long as its process lives."""
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    for place in {parent, out.absolute().parent}:
        for path in place.glob(f"{HIDDEN}*.lock"):
            with suppress(OSError, AttributeError), open(path, "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)                   # BlockingIOError: its process lives
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink()
    folder = parent / f"{HIDDEN}{uuid.uuid4().hex}"
    try:
        with open(f"{folder}.lock", "x") as lock:                # before the folder: a kill at any moment leaves this
            with suppress(OSError, AttributeError):              # a disk, or a system, without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            folder.mkdir(mode=0o700)
            yield folder
            out.mkdir(parents=True, exist_ok=True)
            for name in names:                                   # the last one last: where it stands, the rest does
                fresh = folder / name
                if not fresh.exists():
                    (out / name).unlink(missing_ok=True)         # of an earlier evaluation
                    continue
                with open(fresh, "r+b") as f:
                    os.fsync(f.fileno())
                os.replace(fresh, out / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            os.unlink(f"{folder}.lock")


@contextmanager
def names_target(target, option="--out"):
    """An OSError within becomes the DataError that names what could not be written, and the remedy."""
    try:
        yield
    except OSError as e:
        raise DataError(f"{target}: {e.strerror or e}; choose another {option} or free some space") from None


def plain(x):
    """Numpy numbers to Python's, NaN to None: strict JSON."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (float, np.floating)):
        return float(x) if np.isfinite(x) else None
    return x


def write_csv(path, rows):
    """A float with six significant digits, NaN and None as an empty cell."""
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as f:             # a file's odd name
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        for row in rows:
            row = plain(row)
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def format_number(digits, *values):
    """Mean and deviation, or one value; "-" for what is undefined."""
    return " ± ".join("-" if plain(x) is None else f"{x:.{digits}f}" for x in values)


def index_name(index):
    """lv_edv -> LV EDV, myo_mass -> mass."""
    return index.upper().replace("_", " ").replace("MYO MASS", "mass")


def metrics_table(title, metrics):
    """aggregate's table as text: [header, row, ...], without the metrics that no volume has."""
    shown = [m for m in metrics if metrics[m]["mean"]["n"]]
    table = [[title, *(METRICS[m] for m in shown)]]
    for c in (*CLASSES, "mean"):
        cells = [(2 if "_" in m else 4, metrics[m][c]) for m in shown]                # voxels and mm want two digits
        table.append([c, *(format_number(digits, x["mean"], x["sd"]) for digits, x in cells)])
    return table


def describe(s):
    """The summary for people: a list of lines (str) and of tables as text ([header, row, ...])."""
    depth, base = s["architecture"]["depth"], s["architecture"]["base"]
    options = {"heart found and resampled": s["find_heart"], "largest component per class": s["largest_component"]}
    terms = ["native grid", *(text for text, on in options.items() if on), "mean ± standard deviation"]
    parts = [f"{s['checkpoint']}: {s['network']} of step {s['step']}, U-Net[{depth}, {base}], "
             f"{s['parameters'] / 1e6:.2f} M parameters, {s['macs_per_slice'] / 1e9:.2f} G MACs per slice, "
             f"{s['checkpoint_bytes'] / 1e6:.1f} MB on disk, {s['ms_per_slice']:.1f} ms per slice ({s['device']})",
             f"{s['data']}, {s['split']}: {s['scored']} volumes scored, {', '.join(terms)}"]
    if s["scored"]:
        parts.append(metrics_table("", s["metrics"]))
        if s["largest_component_metrics"]:
            parts.append(metrics_table("largest component", s["largest_component_metrics"]))
        if s["clinical"]:
            table = [["clinical", "unit", "bias ± SD", "r", "n"]]
            for k, x in s["clinical"].items():
                bias, r = format_number(1, x["bias"], x["sd"]), format_number(3, x["r"])
                table.append([index_name(k), x["unit"], bias, r, str(x["n"])])
            parts.append(table)
        empty = ", ".join(f"{c} {n}" for c, n in s["one_empty"].items())
        parts.append(f"one empty, the other not (Dice 0, distances = the volume's diagonal): {empty}")
        parts += [f"{k} against Dice, {x['n']} volumes: r {format_number(3, x['r'])}"
                  for k, x in s["uncertainty"].items() if x["n"] > 2]
    if s["with_spacing"] < s["volumes"]:
        parts.append(f"{s['volumes'] - s['with_spacing']} volumes carry no spacing (the community's copy has none): "
                     "their distances are in voxels only, and clinical indices leave them out; data_prep.py writes the "
                     "spacing")
    elif not s["clinical"]:
        parts.append("no clinical indices: they want ED and ES of a patient in one split")
    return parts


def print_summary(s):
    for part in describe(s):
        if isinstance(part, str):
            print(part)
            continue
        widths = [max(map(len, column)) for column in zip(*part, strict=True)]
        for first, *cells in part:
            print(first.ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths[1:], strict=True)))
    overlays = ", ".join(f"overlay_{k}.png ({p})" for k, p in s["overlays"].items())
    clinical = "clinical.csv, " if s["clinical"] else ""
    print(f"{s['out']}: metrics.csv, {clinical}summary.json, report.html, {overlays}")


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1b2733;
overflow-wrap:anywhere}
h1{line-height:1.2}h2{margin-top:2rem}.notice{color:#5b6b7a}
.box,pre{overflow:auto}.box{margin:1rem 0;max-height:32rem}table{border-collapse:collapse;white-space:nowrap}
td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #d5dde5;font-variant-numeric:tabular-nums}
td:first-child,th:first-child{text-align:left}
img{max-width:100%;margin:.5rem 0}pre{background:#f3f6f9;padding:1rem;font-size:12px}"""


def to_html(part):
    """A line or a table as of `describe`."""
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    lines = []
    for i, row in enumerate(part):
        tag = "td" if i else "th"
        lines.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row))
    return f'<div class="box"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def write_report(folder, summary, scored, config):
    """report.html of the summary, every volume's Dice and the pictures in `folder`: one file that needs no other."""
    title = f"ACT-Net {summary['network'].replace('cot', 'co-t')} on {summary['split']}: "
    title += f"Dice {summary['metrics']['dice']['mean']['mean']:.3f}" if summary["scored"] else "no annotation"
    title = html.escape(title)
    body = [f'<h1>{title}</h1><p class="notice">{NOTICE}</p>', *map(to_html, describe(summary))]
    if summary["scored"]:
        patients = [["patient", "group", "phase", *CLASSES, "mean Dice"]]
        for s in sorted((s for s in scored if s.scores), key=lambda s: s.dice):
            dices = [format_number(3, x) for x in (*(r["dice"] for r in s.rows), s.dice)]
            patients.append([s.rows[0]["patient"], s.rows[0]["group"] or "-", s.rows[0]["phase"], *dices])
        body += ["<h2>Dice of every volume, the worst first</h2>", to_html(patients)]
    pictures = {"clinical.png": "Clinical indices: correlation and Bland-Altman"}
    for kind, patient in sorted(summary["overlays"].items()):                        # best, median, worst
        pictures[f"overlay_{kind}.png"] = html.escape(f"{kind}: {patient}" if summary["scored"] else patient)
    for name, caption in pictures.items():
        if (folder / name).exists():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            body.append(f'<h2>{caption}</h2><img alt="{caption}" src="data:image/png;base64,{data}">')
    shown = ("checkpoint", "network", "step", "architecture", "inference", "find_heart", "largest_component", "data",
             "split", "device")
    settings = {"evaluation": {k: summary[k] for k in shown}, "training": config}
    body.append(f"<h2>Configuration</h2><pre>{html.escape(json.dumps(settings, indent=1, default=str))}</pre>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    page = f'<!doctype html><html lang="en">{head}<style>{STYLE}</style>\n' + "\n".join(body) + "</html>\n"
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")


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


def parse(argv):
    parser = data_prep.Parser(prog="evaluate.py", description=__doc__.splitlines()[0],
                              usage="%(prog)s CHECKPOINT [options]")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt of a run")
    parser.add_argument("--predict", "--onnx", "--time", "--entropy", dest="moved", nargs="*", help=argparse.SUPPRESS)
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
        summary = evaluate_checkpoint(args.checkpoint, out, args.data, args.split, args.which, device, args.find_heart,
                                      args.largest_component)
    print_summary(summary)
    unscored = summary["volumes"] - summary["scored"]
    if unscored:
        print(f"evaluate.py: {unscored} of {summary['volumes']} volumes have no annotation: predicted, not scored",
              file=sys.stderr)


def main(argv=None):
    """The command line -> exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    args = parse(argv)
    return data_prep.exit_code("evaluate.py", lambda: work(args), (CheckpointError, DeviceError),
                               interrupted="nothing was written", memory="--cpu may have more")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                         # so that temporary folders go
    sys.exit(main())
