"""Every knob on one page: frozen settings, read from one YAML file. Unknown keys are refused with their path.

All values here are public constants: they are chosen without looking at the private images and may appear in a release.
`docs/config.md` is generated from this file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpsynth.cells import LABEL, UNKNOWN, Cells, independent_problem, target_problem
from dpsynth.errors import ConfigError
from dpsynth.privacy.calibrate import resolve_delta
from dpsynth.privacy.unit import PrivacyUnit
from dpsynth.recipe import LARGEST_SAMPLING_PROBABILITY, PART, recipe, sampling_probability

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ClipNorm = Annotated[float, Field(ge=1e-6, lt=1e6)]  # far from where float32 loses digits of gradients and noise
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
IntensityRange = tuple[float, float] | Literal["each"]
AnatomyName = Literal["chest", "brain", "organ"]  # of procedural images; organ: one solid body on dark ground, as in a crop or a mask
_FEWEST_POSITIONS, _LARGEST_PACKING = {2: 10, 3: 7}, 8


def packing(spatial_shape: tuple[int, ...]) -> int:
    """Pixels per axis that become channels of one position of the net: 2, 4 or 8, so that it works on about 10 to 20 positions per axis
    of an image, 7 to 14 of a volume, whose positions multiply faster."""
    factor = 2
    while factor < _LARGEST_PACKING and min(spatial_shape) >= 2 * factor * _FEWEST_POSITIONS[len(spatial_shape)]:
        factor *= 2
    return factor


_FINEST_LEARNT = {2: 56, 3: 28}  # by dimensions: smallest side from which images are halved before a net learns from patients


def halvings(spatial_shape: tuple[int, ...]) -> int:
    """How often the sides are halved before a net learns from patients: until the smallest is below 56, of volumes 28, while all stay even.

    What a net can learn from the patients of a hospital is the coarse image; public images teach how it is enlarged.
    """
    count = 0
    while min(spatial_shape) >= _FINEST_LEARNT[len(spatial_shape)] and not any(side % 4 for side in spatial_shape):
        spatial_shape = tuple(side // 2 for side in spatial_shape)
        count += 1
    return count


def learnt_shape(spatial_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of the images that a net learns from patients, where the whole images have these."""
    return tuple(side // 2 ** halvings(spatial_shape) for side in spatial_shape)


def finer_than_learnt(spatial_shape: tuple[int, ...]) -> str:
    """What of images with these sides no patient taught, in words; empty where patients taught all of it."""
    return f"detail finer than {list(learnt_shape(spatial_shape))}" if halvings(spatial_shape) else ""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class PhantomConfig(_Settings):
    """The built-in procedural cohort."""

    anatomy: AnatomyName = Field("chest", description="What the procedural images look like.")
    num_patients: Count = Field(600, description="Patients in the cohort.")
    max_images: Count = Field(3, description="Each patient has 1 to this many images.")
    seed: int = Field(0, ge=0, description="The same seed gives the same cohort, bit by bit.")


_LARGEST_NUMBER_OF_CELLS = 64  # each has a covariance of its own, and a patient is in few of them
_TAKEN = (LABEL, "index", "synthetic", "file", "patient_id", "images", "labels", "png", "nifti", "dicom")


class AttributeConfig(_Settings):
    """One attribute as a public list of values, of bands of numbers, or of both. A list alone stands for `values`."""

    column: str | None = Field(None, min_length=1, description="Column of table.csv, or DICOM keyword; none: the attribute's name.")
    values: tuple[Annotated[str, Field(min_length=1, max_length=40)], ...] = Field(
        (), description=f"Values as they are stored. Images without one are refused, or belong to `{UNKNOWN}` when it is listed."
    )
    bands: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = Field(
        (), description="Rising edges of bands of numbers. The lower edge belongs to a band, the upper to the next; the last has both."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: object) -> object:
        return {"values": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _consistent(self) -> AttributeConfig:
        if len(self.bands) == 1 or any(low >= high for low, high in itertools.pairwise(self.bands)):
            raise ValueError("bands must be two or more rising numbers")
        if len(self.names) < 2 or len(set(self.names)) != len(self.names):
            raise ValueError("an attribute needs at least two values or bands, none of them twice")
        if any(not name.isprintable() or name != name.strip() for name in self.names):
            raise ValueError("values must be printable and neither begin nor end with a space")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """All values: the bands as "18-65", then the listed ones."""
        return (*(f"{low:g}-{high:g}" for low, high in itertools.pairwise(self.bands)), *self.values)


class DataConfig(_Settings):
    """Where the private images are and what is publicly known about them."""

    format: Literal["phantom", "medmnist", "raster", "dicom", "nifti"] = Field(
        "phantom",
        description="phantom: built in. medmnist: one npz file, no patient ids, so unit must be image. raster: folder of "
        "PNG or JPEG with a table.csv. dicom: folder of DICOM files. nifti: folder of NIfTI files with a table.csv.",
    )
    path: Path | None = Field(None, description="File or folder of the images; relative to the configuration file.")
    name: str = Field("phantom", min_length=1, max_length=80, description="Name of the data set in reports.")
    unit: PrivacyUnit = Field(PrivacyUnit.PATIENT, description="Whom the guarantee protects: patient, or image on request.")
    classes: tuple[str, ...] = Field(
        ("normal", "lesion"), min_length=1, description="All labels, a public list; a label outside it is an error."
    )
    label_column: str = Field("label", description="Column of table.csv, or DICOM keyword, that holds the label.")
    attributes: dict[Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9_]{0,39}$")], AttributeConfig] = Field(
        {},
        description="Conditions beside the label, public lists: `sex: [F, M]` for the values of a column, or "
        "`age: {column: age_years, bands: [0, 18, 65, 120]}` for bands of numbers. Images without a value are refused unless the list has "
        "`unknown`. DICOM: any keyword, or sex, age_years, site. Each combination with a label is a cell; at most 64.",
    )
    declared_patients: Count = Field(
        500, description="Public, rounded number of patients (or images when unit is image). Batch size and delta use it."
    )
    max_images_per_patient: Count = Field(8, description="Images of a patient beyond this many are left out.")
    spatial_shape: tuple[Count, ...] = Field(
        (28, 28),
        min_length=2,
        max_length=3,
        description="Size in pixels or voxels that images are resampled to; 2 or 3 numbers, multiples of 4. From 56 on (volumes: 28) "
        "patients teach images of half of it (or less, to below that), and public images alone the finer detail (method diffusion).",
    )
    channels: Literal[1, 3] = Field(1, description="1 for grey images, 3 for colour.")
    mixed_sizes: bool = Field(
        False,
        description="Allow images of different sizes; each is resampled and cropped about its centre. If not, a differing one is an error.",
    )
    intensity_range: IntensityRange = Field(
        (0.0, 255.0),
        description="Stored intensities that map to -1 and 1, values outside are clamped: public constants, or each: the 0.5th and 99.5th "
        "percentile of every image by itself (for MRI, whose units are arbitrary).",
    )
    control_fraction: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.2,
        description="Each patient goes to the control set with this probability, by a keyed coin, and is not trained on; as many, on "
        "average, are trained on and form the audit pool with them.",
    )
    exclusions: Path | None = Field(
        None,
        description="CSV file with the columns image and reason: images that the data owner leaves out, as `dpsynth audit` proposes "
        "them. It is part of what the ledger was opened for.",
    )
    permission_column: str | None = Field(
        None, min_length=1, description="Column of table.csv, or DICOM keyword, that says whether an image may be used; none: all may."
    )
    permission_values: tuple[str, ...] = Field(
        ("yes",), min_length=1, description="Values that mean yes. An image with another, or none, is refused unless it is excluded."
    )
    medmnist_split: Literal["train", "val", "test"] = Field("train", description="Which arrays of a MedMNIST file to read.")
    phantom: PhantomConfig = PhantomConfig()

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.format != "phantom" and self.path is None:
            raise ValueError(f"format {self.format} needs a path")
        if self.format == "medmnist" and self.unit is not PrivacyUnit.IMAGE:
            raise ValueError("a MedMNIST file has no patient ids, so the guarantee can only protect images: set unit: image")
        if self.intensity_range != "each" and not -math.inf < self.intensity_range[0] < self.intensity_range[1] < math.inf:
            raise ValueError("intensity_range must be two finite numbers, the smaller first, or each")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must not repeat")
        if any(side % 4 for side in self.spatial_shape) or min(self.spatial_shape) < 8:
            raise ValueError("each side of spatial_shape must be a multiple of 4 and at least 8")
        self._require_attributes()
        return self

    def _require_attributes(self) -> None:
        if self.attributes and self.format == "medmnist":
            raise ValueError("a MedMNIST file holds no attributes: leave data.attributes out, or use another format")
        if self.permission_column and self.format in ("medmnist", "phantom"):
            raise ValueError(f"format {self.format} says nothing of permission: leave data.permission_column out")
        if taken := [name for name in self.attributes if name in _TAKEN]:
            raise ValueError(f"an attribute cannot be called {taken[0]}: choose another name and set its column")
        if self.attributes and len(self.cells) > _LARGEST_NUMBER_OF_CELLS:
            raise ValueError(
                f"classes and attributes make {len(self.cells)} cells, at most {_LARGEST_NUMBER_OF_CELLS} can be: merge values or bands"
            )

    @property
    def cells(self) -> Cells:
        """The layout of label and attributes."""
        return Cells(classes=self.classes, attributes=tuple((name, attribute.names) for name, attribute in self.attributes.items()))


class PrivacyConfig(_Settings):
    """What this run may spend. The data owner's own budget is in the ledger and stands above it."""

    epsilon: Annotated[float, Field(gt=0, le=100)] = Field(10.0, description="Epsilon that the whole run may spend; at most 100.")
    delta: Annotated[float, Field(ge=1e-12, lt=1)] | None = Field(
        None, description="At most min(1e-5, 1/(10 * declared_patients)), which is also the default."
    )
    unsafe_non_private: bool = Field(
        False, description="Train without noise or clipping. Epsilon is infinite everywhere; the gate never releases it."
    )


class MomentsConfig(_Settings):
    """Stage 1: differentially private class-wise moments."""

    low_frequencies: Count = Field(12, description="The low block of the cosine transform has this many frequencies per axis.")
    share: Fraction = Field(
        PART.moments_share, description="Part of the squared privacy parameter mu^2 that the moments spend (diffusion only)."
    )
    texture: bool = Field(False, description="method moments: add Gaussian texture above the low block instead of smooth images.")


class VotesConfig(_Settings):
    """Stage 4: patients vote for the candidates nearest to their images (method diffusion)."""

    share: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Part of mu^2 that the votes spend; 0: no votes.")


class DiffusionConfig(_Settings):
    """Stage 3: DP-SGD on the denoiser."""

    channels: tuple[Count, ...] = Field((32, 64), min_length=1, description="Channels of the U-Net, level by level.")
    steps: int = Field(PART.steps, ge=0, description="DP-SGD steps.")
    sampling_probability: Annotated[float, Field(gt=0, le=1)] = Field(
        LARGEST_SAMPLING_PROBABILITY, description="Probability of each patient in each step."
    )
    draws: Count = Field(PART.draws, description="Noise draws per patient and step, averaged before the clip; free of privacy cost.")
    clip_norm: ClipNorm = Field(0.05, description="Largest L2 norm of one patient's gradient.")
    learning_rate: Positive = Field(PART.learning_rate, description="Of Adam.")
    trainable: Literal["auto", "all", "small", "none"] = Field(
        "auto",
        description="all weights; small: biases, norms, class embedding and output convolution; none: no DP-SGD. auto: one of them by the "
        "number of patients and epsilon, with steps, draws, learning_rate, sampling_probability and moments.share that go with it where "
        "they are not given.",
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Of the average of the weights, in steps.")
    patients_per_chunk: Count = Field(32, description="Patients per forward pass; changes memory, not the result.")
    checkpoint_every: Count = Field(10, description="Steps between checkpoints.")


class PretrainConfig(_Settings):
    """Stage 0: public images only, at no cost in epsilon."""

    source: Literal["phantom", "raster", "medmnist", "nifti"] = Field(
        "phantom", description="Public images: the built-in procedural ones, or a public folder or file."
    )
    path: Path | None = Field(None, description="Public file or folder when source is not phantom.")
    classes: tuple[str, ...] = Field((), description="Labels of the public set; empty: those of the phantom cohort.")
    label_column: str = Field("label", description="Label column of the public table.csv.")
    intensity_range: IntensityRange | None = Field(None, description="Of the public images; none: that of data.intensity_range.")
    num_phantoms: Count = Field(2000, description="Procedural images when source is phantom.")
    anatomies: tuple[AnatomyName, ...] = Field(
        ("chest", "brain"),
        min_length=1,
        description="What they look like, the nearer to the private images the better; organ: one solid body on dark ground, as in a crop "
        "around an organ or in its mask.",
    )
    steps: int = Field(600, ge=0, description="Training steps.")
    batch_size: Count = Field(96, description="Images per step; of volumes, which hold more, a third as many.")
    learning_rate: Positive = Field(2e-3, description="Of Adam, with warm-up and cosine decay.")
    seed: int = Field(0, ge=0, description="Seed of this public step.")
    cache: Path | None = Field(None, description="Folder that keeps the pre-trained weights for other runs with equal settings.")

    def rows_per_step(self, dimensions: int) -> int:
        """Images, or volumes, of a step."""
        return self.batch_size if dimensions == 2 else max(1, self.batch_size // 3)


LARGEST_SIGMA = {2: 0.5, 3: 2.5}  # by dimensions: noise level of images in [-1, 1] above which the released moments draw alone


class GenerateConfig(_Settings):
    """What to draw from the finished generator."""

    count: Count = Field(500, description="Images to draw.")
    label_mix: Literal["balanced", "noisy_prior"] = Field(
        "noisy_prior",
        description="Equal numbers per class, or the class frequencies as released with noise. Attributes within a class as released.",
    )
    target: dict[str, dict[str, float]] = Field(
        {},
        description="Wanted shares, as in `{sex: {F: 0.5, M: 0.5}}`, of attributes and `label`; for all values, above 0, sum 1. What "
        "is not named follows the noisy frequencies (iterative proportional fitting). `dpsynth generate --target` stands above it.",
    )
    independent: tuple[str, ...] = Field(
        (),
        description="Attributes, as in `[sex]`, that together tell nothing about the label of the drawn images, whatever they tell among "
        "the patients, so that no classifier learns the group in place of the finding. `dpsynth generate --independent` adds to it.",
    )
    seed: int = Field(0, ge=0, description="Image i has its own seed made from this one and i.")
    steps: Count = Field(8, description="Sampler steps.")
    sigma_min: Annotated[float, Field(gt=0, lt=min(LARGEST_SIGMA.values()))] = Field(
        0.08, description=f"Last noise level of the sampler; the first is {LARGEST_SIGMA[2]:g}, of volumes {LARGEST_SIGMA[3]:g}."
    )


Limits = tuple[float, float]


class ContentConfig(_Settings):
    """What a single synthetic image must be like. Two numbers are limits: beyond the first a person must look, beyond the second it is
    withheld. Nothing here looks at a private image."""

    contrast: Limits = Field((0.03, 0.015), description="Least standard deviation of an image's intensities, which lie in [-1, 1].")
    saturated: Limits = Field((0.5, 0.9), description="Largest share of pixels at the upper end of the range.")
    similarity: Limits = Field(
        (0.9995, 0.9999), description="Largest correlation of the thumbnail with that of an earlier synthetic image; 1 is a double."
    )
    structure: Limits = Field(
        (10.0, 25.0), description="Largest squared distance from the released mean of its cell in the low frequencies; 1 is usual."
    )
    detail: Limits = Field((10.0, 25.0), description="Largest energy of fine detail, as part of what was released for its cell.")
    text: Literal["strokes", "ocr"] = Field(
        "strokes",
        description="How burned-in text is looked for: thin strokes, or read by RapidOCR (`dpsynth[ocr]`, about a second an image), which "
        "misses far less. Images below 48 pixels can hold no readable text.",
    )
    largest_rejected: Fraction = Field(0.02, description="The check of content fails when a larger share of the drawn images is rejected.")
    person_sees: int = Field(20, ge=0, description="Images that a person is shown whatever the filters say; a keyed random sample.")

    @model_validator(mode="after")
    def _consistent(self) -> ContentConfig:
        for name in ("saturated", "similarity", "structure", "detail"):
            review, reject = getattr(self, name)
            if not 0 < review <= reject:
                raise ValueError(f"{name}: expected two rising limits above 0, review first, found {review:g} and {reject:g}")
        if not 0 <= self.contrast[1] <= self.contrast[0] < 1:
            raise ValueError("contrast: expected two falling limits below 1, review first")
        return self


class EncoderConfig(_Settings):
    """A network that images are compared by in place of the bundled one, which has not seen the patients of the run.

    One input (n, 3, side, side), one output of rows (n, features) or of maps (n, features, height, width), which are averaged.
    """

    path: Path = Field(description="ONNX file, for example of RadImageNet or Inception weights; needs `dpsynth[encoder]`.")
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = Field(description="Of the file: another one is refused.")
    side: int = Field(224, ge=16, le=1024, description="Pixels a side to which images are enlarged.")
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="Taken from the three channels, which lie in [0, 1].")
    stddev: tuple[Positive, Positive, Positive] = Field((0.5, 0.5, 0.5), description="By which the channels are then divided.")


CheckName = Literal[
    "accounting",
    "mechanism",
    "membership",
    "copying",
    "groups",
    "attributes",
    "white_box",
    "fidelity",
    "utility",
    "content",
    "fairness",
]


class GateConfig(_Settings):
    """The policy by which a release is allowed; fixed before the checks run."""

    required: tuple[CheckName, ...] = Field(
        ("accounting", "mechanism", "membership", "copying", "groups", "fidelity", "utility", "content"),
        description="Checks without which nothing is released; accounting, mechanism, membership and copying always are. attributes and "
        "white_box join the family of `family_error` when they are named here; else they are decided alone and can only flag.",
    )
    family_error: Annotated[float, Field(ge=0.001, le=0.05)] = Field(
        0.05, description="Probability that any of mechanism, membership, copying and groups accuses without cause (Holm); 0.001 to 0.05."
    )
    utility_margin: Fraction = Field(0.10, description="Largest loss of AUC of train-on-synthetic against train-on-real.")
    largest_membership_auc: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.70,
        description="Membership, groups, attributes and white_box are inconclusive when an AUC of this could not have been seen.",
    )
    smallest_precision: Fraction = Field(
        0.10, description="Fidelity fails when precision lies surely below, as part of real against real; inconclusive when not surely."
    )
    smallest_spread: Fraction = Field(
        0.25, description="Fidelity fails when synthetic images surely differ from each other less than this part of what real ones do."
    )
    smallest_coverage: Fraction = Field(
        0.05, description="Fidelity fails when coverage lies surely below, as part of real against real; inconclusive when not surely."
    )
    smallest_distance: Fraction = Field(
        0.35,
        description="Fidelity fails when synthetic images surely lie nearer to each other than this part of what real ones do.",
    )
    content: ContentConfig = ContentConfig()
    encoder: EncoderConfig | None = Field(None, description="A network of your own to compare images by; none: the bundled one.")


def policy_problem(gate: GateConfig, data: DataConfig) -> str:
    """Why these data can never pass the policy, whatever is trained: a required check would have nothing to decide on. Else empty."""
    if "fairness" in gate.required and not data.attributes:
        return (
            "gate.required: fairness compares the values of data.attributes, and none are declared, so nothing could ever be released. "
            "Declare attributes or leave fairness out"
        )
    told = [name for name in ("utility", "fairness") if name in gate.required]
    if told and len(data.classes) == 1:
        return (
            f"gate.required: {' and '.join(told)} train classifiers of the label, and data.classes has one, so nothing could ever be "
            f"released. Set gate.required without {' and '.join(told)}, or declare more classes"
        )
    return ""


class ReleaseConfig(_Settings):
    """What leaves."""

    formats: tuple[Literal["png", "nifti", "dicom"], ...] = Field(("png",), description="Image files beside the npz.")
    detector: bool = Field(
        False,
        description="Train, on public images alone, a detector of this generator's images and release it for `dpsynth detect`; costs no "
        "epsilon and about a minute. None is made when it would do worse than guessing on the drawn images, or when the public images of "
        "pretrain are of another kind than those; `generate` and `release` say so.",
    )
    title: str = Field("Synthetic medical images", description="Title of the released data set.")
    licence: str = Field("CC-BY-4.0", description="Licence of the released images.")
    contact: str = Field("", description="Whom to write to.")


class Config(_Settings):
    """One run."""

    method: Literal["moments", "diffusion"] = Field(
        "diffusion", description="moments: Gaussian images from private moments alone. diffusion: a denoiser built on them."
    )
    data: DataConfig = DataConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    moments: MomentsConfig = MomentsConfig()
    votes: VotesConfig = VotesConfig()
    pretrain: PretrainConfig = PretrainConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    generate: GenerateConfig = GenerateConfig()
    gate: GateConfig = GateConfig()
    release: ReleaseConfig = ReleaseConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.moments.low_frequencies > min(self.learnt_shape):
            raise ValueError(
                f"moments.low_frequencies is larger than {min(self.learnt_shape)}, the smallest side of the images that patients teach "
                "(data.spatial_shape)"
            )
        if self.pretrain.source != "phantom" and (self.pretrain.path is None or not self.pretrain.classes):
            raise ValueError(f"pretrain.source {self.pretrain.source} needs pretrain.path and pretrain.classes")
        if len(self.data.spatial_shape) == 3 and "png" in self.release.formats:
            raise ValueError("release.formats: volumes cannot be written as png; use nifti or dicom")
        if self.method == "diffusion" and self.diffusion.trainable in ("all", "small") and self.moments.share + self.votes.share >= 1:
            raise ValueError("moments.share and votes.share must leave a part for DP-SGD: their sum must be below 1")
        if problem := target_problem(self.data.cells, self.generate.target):
            raise ValueError(f"generate.target.{problem}")
        if problem := independent_problem(self.data.cells, self.generate.independent):
            raise ValueError(f"generate.independent.{problem}")
        if problem := policy_problem(self.gate, self.data):
            raise ValueError(problem)
        return self

    @property
    def halvings(self) -> int:
        """How often images are halved before anything is learnt from them: never where Gaussian images are all there is."""
        return 0 if self.method == "moments" else halvings(self.data.spatial_shape)

    @property
    def learnt_shape(self) -> tuple[int, ...]:
        """Sides of the images that moments and net learn from and draw."""
        return tuple(side // 2**self.halvings for side in self.data.spatial_shape)

    @property
    def finer_than_learnt(self) -> str:
        """What of the images no patient teaches, in words; empty where patients teach all of it."""
        return finer_than_learnt(self.data.spatial_shape) if self.halvings else ""


class _OneValueLoader(yaml.SafeLoader):
    """Refuses a key that is given twice: the last one would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"Wrong configuration: {twice[0]} is set twice, at line {node.start_mark.line + 1} or below. Keep one.")
        return super().construct_mapping(node, deep=deep)


def yaml_mapping(text: str) -> dict[str, Any]:
    """The settings in YAML text. Raises ConfigError when it is no mapping or sets a key twice."""
    try:
        raw = yaml.load(text, Loader=_OneValueLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"The configuration is not valid YAML{line}. Check the indentation and the colons.") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"Expected the configuration to be a mapping of settings, found {type(raw).__name__}.")
    return raw


def parse_config(text: str, *, base: Path) -> Config:
    """Read YAML text; relative paths are taken from `base`. Raises ConfigError with the path of every wrong key."""
    try:
        config = Config.model_validate(yaml_mapping(text))
    except ValidationError as error:
        raise ConfigError(f"Wrong configuration: {wrong_settings(error)}. docs/config.md lists every setting.") from error
    return resolved(_with_absolute_paths(config, base))


def resolved(config: Config, *, sites: int = 1) -> Config:
    """The configuration with `diffusion.trainable: auto` replaced by what the recipe says for its public numbers. What is given stays.

    So many sites that each add their own noise see as much as one with 1/sqrt(sites) of their patients.
    """
    if config.diffusion.trainable != "auto":
        return config
    data, diffusion = config.data, config.diffusion
    chosen = recipe(
        patients=data.declared_patients * (1 - data.control_fraction) / math.sqrt(sites),
        epsilon=config.privacy.epsilon,
        delta=resolve_delta(config.privacy.delta, data.declared_patients),
        channels=diffusion.channels,
        dimensions=len(data.spatial_shape),
        votes_share=config.votes.share,
    )
    proposed = {name: getattr(chosen, name) for name in ("trainable", "steps", "draws", "learning_rate")}
    proposed["sampling_probability"] = sampling_probability(data.declared_patients)
    given = diffusion.model_fields_set - {"trainable"}
    update: dict[str, Any] = {
        "diffusion": diffusion.model_copy(update={name: value for name, value in proposed.items() if name not in given})
    }
    if "share" not in config.moments.model_fields_set:
        update["moments"] = config.moments.model_copy(update={"share": chosen.moments_share})
    return config.model_copy(update=update)


def load_config(path: Path) -> Config:
    """Read the configuration file at `path`. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected a readable YAML file at {path}: {getattr(error, 'strerror', None) or error}.") from error
    return parse_config(text, base=path.resolve().parent)


def dump_config(config: Config) -> str:
    """YAML text that `parse_config` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _with_absolute_paths(config: Config, base: Path) -> Config:
    def absolute(path: Path | None) -> Path | None:
        return None if path is None else (base / path.expanduser()).resolve()

    data = config.data.model_copy(update={"path": absolute(config.data.path), "exclusions": absolute(config.data.exclusions)})
    pretrain = config.pretrain.model_copy(update={"path": absolute(config.pretrain.path), "cache": absolute(config.pretrain.cache)})
    return config.model_copy(update={"data": data, "pretrain": pretrain, "gate": with_absolute_encoder(config.gate, base)})


def with_absolute_encoder(gate: GateConfig, base: Path) -> GateConfig:
    """The policy with the path of its encoder taken from `base`."""
    if gate.encoder is None:
        return gate
    path = (base / gate.encoder.path.expanduser()).resolve()
    return gate.model_copy(update={"encoder": gate.encoder.model_copy(update={"path": path})})


def wrong_settings(error: ValidationError) -> str:
    """The path of every wrong key with what is wrong, in one line."""
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "configuration"
        if item["type"] == "extra_forbidden":
            parts.append(f"{where}: unknown setting")
        else:
            found = "" if isinstance(item.get("input"), dict | BaseModel) else f" (found {item.get('input')!r})"
            parts.append(f"{where}: {_expected(item['type'], item.get('input')) or item['msg'].removeprefix('Value error, ')}{found}")
    return "; ".join(parts)


def _expected(kind: str, value: object) -> str:
    """In words of YAML what belongs where something of another shape was found; empty for faults of other kinds."""
    if kind in ("tuple_type", "list_type"):
        return f"expected a list, as in [{value}]" if isinstance(value, str | int | float) else "expected a list, as in [a, b]"
    return "expected settings with names, as in {name: value}" if kind in ("model_type", "model_attributes_type", "dict_type") else ""
