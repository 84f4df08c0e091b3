"""What an audit found."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class Kind(enum.Enum):
    """What kind of fault. The value says whether the decision looks at one patient alone, or compares patients."""

    UNUSABLE = "cannot be read or shows nothing"
    PERMISSION = "without permission"
    CLASS = "label that is none of the classes"
    VALUE = "no declared value of an attribute"
    TEXT = "text burned in"
    DOUBLE = "near-duplicate images of different patients"
    PERSON = "probably one person under two ids"
    LABEL = "suspicious label"

    @property
    def compares_patients(self) -> bool:
        """Whether leaving an image out for it depends on other patients, so that the guarantee no longer covers the choice."""
        return self in (Kind.DOUBLE, Kind.PERSON, Kind.LABEL)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault. `images`: names of the images that show it; `proposed`: those that would have to be left out to end it; `rows`: of
    the pictures to show, in the decoded images."""

    kind: Kind
    images: tuple[str, ...]
    proposed: tuple[str, ...]
    detail: str
    rows: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the site's own file."""
        return {"kind": self.kind.name.lower(), "images": list(self.images), "proposed": list(self.proposed), "detail": self.detail}
