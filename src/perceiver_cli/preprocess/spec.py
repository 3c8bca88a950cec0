"""The base of every input table of the configuration, and the limits on the size of one input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from perceiver_cli.errors import UsageError

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(ge=1, le=1 << 20)]

Auto = Literal["auto"]

Range = tuple[float, float]
T = TypeVar("T")
# One number stands for both sides.
Pair = Annotated[tuple[Size, Size], BeforeValidator(lambda side: [side, side] if isinstance(side, int) else side)]


class Table(BaseModel):
    """One table of the TOML file: immutable, and strict about keys and numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: Any) -> Any:
        """Refuse an unknown key and name the known ones, which pydantic's own error omits.

        None, which is `--set KEY=none`, is the word "none" where that is a choice.
        """
        known = list(cls.model_fields)
        for key in value if isinstance(value, dict) else ():
            if key not in known:
                raise PydanticCustomError("unknown_key", "unknown key {key}", {"key": str(key), "known": known})
        if not isinstance(value, dict):
            return value
        choices = {key for key, field in cls.model_fields.items() if "none" in get_args(field.annotation)}
        return {key: "none" if item is None and key in choices else item for key, item in value.items()}


class InputSpec(Table):
    """Options of one modality: how a file becomes a byte array. The default of `modality` registers each subclass.

    A modality outside this package defines its subclass beside its `Modality` (see examples/custom_modality.py).
    """

    kinds: ClassVar[dict[str, type[InputSpec]]] = {}
    newer: ClassVar[tuple[str, ...]] = ()  # options that version 0.1.0 lacks
    modality: str
    # Fourier bands per axis, spaced linearly from 1 to max_resolution / 2 (paper 3.2).
    bands: Annotated[int, Field(ge=0, le=4096)] = 64
    # The paper's mu for each axis, in samples over [-1, 1]; unset, the number of inputs along the axis.
    max_resolution: tuple[Positive, ...] | None = None
    # Neighbours along each axis that are merged into one input; their values become channels.
    patch: tuple[Size, ...] = (1,)
    # Fourier features, or a learned vector for each point of a grid (paper 4.1: 128 wide, std 1.0, one cross-attend).
    positions: Literal["fourier", "learned"] = "fourier"
    learned_channels: Size = 128  # width of a learned position
    learned_std: Positive = 1.0  # standard deviation of learned positions at the start
    # Seed of a random order of the byte array's rows, with their features, the same for every input (paper 4.1).
    permutation: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    # Share of training examples that lose this modality if they have another (paper 4.2: video 0.3).
    dropout: Fraction = 0.0

    @model_serializer(mode="wrap")
    def _without_newer(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the options, newer ones only where they are not the default: older records keep their bytes."""
        fields, options = type(self).model_fields, dump(self)
        unused = {name for name in self.newer if getattr(self, name) == fields[name].default}
        return {name: value for name, value in options.items() if name not in unused}

    def known(self, key: str, value: T | Auto, how: str) -> T:
        """Return the value of an option. Raises UsageError if it is still "auto"; how: its unit, for the message."""
        if value == "auto":
            raise UsageError(f"inputs.{self.modality}.{key} is still 'auto', expected a number", f"set it in {how}")
        return value

    def filled(self, values: Mapping[str, Any]) -> Self:
        """Return the options with these values in place of "auto"."""
        return self.model_copy(update={key: value for key, value in values.items() if getattr(self, key) == "auto"})

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        InputSpec.kinds[cls.model_fields["modality"].default] = cls


S = TypeVar("S", bound=InputSpec)


def stemless(spec: S) -> S:
    """Return `spec` without a stem, whose learned layers come before positions: it makes the paper's byte array."""
    return spec.model_copy(update={"stem": "none"}) if "stem" in type(spec).model_fields else spec


class Limits(Table):
    """Limits on the size of one input, against hostile files; `--limit NAME=VALUE` raises one."""

    file_bytes: int = 2 << 30  # bytes of a file
    image_pixels: int = 89_478_485  # pixels of a picture
    audio_seconds: float = 3600.0  # seconds of a sound
    audio_channels: int = 64  # channels of a sound
    video_seconds: float = 3600.0  # seconds of a video
    video_pixels: int = 33_177_600  # pixels of a frame: 8K
    video_side: int = 8192  # pixels along a side of a frame
    vertices: int = 10_000_000  # vertices of a mesh, or points of a cloud
    faces: int = 20_000_000  # faces of a mesh
    text_bytes: int = 64 << 20  # bytes of a text
    decoded_bytes: int = 1 << 30  # bytes of a decoded array

    def raised(self, limits: Mapping[str, float] | None) -> Limits:
        """Return the limits with some of them changed. Raises ValidationError for an unknown name."""
        return Limits.model_validate({**vars(self), **(limits or {})})
