"""Whom the guarantee protects."""

from __future__ import annotations

import enum

NEIGHBORING_RELATION = "ADD_OR_REMOVE_ONE"  # the only one offered; dp-accounting's name


class PrivacyUnit(enum.Enum):
    """One item of the training set. All images of a patient are one item when the unit is PATIENT."""

    PATIENT = "patient"
    IMAGE = "image"
