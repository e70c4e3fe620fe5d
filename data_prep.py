"""ACDC from the raw release to the HDF5 layout of SSL4MIS, BCP and their forks; the split; reading it back.

    python data_prep.py RAW [OUT]          RAW holds training/ and testing/; OUT defaults to data/ACDC
    python data_prep.py --check OUT        every list, file, label and checksum; one line per fault

OUT/data/slices/patientNNN_frameFF_slice_S.h5 for train, OUT/data/patientNNN_frameFF.h5 for val, test and official;
FF is 01 at end-diastole (ED), 02 at end-systole (ES), S counts from 1. Each holds `image`, float32,
(v - v.min()) / (v.max() - v.min()) over the volume, and `label`, uint8: 1 RV, 2 MYO, 3 LV; attributes `spacing`
(z, y, x in mm), `group`, `source`. Arrays are (Z, Y, X). A file copied alone needs numpy, h5py, nibabel, tqdm.

Data: Bernard et al., "Deep Learning Techniques for Automatic MRI Cardiac Multi-structures Segmentation and Diagnosis:
Is the Problem Solved?", IEEE TMI 37(11), 2018. Layout and split: https://github.com/HiLab-git/SSL4MIS
"""

import argparse
import errno
import hashlib
import json
import math
import multiprocessing.connection
import os
import platform
import re
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import h5py
import nibabel as nib
import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two preparations into one folder are not kept apart
    fcntl = None

CLASSES = ("RV", "MYO", "LV")  # labels 1, 2, 3
PHASES = ("ED", "ES")  # frame01, frame02
_IDS = {  # the community's split in its order: --labeled k takes the first k of train
    "train": """099 038 050 100 058 021 049 020 072 040 060 089 004 056 098 096 031 018 094 047 048 055 097 074 043 041
        063 037 095 054 026 088 032 069 006 071 012 073 061 017 025 010 057 029 051 005 036 046 062 034 076 092 070 077
        067 003 091 016 014 044 042 090 053 027 035 086 023 009 079 015""",
    "val": "028 085 082 087 019 030 078 045 002 039",
    "test": "011 013 084 033 093 022 068 024 083 081 080 001 007 066 008 065 075 064 059 052",
    "official": " ".join(str(n) for n in range(101, 151)),
}
SPLIT: dict[str, tuple[str, ...]] = {s: tuple(f"patient{n}" for n in ids.split()) for s, ids in _IDS.items()}
VOLUME, SLICE = r"patient\d{3}_frame\d\d", r"patient\d{3}_frame\d\d_slice_[1-9]\d{0,3}"
# names in the lists; name[:10] is the patient, name[:18] the volume
MAX_VOXELS = 2**28  # 1 GiB in float32; a cine of 256 x 256 x 10 x 30 has 2**24
DEFLATE = 1100  # zlib shrinks 1032 times at most: a file that claims more than that lies
NIFTI_STARTS = {n.to_bytes(4, order) for n in (348, 540) for order in ("little", "big")}  # the header's own length
FETCH, AGAIN, RESTORE = "fetch the file again", "prepare the data again", "restore it from the release"  # remedies
MAX_TAIL = 2**20  # bytes that a .nii.gz may hold behind its voxels
FEW = 30  # pixels of a class, below which nothing is judged by it
FACTS = {  # what judge() measures, in its order: refused outside of the first range, warned about outside of the second
    "of the LV's border touches the MYO": ((0.1, 1), (0.96, 1)),  # 164 volumes of ACDC: 0.987 to 1
    "of the RV's border touches the MYO": ((0.02, 0.75), (0.1, 0.55)),  # 0.172 to 0.440
    "mm from the RV's centre right to the LV's": ((0, 120), (4, 75)),  # 9.5 to 53.7, in pixels 5.6 to 62.8
    "standard deviations from the MYO's intensity up to the LV's": ((-9, 9), (0.8, 9)),  # 1.09 to 2.22
}


class DataError(Exception):
    """A user's error: one line that names the file and the remedy."""


class Volume(NamedTuple):
    """One frame of one patient."""

    name: str
    image: np.ndarray  # (Z, Y, X) float32, 0..1
    label: np.ndarray | None  # (Z, Y, X) uint8, 0..3; None where the release has no annotation
    spacing: tuple[float, float, float] | None  # (z, y, x) mm; None in the community's copy
    group: str | None  # DCM, HCM, MINF, NOR or RV


def require(ok, path, problem, remedy=AGAIN):
    """DataError "PATH: PROBLEM; REMEDY" unless ok; path: the file, or the option, at fault."""
    if not ok:
        raise DataError(f"{path}: {problem}; {remedy}")


def one_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__


def exit_code(prog, work, errors=(), interrupted="run it again to go on", memory="close other programs"):
    """work() of a script -> its exit code (None: 0). A user's error (DataError, OSError and `errors`) and want of
    memory are one line on stderr and 2, Ctrl-C one line and 130; `interrupted`, `memory`: what is left, what helps."""
    with suppress(AttributeError, OSError):  # of a stream that is no file, or has been replaced
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    try:
        return work() or 0
    except (DataError, OSError, *errors) as e:
        text, code = " ".join(str(e).split()), 2
    except KeyboardInterrupt:
        text, code = f"interrupted; {interrupted}", 130
    except (RuntimeError, MemoryError) as e:  # torch's allocators refuse in a RuntimeError
        if isinstance(e, RuntimeError) and "alloc" not in str(e).lower():
            raise
        text, code = f"out of memory ({one_line(e)}); {memory}", 2
    print(f"{prog}: {text}", file=sys.stderr)
    return code


@contextmanager
def readable(path, remedy=AGAIN):
    """A regular file (a pipe would be waited for); what a library raises where it is damaged becomes a DataError."""
    require(os.path.exists(path), path, "absent", remedy)
    require(os.path.isfile(path), path, "is not a file", remedy)
    try:
        yield
    except DataError:
        raise
    except Exception as e:  # it can be anything
        if isinstance(e, BlockingIOError) or re.search("unable to lock|already open", str(e)):  # HDF5's
            remedy = "another process has it open: close it there and run again"
        elif isinstance(e, PermissionError):
            remedy = "give yourself the right to read it"
        elif isinstance(e, MemoryError):  # or it is damaged, and claims too much
            remedy = f"close other programs, or {remedy}"
        raise DataError(f"{path}: cannot be read ({one_line(e)}); {remedy}") from None


def require_room(path, numbers, claim, remedy=AGAIN):
    """Before an array of so many numbers is allocated: it is not empty, and no larger than the file can hold."""
    require(0 < numbers <= DEFLATE * os.path.getsize(path), path, f"{claim}, more than the file can hold", remedy)
    problem = f"{claim}, above the limit of {MAX_VOXELS} voxels that is ours"
    remedy = "cut it to the heart or into parts, or raise MAX_VOXELS in data_prep.py"
    require(numbers <= MAX_VOXELS, path, problem, remedy)


def checked_label(path, label, image, remedy=AGAIN):
    require(label.shape == image.shape, path, f"label of shape {label.shape}, but image {image.shape}", remedy)
    require(np.isin(label, (0, 1, 2, 3)).all(), path, "labels outside 0..3", remedy)
    return label.astype(np.uint8, copy=False)


def measure(image, label):
    """(..., Y, X) each -> (7, 4), which adds up over slices. Rows 0 to 3: pairs of neighbours in a slice, of classes i
    and j. Rows 4 to 6, for RV, MYO, LV: pixels, sum of their columns, of their intensities, of these squared."""
    rows = np.zeros((7, 4))
    for axis in (-2, -1):
        a = label.swapaxes(axis, -1)
        pairs = np.bincount((4 * a[..., :-1] + a[..., 1:]).ravel(), minlength=16).reshape(4, 4)
        rows[:4] += pairs + pairs.T
    for k in (1, 2, 3):
        inside = label == k
        values = image[inside].astype(float)
        rows[3 + k] = values.size, np.nonzero(inside)[-1].sum(), values.sum(), (values**2).sum()
    return rows


def judge(path, measured, spacing):
    """A volume's measure() -> warnings, where it lies at the edge of FACTS; DataError beyond. What is not labelled,
    or on few pixels, is not judged; without spacing, pixels are taken for mm."""
    pairs, (rv, myo, lv), warnings = measured[:4], measured[4:], []
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN is neither below nor above
        touching = pairs[:, 2] / (pairs.sum(1) - pairs.diagonal())
        right = (lv[1] / lv[0] - rv[1] / rv[0]) * (spacing[-1] if spacing else 1)
        n, _, total, squares = lv + myo
        brighter = (lv[2] / lv[0] - myo[2] / myo[0]) / np.sqrt(squares / n - (total / n) ** 2)
    has_rv, has_myo, has_lv = measured[4:, 0] >= FEW
    judged = has_myo & has_lv, has_rv & has_myo, has_rv & has_lv, has_myo & has_lv  # the two that each fact is about
    values = np.where(judged, (touching[3], touching[1], right, brighter), np.nan)
    for (what, (gross, usual)), value in zip(FACTS.items(), values, strict=True):
        text = f"{value:.2f} {what}, usual is {usual[0]} to {usual[1]}"
        remedy = "is the annotation mirrored, shifted, or not 1 RV, 2 MYO, 3 LV?"
        require(not (value < gross[0] or value > gross[1]), path, text, remedy)
        if value < usual[0] or value > usual[1]:
            warnings.append(f"{path}: {text}; {remedy}")
    return warnings


# ------------------------------------------------------------------------------------------------------------------ raw

def load_nifti(path, judged=True):
    """NIfTI -> (array (Z, Y, X) or (T, Z, Y, X) in the file's dtype, float64 where it is scaled, spacing
    (z, y, x) in mm, the nibabel image).

    Spacing is the header's zooms; ACDC's affine says 1 mm whatever the truth. A slope of NaN means unscaled. Time may
    be the fifth axis (x, y, z, 1, t), and axes of one voxel may follow.
    Raises DataError: unreadable, neither 3D nor 4D, not finite numbers, no spacing, or too large (told by the header,
    before anything is allocated). With judged=False the spacing is told as it is, and may be none.
    """
    zipped = str(path).lower().endswith(".gz")
    with readable(path, FETCH), nib.imageglobals.LoggingOutputSuppressor():
        with open(path, "rb") as f:
            plain = f.read(4) in NIFTI_STARTS  # unpacked by a browser or a tool that kept the name
        require(not (plain and zipped), path, "not compressed", "rename it to .nii, or compress it with gzip")
        image = nib.load(path)
        shape, dtype = image.shape, image.get_data_dtype()
        problem = f"{dtype} of shape {shape} is not a 3D or 4D image"
        require(min(shape, default=0) > 0, path, problem, FETCH)
        time = [max(shape[3:])] if len(shape) > 3 else []  # further axes are of one voxel
        remedy = "give it as (x, y, z) or (x, y, z, t)"
        require(len(shape) >= 3 and math.prod(shape[3:]) == math.prod(time), path, problem, remedy)
        remedy = "save the magnitude of complex numbers, one channel of colours"
        require(dtype.kind in "iuf", path, f"holds {dtype}, not real numbers", remedy)
        require_room(path, math.prod(shape), f"the header claims {shape}", FETCH)
        with image.file_map["image"].get_prepare_fileobj("rb") as f:
            data = image.dataobj
            layout = data.shape, data.dtype, data.offset, data.slope, data.inter
            array = np.asanyarray(nib.arrayproxy.ArrayProxy(f.fobj, layout, mmap=False)).T.reshape(*time, *shape[2::-1])
            tail = f.read(MAX_TAIL + 1) if zipped else b""  # gzip compares its checksum at the end of the file
        require(len(tail) <= MAX_TAIL, path, f"goes on for more than {MAX_TAIL} bytes behind its voxels", FETCH)
        with (image.file_map.get("header") or image.file_map["image"]).get_prepare_fileobj("rb") as f:
            header = type(image.header).from_fileobj(f, check=False)  # checked, a zoom of 0 would become 1 mm
        spacing = tuple(abs(float(z)) for z in header.get_zooms()[2::-1])
    given = all(0 < z < math.inf for z in spacing)
    require(given or not judged, path, f"spacing {spacing} mm", "write the true zooms into it")
    bad = array.size - np.count_nonzero(np.isfinite(array))
    require(not bad, path, f"{bad} voxels are NaN or infinity", "write numbers there: numpy.nan_to_num makes NaN 0")
    return array, spacing, image


def read_info(folder):
    """Info.cfg of a patient's folder -> {"ED": 1, "ES": 12, "Group": "DCM", ...}."""
    path = Path(folder) / "Info.cfg"
    with readable(path, RESTORE), open(path, "rb") as f:
        raw = f.read(65536)
    code = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"  # a byte-order mark of Windows
    pairs = [line.partition(":") for line in raw.decode(code, "replace").splitlines()]
    info = {key.strip(): value.strip() for key, _, value in pairs}
    for phase in PHASES:
        require(re.fullmatch("[0-9]{1,4}", info.get(phase, "")), path, f"no frame number for {phase}", RESTORE)
        info[phase] = int(info[phase])
    require(info["ED"] != info["ES"], path, f"ED and ES are both frame {info['ED']}", RESTORE)
    require(re.fullmatch(r"\w{1,32}", info.get("Group", "")), path, "no Group", RESTORE)
    return info


def raw_file(folder, name):
    """FOLDER/NAME.nii.gz, or NAME.nii where only that is there."""
    plain, packed = folder / f"{name}.nii", folder / f"{name}.nii.gz"
    return plain if plain.exists() and not packed.exists() else packed


def same_numbers(a, b):
    return np.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)


def check_grid(path, truth, image):
    """Two nibabel images, the annotation PATH and its image, lie on one grid; an affine of ones counts as not given."""
    remedy = "resample the annotation to the image, or fetch both again"
    given = all(i.header["sform_code"] or i.header["qform_code"] for i in (truth, image))
    same = not given or same_numbers(truth.affine, image.affine)
    same = same or any(np.array_equal(i.affine, np.eye(4)) for i in (truth, image))
    require(same, path, "mirrored, turned or shifted: its affine is not the image's", remedy)
    zooms, expected = ([round(float(z), 4) for z in i.header.get_zooms()[:3]] for i in (truth, image))
    require(same_numbers(zooms, expected), path, f"zooms {zooms}, but the image's are {expected}", remedy)


def read_patient(folder, needs_label, warnings=None):
    """ED and ES of a raw patient, checked -> [(image (Z, Y, X) float32, 0..1, label uint8 or None, attributes)] * 2;
    what looks odd is added to the list `warnings`."""
    info, frames = read_info(folder), []
    warnings = [] if warnings is None else warnings
    for phase in PHASES:
        name = f"{folder.name}_frame{info[phase]:02d}"
        path, truth, label = raw_file(folder, name), raw_file(folder, f"{name}_gt"), None
        require(path.exists(), path, f"absent, but Info.cfg says {phase}: {info[phase]}", RESTORE)
        array, spacing, header = load_nifti(path)
        require(array.ndim == 3, path, f"{array.ndim}D where one 3D frame belongs", RESTORE)
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            image = array.astype(np.float32)
            low, span = image.min(), np.ptp(image)
        require(0 < span < np.inf, path, f"every voxel is {low} or the range overflows", FETCH)
        image = (image - low) / span
        if needs_label or truth.exists():
            label, _, its_header = load_nifti(truth)
            label = checked_label(truth, label, image, RESTORE)
            check_grid(truth, its_header, header)
            warnings += judge(truth, measure(image, label), spacing)
        first = frames[0][2]["spacing"] if frames else spacing
        require(same_numbers(first, spacing), path, f"spacing {spacing} mm, but at ED {first}", RESTORE)
        attrs = {"spacing": spacing, "group": info["Group"], "source": f"{folder.name}/{path.name}"}
        frames.append((image, label, attrs))
    return frames


def find_patients(raw):
    """{"patient001": folder, ...} in RAW or RAW/database: there in training/ and testing/, or in itself."""
    found = {}
    for name in ("training", "testing", "", "database/training", "database/testing", "database"):
        parent = Path(raw, name)
        for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
            if re.fullmatch(r"patient\d{3}", folder.name) and folder.is_dir():
                found.setdefault(folder.name, folder)
    require(found, raw, "no folder patientNNN", "give the folder that holds ACDC's training/ and testing/")
    return found


# ------------------------------------------------------------------------------------------------------------- prepared

def read_array(path, h, key, ndim):
    """h[key] of an open HDF5 file; data outside the file (links, external and virtual storage) are refused."""
    d = h[key] if isinstance(h.get(key, getlink=True), h5py.HardLink) else None  # looked at before it is followed
    inside = isinstance(d, h5py.Dataset) and not d.external and not d.is_virtual
    require(inside, path, f"{key} is not in the file itself")
    numbers = len(d.shape or ()) == ndim and d.dtype.kind in "iuf"
    require(numbers, path, f"{key} is {d.dtype} of shape {d.shape}, not {ndim}D numbers")
    chunk = math.prod(d.chunks or ())  # is read whole, and may exceed the array
    claim = f"{key} claims {d.shape}" + (f" in chunks of {d.chunks}" if chunk > d.size else "")
    require_room(path, d.size and max(d.size, chunk), claim)
    return d[()]


def read_h5(path, ndim):
    """One prepared file -> (image float32 0..1, label uint8 or None, attributes); DataError where it is not sound."""
    label = None
    with readable(path), h5py.File(path, "r") as h:
        keys = set(h)  # not `in h`, which follows links
        require("image" in keys, path, "holds no image")
        image = read_array(path, h, "image", ndim)
        if "label" in keys:
            label = checked_label(path, read_array(path, h, "label", ndim), image)
        attrs = {key: str(h.attrs[key]) for key in ("group", "source") if key in h.attrs}
        if "spacing" in h.attrs:
            attrs["spacing"] = tuple(float(s) for s in h.attrs["spacing"])
    spacing = attrs.get("spacing", (1, 1, 1))
    require(image.min() >= 0 and image.max() <= 1, path, "image outside 0..1")  # NaN fails too
    require(len(spacing) == 3 and all(0 < s < math.inf for s in spacing), path, f"spacing {spacing}")
    return image.astype(np.float32, copy=False), label, attrs


def h5_path(root, name):
    """Where a slice or a volume lies: slices in data/slices/, or in data/ of a flat copy."""
    nested = Path(root) / "data" / "slices" / f"{name}.h5"
    return nested if "_slice_" in name and os.path.isfile(nested) else Path(root) / "data" / f"{name}.h5"


def read_list(root, split, pattern=VOLUME):
    """The names in <split>.list, in its order: ["patient028_frame01", ...]."""
    path = Path(root) / f"{split}.list"
    with readable(path, "prepare the data with data_prep.py"):
        names = path.read_text(encoding="utf-8").split()
    for name in names:
        require(re.fullmatch(pattern, name, re.ASCII), path, f"{name[:60]!r} is not a name like patient028_frame01")
    return names


def volume_paths(root, name):
    """The files of a volume: one, or of a train volume its slices from base to apex."""
    path = h5_path(root, name)
    if os.path.isfile(path) or not os.path.isfile(Path(root) / "train_slices.list"):
        return [path]
    slices = [n for n in read_list(root, "train_slices", SLICE) if n.startswith(f"{name}_slice_")]
    whole = [f"{name}_slice_{z}" for z in range(1, len(slices) + 1)]
    problem = f"lacks slices of {name} between 1 and {len(slices)}"
    require(sorted(slices) == sorted(whole), Path(root) / "train_slices.list", problem)
    return [h5_path(root, n) for n in whole] or [path]


def read_volume(root, name):
    """One volume by its name in a list: (Z, Y, X), of train its slices stacked."""
    paths = volume_paths(root, name)
    if "_slice_" not in paths[0].name:
        image, label, attrs = read_h5(paths[0], 3)
    else:
        images, labels, attrs = zip(*(read_h5(path, 2) for path in paths), strict=True)
        whole = len({i.shape for i in images}) == 1 and all(x is not None for x in labels)
        require(whole, paths[0], "and the other slices of its volume are not of one shape, all with labels")
        image, label, attrs = np.stack(images), np.stack(labels), attrs[0]
    return Volume(name, image, label, attrs.get("spacing"), attrs.get("group"))


def list_patients(names):
    """The patients of slices or volumes by name, in their order."""
    return list(dict.fromkeys(name[:10] for name in names))


def first_patients(names, k):
    """Of slices or volumes by name, in their order: the first k patients, those of `--labeled k`. DataError where
    there are fewer."""
    patients = list_patients(names)
    require(1 <= k <= len(patients), f"--labeled {k}", f"there are {len(patients)} training patients", "give 1 to that")
    return patients[:k]


def read_slices(root, names=None):
    """Yields (name, image (Y, X) float32, label (Y, X) uint8) of training slices: `names`, or all that are listed."""
    for name in read_list(root, "train_slices", SLICE) if names is None else names:
        image, label, _ = read_h5(h5_path(root, name), 2)
        require(label is not None, h5_path(root, name), "holds no label")
        yield name, image, label


# -------------------------------------------------------------------------------------------------------------- writing

def write_atomic(path, data):
    """Bytes to a file that appears whole or not at all; a file that holds them already is left alone."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.is_file() and path.read_bytes() == data:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise refusal(path, e) from None
    finally:
        with suppress(OSError):
            part.unlink()


def refusal(path, e):
    remedy = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "choose another OUT"
    return DataError(f"{path}: {e.strerror or one_line(e)}; {remedy} and run again")


def h5_bytes(image, label, attrs):
    """The HDF5 file as bytes: compressed in memory, so that a full disk meets plain bytes; same arrays, same bytes."""
    with h5py.File("memory", "w", driver="core", backing_store=False) as h:
        for key, array in (("image", image), ("label", label)):
            if array is not None:
                chunk = (1,) * (array.ndim - 2) + array.shape[-2:]  # a slice
                h.create_dataset(key, data=array, chunks=chunk, compression="gzip", compression_opts=4)
        h.attrs.update(attrs)
        h.flush()
        return h.id.get_file_image()


def checksum(image, label):
    """SHA-256 of the decoded content: shape, image as little-endian float32, label as uint8 where there is one."""
    h = hashlib.sha256(repr(image.shape).encode())
    h.update(image.astype("<f4", copy=False).tobytes())
    h.update(b"" if label is None else label.tobytes())
    return h.hexdigest()


def run_parallel(function, jobs, workers=None, title=""):
    """function(*job) for each job in `workers` processes, one per core by default -> results in order."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or cores, len(jobs), 61)  # Windows takes no more
    with ProcessPoolExecutor(count, initializer=_start_worker) as pool:
        results = pool.map(function, *zip(*jobs, strict=True))  # an error cancels the jobs that wait
        return list(tqdm(results, desc=title, total=len(jobs), unit="patient", disable=None))


def _start_worker():
    """Ctrl-C is the parent's to handle; when the parent is killed, its workers leave too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever the parent had set
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (multiprocessing.connection.wait([parent]), os._exit(1)), daemon=True).start()


def hold(path):
    """The file PATH, locked by this process; DataError where another goes on holding it. Forked workers inherit the
    lock: it is free when the last of them has left."""
    for _ in range(30):  # the workers of a killed run need a moment
        f = open(path, "ab+", buffering=0)  # noqa: SIM115
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(f.fileno()), path.stat()):
                return f  # otherwise its last holder has just removed it
        f.seek(0)
        holder = f.read().decode(errors="replace") or "another process"
        f.close()
        time.sleep(0.1)
    raise DataError(f"{path.parent}: {holder} is working in it; wait for it or choose another folder")


def is_temporary(path):
    """Whether a killed process of ours left it: .NAME.PID.part or .tmp, NAME as we give them."""
    return re.fullmatch(r"\..+\.(cfg|csv|gz|h5|json|list|onnx|png|pt)\.\d+\.(part|tmp)", path.name)


@contextmanager
def locked_folder(path):
    """A folder: made if absent, locked by a .lock that names the holder, rid of a killed process's temporary files,
    and not left behind empty."""
    made = [d for d in (path, *path.parents) if not d.exists()]
    lock = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        if fcntl is not None:
            lock = hold(path / ".lock")
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}".encode())
        for part in filter(is_temporary, path.iterdir()):
            part.unlink()
        yield
    finally:
        if lock is not None:
            (path / ".lock").unlink(missing_ok=True)
            lock.close()
        for d in made:
            with suppress(OSError):  # stays unless empty
                d.rmdir()


@contextmanager
def workspace(out, names):
    """OUT for one run that makes `names` there: locked, and on an error without what this run has added. Ctrl-C and
    kills leave the finished files: the next run goes on from them."""
    def ours():
        return {p for name in names for p in (*out.glob(name), *out.glob(f"{name}/**/*"))}

    try:
        with locked_folder(out):
            before = ours()
            for part in filter(is_temporary, before):  # a killed run's
                part.unlink()
            try:
                yield
            except Exception:
                for p in sorted(ours() - before, reverse=True):  # a folder comes after what it holds
                    remove = p.rmdir if p.is_dir() else p.unlink
                    remove()
                raise
    except BrokenProcessPool:
        raise DataError(f"{out}: a worker was killed, perhaps for memory; run again with --workers 1") from None
    except OSError as e:
        raise refusal(e.filename or out, e) from None


def convert_patient(folder, split, out):
    """Write what is not there yet of one patient (same arrays, same bytes) -> {path below OUT: checksum}, number of
    slices, warnings."""
    sums, slices, warnings = {}, 0, []
    for number, (image, label, attrs) in enumerate(read_patient(folder, split != "official", warnings), 1):
        name = f"{folder.name}_frame{number:02d}"
        files = {f"data/{name}.h5": (image, label)}
        if split == "train":
            files = {f"data/slices/{name}_slice_{s + 1}.h5": (image[s], label[s]) for s in range(len(image))}
        for file, arrays in files.items():
            write_atomic(out / file, h5_bytes(*arrays, attrs))
            sums[file] = checksum(*arrays)
        slices += len(image)
    return sums, slices, warnings


def convert(raw, out, allow_missing=False, workers=None):
    """Raw ACDC -> prepared folder; returns the manifest. Patients that RAW lacks are an error without `allow_missing`.
    A second run leaves finished files alone and makes the rest."""
    found, out = find_patients(raw), Path(out)
    members = {s: [p for p in ids if p in found] for s, ids in SPLIT.items()}
    missing = [p for ids in SPLIT.values() for p in ids if p not in found]
    problem = f"lacks {len(missing)} of 150 patients, first {next(iter(missing), '')}"
    require(allow_missing or not missing, raw, problem, "add them or pass --allow-missing")
    require(any(members.values()), raw, "holds none of ACDC's 150 patients", "give the folder that holds them")

    jobs = {p: (found[p], s, out) for s, ids in members.items() for p in ids}
    with workspace(out, ("data", "*.list", "manifest.json")):
        made = dict(zip(jobs, run_parallel(convert_patient, [*jobs.values()], workers, "convert"), strict=True))
        lists, counts = {}, {}
        for s, ids in members.items():
            lists[s] = [f"{p}_frame{n:02d}" for p in ids for n in (1, 2)]
            slices = sum(made[p][1] for p in ids)
            counts[s] = {"patients": len(ids), "volumes": len(lists[s]), "slices": slices}
        # The community lists a volume's slices as its file system returned them; ours ascend. Volumes: its order.
        lists["train_slices"] = [Path(file).stem for p in members["train"] for file in made[p][0]]
        for name, lines in lists.items():
            write_atomic(out / f"{name}.list", "".join(f"{line}\n" for line in lines).encode())
        versions = {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (np, h5py, nib)}}
        sha256 = {file: sha for sums, _, _ in made.values() for file, sha in sums.items()}
        manifest = dict(counts=counts, split=members, missing=missing, versions=versions, sha256=sha256)
        write_atomic(out / "manifest.json", f"{json.dumps(manifest, indent=1)}\n".encode())  # last: all is there
    warn(text for _, _, warnings in made.values() for text in warnings)
    return manifest


def warn(texts):
    for text in texts:
        print(f"data_prep.py: {text}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------- check

@contextmanager
def noted(faults):
    """A DataError is one more fault, and what follows is checked too."""
    try:
        yield
    except DataError as e:
        faults.append(str(e))


def check(root):
    """Every list, file and checksum of a prepared folder, ours or the community's -> one line per fault; what is only
    odd is a warning on stderr."""
    root, faults, lists, sums = Path(root), [], {}, {}
    require(root.is_dir(), root, "no such folder", "give the one that data_prep.py wrote")
    for name in (*SPLIT, "train_slices"):
        if name == "official" and not (root / "official.list").exists():
            continue  # the community has none
        with noted(faults):
            lists[name] = read_list(root, name, SLICE if name == "train_slices" else VOLUME)
    owners = {entry[:10]: name for name, entries in reversed(lists.items()) for entry in entries}  # the first has it
    for name, text in (*check_lists(lists, owners), *check_slices(lists)):
        faults.append(f"{root / name}.list: {text}; {AGAIN}")

    manifest = root / "manifest.json"
    if manifest.exists():  # the community has none
        with noted(faults), readable(manifest):
            sums = dict(json.loads(manifest.read_bytes())["sha256"].items())
    names = list(lists.get("train_slices", ()))
    for split in ("val", "test", "official"):
        names += [name for name in lists.get(split, ()) if owners[name[:10]] == split]
    files = {h5_path(root, name).relative_to(root).as_posix(): name for name in names}
    odd = sorted(set(sums) ^ set(files))
    if sums and odd and not faults:
        text = f"{len(odd)} files are in it or in the lists, but not in both, first {odd[0]!r}"
        faults.append(f"{manifest}: {text}; {AGAIN}")
    volumes, spacings = {}, {}
    for file, name in tqdm(files.items(), desc="check", unit="file", disable=None):
        with noted(faults):
            image, label, attrs = read_h5(root / file, 2 if "_slice_" in name else 3)
            require(label is not None or owners[name[:10]] == "official", root / file, "holds no label")
            same = file not in sums or sums[file] == checksum(image, label)
            require(same, root / file, "the content is not what manifest.json says")
            spacing = attrs.get("spacing")
            if label is not None:
                before = volumes.get(name[:18], [0])[0]
                volumes[name[:18]] = before + measure(image, label), spacing, root / file
            first = spacings.setdefault(name[:10], spacing)
            same = None in (first, spacing) or same_numbers(first, spacing)
            require(same, root / file, f"spacing {spacing} mm, but the patient's first is {first}")

    for measured, spacing, path in volumes.values():
        with noted(faults):
            warn(judge(path, measured, spacing))
    return faults


def check_lists(lists, owners):
    """Yields (list, fault): entries twice, patients in two splits, frames not listed."""
    for name, entries in lists.items():
        for entry, times in Counter(entries).items():
            if times > 1:
                yield name, f"{entry} stands there {times} times"
        if name == "train_slices":
            continue  # check_slices
        for patient in list_patients(entries):
            if owners[patient] != name:
                yield name, f"{patient} is also in {owners[patient]}.list"
            for frame in (f"{patient}_frame01", f"{patient}_frame02"):
                if frame not in entries:
                    yield name, f"lacks {frame}"


def check_slices(lists):
    """-> [(list, fault)]: train_slices.list has the volumes of train.list in its order, each with slices 1, 2, 3..."""
    if not {"train", "train_slices"} <= lists.keys():
        return []  # not readable
    train, numbers = list(dict.fromkeys(lists["train"])), {}
    for name in dict.fromkeys(lists["train_slices"]):
        volume, _, number = name.partition("_slice_")
        numbers.setdefault(volume, []).append(int(number))
    faults = [f"{volume} is not in train.list" for volume in numbers if volume not in train]
    for volume in train:
        have = sorted(numbers.get(volume, ()))
        if not have or have != list(range(1, len(have) + 1)):
            faults.append(f"{volume} has slices {have}, not 1, 2, 3 and so on")
    if not faults and list(numbers) != train:
        faults.append("the volumes' order is not train.list's, and --labeled counts by it")
    return [("train_slices", text) for text in faults]


# --------------------------------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def print_counts(manifest):
    for split, n in manifest["counts"].items():
        print(f"{split:9}{n['patients']:4} patients {n['volumes']:4} volumes {n['slices']:5} slices")


def main(argv=None):
    """The command line -> exit code: 0, 1 where --check finds faults, 2 for a user's error, 130 for Ctrl-C."""
    parser = Parser(
        description="ACDC to HDF5 slices and volumes with the split's lists.",
        usage="%(prog)s RAW [OUT] [--allow-missing] [--workers N]\n       %(prog)s --check OUT",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=118),
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes [one per core]")
    group = parser.add_argument_group("the raw release")
    group.add_argument("raw", metavar="RAW", nargs="?", help="folder that holds ACDC's training/ and testing/")
    group.add_argument("out", metavar="OUT", nargs="?", default="data/ACDC", help="prepared folder [data/ACDC]")
    group.add_argument("--allow-missing", action="store_true", help="go on without the patients that RAW lacks")
    group = parser.add_argument_group("a prepared folder")
    group.add_argument("--check", metavar="OUT", help="report its faults")
    parser.add_argument("--phantom", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.phantom is not None:
        parser.error("--phantom: phantom.py does this: python phantom.py data/phantom/raw, then "
                     "python data_prep.py data/phantom/raw data/phantom --allow-missing")
    if (args.raw is None) == (args.check is None):
        parser.error("give one of RAW and --check")
    if args.workers is not None and not 1 <= args.workers <= 64:
        parser.error("--workers: give 1 to 64")

    def work():
        start = time.perf_counter()
        if args.check is not None:
            faults = check(args.check)
            print("\n".join(faults) or f"{args.check}: no faults")
            return 1 if faults else 0
        manifest = convert(args.raw, args.out, args.allow_missing, args.workers)
        print_counts(manifest)
        if missing := manifest["missing"]:
            print(f"absent: {len(missing)} of 150 patients, first {missing[0]}")
        print(f"{args.out}: done in {time.perf_counter() - start:.1f} s")

    return exit_code(parser.prog, work, memory="run again with --workers 1")


if __name__ == "__main__":
    sys.exit(main())
