"""Writes the findings and the impression of a phantom from a small grammar.

As in real collections: most normal studies read alike word for word, some sections are missing, some wording hedges, and
what is not there is said to be absent.
"""

import numpy as np

from imitate_ds.data.sources.phantom_case import Case, Lesion

MOST_SENTENCES = 5
NO_FINDINGS_SHARE, NO_IMPRESSION_SHARE = 0.08, 0.03
STANDARD_NORMAL_IMPRESSION_SHARE = 0.75
STANDARD_NORMAL_IMPRESSION = "No acute cardiopulmonary abnormality."
OTHER_NORMAL_IMPRESSIONS = (
    "No acute cardiopulmonary process.",
    "Normal chest radiograph.",
    "No evidence of active disease.",
    "Unremarkable chest.",
)
NORMAL_FINDINGS = (
    "The heart is normal in size. The mediastinum is unremarkable. The lungs are clear.",
    "The cardiomediastinal silhouette is within normal limits. The lungs are clear. No pleural effusion or pneumothorax.",
    "Heart size is normal. No focal consolidation. No pleural effusion or pneumothorax. Bony structures are intact.",
    "Lungs are clear bilaterally. There is no focal consolidation, pleural effusion or pneumothorax.",
    "Cardiac and mediastinal contours are normal. The lungs are well expanded and clear. No pleural effusion or "
    "pneumothorax. No acute osseous abnormality.",
)
_NORMAL_HEART = (
    "The heart is normal in size.",
    "Heart size is within normal limits.",
    "The cardiac silhouette is not enlarged.",
    "The cardiomediastinal silhouette is normal.",
)
_CLEAR_LUNGS = ("The lungs are clear.", "No focal consolidation.")
_OTHERWISE_CLEAR = ("The lungs are otherwise clear.", "No focal consolidation.")
_PLEURAL = (("pleural effusion", "effusion"), ("pneumothorax", "pneumothorax"))

# Words in braces are those of _words; with a capital they begin a sentence
_FINDINGS = {
    "cardiomegaly": (
        "The heart is {degree} enlarged.",
        "There is {extent} cardiomegaly.",
        "{Extent} enlargement of the cardiac silhouette.",
        "Cardiac silhouette is {degree} enlarged.",
    ),
    "effusion": (
        "There is a {size} {side} pleural effusion.",
        "{Size} {side} pleural effusion with blunting of the costophrenic angle.",
        "Blunting of the {side} costophrenic angle consistent with a {size} pleural effusion.",
        "A {size} pleural effusion is present on the {side}.",
    ),
    "pneumothorax": (
        "There is a {size} {side} pneumothorax.",
        "{Size} {side} pneumothorax with a visible pleural line.",
        "A {size} {side} apical pneumothorax is noted.",
        "Absent lung markings at the {side} apex, in keeping with a {size} pneumothorax.",
    ),
    "consolidation": (
        "There is {patch} in the {side} {zone} lung zone.",
        "{Side} {zone} zone airspace opacity consistent with {patch}.",
        "{Patch} is seen in the {side} {zone} lung.",
        "Airspace disease in the {side} {zone} zone with {patch}.",
    ),
    "nodule": (
        "There is a {nodule} in the {side} {zone} lung zone.",
        "Rounded {nodule} projects over the {side} {zone} lung.",
        "A well-defined {nodule} is seen in the {side} {zone} zone.",
    ),
    "atelectasis": (
        "{Plates} in the {side} {zone} lung zone.",
        "Linear opacities in the {side} {zone} lung, compatible with {extent} atelectasis.",
        "There is {extent} {side} {zone} zone atelectasis.",
        "Bandlike opacity at the {side} {zone} zone reflects {extent} atelectasis.",
    ),
}
_HEDGED = {
    "cardiomegaly": ("Possible {extent} cardiomegaly.", "The heart may be {degree} enlarged."),
    "effusion": (
        "Possible {size} {side} pleural effusion.",
        "Findings may represent a {size} {side} pleural effusion.",
    ),
    "pneumothorax": ("Possible {size} {side} pneumothorax.", "Questionable {size} {side} apical pneumothorax."),
    "consolidation": (
        "Possible {patch} in the {side} {zone} lung zone.",
        "{Side} {zone} zone opacity may represent consolidation.",
    ),
    "nodule": (
        "Possible {nodule} in the {side} {zone} lung zone.",
        "Questionable {nodule} over the {side} {zone} lung.",
    ),
    "atelectasis": (
        "Possible {extent} atelectasis in the {side} {zone} lung zone.",
        "Linear {side} {zone} zone opacity, probably atelectasis.",
    ),
}
_IMPRESSIONS = {
    "cardiomegaly": ("{Extent} cardiomegaly.", "Cardiomegaly.", "Enlarged heart."),
    "effusion": ("{Size} {side} pleural effusion.", "{Side} pleural effusion, {size}."),
    "pneumothorax": ("{Size} {side} pneumothorax.", "{Side} pneumothorax, {size}."),
    "consolidation": (
        "{Side} {zone} zone consolidation.",
        "{Side} {zone} lung consolidation, concerning for pneumonia.",
        "{Side} {zone} zone pneumonia.",
    ),
    "nodule": ("{Nodule} of the {side} {zone} lung.", "{Nodule} in the {side} {zone} zone. Recommend CT."),
    "atelectasis": ("{Side} {zone} zone atelectasis.", "{Extent} {side} atelectasis."),
}
_DEVICE_FINDINGS = {
    "pacemaker": (
        "A {side}-sided pacemaker is in place with leads over the heart.",
        "{Side} chest wall pacemaker with intact leads.",
    ),
    "central line": (
        "A {side} central venous catheter terminates in the superior vena cava.",
        "{Side} central line with its tip over the superior vena cava.",
    ),
    "ECG leads": ("ECG leads overlie the chest.", "Monitoring leads project over the thorax."),
    "endotracheal tube": (
        "An endotracheal tube and an enteric tube are in place.",
        "Endotracheal tube tip lies above the carina; enteric tube courses below the diaphragm.",
    ),
}
_DEVICE_IMPRESSIONS = {
    "pacemaker": "{Side} pacemaker in place.",
    "central line": "{Side} central venous catheter in satisfactory position.",
    "ECG leads": "",  # nobody concludes on a wire
    "endotracheal tube": "Support tubes in satisfactory position.",
}


def write_report(case: Case) -> tuple[str, str]:
    """Findings and impression; "" for a section that is missing, never both."""
    rng = case.stream("report")
    missing = rng.random()
    findings = _write_findings(case.lesions, rng)
    impression = _write_impression(case.lesions, rng)
    if missing < NO_FINDINGS_SHARE:
        return "", impression
    return findings, "" if missing > 1 - NO_IMPRESSION_SHARE else impression


def _write_findings(lesions: tuple[Lesion, ...], rng: np.random.Generator) -> str:
    if not lesions:
        return _pick(NORMAL_FINDINGS, rng)
    kinds = {lesion.kind for lesion in lesions}
    positive = [_describe(group, rng) for group in _groups(lesions)]
    heart = [] if "cardiomegaly" in kinds else [_pick(_NORMAL_HEART, rng)]
    negatives = []
    if not kinds & {"consolidation", "nodule", "atelectasis"}:
        negatives.append(_pick(_OTHERWISE_CLEAR if kinds & {"effusion", "pneumothorax"} else _CLEAR_LUNGS, rng))
    absent = [words for words, kind in _PLEURAL if kind not in kinds]
    if absent:
        negatives.append(f"No {' or '.join(absent)}.")
    sentences = heart + positive + negatives
    return " ".join(sentences[:MOST_SENTENCES])  # what is cut is a negative: at most three kinds are found


def _write_impression(lesions: tuple[Lesion, ...], rng: np.random.Generator) -> str:
    standard = rng.random() < STANDARD_NORMAL_IMPRESSION_SHARE
    if not lesions:
        return STANDARD_NORMAL_IMPRESSION if standard else _pick(OTHER_NORMAL_IMPRESSIONS, rng)
    sentences = [_conclude(group, rng) for group in _groups(lesions)]
    if {lesion.kind for lesion in lesions} == {"device"}:
        sentences.append(STANDARD_NORMAL_IMPRESSION)
    return " ".join(filter(None, sentences))


def _groups(lesions: tuple[Lesion, ...]) -> list[tuple[Lesion, ...]]:
    """Lesions by kind, in the order in which they came."""
    kinds = dict.fromkeys(lesion.kind for lesion in lesions)
    return [tuple(lesion for lesion in lesions if lesion.kind == kind) for kind in kinds]


def _describe(group: tuple[Lesion, ...], rng: np.random.Generator) -> str:
    lesion = group[0]
    if lesion.kind == "device":
        return _fill(_pick(_DEVICE_FINDINGS[lesion.device], rng), lesion)
    if len(group) == 2:
        return _bilateral(group, "Possible bilateral" if lesion.uncertain else "There are bilateral")
    return _fill(_pick((_HEDGED if lesion.uncertain else _FINDINGS)[lesion.kind], rng), lesion)


def _conclude(group: tuple[Lesion, ...], rng: np.random.Generator) -> str:
    lesion = group[0]
    if lesion.kind == "device":
        return _fill(_DEVICE_IMPRESSIONS[lesion.device], lesion)
    if len(group) == 2:
        return _bilateral(group, "Possible bilateral" if lesion.uncertain else "Bilateral")
    sentence = _fill(_pick(_IMPRESSIONS[lesion.kind], rng), lesion)
    return f"Possible {sentence[0].lower()}{sentence[1:]}" if lesion.uncertain else sentence


def _bilateral(group: tuple[Lesion, ...], opening: str) -> str:
    sizes = {lesion.side: _words(lesion)["size"] for lesion in group}
    if sizes["right"] == sizes["left"]:
        return f"{opening} {sizes['right']} pleural effusions."
    return f"{opening} pleural effusions, {sizes['right']} on the right and {sizes['left']} on the left."


def _words(lesion: Lesion) -> dict[str, str]:
    s = lesion.severity
    words = {
        "side": lesion.side,
        "zone": lesion.zone,
        "size": ("small", "moderate", "large")[s],
        "degree": ("mildly", "moderately", "severely")[s],
        "extent": ("mild", "moderate", "severe")[s],
        "patch": ("patchy consolidation", "moderate consolidation", "dense extensive consolidation")[s],
        "nodule": ("small nodule", "nodule", "large nodule")[s],
        "plates": ("Subsegmental atelectasis", "Plate-like atelectasis", "Multiple bands of atelectasis")[s],
    }
    return words | {word.capitalize(): text[:1].upper() + text[1:] for word, text in words.items()}


def _fill(template: str, lesion: Lesion) -> str:
    return template.format(**_words(lesion))


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
