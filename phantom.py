"""A synthetic cohort in ACDC's raw layout, to try everything without the data: short-axis stacks of beating hearts.

    python phantom.py [OUT]                                            NIfTI and Info.cfg; OUT is data/phantom/raw
    python data_prep.py data/phantom/raw data/phantom --allow-missing  converted like any other raw release

As in the release: OUT/training and OUT/testing, patients of the split's train, val, test and official parts (the last
without annotation), ED and ES, zooms in the header beside a sform that says 1 mm, three dtypes, five groups, and a
patient090 whose ED is not the first frame. Same seed, same bytes.
"""

import argparse
import gzip
import json
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from data_prep import SPLIT, Parser, convert, exit_code, print_counts, require, run_parallel, workspace, write_atomic

MARKER = "phantom.json"  # in OUT: what the cohort was made of

ANATOMY = {  # at end-diastole: LV radius, wall, RV width (mm); then the LV's ejection fraction
    "NOR": (23, 8.5, 31, 0.62), "DCM": (31, 7.5, 30, 0.25), "HCM": (21, 14.0, 27, 0.70), "MINF": (27, 8.5, 30, 0.36),
    "RV": (22, 8.5, 42, 0.55),
}


class Chest:
    """What lies around the heart: its grey values and textures, and `behind`, the picture (Z, Y, X) without a heart.

    Each structure is a signed distance in mm, negative inside, painted over what lies behind it.
    """

    def __init__(self, rng, shape, pixel):
        self.rng, self.shape, self.pixel = rng, shape, pixel
        vary, texture = self.vary, self.texture
        z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
        self.t = t = 0.02 + 0.9 * z / (shape[0] - 1)  # (Z, 1, 1) along the long axis: 0 base, 1 apex of the ED cavity
        u, v = (x - shape[2] / 2) * pixel, (y - shape[1] / 2) * pixel  # (1, 1, X), (1, Y, 1) mm right and down
        self.bias = sum(rng.normal(0, 0.15) * f for f in (u / 100, v / 100, u * v / 1e4, u**2 / 1e4))
        tilt = rng.normal(0, 0.12)
        across, down = np.cos(tilt) * u + np.sin(tilt) * v, np.cos(tilt) * v - np.sin(tilt) * u
        self.u = u = across + vary(1.6, 0.4) * texture(11)  # (1, Y, X), nothing in a body is round
        self.v = v = down + vary(1.6, 0.4) * texture(11)
        self.fine, self.grain, self.spots, self.lumps = texture(1.2), texture(4), texture(1.7), texture(9)
        self.blood, self.muscle, self.fat = vary(0.85, 0.2), vary(0.27, 0.25), vary(0.95, 0.2)
        lung, liver = vary(0.06, 0.4), vary(0.33, 0.25)
        self.noise, self.blur = vary(0.025, 0.4), vary(0.6, 0.25)

        body = vary(118, 0.08)
        self.skin = np.hypot(u - vary(28, 0.4), (v - vary(30, 0.4)) * vary(1, 0.1)) - body + 6 * t
        layer = self.skin + vary(15, 0.45)  # under the fat
        chest = layer + 9
        diaphragm = np.maximum(chest, vary(41, 0.12) - 14 * t + (u + 10) ** 2 / 300 - v)
        left = np.maximum(diaphragm + 3, 25 - u + 6 * self.lumps)  # stomach and spleen in fat
        aorta = np.hypot(u - vary(45, 0.2), v - vary(42, 0.15)) - vary(10, 0.15)
        vessels = 5 * (1.9 - self.spots)
        self.behind = np.zeros(shape)
        for distance, value, edge in (
            (self.skin, self.fat * (1 + 0.06 * self.grain), 1),
            (layer, self.muscle * (1 + 0.2 * self.grain), 1),
            (layer + 3 + 2 * self.grain, 0.6 * self.fat, 2),
            (layer + 6 + 2 * self.grain, self.muscle, 2),
            (chest, lung * (1 + 0.3 * self.fine), 1),
            (np.maximum(chest + 4, vessels), 0.8 * self.blood, 3),
            (diaphragm, liver * (1 + 0.1 * self.fine), 1),
            (np.maximum(diaphragm + 5, vessels), 0.9 * self.blood, 3),
            (left, 0.75 * self.fat * (1 + 0.1 * self.grain), 1),
            (np.maximum(left + 4, 6 * (0.3 - self.lumps)), 0.8 * liver + 0.1 * self.fine, 2),
            (aorta, self.blood, 1),
        ):
            self.paint(self.behind, distance, value, edge)

    def vary(self, mean, part):
        return mean * self.rng.uniform(1 - part, 1 + part)

    def texture(self, mm):
        """(Y, X), mean 0, deviation 1, grains of `mm`."""
        field = ndimage.gaussian_filter(self.rng.normal(size=self.shape[1:]), mm / self.pixel)
        return (field - field.mean()) / field.std()

    def paint(self, image, distance, value, edge=1.0):
        """With `edge` pixels of partial volume."""
        image += np.clip(0.5 - distance / (self.pixel * edge), 0, 1) * (value - image)

    def expose(self, image):
        """As a scanner would show it: brighter near the coil on the chest, biased, blurred, with Rician noise."""
        image = image * np.exp(self.bias) * (0.75 + 0.6 * np.exp(np.minimum(self.skin, 0) / 45))
        image = ndimage.gaussian_filter(image, (0, self.blur, self.blur))
        return np.hypot(image + self.rng.normal(0, self.noise, self.shape), self.rng.normal(0, self.noise, self.shape))


def bump(angle, at):
    """The distance on the circle."""
    return np.abs(np.angle(np.exp(1j * (angle - at))))


def draw(rng, group, shape, pixel, beat=(0, 1)):
    """The short-axis stacks of one synthetic patient -> [(image (Z, Y, X) float, label uint8)], one per number of
    `beat`, which says how far the heart has contracted: 0 at ED, 1 at ES.

    `pixel` is mm per pixel. The LV is half an ellipsoid, base first, whose wall keeps its volume as it contracts; the
    RV is a crescent on it, gone before the apex. Papillary muscles are labelled as cavity, as in ACDC.
    """
    c = Chest(rng, shape, pixel)
    radius, wall, width, fraction = (c.vary(a, 0.1) for a in ANATOMY[group])
    u, v = c.u - 12 - rng.normal(0, 5) - 5 * c.t, c.v + 4 - rng.normal(0, 5) - 4 * c.t
    rho, phi = np.hypot(u, v), np.arctan2(v, u)  # around the LV's long axis; 0 is the lateral wall, pi the septum
    wave = 1 + sum(rng.normal(0, 0.03) * np.cos(k * phi + rng.uniform(0, 6.3)) for k in (2, 3))
    septum, span, scar = np.pi - 0.35 + rng.normal(0, 0.15), c.vary(1.45, 0.08), rng.uniform(-1.5, 1.5)
    from_septum = bump(phi, septum)
    crescent = np.where(from_septum < span, np.cos(np.minimum(from_septum / span, 1) * np.pi / 2) ** 0.75, 0)
    papillae = [(angle + rng.normal(0, 0.2), c.vary(5, 0.3)) for angle in (-1.0, 1.3)]
    groove = 4 * (np.abs(from_septum - span) < 0.35)  # fat where the ventricles meet
    rough = 0.3 * np.clip(c.spots - 0.8, 0, 1.5)  # trabeculae
    ends = (1, 1, width), (0.92, 1 - fraction, width * c.vary(0.7, 0.1))  # ED, ES
    frames = []
    for k in beat:
        length, rest, rv_width = ((1 - k) * ed + k * es for ed, es in zip(*ends, strict=True))
        inner = radius * np.sqrt(rest / length)  # the cavity's volume goes with radius^2 * length
        outer = np.sqrt(inner**2 + ((radius + wall) ** 2 - radius**2) / length)
        s = c.t / length
        endo = inner * wave * np.sqrt(np.clip(1 - s**2, 0, 1))
        epi = outer * wave * np.sqrt(np.clip(1 - (s / 1.12) ** 2, 0, 1))
        if group == "MINF":  # a thin scar
            epi = epi - 0.45 * (epi - endo) * np.exp(-((bump(phi, scar) / 0.6) ** 2))
        depth = rv_width * np.sqrt(np.clip(1 - (s / 0.9) ** 2, 0, 1))  # (Z, 1, 1)
        rv = epi + np.where(depth > 4, depth * crescent, 0)

        image = c.behind.copy()
        fat = 0.8 * c.fat * (1 + 0.1 * c.fine)
        c.paint(image, rho - rv - 3 - groove - 2 * np.clip(c.lumps + c.grain, -1, 2), fat)
        c.paint(image, rho - rv - 3 * (rv > epi), c.muscle)
        cavity = np.where(rv > epi, np.maximum(rho - rv, epi - rho), 99)
        c.paint(image, cavity, c.blood * (0.95 + 0.06 * c.grain - rough))
        c.paint(image, rho - epi, c.muscle * (1 + 0.1 * c.fine))
        c.paint(image, rho - endo, c.blood * (1 + 0.05 * c.grain - rough * (rho > 0.7 * endo)))
        for angle, size in papillae:
            size = size * np.sqrt(np.clip(1 - ((s - 0.5) / 0.4) ** 2, 0, 1)) + 0.6 * c.fine  # (Z, Y, X)
            apart = np.hypot(u - 0.72 * endo * np.cos(angle), v - 0.72 * endo * np.sin(angle))
            c.paint(image, np.where(size > 1.5, np.maximum(apart - size, rho - endo), 99), c.muscle)
        label = np.select([rho < endo, rho < epi, rho < rv], [3, 2, 1], 0).astype(np.uint8)
        frames.append((c.expose(image), label))
    return frames


def write_patient(folder, seed):
    """One raw patient as in ACDC: frames, annotation, Info.cfg; zooms in the header, a sform that says 1 mm."""
    number = int(folder.name[7:])
    rng = np.random.default_rng([seed, number])
    group, dtype = list(ANATOMY)[number % 5], (np.float32, np.int16, np.uint8)[number % 3]
    pixel, gap = rng.uniform(1.3, 1.8), float(rng.choice((8, 10)))  # mm
    shape = int(rng.integers(6, 10)), int(rng.uniform(190, 208) / pixel), int(rng.uniform(172, 190) / pixel)  # Z, Y, X
    frames = {"ED": 1, "ES": int(rng.integers(8, 13))} if number != 90 else {"ED": 4, "ES": 11}
    for (image, label), frame in zip(draw(rng, group, shape, pixel), frames.values(), strict=True):
        image = np.rint(np.clip(image / np.quantile(image, 0.998), 0, 1) * (255 if dtype == np.uint8 else 900))
        for end, array in (("", image.astype(dtype)), ("_gt", label)):
            if end and number > 100:
                continue  # the challenge's own test set, as it was before its annotation was released
            write_nifti(folder / f"{folder.name}_frame{frame:02d}{end}.nii.gz", array, (pixel, pixel, gap))
    info = {**frames, "Group": group, "Height": 170.0, "NbFrame": 25, "Weight": 70.0}
    write_atomic(folder / "Info.cfg", "".join(f"{k}: {v}\n" for k, v in info.items()).encode())


def write_cine(path, frames=10, seed=0):
    """One synthetic heart beating, (T, Z, Y, X), as a 4D NIfTI; ED is its first frame."""
    beat = np.sin(np.pi * (np.arange(frames) / frames) ** 0.8) ** 2  # systole is the shorter part
    drawn = draw(np.random.default_rng(seed), "NOR", (8, 144, 128), 1.5, beat)
    images = np.array([image for image, _ in drawn])
    images = np.rint(np.clip(images / np.quantile(images, 0.998), 0, 1) * 900).astype(np.int16)
    write_nifti(path, images, (1.5, 1.5, 10, 0.8 / frames))


def write_nifti(path, array, zooms):
    """(Z, Y, X) or (T, Z, Y, X), zooms (x, y, z) in mm (and t in s) -> as in ACDC, with a sform that says 1 mm."""
    nifti = nib.Nifti1Image(np.asfortranarray(array.T), None)
    nifti.header.set_zooms(zooms)
    nifti.header.set_sform(np.diag([-1, -1, 1, 1]), 2)
    write_atomic(path, gzip.compress(nifti.to_bytes(), 6, mtime=0))  # no date: same seed, same bytes


def make_phantom(out, patients=20, seed=0, workers=None):
    """A synthetic cohort in ACDC's raw layout, in OUT; same seed, same bytes."""
    require(6 <= patients <= 80, "--patients", f"{patients} is out of range", "give 6 to 80")
    require(seed >= 0, "--seed", f"{seed} is negative", "give 0 or more")
    out = Path(out)
    val = min(patients * 3 // 20 or 1, len(SPLIT["val"]))
    test = min(patients * 6 // 20, len(SPLIT["test"]))
    parts = {"train": patients - val - test - 2, "val": val, "test": test, "official": 1}
    names = ["patient090"]  # its ED is not the first frame
    names += [p for s, n in parts.items() for p in SPLIT[s][:n]]
    mark = json.dumps({"phantom": 1, "patients": patients, "seed": seed}).encode()
    with workspace(out, ("training", "testing", MARKER)):
        empty = all(p.name == ".lock" for p in out.iterdir())
        same = (out / MARKER).is_file() and (out / MARKER).read_bytes() == mark
        require(empty or same, out, "holds other data", "remove it or choose another OUT")
        write_atomic(out / MARKER, mark)
        jobs = [(out / ("testing" if p > "patient100" else "training") / p, seed) for p in names]
        run_parallel(write_patient, jobs, workers, "phantom")


def prepare_demo(data):
    """What train_actnet.py --demo learns from: the cohort in DATA/raw, converted in DATA -> exit code."""
    raw, start = Path(data, "raw"), time.perf_counter()

    def work():
        others = {p.name for p in Path(data).glob("*")} - {"raw", ".lock"}
        require(not others or (raw / MARKER).is_file(), data, "holds other data", "remove it or choose another --data")
        make_phantom(raw)
        print_counts(convert(raw, data, allow_missing=True))
        print(f"{data}: made in {time.perf_counter() - start:.1f} s")

    return exit_code("phantom.py", work)


# --------------------------------------------------------------------------------------------------------- command line


def main(argv=None):
    """The command line -> exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    parser = Parser(
        description="A synthetic cohort in ACDC's raw layout.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=118),
    )
    parser.add_argument("out", metavar="OUT", nargs="?", default="data/phantom/raw", help="folder [data/phantom/raw]")
    parser.add_argument("--patients", type=int, default=20, metavar="N", help="6 to 80 [20]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same bytes [0]")
    parser.add_argument("--workers", type=int, metavar="N", help="processes [one per core]")
    args = parser.parse_args(argv)
    if args.workers is not None and not 1 <= args.workers <= 64:
        parser.error("--workers: give 1 to 64")

    def work():
        start = time.perf_counter()
        make_phantom(args.out, args.patients, args.seed, args.workers)
        print(f"{args.out}: {args.patients} patients in {time.perf_counter() - start:.1f} s")

    return exit_code(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
