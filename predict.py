"""Segment the RV, myocardium and LV in NIfTI files with a trained checkpoint; export the network; time it.

    python predict.py results/student_acdc7.pt scan.nii.gz folder/ --out predictions
    python predict.py results/student_acdc7.pt --onnx student.onnx
    python predict.py results/student_acdc7.pt --time

Per input NAME.nii or NAME.nii.gz, 3D or 4D, DIR (`--out`, by default predictions) receives, whole or not at all
    NAME_seg.nii.gz    uint8: 0 background, 1 RV, 2 MYO, 3 LV; the source's header, shape and orientation
    NAME_overlay.png   NAME_volumes.csv (a row per frame)   NAME_entropy.nii.gz (--entropy)
    NAME_volumes.png   4D: ventricular volume over time; ED and ES are the frames with most and least LV
and predictions.csv, a row per input; later calls into DIR add to it. A folder gives every *.nii and *.nii.gz below it
but label maps by their names (LABELS, LABEL_FOLDERS) and what is hidden. scans.py judges axes and spacing, the network
the position (models.find_position). Volumes, indices and uncertainty are evaluate.py's.
"""
import csv
import hashlib
import importlib.util
import logging
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

if __name__ == "__main__":     # before torch starts its threads: one that spins while it waits takes the core of those
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")       # that it waits for, where other work runs beside

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

import data_prep
import evaluate
import models
from data_prep import CLASSES, PHASES, DataError, Volume
from evaluate import COLORS, INDICES, NOTICE, format_number, mean, staging, volumes_ml, write_csv
from models import CheckpointError, DeviceError, find_heart, find_position, pick_device, segment_volume, turn
from scans import likeness, read_scan

ML = [f"{c.lower()}_ml" for c in CLASSES]
RESULTS = ("overlay.png", "entropy.nii.gz", "volumes.csv", "volumes.png", "seg.nii.gz")            # after NAME_
COLUMNS = ("file", "name", "frames", "axes", "position", *ML, *PHASES, *INDICES,
           "entropy", "disagreement", "warning", "error")                                          # of predictions.csv
NIFTI = re.compile(r"(?<=.)\.nii(\.gz)?$", re.I)
LABELS = re.compile(r"(^|[^a-z])(gt|seg|segmentation|entropy|labels?|masks?|annotations?)([^a-z]|$)", re.I)
LABEL_FOLDERS = re.compile(r"(labels|masks|segmentations|annotations)(tr|ts|val)?", re.I)           # nnU-Net's labelsTr
LONGEST = 255 - len("_entropy.nii.gz")                              # bytes of a name that results can still be added to
BY_IMAGE = 4                         # frames of a cine, from which one can be told as odd by its image
BY_VOLUME = 16                       # and by its volumes
UNLIKE = 0.2                         # below the usual correlation of a slice with its median over time; sound ones 0.03
JUMP = 0.3                           # of the usual volume, off the running median of five frames
SHARE = 0.25                         # of the slices with a heart, on which each structure is; predicted from 0.30
RATIO = {"ED": (0.25, 5), "": (0.1, 8)}  # RV/LV; annotated from 0.31, at ES 0.15; predicted 0.32 to 3.2, 0.11 to 5.3
USUAL = 0.065                        # entropy on val where a checkpoint does not tell its own: an early student's
ENTROPY = 2.5                        # times the usual: 160 frames of ACDC up to 0.13, no heart 0.15 to 0.36
ENCLOSED = 0.78                      # of the LV's border faces myocardium; annotated from 0.98, predicted from 0.82 but
                                     # for the RV of patient086, taken for LV: 0.73


# ----------------------------------------------------------------------------------------------------------- inputs

def walk(folder):
    """The NIfTI files below a folder, those of linked folders too, nothing hidden. Raises DataError."""
    def refuse(error):
        raise DataError(f"{error.filename}: {error.strerror}; give yourself the right to read it, or move it away")
    files, seen = [], set()
    for place, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:                                               # a link, to a parent perhaps
            below.clear()
            continue
        seen.add(real)
        below[:] = [n for n in sorted(below) if n[0] != "."]
        files += [Path(place, n) for n in names if NIFTI.search(n) and n[0] != "."]
    return sorted(files)


def list_images(path):
    """A file -> [itself]; a folder -> the NIfTI files below it without label maps. Raises DataError."""
    if not os.path.exists(path):                                       # Path.exists raises where a name is too long
        raise DataError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    found, scans = walk(path), []
    for file in found:
        *folders, name = file.relative_to(path).parts
        if not (LABELS.search(NIFTI.sub("", name)) or any(map(LABEL_FOLDERS.fullmatch, folders))):
            scans.append(file)
    labels = len(found) - len(scans)
    if not scans:
        why = f" but label maps by their names, {labels}; rename the scans" if labels else "; dcm2niix converts DICOM"
        raise DataError(f"{path}: holds no .nii or .nii.gz to segment{why}")
    if labels:
        print(f"{path}: label maps left out, by their names: {labels}")
    return scans


def fitting(path):
    """A result's name, shortened where a file system would not take it with its suffix; a hash tells it from others."""
    raw = os.fsencode(path.name)
    if len(raw) <= LONGEST:
        return path
    return path.with_name(f"{raw[:LONGEST - 9].decode(errors='ignore')}~{hashlib.sha256(raw).hexdigest()[:8]}")


def find_images(paths):
    """Files, and folders of them, to {NIfTI file: name of its results, relative, without extension}, no name twice.

    Names are the files' own, or from the folder given on; where two would be the same, from the deepest folder that
    holds all; where even those are (scan.nii and scan.nii.gz), with the extension. Raises DataError.
    """
    sources, names = {}, {}                                            # of each file once, whatever ways lead to it
    for path in map(Path, paths):
        for file in list_images(path):
            key = Path(os.path.realpath(file))                         # Path.resolve raises at a link to itself
            if key not in sources:
                sources[key] = file
                names[key] = file.relative_to(path) if path.is_dir() else Path(file.name)
    try:
        common = os.path.commonpath([key.parent for key in sources])
        full = [key.relative_to(common) for key in sources]
    except ValueError:                                                 # two drives of Windows
        full = [Path(re.sub(r"\W", "", key.drive), *key.parts[1:]) for key in sources]
    short = [p.with_name(NIFTI.sub("", p.name)) for p in names.values()]
    long = [p.with_name(NIFTI.sub("", p.name)) for p in full]
    chosen = next((choice for choice in (short, long) if len(set(choice)) == len(choice)), full)
    return dict(zip(sources.values(), map(fitting, chosen), strict=True))


# --------------------------------------------------------------------------------------------------------- one file

def beside(labels):
    """(Z, Y, X) -> the labels of each pixel's four neighbours in its slice, four arrays of that shape."""
    wide = np.pad(labels, ((0, 0), (1, 1), (1, 1)), mode="edge")
    return wide[:, :-2, 1:-1], wide[:, 2:, 1:-1], wide[:, 1:-1, :-2], wide[:, 1:-1, 2:]


def enclosed(labels):
    """(Z, Y, X) -> the part of the LV's border within the slices that faces myocardium, 0 to 1; 1 without LV. What is
    not connected to the largest heart does not count."""
    labels = labels * models.largest_component((labels > 0).astype(np.uint8))
    lv = labels == 3
    facing = np.concatenate([side[lv & (side != 3)] for side in beside(labels)])
    return float(np.mean(facing == 2)) if len(facing) else 1.0


def keep_parts(labels):
    """models.largest_component, but of the LV the part that faces most myocardium: of an RV so wide that it was taken
    for LV, more may be left than of the LV itself."""
    kept = models.largest_component(labels)
    parts, n = ndimage.label(labels == 3)
    faces = sum(np.bincount(parts[side == 2], minlength=n + 1) for side in beside(labels))[1:]        # of each part
    if faces.any():
        kept[kept == 3] = 0
        kept[parts == 1 + faces.argmax()] = 3
    return kept


def segment_frames(nets, frames, spacing, inference, component, name="", position=0):
    """(T, Z, Y, X) -> (labels of that shape, uint8; entropy maps, float32; rows of NAME_volumes.csv). position: how
    they lie, as of find_position; name: of the progress bar."""
    labels, maps, rows = np.empty(frames.shape, np.uint8), np.empty(frames.shape, np.float32), []
    silent = None if len(frames) > 1 else True                         # None: silent where stderr is no terminal
    for t, frame in enumerate(tqdm(frames, desc=name, unit="frame", disable=silent, leave=False)):
        result = evaluate.segment(nets, turn(frame, position), inference)
        kept = keep_parts(result.labels) if component else result.labels
        labels[t] = turn(kept, position, back=True)
        maps[t] = turn(result.entropy, position, back=True)
        row = dict(frame=t + 1, phase="")
        row |= zip(ML, volumes_ml(kept, spacing), strict=True)
        row["lv_enclosed"] = enclosed(result.labels)
        row["entropy"] = mean(result.entropy[kept > 0])
        if result.disagreement is not None:
            row["disagreement"] = mean(result.disagreement)
        rows.append(row)
    return labels, maps, rows


def odd_images(frames):
    """(T, Z, Y, X) -> (T,) bool: a slice of the frame is not like the same slice in the other frames."""
    if len(frames) < BY_IMAGE:
        return np.zeros(len(frames), bool)
    like = np.array([likeness(frames[:, z]) for z in range(frames.shape[1])])                      # (Z, T)
    return (like < np.median(like, axis=1, keepdims=True) - UNLIKE).any(0)


def odd_volumes(ml, odd):
    """ml (T, 3), odd (T,) bool -> (T,) bool: also the frames one of whose volumes is far from its neighbours'."""
    sound = ml[~odd]
    if len(sound) < BY_VOLUME:
        return odd
    around = ndimage.median_filter(sound, size=(5, 1), mode="wrap")
    odd = odd.copy()
    odd[~odd] = (np.abs(sound - around) > JUMP * np.median(sound, axis=0)).any(1)
    return odd


def find_phases(ml):
    """ml (T, 3) of RV, MYO, LV -> {"ED": frame, "ES": frame} from 0, those with most and least LV; {} unless two
    frames have any. A frame without a cavity is a failure, not systole."""
    cavity = np.where(ml[:, 2] > 0, ml[:, 2], np.inf)
    if np.isfinite(cavity).sum() < 2:
        return {}
    return dict(zip(PHASES, (int(np.nanargmax(ml[:, 2])), int(cavity.argmin())), strict=True))


def asked_slices(frames):
    """(T, Z, Y, X) -> (Z, Y, X), the slices by which find_position judges, of frames all over the cine, and the indices
    of the four that it is asked about first, the same ones if the stack is upside down."""
    n, depth = frames.shape[:2]
    low, near = int(0.2 * (depth - 1)), int(0.4 * (depth - 1))
    heights = np.arange(depth)
    return frames[heights * n // depth, heights], [low, near, depth - 1 - near, depth - 1 - low]


def odd_result(labels, image, row, usual=USUAL):
    """What is implausible about one frame's result -> [texts]. labels, image (Z, Y, X); its row of NAME_volumes.csv;
    the usual entropy."""
    ml, entropy = [row[k] for k in ML], row["entropy"]
    slices = np.count_nonzero((labels > 0).any((1, 2)))
    if not slices:
        return ["no heart found"]
    texts = []
    on = {c: np.count_nonzero((labels == k).any((1, 2))) for k, c in enumerate(CLASSES, 1)}
    if lost := [c for c, n in on.items() if n < SHARE * slices]:
        texts.append(f"{' and '.join(lost)} on fewer than {SHARE:.0%} of the {slices} slices with a heart")
    ratio = ml[0] / ml[2] if ml[2] else np.inf
    least, most = RATIO.get(row["phase"], RATIO[""])
    if not least <= ratio <= most:
        texts.append(f"RV/LV {ratio:.2f}, usual is {least} to {most}")
    if row["lv_enclosed"] < ENCLOSED:
        texts.append(f"myocardium around {row['lv_enclosed']:.0%} of what was taken for LV: is part of it another "
                     "cavity?")
    if not entropy <= ENTROPY * usual:
        texts.append(f"entropy {entropy:.2f}, usual is {usual:.2f}")
    if ml[2] and ml[1] and image[labels == 3].mean() < image[labels == 2].mean():
        texts.append("blood darker than muscle: is the contrast inverted, or no cine's?")
    return texts


def predict_file(nets, source, stem, inference, find=True, component=True, entropy=False, spacing=None, axes=None,
                 usual=USUAL):
    """Segment one NIfTI file and write the results that the head of this file names to `stem`_* -> (the row of
    predictions.csv, the scan, its labels (T, Z, Y, X)). DataError, ValueError, MemoryError or OSError, and then nothing
    was written.

    nets, inference: as of load_networks. find: judge the position, look for the heart. component: keep_parts of
    each frame. entropy: write its map too. spacing, axes: as of read_scan. usual: the entropy to expect.
    """
    if not (NIFTI.search(source.name) and os.path.isfile(source)):
        raise DataError(f"{source}: not a NIfTI file by its name and kind; give .nii or .nii.gz (of .hdr and .img "
                        "nibabel.save(nibabel.load(FILE), 'scan.nii') makes one)")
    scan = read_scan(source, spacing, axes)
    frames, spacing, doubts = scan.frames, scan.spacing, list(scan.warnings)
    odd = odd_images(frames)
    if odd.all():
        odd[:] = False
        doubts.append("each frame has a slice unlike the others', so none is left out: look at the curve")
    position, focus = 0, {}
    judged = find and inference["view"] == "heart"
    if judged:
        slices, few = asked_slices(frames[~odd])
        position = find_position(nets[0], slices, spacing, few=few, **inference)
        seen = turn(frames[~odd][0], position)
        focus = find_heart(nets[0], seen, models.turn_spacing(spacing, position), **inference)
    labels, maps, rows = segment_frames(nets, frames, spacing, inference | focus, component, source.name, position)
    ml = np.array([[row[k] for k in ML] for row in rows])                                          # (T, 3)
    odd = odd_volumes(ml, odd)
    if frames.shape[1] < 3:
        doubts.append(f"a stack of {frames.shape[1]}: is it a short-axis view? The network knows no other")
    if odd.any():
        names = ", ".join(map(str, 1 + np.flatnonzero(odd)))
        doubts.append(f"frames unlike the others, left out of ED, ES and means: {names}")
    phases = find_phases(np.where(odd[:, None], np.nan, ml))
    indices = evaluate.clinical_indices(*(ml[t] for t in phases.values())) if phases else {}
    shown = []
    for phase, t in phases.items() or (("", 0),):                                     # without phases the first frame
        rows[t]["phase"] = phase
        image = np.subtract(frames[t], frames[t].min(), dtype=np.float64).astype(np.float32)
        volume = Volume(source.name, image, None, spacing, None)
        shown.append((f"{phase}, frame {t + 1}" if phase else "", volume, labels[t]))
        texts = odd_result(labels[t], image, rows[t], usual)
        doubts += [f"{phase}: {text}" if phase else text for text in texts]
    title = source.name.encode("utf-8", "replace").decode().replace("$", r"\$")       # as matplotlib takes any name
    with staging(stem.parent, [f"{stem.name}_{k}" for k in RESULTS]) as folder:
        evaluate.draw_overlay(folder / f"{stem.name}_overlay.png", title, shown)
        if len(frames) > 1:
            draw_volumes(folder / f"{stem.name}_volumes.png", title, ml, phases, indices)
        write_csv(folder / f"{stem.name}_volumes.csv", rows)
        save_like(scan.nifti, scan.back(labels), folder / f"{stem.name}_seg.nii.gz")
        if entropy:
            save_like(scan.nifti, scan.back(maps), folder / f"{stem.name}_entropy.nii.gz")
    row = dict(file=str(source), frames=len(frames), axes=scan.axes)
    row["position"] = models.POSITIONS[position] if judged else ""
    row |= {k: t + 1 for k, t in phases.items()} | indices
    if len(frames) == 1:
        row |= zip(ML, ml[0], strict=True)
    sound = [r for r, left_out in zip(rows, odd, strict=True) if not left_out]
    for key in rows[0].keys() & {"entropy", "disagreement"}:
        row[key] = mean([r[key] for r in sound if np.isfinite(r[key])])
    return row | dict(warning="; ".join(dict.fromkeys(doubts))), scan, labels


def save_like(nifti, array, path):
    """An array of the shape of `nifti` -> NIfTI with its header: its zooms, forms and units stay, whatever they say;
    its texts, which can name a person, do not."""
    header = nifti.header.copy()
    header.extensions.clear()
    for key in {"descrip", "db_name", "aux_file", "intent_name", "data_type"}.intersection(header.keys()):
        header[key] = b""
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0                                # the source's window of display
    affine = nifti.affine if np.isfinite(nifti.affine).all() else None                  # nibabel cannot write it again
    nib.save(type(nifti)(array, affine, header), path)


def draw_volumes(path, title, ml, phases, indices):
    """ml (T, 3) of RV, MYO, LV, phases {"ED": frame, "ES": frame} from 0, indices -> a PNG of the ventricles' volume
    over time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax, frames = figure.subplots(), np.arange(1, len(ml) + 1)
    for name, i, color in (("LV", 2, COLORS["LV"]), ("RV", 0, "#0d8fc4")):
        label = f"{name}, EF {format_number(1, indices[f'{name.lower()}_ef'])} %" if indices else name
        ax.plot(frames, ml[:, i], "o-", color=color, label=label, linewidth=2, markersize=4)
    for phase, t in phases.items():
        ax.axvline(t + 1, color="0.6", linestyle="--", linewidth=1)
        late = t > len(ml) / 2                                       # its text to the left, or it leaves the axes
        ax.annotate(f"{phase}, frame {t + 1}", (t + 1, 1), xycoords=("data", "axes fraction"),
                    xytext=(-4 if late else 4, -12), textcoords="offset points", ha="right" if late else "left",
                    color="0.35", fontsize=9)
    ax.set(title=title, xlabel="frame", ylabel="volume, ml", ylim=(0, 1.15 * max(1, ml[:, [0, 2]].max())))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, title=NOTICE, title_fontsize=8)
    figure.savefig(path, dpi=110)


# -------------------------------------------------------------------------------------------------------- all files

def tell(text):
    tqdm.write(f"predict.py: {text}", file=sys.stderr)


def describe_error(source, error):
    return str(error) if isinstance(error, DataError) else f"{source}: {data_prep.one_line(error)}"


def attempt(nets, source, stem, inference, options):
    """predict_file, told to people -> its row, or one that says why there is none."""
    try:
        row, *_ = predict_file(nets, source, stem, inference, **options)
    except OSError:                                                             # `out` takes no more
        raise
    except Exception as error:                                                  # a library's, of a file: others go on
        text = describe_error(source, error)
        tell(text)
        return dict(error=text)
    told = f"{row['file']}: {row['frames']} frame{'s' * (row['frames'] > 1)}"
    if "ED" in row:
        found = [f"{evaluate.index_name(k)} {format_number(1, row[k])} {unit}" for k, unit in INDICES.items()]
        told += f", ED {row['ED']}, ES {row['ES']}; {', '.join(found)}"
    tqdm.write(told)
    if row.get("warning"):
        tell(f"{row['file']}: {row['warning']}")
    return row


def as_text(path):
    """A path as predictions.csv has it, also where its name is no text."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def identity(file):
    return os.path.normcase(as_text(os.path.realpath(file)))


def read_table(out):
    """The rows of earlier calls in predictions.csv. Raises DataError."""
    path = out / "predictions.csv"
    if not path.exists():
        return []
    with data_prep.readable(path, "move it away"), open(path, newline="", encoding="utf-8-sig") as f:
        return [{c: row["file"] if c == "file" else row.get(c) for c in COLUMNS} for row in csv.DictReader(f)]


def refuse_replacing(images, out):
    """DataError where a result would land in the folder of its source, or replace that of another file."""
    owners = {row["name"]: row["file"] for row in read_table(out) if row["name"]}
    for source, name in images.items():
        if os.path.realpath((out / name).parent) == os.path.dirname(os.path.realpath(source)):
            raise DataError(f"--out {out}: holds {source}; give a folder apart, so that no file there is replaced")
        owner = owners.get(as_text(name.as_posix()), source)
        if identity(owner) != identity(source) and (out / f"{name}_seg.nii.gz").exists():
            raise DataError(f"--out {out}: {name}_seg.nii.gz there is of {owner}, not of {source}; give another --out")


def merge_table(out, table):
    """Write the rows of `table` and those of earlier calls about other files to predictions.csv."""
    files = {identity(row["file"]) for row in table}
    names = {row["name"] for row in table if row["name"]}
    kept = [row for row in read_table(out) if identity(row["file"]) not in files and row["name"] not in names]
    with staging(out, ["predictions.csv"]) as folder:
        write_csv(folder / "predictions.csv", kept + [{c: row.get(c) for c in COLUMNS} for row in table])


def predict(nets, inference, paths, out, **options):
    """Segment files and folders into `out`, as predict_file; a bad file is reported and the others are done. Returns
    the number of bad ones. Raises DataError before anything is written, OSError where `out` takes no more."""
    images, out, table = find_images(paths), Path(out), []
    refuse_replacing(images, out)
    try:
        for source, name in tqdm(images.items(), desc="predict", unit="file", disable=None, leave=False):
            row = attempt(nets, source, out / name, inference, options)
            results = "" if "error" in row else as_text(name.as_posix())
            table.append(row | dict(file=os.path.abspath(source), name=results))
    finally:                                                               # Ctrl-C, a full disk: of what is done
        if table:
            merge_table(out, table)
    failed = sum("error" in row for row in table)
    print(f"{out}: {len(table) - failed} of {len(table)} files segmented; predictions.csv lists them")
    return failed


# ------------------------------------------------------------------------------------------------------ export, time

class Exported(models.UNet):
    """What the ONNX file computes: standardize and the network."""

    def forward(self, slices):
        return super().forward(models.standardize(slices))


def export_onnx(net, path, metadata):
    """Write the network as ONNX, whole or not at all: `slices` (n, in_channels, height, width) float32, any size and
    range, standardised in the graph -> `logits` (n, num_classes, height, width). metadata: {str: str}. Returns the
    opset. Needs onnxscript; raises OSError."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)                             # it misses torchvision aloud
    exported = Exported(**net.architecture).eval()
    exported.load_state_dict(net.state_dict())
    example = torch.rand(2, net.architecture["in_channels"], 72, 88)
    sizes = {i: torch.export.Dim(n) for i, n in {0: "n", 2: "height", 3: "width"}.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(exported, (example,), input_names=["slices"], output_names=["logits"],
                                    dynamic_shapes=[sizes], dynamo=True, verbose=False)
    program.model.metadata_props.update(metadata)
    with staging(Path(os.path.realpath(path.parent, strict=True)), [path.name]) as folder:  # a folder must be there
        program.save(folder / path.name)
    return program.model.opset_imports[""]


def onnx_session(net):
    """The network in onnxruntime, on the CPU with torch's threads, or None where a package is not installed."""
    if not all(map(importlib.util.find_spec, ("onnxscript", "onnxruntime"))):
        return None
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export_onnx(net, path, {})
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def time_inference(net, inference, device="cpu", slices=10, frames=30):
    """Seconds per frame of `slices` x 256 x 216 at 1.4 mm, (frames,) each -> {"torch fp32": ..., and where this machine
    has them "torch bf16": ..., "onnxruntime": ...}. The image is noise, which costs as much as a heart."""
    frame = np.random.default_rng(0).random((slices, 256, 216), np.float32)

    def answer():
        segment_volume(net, frame, **inference)
    ways, device = {"torch fp32": answer}, torch.device(device)
    if models.bf16_pays(device):                                              # emulated it would take minutes
        ways["torch bf16"] = torch.autocast(device.type, torch.bfloat16)(answer)
    if session := onnx_session(net):
        size = inference["size"]
        window = (size, size) if inference["view"] == "whole" else [min(size, n) for n in frame.shape[1:]]
        seen = np.resize(frame, (slices, 1, *window))
        ways["onnxruntime"] = lambda: session.run(None, {"slices": seen})[0].argmax(1)
    seconds = {name: [] for name in ways}
    for _ in range(frames + 1):                                # in turns, so that other work on the machine slows all
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(times[1:]) for name, times in seconds.items()}                   # the first one warms up


# ------------------------------------------------------------------------------------------------------------- main

def print_export(net, inference, path):
    if not importlib.util.find_spec("onnxscript"):
        raise DataError("--onnx wants the package onnxscript: pip install onnxscript")
    classes = ",".join(("background", *CLASSES))
    window = "central window of" if inference["view"] == "heart" else "whole slice resized to"
    steps = f"{window} size x size pixels; the graph standardises each slice; argmax of the logits"
    with evaluate.names_target(path, "FILE"):
        opset = export_onnx(net, path, dict(classes=classes, preprocessing=steps, size=str(inference["size"]),
                                            view=inference["view"]))
        megabytes = path.stat().st_size / 1e6
    print(f"{path}: ONNX opset {opset}, {megabytes:.1f} MB; classes {classes}; {steps}")


def print_times(net, inference, device):
    for name, seconds in time_inference(net, inference, device).items():
        where = models.describe_device("cpu" if name == "onnxruntime" else device)
        ms = 1000 / 10 * seconds                                                        # a slice, of a frame's 10
        print(f"{name:12} {np.median(ms):7.2f} ms per slice (fastest {min(ms):.2f}) "
              f"{sum(seconds):7.2f} s per cine of 30 frames of 10 slices ({where}, window {inference['size']})")


def parse(argv, kind=data_prep.Parser):
    parser = kind(prog="predict.py", description=__doc__.splitlines()[0], usage=(
        "%(prog)s CHECKPOINT PATH... [options]\n       %(prog)s CHECKPOINT --onnx FILE | --time [options]"))
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt of a run")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="NIfTI files, and folders of them, to segment")
    modes = parser.add_argument_group("instead of segmenting").add_mutually_exclusive_group()
    modes.add_argument("--onnx", type=Path, metavar="FILE", help="export the network")
    modes.add_argument("--time", action="store_true", help="measure ms per slice and per cine on this machine")
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="folder [predictions]")
    group.add_argument("--entropy", action="store_true", help="the uncertainty too, as NIfTI")
    group = parser.add_argument_group("a header that does not tell")
    group.add_argument("--spacing", nargs=3, type=float, metavar=("Z", "Y", "X"), help="mm between slices, of a pixel")
    group.add_argument("--axes", metavar="xyzt", help="the array's axes in their order, t for time")
    evaluate.add_network_options(parser, on=True)
    args = parser.parse_intermixed_args(argv)                          # options may stand before PATH
    if bool(args.onnx) + args.time + bool(args.paths) != 1:
        parser.error("give one of PATH, --onnx and --time")
    if args.spacing and not all(0 < mm < np.inf for mm in args.spacing):
        parser.error("--spacing: give three lengths in mm")
    if args.axes and "".join(sorted(args.axes)) not in ("txy", "xyz", "txyz"):
        parser.error("--axes: give x, y, z and t in the array's order, each once; z or t may be absent")
    for option in ("entropy", "spacing", "axes"):
        if getattr(args, option) and not args.paths:
            parser.error(f"--{option} goes with PATH")
    return args


def work(args):
    """What the command line asks for -> 1 where a file could not be segmented."""
    device = pick_device(args.gpu, args.cpu)
    nets, checkpoint = evaluate.load_networks(args.checkpoint, device, args.which)
    inference = checkpoint["inference"]
    if args.onnx:
        return print_export(nets[0], inference, args.onnx)
    if args.time:
        return print_times(nets[0], inference, device)
    options = dict(find=args.find_heart, component=args.largest_component, entropy=args.entropy,
                   spacing=args.spacing, axes=args.axes, usual=checkpoint.get("entropy", USUAL))
    with evaluate.names_target(args.out):
        return 1 if predict(nets, inference, args.paths, args.out, **options) else 0


def main(argv=None):
    """The command line -> exit code: 0, 1 where it met bad files, 2 for a user's error, 130 for Ctrl-C."""
    args = parse(argv)
    left = "what is there is whole" if args.paths else "nothing was written"
    return data_prep.exit_code("predict.py", lambda: work(args), (CheckpointError, DeviceError), interrupted=left,
                               memory="--cpu may have more")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                         # so that temporary folders go
    sys.exit(main())
