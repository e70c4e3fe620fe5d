"""A NIfTI file from anywhere, read as frames of short-axis slices: which axis is which, and how far apart slices lie.

    scan = read_scan("scan.nii.gz")                               # or with spacing=(8, 1.4, 1.4), axes="zyx"
    scan.frames                                                   # (T, Z, Y, X), scan.spacing (z, y, x) in mm
    scan.back(labels)                                             # (T, Z, Y, X) -> the file's own shape

The header is judged by what a short-axis stack can be, and time by what the images show: a frame is like the other
frames of its slice, a slice is not like the others. What neither settles is refused, with the option that does.
"""
import itertools
from typing import NamedTuple

import nibabel as nib
import numpy as np

import data_prep
from data_prep import DataError

FIELD = (50, 1000)                  # mm that a slice spans; 160 frames of ACDC: 224 to 480, the phantom 135 upwards
GAP = (3, 20)                       # mm from slice to slice; ACDC 5 to 10
HEIGHT = 200                        # mm of a stack, at most; ACDC 50 to 110, M&Ms 140
COARSE = 1.3                        # slices lie so many pixels apart, at least; ACDC 2.8
SQUARE = 2                          # a pixel's sides are so unequal, at most; ACDC 1
AGREE = 0.03                        # by which zooms and affine may differ
ALIKE = 0.96                        # mean correlation with the median image; a cine's frames 0.98, slices of ACDC up to
                                    # 0.81, of M&Ms 0.42, of the phantom 0.94
MOSTLY = 0.9                        # of a single image: frames of the cine 0.964 upwards
APART = (0.85, 0.05)                # of slices k apart, and above that of neighbours; sound stacks at most 0
PAIRS = 0.17                        # of slices 1 and 2, 3 and 4, above that of 2 and 3; sound stacks at most 0.132
FEW_VALUES = 16                     # a label map has no more; a scan of 8 bits has a hundred
ASK = "give the true --spacing Z Y X in mm, or --axes"


class Scan(NamedTuple):
    """One file, turned so that slices can be read."""

    frames: np.ndarray              # (T, Z, Y, X) in the file's dtype
    spacing: tuple[float, float, float]         # (z, y, x) mm
    nifti: nib.spatialimages.SpatialImage
    axes: str                       # of the file's array, as --axes
    warnings: list[str]

    def back(self, array):
        """(T, Z, Y, X) -> the same in the order and shape of the file's array."""
        sizes = dict(zip("tzyx", array.shape, strict=True))
        kept = [c for c in "tzyx" if c in self.axes]
        turned = array.reshape([sizes[c] for c in kept]).transpose([kept.index(c) for c in self.axes])
        return turned.T.reshape(self.nifti.shape[::-1]).T            # .T: nibabel's arrays are in Fortran's order


def refuse_labels(source, array):
    """DataError where an image holds only a few whole numbers, and more than one."""
    if len(np.unique(array.ravel()[::1 + array.size // 2**16])) > FEW_VALUES:                     # a scan's, in no time
        return
    values = np.unique(array)
    if 1 < len(values) <= FEW_VALUES and np.array_equal(values, np.rint(values)):
        raise DataError(f"{source}: holds only {len(values)} whole numbers, as a label map does; give the scan itself, "
                        "and end the names of label maps in _seg, so that folders leave them out")


def unit_rows(images):
    """(N, Y, X) -> (1 + N, pixels): the median image and each image, thinned, with mean 0 and length 1; 0 if flat."""
    def thirds(n):                                                   # the same pixels if the image is mirrored
        i = np.arange(n)
        return np.flatnonzero((i % 3 == 0) | (i[::-1] % 3 == 0))
    thin = images[:, thirds(images.shape[1])][:, :, thirds(images.shape[2])].astype(np.float64)
    thin = np.clip(thin, *np.percentile(thin, (1, 99)))              # a few extremes are no likeness
    rows = np.concatenate((np.median(thin, axis=0)[None], thin)).reshape(len(thin) + 1, -1)
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def likeness(images):
    """(N, Y, X) -> the correlation of each image with the median image, (N,), 0 where one is flat."""
    rows = unit_rows(images)
    return rows[1:] @ rows[0]


def repeats(images):
    """(N, Y, X) -> whether they are several stacks in one row, one after the other or slice by slice: images that lie
    apart are alike, or pairs are, more than a stack's neighbours ever are."""
    n, rows = len(images), unit_rows(images)[1:]
    def like(step, start=0, by=1):
        return np.median(np.einsum("ij,ij->i", rows[:-step], rows[step:])[start::by])
    near = like(1) if n > 1 else 0
    apart = (like(m) for m in range(2, n // 2 + 1) if n % m == 0)
    return any(x > APART[0] and x - near > APART[1] for x in apart) or (
        n > 3 and n % 2 == 0 and like(1, 0, 2) - like(1, 1, 2) > PAIRS)


def contrast(frames):
    """(T, Z, Y, X) -> how much more alike the frames of a slice are than the slices of a frame; below 0 where T and Z
    are exchanged, 0 where one of them is 1."""
    if min(frames.shape[:2]) == 1:
        return 0.0
    over_time = [np.median(likeness(images)) for images in frames.swapaxes(0, 1)]
    over_space = [np.median(likeness(images)) for images in frames[:: max(1, len(frames) // 8)]]
    return float(np.median(over_time) - np.median(over_space))


def as_frames(array, axes):
    """The file's array, its axes named -> (T, Z, Y, X)."""
    kept = [c for c in "tzyx" if c in axes]
    frames = array.transpose([axes.index(c) for c in kept])
    return np.expand_dims(frames, tuple(i for i, c in enumerate("tzyx") if c not in axes))


def odd_stack(shape, spacing):
    """(Z, Y, X) and mm -> what is odd about them as a stack of short-axis slices: a text, empty for nothing."""
    extent = [n * s for n, s in zip(shape, spacing, strict=True)]
    gap, *pixel = spacing
    size = " x ".join(f"{s:g}" for s in spacing)
    if not (all(FIELD[0] <= e <= FIELD[1] for e in extent[1:]) and max(pixel) <= SQUARE * min(pixel)):
        return f"slices of {shape[1]} x {shape[2]} pixels of {pixel[0]:g} x {pixel[1]:g} mm cannot be a chest"
    if shape[0] > 1 and not (GAP[0] <= gap <= GAP[1] and gap >= COARSE * max(pixel)):
        return f"spacing {size} mm (z, y, x): slices lie {GAP[0]} to {GAP[1]} mm apart and coarser than their pixels"
    if shape[0] > 1 and extent[0] > HEIGHT:
        return f"{shape[0]} slices, {gap:g} mm apart, are {extent[0]:g} mm high, but no stack is above {HEIGHT}"
    return ""


def header_spacing(source, zooms, nifti):
    """mm along the array's first three axes, from zooms and sform: ones are not given. DataError where they differ."""
    sform, code = nifti.header.get_sform(coded=True)
    columns = np.linalg.norm(sform[:3, :3], axis=0) if code else np.ones(3)
    given = [v for v in (zooms, columns)
             if np.isfinite(v).all() and min(v) > 0 and not np.allclose(v, 1, atol=1e-3)]
    if len(given) == 2 and not np.allclose(*given, rtol=AGREE):
        told = [" x ".join(f"{x:.4g}" for x in v) for v in given]
        raise DataError(f"{source}: zooms say {told[0]} mm, the affine {told[1]}; which is right? give --spacing Z Y X")
    return tuple(float(x) for x in (given[0] if given else np.ones(3)))


def unfold(array):
    """(N, Y, X) whose images are slices and frames in one row -> (axes, array of four axes); None for a stack."""
    n, best = len(array), (0.75, None)                               # three of four images must be like their frames
    for slices in (s for s in range(1, n // 5 + 1) if n % s == 0):   # a cine has five frames at least
        outer = array.reshape(n // slices, slices, *array.shape[1:])
        inner = array.reshape(slices, n // slices, *array.shape[1:])
        for axes, way, images in (("xyzt", outer, outer.swapaxes(0, 1)), ("xytz", inner, inner)):
            like = np.concatenate([likeness(i) for i in images])
            share = np.mean(like > MOSTLY)
            if share > best[0] and np.median(like) > ALIKE:
                best = share, (axes, way)
    return best[1]


def orders(ndim):
    """What the axes of a file can be, the usual first: "xyzt", "xytz", ..."""
    found = ["".join(p) for p in itertools.permutations("xyzt"[:ndim]) if p.index("x") < p.index("y")]
    return sorted(found, key=lambda axes: [axes.index(c) for c in "xyzt"[:ndim]])


def candidates(array, zooms, spacing, axes):
    """Every way to read the file's array -> [(as the header has it, axes, (z, y, x) mm, doubts)]."""
    ways = []
    for order in [axes] if axes else orders(array.ndim):
        shape = as_frames(array, order).shape[1:]
        along = dict(zip(order, zooms, strict=False))
        mm = tuple(spacing or (along.get(c, 1.0) for c in "zyx"))
        ways.append((True, order, mm, odd_stack(shape, mm)))
        if not spacing and not order.startswith("xyz"):              # the array was turned, its header left behind
            mm = zooms[2::-1]
            ways.append((False, order, mm, odd_stack(shape, mm)))
    return ways


def choose(source, array, zooms, spacing, axes):
    """Of candidates() what a stack of slices can be: its axes, mm and warnings. DataError where there is none."""
    ways = candidates(array, zooms, spacing, axes)
    sound = [way[:3] for way in ways if not way[3]]
    if spacing and not sound:                                        # the user's word
        _, order, mm, doubt = ways[0]
        return order, mm, [doubt]
    scores = {order: 0.0 for _, order, _ in sound}
    if array.ndim == 4 and not axes:
        scores = {order: contrast(as_frames(array, order)) for order in scores}
        sound = [way for way in sound if scores[way[1]] > -0.02]     # noise
    if not sound:
        text = next((way[3] for way in ways if way[3]), "time is not where the header has it")
        raise DataError(f"{source}: {text}; {ASK} {'xytz' if array.ndim == 4 else 'zyx'} if the array lies so, "
                        "and save a cine as (x, y, z, t)")

    def preference(way):                                             # square pixels, then the header, then the images
        as_told, order, (_, y, x) = way
        return abs(y - x) > 0.02 * x, not as_told, -scores[order]
    as_told, order, mm = min(sound, key=preference)
    note = f"read as {order}, slices {mm[0]:g} mm apart, against the header's order: look at the overlay"
    return order, mm, [] if as_told else [note]


def read_scan(source, spacing=None, axes=None):
    """NIfTI -> Scan. spacing: (z, y, x) in mm, axes: the array's, as "xyzt", where the user knows better than the
    header. Raises DataError: unreadable, or nothing that a short-axis stack can be."""
    array, zooms, nifti = data_prep.load_nifti(source, judged=False)
    refuse_labels(source, array)
    array, warnings = array.T, []                                    # in the file's order of axes
    if array.ndim == 4 and array.shape[3] == 1 and len(axes or "") < 4:
        array = array[..., 0]
    if axes and len(axes) > array.ndim:
        axes = axes.replace("t", "")
    if axes and len(axes) != array.ndim:
        raise DataError(f"{source}: has {array.ndim} axes, --axes {axes} names {len(axes)}; name each once")
    zooms = spacing[::-1] if spacing else header_spacing(source, zooms[::-1], nifti)
    plane = odd_stack((1, *array.shape[1::-1]), (1, *zooms[1::-1]))
    zooms = (*zooms, *(float(z) for z in nifti.header.get_zooms()[3:4]))
    if array.ndim == 3 and not (axes or plane) and (found := unfold(array.T)):
        axes, turned = found
        array = turned.T
        frames, slices = as_frames(array, axes).shape[:2]
        if slices == 1:
            raise DataError(f"{source}: its {frames} slices are as alike as the frames of a cine; give --axes xyt "
                            "and --spacing Z Y X if they are, --axes xyz if not")
        zooms = (*zooms[:3], zooms[2])
        warnings.append(f"read as {frames} frames of {slices} slices, told by the images: look at the curve")
    elif array.ndim == 3 and not axes and repeats(array.T):
        raise DataError(f"{source}: holds slices several times, as frames do; save a cine as (x, y, z, t), or give "
                        "--axes xyz if they are one stack")
    order, mm, more = choose(source, array, zooms, spacing, axes)
    if "z" not in order and not spacing:
        more.append("thickness of the slice not told: volumes and mass are for 1 mm; give --spacing Z Y X")
    return Scan(np.ascontiguousarray(as_frames(array, order)), mm, nifti, order, warnings + more)
