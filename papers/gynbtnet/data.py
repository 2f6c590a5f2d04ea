"""Draws the sets of phantoms, or cuts up the real CT: images in HU and labels, one set a purpose.

Files of `data/`: `<set>_images.npy`, int16 HU [cases, X, Y, Z]; `<set>_labels.npy`, uint8; `sets.json`, their spacing,
normalization and digest. Sets: `unlabeled` and `unlabeled_held_out` of the first stage, `multi_organ` of the second,
`brachytherapy` of the third, and what is tested on, `test`.

Files of the real CT, in `$REPRISE_DATA/gynbtnet/`: `example_ct.nii.gz`, and `example_ct_sm.nii.gz`, its uppermost
slices, with `example_seg.nii.gz`, their labels. These are predictions of TotalSegmentator, not contours of physicians.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.config import Stage, UserError, data_root
from shared.data.volumes import Normalization, fit_normalization, read_labels, read_volume, resample
from shared.files import atomic_path, write_json
from shared.training import Job, run_jobs
from shared.training.parallel import Report

from .config import (
    BRACHYTHERAPY_CLASSES,
    MULTI_ORGAN_CLASSES,
    NUM_REAL_CLASSES,
    REAL_CLASSES,
    Params,
    PhantomData,
    RealData,
)
from .phantom import CODE, Grid, Kind, phantom

Images = NDArray[np.int16]
Labels = NDArray[np.uint8]

SETS = ("unlabeled", "unlabeled_held_out", "multi_organ", "brachytherapy", "test")
KINDS: dict[str, Kind] = {
    "unlabeled": "unlabeled",
    "unlabeled_held_out": "unlabeled",
    "multi_organ": "multi_organ",
    "brachytherapy": "brachytherapy",
    "test": "brachytherapy",
}
PHANTOMS_A_JOB = 20
AIR = -1000
SCANS = ("example_ct.nii.gz", "example_ct_sm.nii.gz", "example_seg.nii.gz")


@dataclass(frozen=True)
class CaseSet:
    """Images in HU and labels of some cases, [cases, X, Y, Z] each; labels are None where there are none."""

    images: Images
    labels: Labels | None

    def first(self, cases: int) -> CaseSet:
        """The first cases, so that a smaller training set is part of a larger one."""
        return CaseSet(self.images[:cases], None if self.labels is None else self.labels[:cases])


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote; `spacing` in mm, `digest` a SHA-256 of all sets."""

    folder: Path
    spacing: tuple[float, float, float]
    normalization: Normalization
    source: str
    digest: str

    def read(self, name: str) -> CaseSet:
        """A set, left on disk until it is looked at."""
        images, labels = (self.folder / f"{name}_{what}.npy" for what in ("images", "labels"))
        if not images.is_file():
            raise UserError(f"{images} is missing: run the stage prepare (dvc repro), in a profile that has this set")
        return CaseSet(_open(images), _open(labels) if labels.is_file() else None)


def prepare(stage: Stage[Params]) -> None:
    """Write the sets of the profile."""
    params = stage.params
    if isinstance(params.data, PhantomData):
        sets = phantom_sets(params)
        spacing, source = (params.data.spacing,) * 3, "generated: pelvis phantoms"
    else:
        sets, spacing = real_sets(params.data)
        source = "real: one abdominal CT, labels predicted by TotalSegmentator"
    digest = hashlib.sha256()
    for name in SETS:
        for what in ("images", "labels"):
            (stage.data_dir / f"{name}_{what}.npy").unlink(missing_ok=True)
    for name, cases in sets.items():
        _save(stage.data_dir / f"{name}_images.npy", cases.images, digest)
        if cases.labels is not None:
            _save(stage.data_dir / f"{name}_labels.npy", cases.labels, digest)
    labeled = sets["multi_organ"]
    assert labeled.labels is not None
    # One normalization for all stages and models: transferred weights then see the densities that they know.
    normalization = fit_normalization(labeled.images, labeled.labels > 0)
    description = {"spacing": spacing, "normalization": asdict(normalization), "source": source}
    write_json(stage.data_dir / "sets.json", description | {"digest": digest.hexdigest()})


def load(folder: Path) -> Prepared:
    """Open what `prepare` wrote to `folder`."""
    path = folder / "sets.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        spacing = tuple(described["spacing"])
        normalization = Normalization(**described["normalization"])
        return Prepared(folder, spacing, normalization, described["source"], described["digest"])
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the stage prepare first (dvc repro)") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): run the stage prepare again (dvc repro -f prepare)") from None


# --- Phantoms ---------------------------------------------------------------------------------------------------------


def phantom_sets(params: Params) -> dict[str, CaseSet]:
    """All sets of phantoms; the anatomy of a case is a function of the profile's seed, the set and its number."""
    settings = params.data
    assert isinstance(settings, PhantomData)
    jobs = [
        Job(f"{name}, {first + 1} to {min(first + PHANTOMS_A_JOB, count)}", draw_phantoms, (params, name, first, count))
        for name in SETS
        for count in [getattr(settings, name)]
        for first in range(0, count, PHANTOMS_A_JOB)
    ]
    drawn: dict[str, list[tuple[Images, Labels]]] = {name: [] for name in SETS}
    for job, result in zip(jobs, run_jobs(jobs, workers=params.workers, threads=1), strict=True):
        drawn[job.arguments[1]].append(result)
    sets = {}
    for name, parts in drawn.items():
        images, structures = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if KINDS[name] == "unlabeled":
            sets[name] = CaseSet(images, None)
        else:
            classes = MULTI_ORGAN_CLASSES if name == "multi_organ" else BRACHYTHERAPY_CLASSES
            sets[name] = CaseSet(images, relabel(structures, codes_of(classes)))
    if settings.with_real_ct:
        sets["unlabeled"] = CaseSet(np.concatenate([sets["unlabeled"].images, real_blocks(settings)]), None)
    return sets


def draw_phantoms(params: Params, name: str, first: int, count: int, report: Report) -> tuple[Images, Labels]:
    """Up to PHANTOMS_A_JOB phantoms of a set from number `first` on, with all structures as labels."""
    assert isinstance(params.data, PhantomData)
    grid = Grid(params.data.shape, (params.data.spacing,) * 3)
    images, labels = [], []
    for number in range(first, min(first + PHANTOMS_A_JOB, count)):
        image, structures = phantom((params.seed, SETS.index(name), number), grid, KINDS[name])
        images.append(image)
        labels.append(structures)
        report(len(images) / PHANTOMS_A_JOB, "")
    return np.stack(images), np.stack(labels)


def relabel(labels: NDArray[np.integer], classes: Mapping[str, tuple[int, ...]]) -> Labels:
    """Labels by the place of their class in `classes`, from 1; numbers that belong to none become 0."""
    table = np.zeros(1 + max(int(labels.max(initial=0)), *(max(codes) for codes in classes.values())), np.uint8)
    for place, codes in enumerate(classes.values(), start=1):
        table[list(codes)] = place
    return table[labels]


def codes_of(classes: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
    """Classes of structures of the phantom, by the numbers of these."""
    return {name: tuple(CODE[structure] for structure in structures) for name, structures in classes.items()}


# --- The real CT ------------------------------------------------------------------------------------------------------


def real_sets(settings: RealData) -> tuple[dict[str, CaseSet], tuple[float, float, float]]:
    """The CT but for its upper end, that end, the labeled crop below and the part of it that is tested on."""
    folder = real_folder(settings.folder)
    scan = read_volume(folder / SCANS[0])
    crop = read_volume(folder / SCANS[1])
    labels = read_labels(folder / SCANS[2], range(NUM_REAL_CLASSES + 1), image=crop)
    image, structures = _hu(scan.values), relabel(labels.values, REAL_CLASSES)
    cut, tested = settings.held_out_slices, settings.test_slices
    if cut >= image.shape[2] or tested >= crop.shape[2]:
        raise UserError(
            f"params.yaml keeps {cut} of {image.shape[2]} slices of {SCANS[0]} and {tested} of {crop.shape[2]} slices "
            f"of {SCANS[1]} back for testing, and nothing is left: lower held_out_slices or test_slices"
        )
    upper = _hu(crop.values)
    sets = {
        "unlabeled": CaseSet(image[None, :, :, :-cut], None),
        "unlabeled_held_out": CaseSet(image[None, :, :, -cut:], None),
        "multi_organ": CaseSet(upper[None, :, :, :-tested], structures[None, :, :, :-tested]),
        "test": CaseSet(upper[None, :, :, -tested:], structures[None, :, :, -tested:]),
    }
    return sets, scan.spacing


def real_blocks(settings: PhantomData) -> Images:
    """The real CT at the phantoms' spacing, in as many blocks of their shape as fit, [blocks, X, Y, Z]."""
    scan = read_volume(real_folder(RealData(source="real_ct").folder) / SCANS[0])
    image = _hu(resample(scan, (settings.spacing,) * 3).values)
    image = np.pad(
        image,
        [(0, max(0, side - have)) for side, have in zip(settings.shape, image.shape, strict=True)],
        constant_values=AIR,
    )
    return np.stack(list(blocks(image, settings.shape)))


def blocks(image: Images, shape: tuple[int, ...]) -> Iterator[Images]:
    """As many blocks of this shape, side by side, as fit into an image [X, Y, Z], from around its middle."""
    counts = [have // side for side, have in zip(shape, image.shape, strict=True)]
    starts = [(have - count * side) // 2 for side, have, count in zip(shape, image.shape, counts, strict=True)]
    for place in np.ndindex(*counts):
        corner = [start + index * side for start, index, side in zip(starts, place, shape, strict=True)]
        yield image[tuple(slice(at, at + side) for at, side in zip(corner, shape, strict=True))]


def real_folder(name: str) -> Path:
    """Where the files of the real CT lie; `UserError` names those that are missing."""
    folder = data_root() / name
    missing = [each for each in SCANS if not (folder / each).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: fetch the reference files of TotalSegmentator (reprise data fetch "
            "gynbtnet), or set REPRISE_DATA to the folder that holds gynbtnet/"
        )
    return folder


def _hu(values: NDArray[Any]) -> Images:
    return np.clip(np.rint(values), -1024, 3071).astype(np.int16)


def _save(path: Path, array: NDArray[Any], digest: Any) -> None:
    digest.update(f"{path.name}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array))
    with atomic_path(path) as temporary:
        np.save(temporary, array)


def _open(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): run the stage prepare again (dvc repro -f prepare)") from None
