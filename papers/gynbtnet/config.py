"""The params of one profile: data, networks, the three stages of training and what is compared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from shared.config import Strict
from shared.training import TrainingSettings

from .phantom import ORGANS

# The residual U-Net by the stages that it goes through: where the weights of its last one come from.
# `scratch_long` is trained on the third alone, for as many steps as the three have together.
VARIANTS = ("scratch", "self_supervised", "multi_organ", "gynbtnet", "scratch_long")
# Of the second stage: what the variants `multi_organ` and `gynbtnet` of the third start from.
SECOND_STAGE = {"multi_organ": "scratch", "gynbtnet": "self_supervised"}
BASELINES = ("nnunet", "swin_unetr")
ATLAS = "atlas"

# Classes of the stages, background apart, each made of structures of the phantom. The second has no target volume, and
# rectum and sigmoid are one.
MULTI_ORGAN_CLASSES: dict[str, tuple[str, ...]] = {
    "bladder": ("bladder",),
    "colon": ("rectum", "sigmoid"),
    "uterus": ("uterus",),
    "femoral_heads": ("femoral_heads",),
    "sacrum": ("sacrum",),
    "small_bowel": ("small_bowel",),
}
BRACHYTHERAPY_CLASSES: dict[str, tuple[str, ...]] = {organ: (organ,) for organ in ORGANS}
# Borders of the first are faint or only positional.
COMPLEX, SIMPLE = ("ctv", "rectum", "sigmoid"), ("bladder", "uterus")
# One connected piece each; bowels may be cut by the edge of the volume.
SINGLE = ("bladder", "uterus", "ctv")
# Of the real CT, by numbers of TotalSegmentator's 117 classes: what all of its labeled crop holds.
REAL_CLASSES: dict[str, tuple[int, ...]] = {
    "liver": (5,),
    "spleen": (1,),
    "stomach": (6,),
    "colon": (20,),
    "aorta": (52,),
    "vertebrae": tuple(range(26, 51)),
    "muscles": (86, 87),
}
NUM_REAL_CLASSES = 117

Size = Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=3)]


class PhantomData(Strict):
    """Sets of phantoms, one a stage, no anatomy twice."""

    source: Literal["phantoms"]
    shape: Size = Field((64, 64, 48), description="voxels along x, y, z")
    spacing: PositiveFloat = Field(3.0, description="mm")
    unlabeled: PositiveInt = Field(200, description="of the first stage")
    unlabeled_held_out: PositiveInt = Field(8, description="to measure reconstruction on")
    multi_organ: PositiveInt = Field(40, description="of the second stage")
    brachytherapy: PositiveInt = Field(12, description="of the third stage, of which experiments may use fewer")
    test: PositiveInt = 12
    with_real_ct: bool = Field(False, description="the first stage also sees the real CT, resampled")


class RealData(Strict):
    """The real CT for the first stage, its labeled crop for the second; there is no third."""

    source: Literal["real_ct"]
    folder: str = Field("gynbtnet", description="of the files, under $REPRISE_DATA")
    held_out_slices: PositiveInt = Field(24, description="uppermost of the CT, to measure reconstruction on")
    test_slices: PositiveInt = Field(12, description="uppermost of the labeled crop, to measure segmentation on")

    @model_validator(mode="after")
    def _tested_slices_are_unseen(self) -> RealData:
        if self.test_slices > self.held_out_slices:
            raise ValueError(
                "the labeled crop is the upper end of the CT: held_out_slices must be at least test_slices, or the "
                f"first stage would see what is tested on (given: {self.held_out_slices} and {self.test_slices})"
            )
        return self


class Network(Strict):
    """The residual U-Net; paper scale (ours: STU-Net-L) is width 64, two blocks, six resolutions."""

    width: PositiveInt = 8
    blocks: PositiveInt = 1
    resolutions: int = Field(4, ge=2)
    masked_decoder_width: PositiveInt | None = Field(None, description="of masked modeling; default: the encoder's")
    sparse: bool = Field(False, description="masked modeling by submanifold kernels instead of masked dense layers")


class SwinSettings(Strict):
    """MONAI's Swin UNETR; the published one has 48 features and windows of 7."""

    feature_size: int = Field(12, multiple_of=12, gt=0)
    window_size: PositiveInt = 4
    norm: Literal["instance", "group"] = Field("instance", description="group where the coarsest level is one voxel")


class StageTraining(TrainingSettings):
    """Training of one stage; an epoch is a number of steps, each a batch of random patches."""

    steps_per_epoch: PositiveInt

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


class Params(Strict):
    """A profile's section of params.yaml."""

    seed: int = Field(0, ge=0, description="of the phantoms")
    seeds: tuple[int, ...] = Field(min_length=1, description="of the trainings: weights, patches, masks")
    workers: PositiveInt = Field(2, description="processes side by side")
    loaders: int = Field(0, ge=0, description="processes that cut patches; needs workers 1")
    threads: PositiveInt = 1
    data: Annotated[PhantomData | RealData, Field(discriminator="source")]
    patch: Size = Field(description="voxels that a network sees at once in training and in sliding windows")
    augmentation: Literal["none", "intensity", "full"] = Field(
        "none", description="mirroring and intensity; full: deformation too"
    )
    mirrored_axes: tuple[Literal[1, 2], ...] = Field((), description="averaged over in testing; never left and right")
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    network: Network = Network()
    swin: SwinSettings = SwinSettings()
    pretrain: StageTraining
    multi_organ: StageTraining
    brachytherapy: StageTraining
    learning_rates: dict[str, PositiveFloat] = Field({}, description="of baselines, where not the third stage's")
    models: dict[PositiveInt, tuple[str, ...]] = Field({}, description="of the third stage, by number of cases")

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is listed twice")
        return seeds

    @model_validator(mode="after")
    def _patches_fit(self) -> Params:
        stride = 2 ** (self.network.resolutions - 1)
        if any(side % stride for side in self.patch):
            raise ValueError(
                f"the sides of patch must be multiples of {stride}, the stride of {self.network.resolutions} "
                f"resolutions (given: {list(self.patch)})"
            )
        if isinstance(self.data, PhantomData) and any(
            side > whole for side, whole in zip(self.patch, self.data.shape, strict=True)
        ):
            raise ValueError(f"patch {list(self.patch)} is larger than the phantoms, {list(self.data.shape)}")
        return self

    @model_validator(mode="after")
    def _models_are_known(self) -> Params:
        known = (*VARIANTS, *BASELINES)
        for cases, names in self.models.items():
            for name in names:
                if name not in known:
                    raise ValueError(f"models.{cases}: unknown model {name!r}; choose among {', '.join(known)}")
            if len(set(names)) < len(names):
                raise ValueError(f"models.{cases}: a model is listed twice")
            if isinstance(self.data, PhantomData) and cases > self.data.brachytherapy:
                raise ValueError(
                    f"models.{cases}: there are {self.data.brachytherapy} cases to train on; raise data.brachytherapy"
                )
        if isinstance(self.data, RealData) and self.models:
            raise ValueError("the real CT has no third stage: leave models out")
        for name in self.learning_rates:
            if name not in BASELINES:
                raise ValueError(f"learning_rates: unknown baseline {name!r}; choose among {', '.join(BASELINES)}")
        return self

    @model_validator(mode="after")
    def _loaders_have_a_parent(self) -> Params:
        if self.loaders and self.workers > 1:
            raise ValueError(
                "trainings side by side cannot have loaders of their own: set workers to 1 or loaders to 0"
            )
        return self

    @property
    def main_cases(self) -> int | None:
        """The number of training cases on which most models are compared; None without a third stage."""
        return max(self.models, key=lambda cases: len(self.models[cases]), default=None)

    def training(self, model: str) -> StageTraining:
        """Training of the third stage; that of `scratch_long` has the steps of all three."""
        rate = self.learning_rates.get(model, self.brachytherapy.learning_rate)
        epochs = self.brachytherapy.epochs
        if model == "scratch_long":
            steps = self.pretrain.steps + self.multi_organ.steps + self.brachytherapy.steps
            epochs = -(-steps // self.brachytherapy.steps_per_epoch)
        return self.brachytherapy.model_copy(update={"learning_rate": rate, "epochs": epochs})

    def classes(self, stage: Literal["multi_organ", "brachytherapy"]) -> tuple[str, ...]:
        """Names of the classes of a supervised stage, background apart; their numbers are their places, from 1."""
        if stage == "brachytherapy":
            return tuple(BRACHYTHERAPY_CLASSES)
        return tuple(REAL_CLASSES if isinstance(self.data, RealData) else MULTI_ORGAN_CLASSES)
