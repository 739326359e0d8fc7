"""What a figure is called in results.json, and where that puts it on the page."""

import re
from typing import NamedTuple

RETRIEVAL_METRIC = re.compile(r"(?P<row>.+?)_(?P<level>chance_|blind_)?(?P<measure>[RP]@\d+)")
MEASURES = {"auroc": "AUROC", "ap": "AP", "ap50": "AP50", "f1": "F1", "accuracy": "accuracy", "dice": "Dice"}
MEASURES |= {"blind_accuracy": "best fixed answer", "pointing": "pointing game"}
MEASURES |= {"chance_pointing": "random pixel", "blind_pointing": "best fixed pixel"}
LABEL_METRIC = re.compile(
    rf"(?:(?P<share>[^/]+%)/)?(?P<measure>{'|'.join(MEASURES)})(?:(?P<macro>_macro)|/(?P<label>.+))?"
)


class Place(NamedTuple):
    """Where a figure by label stands on the page."""

    share: str  # of the training labels, of a probe
    measure: str
    label: str

    @property
    def column(self) -> str:
        return f"{MEASURES[self.measure]}, {self.share}" if self.share else MEASURES[self.measure]


def place_of(name: str) -> Place | None:
    if not (match := LABEL_METRIC.fullmatch(name)):
        return None
    over_all = "mean of labels" if match["macro"] else "all"
    return Place(match["share"] or "", match["measure"], match["label"] or over_all)
