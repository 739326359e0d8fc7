"""What a chest phantom shows: one patient's anatomy, one study's pose, exposure and findings, drawn from (seed, number).

Nothing is rendered here. Every study is a pure function of (seed, number), so that any worker can make any study in any
order. Coordinates are those of the body frame: x to the image's right (the patient's left), y down, the film about [-1, 1]².
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

LABELS = (
    "atelectasis",
    "cardiomegaly",
    "consolidation",
    "device",
    "effusion",
    "nodule",
    "normal",
    "pneumothorax",
)
SIDES = ("right", "left")  # the patient's; "right" is drawn on the left of the image
ZONES = ("upper", "mid", "lower")
DEVICES = ("pacemaker", "central line", "ECG leads", "endotracheal tube")
DEVICE_SHARES = (0.28, 0.32, 0.20, 0.20)

NORMAL_SHARE = 0.38
# How often each kind is drawn first in an abnormal study; effusion and pneumothorax come first so that they get a free side
KIND_WEIGHTS = {
    "effusion": 0.19,
    "pneumothorax": 0.13,
    "cardiomegaly": 0.19,
    "consolidation": 0.17,
    "atelectasis": 0.13,
    "nodule": 0.12,
    "device": 0.22,
}
KINDS_PER_STUDY = (0.50, 0.35, 0.15)  # one, two, three kinds
SEVERITY_SHARES = (0.35, 0.40, 0.25)  # small, moderate, large
BILATERAL_EFFUSION_SHARE = 0.25
UNCERTAIN_SHARE = 0.15

# Of every 23 studies, 18 are the only one of their patient, 2 are of one patient and 3 of another: 10 % of patients return
PATIENTS_PER_BLOCK, STUDIES_PER_BLOCK = 20, 23

_PATIENT_STREAM, _STUDY_STREAM, _LESION_STREAM, _NOISE_STREAM, _REPORT_STREAM = range(5)


@dataclass(frozen=True)
class Lesion:
    """One abnormality. Side and zone are "" where they make no sense (cardiomegaly, device)."""

    kind: str
    side: str = ""
    zone: str = ""
    severity: int = 0  # 0 small, 1 moderate, 2 large
    uncertain: bool = False  # the report hedges; the picture and the label do not
    device: str = ""


@dataclass(frozen=True)
class Anatomy:
    """What stays with a patient. Lengths in body-frame units, absorption between 0 (air) and 1 (bone)."""

    body_width: float
    lung_width: float  # half width of the rib cage
    apex: float  # y of the lung tips
    right_dome: float  # y of the top of each diaphragm dome
    left_dome: float
    mediastinum: float  # half width
    heart_ratio: float  # cardiothoracic ratio while healthy
    rib_spacing: float
    rib_offset: float
    rib_slope: float
    rib_contrast: float
    clavicle_slope: float
    breast: float  # absorption of the breast shadows; 0 for none
    stomach_bubble: float
    vessel_template: int
    vessel_contrast: float


@dataclass(frozen=True)
class Case:
    """Everything that the picture, the masks and the report of one study are made from."""

    seed: int
    number: int
    patient: int
    anatomy: Anatomy
    lesions: tuple[Lesion, ...]
    heart_ratio: float  # in this study, cardiomegaly included
    inspiration: float  # moves both domes down
    rotation: float  # radians
    zoom: float
    shift: tuple[float, float]
    contrast: float
    brightness: float
    gamma: float
    noise: float
    blur: float  # pixels at 256 pixels
    marker: str  # "", "L" or "R"

    def stream(self, which: str) -> np.random.Generator:
        """A generator of this study's own for "noise", "report" or, by index, a lesion's outline ("lesion0")."""
        fixed = {"noise": _NOISE_STREAM, "report": _REPORT_STREAM}
        if which in fixed:
            return np.random.default_rng((self.seed, self.number, fixed[which]))
        return np.random.default_rng((self.seed, self.number, _LESION_STREAM, int(which.removeprefix("lesion"))))

    def lifted(self, side: str) -> float:
        """How far atelectasis has pulled up the diaphragm of one side: volume loss, its second sign."""
        found = [lesion.severity for lesion in self.lesions if lesion.kind == "atelectasis" and lesion.side == side]
        return sum((0.05, 0.08, 0.12)[severity] for severity in found)

    def labels(self) -> dict[str, int]:
        kinds = {lesion.kind for lesion in self.lesions} or {"normal"}
        return {name: int(name in kinds) for name in LABELS}


def patient_of(number: int) -> int:
    """The patient of a study: a closed form, so that no table of patients has to exist."""
    block, place = divmod(number, STUDIES_PER_BLOCK)
    within = place if place < 18 else 18 if place < 20 else 19
    return block * PATIENTS_PER_BLOCK + within


def sample_case(seed: int, number: int) -> Case:
    """Draws study `number` of the collection `seed`."""
    patient = patient_of(number)
    anatomy = _sample_anatomy(np.random.default_rng((seed, patient, _PATIENT_STREAM)))
    rng = np.random.default_rng((seed, number, _STUDY_STREAM))
    lesions = () if rng.random() < NORMAL_SHARE else _sample_lesions(rng)
    enlarged = next((lesion.severity for lesion in lesions if lesion.kind == "cardiomegaly"), None)
    # the healthy range reaches a little into mild cardiomegaly, as in life
    ratio = anatomy.heart_ratio if enlarged is None else 0.505 + 0.045 * enlarged + rng.uniform(0, 0.05)
    return Case(
        seed=seed,
        number=number,
        patient=patient,
        anatomy=anatomy,
        lesions=lesions,
        heart_ratio=ratio,
        inspiration=rng.uniform(-0.06, 0.05),
        rotation=rng.normal(0, 0.025),
        zoom=rng.uniform(1.0, 1.14),
        shift=(rng.normal(0, 0.025), rng.normal(0, 0.025)),
        contrast=rng.uniform(0.85, 1.15),
        brightness=rng.normal(0, 0.045),
        gamma=rng.uniform(0.8, 1.3),
        noise=rng.uniform(0.012, 0.035),
        blur=max(0.0, rng.uniform(-0.4, 0.9)),
        marker=("", "L", "R")[_draw((0.4, 0.35, 0.25), rng)],
    )


def _draw(shares: Iterable[float], rng: np.random.Generator) -> int:
    """An index with the given shares, which sum to one; ten times quicker than `rng.choice`."""
    place = rng.random()
    return next((i for i, total in enumerate(accumulate(shares)) if place < total), 0)


def _sample_anatomy(rng: np.random.Generator) -> Anatomy:
    right_dome = rng.uniform(0.42, 0.52)
    return Anatomy(
        body_width=rng.uniform(0.94, 1.08),
        lung_width=rng.uniform(0.70, 0.79),
        apex=rng.uniform(-0.84, -0.76),
        right_dome=right_dome,
        left_dome=right_dome + rng.uniform(0.03, 0.09),
        mediastinum=rng.uniform(0.13, 0.18),
        heart_ratio=rng.uniform(0.40, 0.51),
        rib_spacing=rng.uniform(0.155, 0.185),
        rib_offset=rng.uniform(0, 1),
        rib_slope=rng.uniform(0.85, 1.2),
        rib_contrast=rng.uniform(0.05, 0.09),
        clavicle_slope=rng.uniform(-0.05, 0.14),
        breast=rng.uniform(0.03, 0.08) if rng.random() < 0.4 else 0.0,
        stomach_bubble=rng.uniform(0.1, 0.25) if rng.random() < 0.6 else 0.0,
        vessel_template=int(rng.integers(1 << 16)),
        vessel_contrast=rng.uniform(0.12, 0.24),
    )


def _sample_lesions(rng: np.random.Generator) -> tuple[Lesion, ...]:
    """One to three kinds, each where there is still room: no lesion hides behind an effusion or in a collapsed lung."""
    names = list(KIND_WEIGHTS)
    weights = np.array(list(KIND_WEIGHTS.values()))
    count = 1 + _draw(KINDS_PER_STUDY, rng)
    chosen = {str(name) for name in rng.choice(names, size=count, replace=False, p=weights / weights.sum())}
    free = {(side, zone) for side in SIDES for zone in ZONES}
    lesions: list[Lesion] = []
    for kind in (name for name in names if name in chosen):
        lesions.extend(_place(kind, free, rng))
    return tuple(lesions)


def _place(kind: str, free: set[tuple[str, str]], rng: np.random.Generator) -> list[Lesion]:
    """Lesions of one kind; takes what they occupy out of `free`. Empty where no room is left."""
    severity, uncertain = _draw(SEVERITY_SHARES, rng), bool(rng.random() < UNCERTAIN_SHARE)
    if kind == "cardiomegaly":
        return [Lesion(kind, severity=severity, uncertain=uncertain)]
    if kind == "device":
        return [Lesion(kind, side=SIDES[int(rng.integers(2))], device=DEVICES[_draw(DEVICE_SHARES, rng)])]
    if kind == "effusion":
        other = _draw(SEVERITY_SHARES, rng)
        if rng.random() < BILATERAL_EFFUSION_SHARE:
            return [_effusion(*pair, uncertain, free) for pair in zip(SIDES, (severity, other), strict=True)]
        return [_effusion(SIDES[int(rng.integers(2))], severity, uncertain, free)]
    if kind == "pneumothorax":
        return _pneumothorax(severity, uncertain, free, rng)
    zones = ("mid", "lower", "lower") if kind == "atelectasis" else ZONES
    places = sorted((side, zone) for side in SIDES for zone in zones if (side, zone) in free)
    if not places:
        return []
    side, zone = places[int(rng.integers(len(places)))]
    free.discard((side, zone))
    return [Lesion(kind, side, zone, severity, uncertain)]


def _effusion(side: str, severity: int, uncertain: bool, free: set[tuple[str, str]]) -> Lesion:
    free.difference_update((side, zone) for zone in (ZONES[2:], ZONES[1:], ZONES)[severity])
    return Lesion("effusion", side, "lower", severity, uncertain)


def _pneumothorax(severity: int, uncertain: bool, free: set[tuple[str, str]], rng: np.random.Generator) -> list[Lesion]:
    """Needs a side with nothing on it, and keeps the side to itself."""
    sides = [side for side in SIDES if all((side, zone) in free for zone in ZONES)]
    if not sides:
        return []
    side = sides[int(rng.integers(len(sides)))]
    free.difference_update((side, zone) for zone in ZONES)
    return [Lesion("pneumothorax", side, "upper", severity, uncertain)]
