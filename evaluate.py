"""Score a checkpoint on a prepared split: the one place with metrics.

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

OUT, by default <checkpoint's folder>/<split>, receives
    metrics.csv     one row per volume and class: pandas.read_csv(f).groupby("class").mean(numeric_only=True)
    clinical.csv    one row per patient and index; absent where the data hold no spacing
    overlay_*.png   the best, median and worst patient by mean Dice: end-diastole and end-systole, three levels
    summary.json    everything that is printed
A volume without annotation is predicted (its ml are in metrics.csv) and not scored; a line says how many there are.
"""
import argparse
import csv
import json
import math
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

import data_prep
from data_prep import CLASSES, PHASES, DataError
from models import CheckpointError, count_macs, count_parameters, load_model, segment_volume

SPLITS = ("val", "test", "official")
METRICS = {"dice": "Dice", "jaccard": "Jaccard", "hd95_voxel": "HD95 voxels", "asd_voxel": "ASD voxels",
           "hd95_mm": "HD95 mm", "asd_mm": "ASD mm"}
INDICES = {"lv_edv": "ml", "lv_esv": "ml", "lv_ef": "%", "rv_edv": "ml", "rv_esv": "ml", "rv_ef": "%", "myo_mass": "g"}
DENSITY = 1.05                                                     # of myocardium, g/ml
COLORS = {"RV": "#35c9ff", "MYO": "#ffd23f", "LV": "#ff4d6d"}
PICTURES = ("best", "worst", "median")                             # in the order of their claim on a patient
RESULTS = ("metrics.csv", "clinical.csv", *(f"overlay_{k}.png" for k in PICTURES), "summary.json")


class UsageError(Exception):
    """An option that the user can mend: one line."""


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
    overlap = dice(pred, label)
    scores = {m: np.full(len(CLASSES), np.nan) for m in METRICS}
    scores.update(dice=overlap, jaccard=overlap / (2 - overlap), one_empty=np.zeros(len(CLASSES), bool))
    for i in range(len(CLASSES)):
        p, y = pred == i + 1, label == i + 1
        scores["one_empty"][i] = p.any() != y.any()
        scores["hd95_voxel"][i], scores["asd_voxel"][i] = surface_metrics(p, y)
        if spacing is not None:
            scores["hd95_mm"][i], scores["asd_mm"][i] = surface_metrics(p, y, spacing)
    return scores


def volumes_ml(labels, spacing):
    """Label map, spacing in mm or None -> ml of RV, MYO, LV, (3,) float64; NaN without spacing."""
    counts = np.array([np.count_nonzero(labels == k) for k in range(1, len(CLASSES) + 1)])
    return counts * (math.prod(spacing) / 1000 if spacing is not None else np.nan)


def clinical_indices(ed, es):
    """ml of RV, MYO, LV at end-diastole and end-systole -> {index: value} in the units of INDICES; an EF of an empty
    ventricle is NaN."""
    values = {"myo_mass": DENSITY * ed[1]}
    for side, i in (("lv", 2), ("rv", 0)):
        values |= {f"{side}_edv": ed[i], f"{side}_esv": es[i],
                   f"{side}_ef": 100 * (ed[i] - es[i]) / ed[i] if ed[i] else np.nan}
    return {k: float(values[k]) for k in INDICES}


def agreement(prediction, annotation):
    """Pairs of values, those with a NaN left out -> n, bias (mean of prediction - annotation), its SD, Pearson's r."""
    x, y = np.array([prediction, annotation], float).reshape(2, -1)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    related = len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    return dict(n=len(x), bias=_mean(x - y), sd=_sd(x - y), r=float(np.corrcoef(x, y)[0, 1]) if related else np.nan)


def aggregate(cases):
    """case_metrics of each volume -> {metric: {RV | MYO | LV | mean: {n, mean, sd}}}; n counts volumes."""
    table = {}
    for metric in METRICS:
        values = np.array([c[metric] for c in cases]).reshape(-1, len(CLASSES))                    # (volumes, 3)
        values = values[np.isfinite(values).all(1)]
        columns = zip((*CLASSES, "mean"), (*values.T, values.mean(1)), strict=True)
        table[metric] = {c: dict(n=len(v), mean=_mean(v), sd=_sd(v)) for c, v in columns}
    return table


def _mean(x):
    return float(np.mean(x)) if len(x) else np.nan


def _sd(x):
    return float(np.std(x, ddof=1)) if len(x) > 1 else np.nan


# --------------------------------------------------------------------------------------------------------- overlays

def three_slices(mask):
    """(Z, Y, X) bool -> a basal, a middle and an apical slice of it; the base is where the heart is wider."""
    area = mask.sum((1, 2))
    z = np.flatnonzero(area) if area.any() else np.arange(len(area))
    half = (len(z) + 1) // 2
    z = z if area[z[:half]].sum() >= area[z[-half:]].sum() else z[::-1]
    return [int(z[round(f * (len(z) - 1))]) for f in (0.15, 0.5, 0.85)]


def draw_overlay(path, title, frames):
    """frames: [(phase, Volume, pred (Z, Y, X)), ...] -> a PNG: a row per level, a column per frame, of image,
    annotation (where there is one) and prediction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from PIL import Image
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
        for row, z, level in zip(axes, three_slices(truth > 0), ("basal", "mid", "apical"), strict=True):
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
                if row is axes[0]:
                    ax.set_title(panel, color="0.8", fontsize=10)
            row[0].set_ylabel(f"{level}, slice {z + 1}", color="0.8", fontsize=10)
    handles = [Patch(facecolor="none", edgecolor=COLORS[c], linewidth=2, label=c) for c in CLASSES]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, labelcolor="white", fontsize=12)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]                                             # (H, W, 3) uint8
    Image.fromarray(pixels).quantize(256).save(path, optimize=True)                       # a third of the bytes of RGB


# ------------------------------------------------------------------------------------------------------- evaluation

def evaluate_checkpoint(path, out, data=None, split="test", which=None, device="cpu"):
    """Predict and score a split, write the files that the head of this file names into `out`, return the summary.

    `which`: "student" or "coteacher", by default the better on val. Raises CheckpointError, DataError or OSError, and
    then `out` is as it was.
    """
    net, checkpoint = load_model(path, device, which)
    arch, inference = net.architecture, checkpoint["inference"]
    if (arch["in_channels"], arch["num_classes"]) != (1, len(CLASSES) + 1):
        raise CheckpointError(f"{path}: maps {arch['in_channels']} channels to {arch['num_classes']} classes, but ACDC "
                              f"has 1 and {len(CLASSES) + 1} with background; train on this data")
    config = checkpoint.get("config")
    trained_on = str(config.get("data") or "") if isinstance(config, dict) else ""
    root = Path(data or (trained_on if trained_on and Path(trained_on).is_dir() else "data/ACDC"))
    names = _names(root, split)
    with _staging(Path(out)) as folder:
        rows, cases, preds, seconds = [], [], {}, []
        for name in tqdm(names, desc=f"{split} of {root}", unit="volume", disable=None, leave=False):
            v = data_prep.read_volume(root, name)
            began = time.perf_counter()
            preds[name] = pred = segment_volume(net, v.image, **inference)
            seconds.append((time.perf_counter() - began, len(pred)))
            scores = {} if v.label is None else case_metrics(pred, v.label, v.spacing)
            cases += [scores] if scores else []
            rows += _case_rows(v, pred, scores)
        clinical = _clinical_rows(rows)
        columns = {k: [[r[c] for r in clinical if r["index"] == k] for c in ("prediction", "annotation")]
                   for k in INDICES}
        overlays = _draw_cases(folder, root, split, rows, preds)
        timed = seconds[1:] or seconds                                                    # the first one warms up
        summary = dict(
            checkpoint=str(path), network=which or checkpoint["better"], step=checkpoint.get("step"),
            architecture=arch, inference=inference, parameters=count_parameters(net),
            macs_per_slice=count_macs(net, inference["size"]), checkpoint_bytes=Path(path).stat().st_size,
            ms_per_slice=1000 * sum(s for s, _ in timed) / sum(n for _, n in timed), device=_describe(device),
            data=str(root), split=split, volumes=len(names), scored=len(cases),
            with_spacing=sum(bool(np.isfinite(r["volume_ml"])) for r in rows) // len(CLASSES),
            one_empty={c: int(sum(s["one_empty"][i] for s in cases)) for i, c in enumerate(CLASSES)},
            metrics=aggregate(cases), overlays=overlays,
            clinical={k: {"unit": INDICES[k], **agreement(*columns[k])} for k in INDICES} if clinical else None)
        summary = _plain(summary)
        _write_csv(folder / "metrics.csv", rows)
        if clinical:
            _write_csv(folder / "clinical.csv", clinical)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return {**summary, "out": str(out)}


def _names(root, split):
    """The volumes of a split, all of them there; otherwise DataError."""
    names = data_prep.read_list(root, split)
    if not names:
        others = [s for s in SPLITS if (root / f"{s}.list").is_file() and data_prep.read_list(root, s)]
        choice = f"choose --split {' or '.join(others)}" if others else "choose another --data"
        raise DataError(f"{root / split}.list: empty; prepare the {split} patients with data_prep.py, or {choice}")
    absent = [p for p in (data_prep.h5_path(root, n) for n in names) if not p.is_file()]
    if absent:
        raise DataError(f"{root}: {len(absent)} of the {len(names)} volumes of {split}.list are absent, first "
                        f"{absent[0].relative_to(root)}; prepare the data again")
    return names


def _case_rows(v, pred, scores):
    """The rows of metrics.csv of one volume; without annotation `scores` is empty."""
    patient, frame = v.name.split("_frame")
    phase = dict(zip(("01", "02"), PHASES, strict=True)).get(frame, frame)
    ml = [np.full(len(CLASSES), np.nan) if a is None else volumes_ml(a, v.spacing) for a in (pred, v.label)]
    return [{"case": v.name, "patient": patient, "phase": phase, "group": v.group, "class": c,
             **{m: scores[m][i] if scores else np.nan for m in METRICS},
             "one_empty": int(scores["one_empty"][i]) if scores else None,
             "volume_ml": ml[0][i], "annotation_ml": ml[1][i]} for i, c in enumerate(CLASSES)]


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
    frames, scores = {}, {}
    for r in rows[::len(CLASSES)]:
        frames.setdefault(r["patient"], []).append((r["phase"], r["case"]))
    for r in rows:
        scores.setdefault(r["patient"], []).append(r["dice"])
    scores = {p: float(np.mean(s)) for p, s in scores.items() if np.isfinite(s).all()}
    order = sorted(scores, key=scores.get, reverse=True) or list(frames)[:1]
    drawn = {}
    for kind, i in zip(PICTURES, (0, len(order) - 1, (len(order) - 1) // 2), strict=True):
        if (patient := order[i]) in drawn.values():
            continue
        drawn[kind] = patient
        volumes = [(phase, data_prep.read_volume(root, name), preds[name]) for phase, name in frames[patient]]
        group = f" ({volumes[0][1].group})" if volumes[0][1].group else ""
        score = f", {kind} of {len(order)} in {split}: mean Dice {scores[patient]:.3f}" if scores else ", no annotation"
        draw_overlay(folder / f"overlay_{kind}.png", patient + group + score, volumes)
    return drawn


# ----------------------------------------------------------------------------------------------------------- output

@contextmanager
def _staging(out):
    """A temporary folder whose files move into `out` on success; after an error `out` is as it was."""
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    with tempfile.TemporaryDirectory(dir=parent, prefix=".evaluate-") as temporary:
        yield Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:                                     # summary.json last: where it stands, the rest does
            fresh = Path(temporary) / name
            if not fresh.exists():
                (out / name).unlink(missing_ok=True)             # of an earlier evaluation
                continue
            with open(fresh, "r+b") as f:
                os.fsync(f.fileno())
            os.replace(fresh, out / name)


def _plain(x):
    """Numpy numbers to Python's, NaN to None: strict JSON."""
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, (float, np.floating)):
        return float(x) if np.isfinite(x) else None
    return x


def _write_csv(path, rows):
    """A float with six digits, NaN and None as an empty cell."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        for row in rows:
            row = {k: _plain(v) for k, v in row.items()}
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def _describe(device):
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def print_table(s):
    """The summary for people."""
    depth, base = s["architecture"]["depth"], s["architecture"]["base"]
    print(f"{s['checkpoint']}: {s['network']} of step {s['step']}, U-Net[{depth}, {base}], "
          f"{s['parameters'] / 1e6:.2f} M parameters, {s['macs_per_slice'] / 1e9:.2f} G MACs per slice, "
          f"{s['checkpoint_bytes'] / 1e6:.1f} MB on disk, {s['ms_per_slice']:.1f} ms per slice ({s['device']})")
    print(f"{s['data']}, {s['split']}: {s['scored']} volumes scored, native grid, mean ± standard deviation")
    if s["scored"]:
        shown = [m for m in METRICS if s["metrics"][m]["mean"]["n"]]
        print(" " * 5 + "".join(f"{METRICS[m]:>18}" for m in shown))
        for c in (*CLASSES, "mean"):
            cells = [(2 if "_" in m else 4, s["metrics"][m][c]) for m in shown]       # voxels and mm want two digits
            print(f"{c:5}" + "".join(f"{_number(d, x['mean'], x['sd']):>18}" for d, x in cells))
        empty = ", ".join(f"{c} {n}" for c, n in s["one_empty"].items())
        print(f"one empty, the other not (Dice 0, distances = the volume's diagonal): {empty}")
    if s["clinical"] and s["scored"]:
        print(f"{'clinical':12}{'bias ± SD':>18}{'r':>8}{'n':>5}")
        for k, x in s["clinical"].items():
            name, bias = k.replace("_", " ").upper(), _number(1, x["bias"], x["sd"])
            print(f"{name:9}{x['unit']:3}{bias:>18}{_number(3, x['r']):>8}{x['n']:5}")
    if s["with_spacing"] < s["volumes"]:
        print(f"{s['volumes'] - s['with_spacing']} volumes carry no spacing (the community's copy has none): their "
              "distances are in voxels only, and clinical indices leave them out; data_prep.py writes the spacing")
    elif not s["clinical"]:
        print("no clinical indices: they want ED and ES of a patient in one split")
    print(f"{s['out']}: metrics.csv, {'clinical.csv, ' if s['clinical'] else ''}summary.json, "
          + ", ".join(f"overlay_{k}.png ({p})" for k, p in s["overlays"].items()))


def _number(digits, *values):
    """Mean and deviation, or one value; "-" for what is undefined."""
    return " ± ".join("-" if x is None else f"{x:.{digits}f}" for x in values)


# ------------------------------------------------------------------------------------------------------------- main

def _pick_device(gpu, cpu):
    count = torch.cuda.device_count()
    if gpu is not None and not 0 <= gpu < count:
        have = f"devices 0 to {count - 1}" if count else "no CUDA device; leave --gpu out to run on the CPU"
        raise UsageError(f"--gpu {gpu}: this machine has {have}")
    return torch.device("cpu") if cpu or not count else torch.device("cuda", gpu or 0)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="best.pt of a run")
    parser.add_argument("--data", type=Path, help="prepared folder [the one trained on if it is there, or data/ACDC]")
    parser.add_argument("--split", choices=SPLITS, default="test", help="[%(default)s]")
    parser.add_argument("--out", type=Path, help="folder for the results [CHECKPOINT's folder/SPLIT]")
    parser.add_argument("--which", choices=("student", "coteacher"), help="network [the better one on val]")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--gpu", type=int, metavar="N", help="CUDA device [the first, if any]")
    device.add_argument("--cpu", action="store_true", help="run on the CPU")
    args = parser.parse_args(argv)
    out = args.out or args.checkpoint.parent / args.split
    try:
        summary = evaluate_checkpoint(args.checkpoint, out, args.data, args.split, args.which,
                                      _pick_device(args.gpu, args.cpu))
    except (CheckpointError, DataError, UsageError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evaluate.py: {out}: {error.strerror or error}; choose another --out or free some space",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    print_table(summary)
    unscored = summary["volumes"] - summary["scored"]
    if unscored:
        print(f"evaluate.py: {unscored} of {summary['volumes']} volumes have no annotation: predicted, not scored",
              file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
