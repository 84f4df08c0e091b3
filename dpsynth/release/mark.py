"""Words and tags by which a released image says that it is synthetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dpsynth.privacy.guarantee import Guarantee

DISCLOSURE = """\
These images are SYNTHETIC. They were drawn by a computer program; none of them was taken of a person.

They must not be used for diagnosis, and must not be presented as images of patients. Every file is marked as synthetic in its
own format; the marks can be lost when a file is converted, so keep this notice and the manifest with the images.
"""

_DETECTING = """\
## Recognising these images

`dpsynth detect FOLDER IMAGES --key signing.pub` gives the probability that images whose marks were lost are synthetic, by `detector.json`,
which was trained without any image of a patient. How often it is right on generators that it had not seen, and what it cannot do, is
written in that file. The signature and the marks are evidence; a probability is not.

"""

_ASKING_EACH_SITE = """

Several hospitals trained this. Get the key of at least one from the hospital itself, and name each that you have with
`--site-key NAME=FILE`: otherwise neither made-up hospitals nor a folder from which all were taken out can be told from this one.\
"""


def marking(*, release_id: str, index: int, label: str, attributes: Mapping[str, str], guarantee: Guarantee) -> dict[str, str]:
    """Text that goes into an image file."""
    return {
        "Synthetic": "YES",
        "Disclosure": "Synthetic image drawn by a generative model; not for diagnostic use",
        "Software": "dpsynth",
        "Release": release_id,
        "Sample": f"{index:06d}",
        "Label": label,
        **({"Attributes": ", ".join(f"{name} {value}" for name, value in attributes.items())} if attributes else {}),
        "Privacy": f"epsilon {guarantee.epsilon:.3f}, delta {guarantee.delta:.3g}, per {guarantee.unit.value}",
    }


def data_card(
    *,
    title: str,
    licence: str,
    contact: str,
    classes: Sequence[str],
    counts: Mapping[str, int],
    attributes: Mapping[str, Mapping[str, int]],
    guarantee: Guarantee,
    method: str,
    detector: bool = False,
    sites: Sequence[str] = (),
) -> str:
    """README.md of a release. counts: images by class; attributes: by name images by value; sites: a line each, when several trained."""
    tables = "".join(
        f"\n| {name} | images |\n|---|---|\n" + "".join(f"| {value} | {number} |\n" for value, number in sorted(numbers.items()))
        for name, numbers in attributes.items()
    )
    arrays = "".join(f", `train_{name}`" for name in attributes)
    files = "labels and attributes" if attributes else "labels"
    rows = "\n".join(f"| {name} | {counts[name]} |" for name in classes)
    hospitals = "\n## Sites\n\n" + "".join(f"- {line}\n" for line in sites) if sites else ""
    relation = guarantee.neighboring_relation.lower().replace("_", " ")
    return f"""\
# {title}

{sum(counts.values())} synthetic images, drawn by a computer program; none was taken of a person. Not for diagnosis.

## Privacy

{guarantee.sentence()}

Protected unit: {guarantee.unit.value}; neighbouring data sets differ by {relation}.
What is not claimed is in `report.html`.
{hospitals}
## Images

Method: {method}.

| class | images |
|---|---|
{rows}
{tables}
`synthetic.npz` has the layout of MedMNIST: `train_images`, `train_labels`{arrays} (the other splits are empty). `images/` holds the same
images as files, `labels.csv` their {files}.

```python
import numpy as np
arrays = np.load("synthetic.npz")
images, labels = arrays["train_images"], arrays["train_labels"]
```

{_DETECTING if detector else ""}## Checking this folder

`dpsynth verify FOLDER --key signing.pub` tells whether it is complete and unchanged since the releasing site signed it. Get the
key from the site, not from this folder.{_ASKING_EACH_SITE if sites else ""}

Licence: {licence}. Contact: {contact or "the releasing site"}.
"""
