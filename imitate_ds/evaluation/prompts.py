"""What radiologists write when a finding is there, and when it is not: prompts for zero-shot classification."""

from collections.abc import Iterable

# label -> (texts that affirm it, texts that deny it); an ensemble each, averaged by the model
PROMPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "atelectasis": (
        ("Atelectasis.", "Bibasilar atelectasis.", "Linear opacity consistent with subsegmental atelectasis."),
        ("No atelectasis.", "The lungs are well expanded and clear."),
    ),
    "cardiomegaly": (
        ("Cardiomegaly.", "The heart is enlarged.", "The cardiac silhouette is enlarged."),
        ("No cardiomegaly.", "The heart is normal in size.", "Heart size is within normal limits."),
    ),
    "consolidation": (
        ("Consolidation.", "Focal airspace consolidation.", "There is a consolidation in the lung."),
        ("No consolidation.", "No focal airspace consolidation.", "The lungs are clear."),
    ),
    "device": (
        ("Support device in place.", "A central venous catheter is in place.", "A pacemaker is seen."),
        ("No support device.", "No tubes, lines or catheters."),
    ),
    "edema": (
        ("Pulmonary edema.", "Interstitial edema and vascular congestion."),
        ("No pulmonary edema.", "Pulmonary vascularity is normal."),
    ),
    "effusion": (
        ("Pleural effusion.", "There is a pleural effusion.", "Blunting of the costophrenic angle by effusion."),
        ("No pleural effusion.", "The costophrenic angles are sharp."),
    ),
    "emphysema": (
        ("Emphysema.", "Hyperexpanded lungs with flattened diaphragms, consistent with emphysema."),
        ("No emphysema.", "Lung volumes are normal."),
    ),
    "enlarged cardiomediastinum": (
        ("Enlarged cardiomediastinum.", "The mediastinum is widened.", "The cardiomediastinal silhouette is enlarged."),
        ("The cardiomediastinal silhouette is normal.", "The mediastinal contours are within normal limits."),
    ),
    "fracture": (
        ("Fracture.", "There is a rib fracture."),
        ("No fracture.", "No acute bony abnormality.", "The bony structures are intact."),
    ),
    "granuloma": (
        ("Granuloma.", "Calcified granuloma.", "Evidence of prior granulomatous disease."),
        ("No granuloma.", "The lungs are clear."),
    ),
    "nodule": (
        ("Nodule.", "Pulmonary nodule.", "There is a nodule in the lung."),
        ("No nodule.", "No pulmonary nodule or mass.", "The lungs are clear."),
    ),
    "lung lesion": (
        ("Lung lesion.", "There is a nodule in the lung.", "There is a mass in the lung."),
        ("No lung lesion.", "No pulmonary nodule or mass."),
    ),
    "mass": (
        ("Mass.", "There is a mass in the lung."),
        ("No mass.", "No pulmonary nodule or mass."),
    ),
    "normal": (
        ("No acute cardiopulmonary abnormality.", "Normal chest radiograph.", "No acute disease."),
        ("Abnormal chest radiograph.", "There is an acute cardiopulmonary abnormality."),
    ),
    "opacity": (
        ("Opacity.", "Airspace opacity.", "There is an opacity in the lung."),
        ("No opacity.", "No focal airspace opacity.", "The lungs are clear."),
    ),
    "pneumonia": (
        ("Pneumonia.", "Findings consistent with pneumonia."),
        ("No pneumonia.", "No evidence of pneumonia."),
    ),
    "pneumothorax": (
        ("Pneumothorax.", "There is a pneumothorax."),
        ("No pneumothorax.", "No evidence of pneumothorax."),
    ),
}

# names that collections use for the same thing
ALIASES = {
    "pleural effusion": "effusion",
    "lung opacity": "opacity",
    "infiltrate": "opacity",
    "infiltration": "opacity",
    "support devices": "device",
    "support device": "device",
    "no finding": "normal",
    "enlarged heart": "cardiomegaly",
    "pulmonary edema": "edema",
    "oedema": "edema",
}


# labels that no wording affirms: whatever is left over
NO_WORDING = frozenset({"pleural other"})


def prompts_for(labels: Iterable[str]) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """For each label, texts that affirm and texts that deny it; "X." and "No X." where we have no better wording.

    Labels of NO_WORDING are left out.
    """
    return {label: _prompts(label) for label in labels if _words(label) not in NO_WORDING}


def _words(label: str) -> str:
    return label.replace("_", " ").strip().lower()


def _prompts(label: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    words = _words(label)
    return PROMPTS.get(ALIASES.get(words, words)) or ((f"{words.capitalize()}.",), (f"No {words}.",))
