"""What the README.md of an export says: of what the model was made, what it is for, and what it is not for."""

from collections.abc import Mapping
from typing import Any

CARD_FIELDS = ("data", "synthetic", "image_size")  # of a pre-trained model

LSA_LICENCE = """`text_encoder/terms.json` holds words and pairs of words that occur in the training reports, so this folder
falls under the licence of the training data.
"""


def pretrained_card(settings: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    synthetic = "**synthetic** (procedural phantoms, no patients)" if settings["synthetic"] else "radiographs of people"
    licence = card.get("licence", "follows the terms of the training data, which you must read before sharing them")
    words = LSA_LICENCE if (settings["text_encoder"] or {}).get("kind") == "lsa" else ""
    facts = {k: v for k, v in card.items() if k not in (*CARD_FIELDS, "licence")}
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    channels = "" if settings["model"]["in_chans"] == 3 else ", with `in_chans=1`"
    return f"""---
license: other
library_name: imitate-ds
tags: [chest-x-ray, vision-language, imitate]
---
# {settings["model"]["image_encoder"]}, pre-trained by imitate-ds

Hierarchical vision-language pre-training of a chest X-ray encoder, after "IMITATE: Clinical Prior Guided Hierarchical
Vision-Language Pre-training" (Liu et al., 2025). Preset `{settings["preset"]}`.

**Not for clinical use.** A research artefact: not a medical device, not validated for diagnosis, triage or treatment.

| | |
|---|---|
| training data | {settings["data"]}: {synthetic} |
| highest level aligned with | {settings["impression_text"]} |
| radiographs stored at | {card["image_size"]} x {card["image_size"]} grey |
| encoder input | {settings["input_size"]} x {settings["input_size"]} |
{rows}
## Intended use
Research on representations of frontal chest radiographs: linear probes, fine-tuning, retrieval, prompted classification.
It sees frontal views only, knows the population and the reporting habits of its training data and nothing else, and
inherits their errors.

## Licence
Program: Apache-2.0. Weights: {licence}.
{words}
## Use
```python
import imitate_ds
model = imitate_ds.load_model("PATH/OF/THIS/FOLDER")
v = model.encode_image(["a.dcm", "b.png"], branch="impression")
t = model.encode_text(["No pleural effusion."], section="impression")
model.similarity(v, t)
```
`image_encoder.safetensors` holds the backbone alone, under the names of `timm.create_model`{channels}.
"""


def predictor_card(settings: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    task, encoder = settings["task"], settings["model"]["image_encoder"]
    synthetic = "**synthetic** (procedural phantoms, no patients)" if settings["synthetic"] else "radiographs of people"
    rows = "".join(f"| {name} | {value} |\n" for name, value in card.items())
    return f"""---
license: other
library_name: imitate-ds
tags: [chest-x-ray, {task["kind"]}]
---
# {task["kind"].capitalize()} by {encoder}, fine-tuned by imitate-ds

**Not for clinical use.** A research artefact: not a medical device, not validated for diagnosis, triage or treatment.

| | |
|---|---|
| answers | {", ".join(settings["targets"])} |
| training data | {settings["data"]}: {synthetic} |
| encoder input | {settings["input_size"]} x {settings["input_size"]} |
{rows}
## Licence
Program: Apache-2.0. Weights follow the terms of the training data, which you must read before sharing them.

## Use
```python
import imitate_ds
predictor = imitate_ds.load_predictor("PATH/OF/THIS/FOLDER")
predictor.targets, predictor.predict(["a.dcm", "b.png"])
```
"""
