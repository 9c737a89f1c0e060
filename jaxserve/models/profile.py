"""Serving-time profiles: how long slices take on one deployment, as a JSON file.

One schema, `jaxserve.profile/1`. A profile says what it is of (the model's shape, device, precision
and page size), whether it was measured or computed, the models of time, and how far off they are.
Knows no simulator and no executor, and loads no JAX. Committed ones lie in `jaxserve/profiles/`
and go by their name.
"""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.schedulers.estimators.bilinear import BilinearTime
from jaxserve.schedulers.estimators.fitted_time import FitError, FittedTime
from jaxserve.schedulers.estimators.roofline_time import ModelSizes, RooflineTime

SCHEMA: Final = "jaxserve.profile/1"
MEASURED, COMPUTED = KINDS = ("measured", "computed")
DIRECTORY: Final = Path(__file__).parents[1] / "profiles"
BYTES_OF: Final = {"float32": 4, "bfloat16": 2}
QUANTISED: Final = {"int8": (1, 4), "float8_e4m3fn": (1, 4)}
"""Types of KV pages alone: bytes of a number, and of the scale that a row of numbers has."""

# Fields that profiles of before do not have; their defaults say what was meant.
_LATER: Final[dict[type, frozenset[str]]] = {
    ModelSizes: frozenset({"kv_value_bytes", "kv_scale_bytes"})
}

_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The fields of `ModelConfig` that slice times depend on."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelShape":
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(config, name) for name in names})

    def sizes(self, precision: str, kv_dtype: str = "auto") -> ModelSizes:
        """What the roofline is computed from; `kv_dtype` auto is `precision`."""
        numbers = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(ModelSizes)
            if hasattr(self, field.name)
        }
        if kv_dtype not in ("auto", precision):
            value_bytes, scale_bytes = QUANTISED.get(kv_dtype) or (BYTES_OF[kv_dtype], 0)
            numbers |= {"kv_value_bytes": value_bytes, "kv_scale_bytes": scale_bytes}
        return ModelSizes(value_bytes=BYTES_OF[precision], **numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """How far off: relative to measured seconds, None where nothing was measured.

    `spread` is the distance of repeated identical slices from their median, which no model can
    undercut. `held_out` slices were not fitted; `out_of_range` ones, longer or of more rows, were
    not fitted by the model that was judged on them. `prefill` and `decode` judge the bilinear model
    on what it was not fitted to.
    """

    spread: FitError | None = None
    held_out: FitError | None = None
    out_of_range: FitError | None = None
    prefill: FitError
    decode: FitError


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One deployment's times. `num_pages` KV pages fit beside the weights (None: as configured).

    `host_overlaps` says that host and device do not share a core, so that a second slice in flight
    hides the host's work.
    """

    kind: str
    model_name: str
    model: ModelShape
    device: str
    num_devices: int
    precision: str
    page_size: int
    num_pages: int | None
    kernels: Mapping[str, str]
    versions: Mapping[str, str]
    date: str
    host_overlaps: bool
    time: FittedTime | RooflineTime
    bilinear: BilinearTime
    errors: Errors
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A hash of everything in the profile: what is kept of predictions is kept under it."""
        text = json.dumps(self._fields(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def spread(self) -> float:
        """What `NoisyTime` takes; 0 where nothing was measured."""
        return self.errors.spread.mean if self.errors.spread else 0.0

    def save(self, path: str | Path) -> None:
        """Raises ConfigError where no file can be written."""
        try:
            Path(path).write_text(json.dumps(self._fields(), indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"output: {str(path)!r}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Raises ConfigError naming the file that is missing or holds no profile."""
        try:
            fields = json.loads(Path(path).read_text())
            if not isinstance(fields, dict) or fields.pop("schema", None) != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA!r}")
            profile = _decoded(cls, fields, "")
            profile._check()
            return profile
        except (OSError, TypeError, ValueError) as error:
            raise ConfigError(
                f"profile: got {str(path)!r} ({error}); allowed: a file that `jaxserve profile`"
                " wrote"
            ) from error

    def _check(self) -> None:
        """Raises ValueError for what would make time stand still or run backwards."""
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}; allowed: {', '.join(KINDS)}")
        for name, value in _numbers(dataclasses.asdict(self.time), "time"):
            if value < 0:
                raise ValueError(f"{name}: got {value!r}; allowed: 0 or more")

    def check_shape(self, config: ModelConfig, *, dtype: str = "") -> None:
        """Raises ConfigError, naming the fields that differ, for a model of another shape or, where
        it is given, precision."""
        wanted, got = dataclasses.asdict(ModelShape.of(config)), dataclasses.asdict(self.model)
        wrong = [f"{name} {got[name]} (the model's: {wanted[name]})" for name in wanted]
        wrong = [
            text for text, name in zip(wrong, wanted, strict=True) if got[name] != wanted[name]
        ]
        if dtype and dtype != self.precision:
            wrong.append(f"precision {self.precision} (wanted: {dtype})")
        if wrong:
            raise ConfigError(
                f"profile: got one of {self.model_name} for {config.name}, with {', '.join(wrong)};"
                " allowed: one of the same shape; `jaxserve profile` makes it"
            )

    def _fields(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


def profile_names() -> list[str]:
    """The committed profiles."""
    return sorted(path.stem for path in DIRECTORY.glob("*.json"))


def find_profile(name_or_path: str) -> Profile:
    """A committed profile by name, or any by its path. Raises ConfigError listing the names."""
    if name_or_path in profile_names():
        return Profile.load(DIRECTORY / f"{name_or_path}.json")
    if not Path(name_or_path).is_file():
        raise ConfigError(
            f"profile: got {name_or_path!r}; allowed: a JSON file that `jaxserve profile` wrote, or"
            f" one of {', '.join(profile_names())}"
        )
    return Profile.load(name_or_path)


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    """All numbers in nested fields, by name."""
    if isinstance(value, dict):
        for name, inside in value.items():
            yield from _numbers(inside, f"{where}.{name}")
    elif isinstance(value, tuple):
        for inside in value:
            yield from _numbers(inside, where)
    elif isinstance(value, float):
        yield where, value


def _decoded(kind: Any, value: Any, where: str) -> Any:
    """`value` of a JSON file as `kind`. Raises ValueError naming the field that cannot be so."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decoded_record(typing.cast(type, kind), value, where)
    if origin in (types.UnionType, typing.Union):
        return _decoded_union(parts, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decoded(parts[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {str(key): _decoded(parts[1], item, where) for key, item in value.items()}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if origin is None and kind is not float and type(value) is kind:
        return value
    raise ValueError(f"{where}: got {value!r}")


def _decoded_record(kind: type[_Record], value: Any, where: str) -> _Record:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {value!r}")
    hints = typing.get_type_hints(kind)
    if not _has_fields(kind, value):
        odd = ", ".join(sorted(set(value) ^ set(hints)))
        raise ValueError(f"{where or 'fields'} missing or unknown: {odd}")
    inside = f"{where}." if where else ""
    return kind(**{name: _decoded(hints[name], value[name], inside + name) for name in value})


def _has_fields(kind: Any, value: Mapping[str, Any]) -> bool:
    """Whether all are known and none is missing that must be there. `_LATER` ones need not be."""
    names = {field.name for field in dataclasses.fields(kind)}
    return set(value) <= names and names - set(value) <= _LATER.get(kind, frozenset())


def _decoded_union(parts: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first that fits; a record is told by its fields."""
    if value is None and types.NoneType in parts:
        return None
    if isinstance(value, dict):
        for kind in parts:
            if dataclasses.is_dataclass(kind) and _has_fields(kind, value):
                return _decoded(kind, value, where)
    kinds = [part for part in parts if part is not types.NoneType]
    if len(kinds) == 1:
        return _decoded(kinds[0], value, where)
    raise ValueError(f"{where}: got {value!r}")
