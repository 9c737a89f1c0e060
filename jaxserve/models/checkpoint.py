"""A model directory: what it holds, how it is written, and how it is read back and checked.

    config.json      the ModelConfig
    tokenizer.json   the tokenizer, in the Hugging Face tokenizers format; optional, as are the
                     other TEXT_FILES
    weights/         the decoder's tensors as one orbax checkpoint
    weights.json     size and digest of each file under weights/, shape and dtype of each tensor

Knows no decoder code beyond its shapes. Orbax keeps no checksums of values: a flipped bit in a
bfloat16 tensor would be served as it is, so weights.json is what the files are held against.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import PartitionSpec, Sharding, SingleDeviceSharding

from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, Init
from jaxserve.models.partition import partition_specs

CONFIG_FILE: Final = "config.json"
TOKENIZER_FILE: Final = "tokenizer.json"
WEIGHTS_FOLDER: Final = "weights"
MANIFEST_FILE: Final = "weights.json"
TEXT_FILES: Final = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""What says how a model speaks: named and written as Hugging Face does."""
STORED_DTYPES: Final = ("bfloat16", "float16", "float32")

_REMEDY: Final = "try a fresh copy of the model"

# A process reads the chunks that its part of a tensor touches: of eight to a tensor, little more
# than the part. Larger ones than this are read no faster, smaller ones slower.
_CHUNKS: Final = 8
_MOST_CHUNK_BYTES: Final = 16 << 20
_LEAST_CHUNK_BYTES: Final = 1 << 20
_FILE_BYTES: Final = 256 << 20  # files are hashed on a core each
# Orbax cuts the longest axis first, which is where a mesh cuts too but for kv heads: so few entries
# are cut apart altogether.
_SHORT_AXIS: Final = 64

Params = dict[str, Any]
"""A decoder's state as `nnx.to_pure_dict` gives it and `nnx.merge` takes it."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file under weights/ was when it was written."""

    num_bytes: int
    blake2b: str


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What a stored tensor is."""

    shape: list[int]
    dtype: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of weights.json: files by path under weights/, tensors by dotted path."""

    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]

    def to_json(self) -> str:
        """The record as JSON; `from_json` is its inverse."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises ConfigError for text that is no such record."""
        try:
            fields = json.loads(text)
            files = {name: FileRecord(**record) for name, record in fields["files"].items()}
            tensors = {name: TensorRecord(**record) for name, record in fields["tensors"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"damaged: {error!r}; {_REMEDY}") from error
        return cls(files, tensors)


def save_model(
    directory: Path,
    config: ModelConfig,
    params: Params,
    *,
    texts: Mapping[str, bytes] | None = None,
    compress: bool = True,
) -> None:
    """Write a model directory; `params` are stored in the dtypes they have.

    `texts` holds contents by name, of TEXT_FILES. Compressed weights take a quarter less room and
    twice the time to load. Files of an earlier model there are replaced, others are left alone. The
    manifest goes first and comes last, so that a directory whose writing was cut short is not taken
    for a model. Raises ConfigError when `params` are not those of `config`.
    """
    tensors = {path: _describe(leaf) for path, leaf in _flat(params).items()}
    _check_tensors(directory, abstract_params(config, dtype=jnp.float32), tensors)
    weights = directory.resolve() / WEIGHTS_FOLDER  # orbax takes absolute paths only
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    (directory / CONFIG_FILE).write_text(config.to_json() + "\n", "utf-8")
    for name in TEXT_FILES:
        (directory / name).unlink(missing_ok=True)
    for name, content in (texts or {}).items():
        (directory / name).write_bytes(content)
    if weights.exists():
        shutil.rmtree(weights)
    handler = ocp.PyTreeCheckpointHandler(use_compression=compress)
    with ocp.Checkpointer(handler) as checkpointer:
        save_args = jax.tree.map(_save_args, params, partition_specs(params))
        checkpointer.save(
            weights,
            args=ocp.args.PyTreeSave(
                params, save_args=save_args, ocdbt_target_data_file_size=_FILE_BYTES
            ),
        )
    for marker in weights.glob("commit_success.txt"):
        marker.write_text("committed\n", "utf-8")  # orbax writes the path on this machine there
    written = sorted(path for path in weights.rglob("*") if path.is_file())
    files = {
        path.relative_to(weights).as_posix(): FileRecord(path.stat().st_size, _digest(path))
        for path in written
    }
    (directory / MANIFEST_FILE).write_text(Manifest(files, tensors).to_json() + "\n", "utf-8")


def load_config(directory: Path) -> ModelConfig:
    """The model's configuration; raises ConfigError when there is none or it is damaged."""
    path = directory / CONFIG_FILE
    try:
        return ModelConfig.from_json(_read(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def load_state(
    directory: Path,
    config: ModelConfig,
    *,
    dtype: jax.typing.DTypeLike,
    sharding: Sharding | Mapping[str, Any] | None = None,
) -> Params:
    """The weights, cast to `dtype`, laid out by `sharding`.

    `sharding` is one for all tensors, or a tree of them in the shape of the params; without it
    all go to the first device. Each process reads its own shards, after it has held every file
    against the manifest (about a second per gigabyte and core).
    Raises ConfigError, naming file or tensor, got and wanted, when anything is missing, damaged or
    not what `config` says.
    """
    target = abstract_params(config, dtype=dtype, sharding=sharding)
    manifest = _load_manifest(directory)
    _check_tensors(directory, target, manifest.tensors)
    _check_files(directory / WEIGHTS_FOLDER, manifest.files)
    return restore(directory, target)


def restore(directory: Path, target: Params) -> Params:
    """The tensors that `target`, a part of `abstract_params`, asks for; checks no file.

    Raises ConfigError when orbax cannot read them.
    """
    weights = directory.resolve() / WEIGHTS_FOLDER
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
    # Left alone, orbax reads all tensors at a time and holds each of them twice.
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=max(1, -(-2 * largest // 10**9)))
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(
                weights,
                args=ocp.args.PyTreeRestore(
                    item=target, restore_args=restore_args, partial_restore=True
                ),
            )
    except (OSError, ValueError, KeyError) as error:
        # The files are as they were written: another version of orbax may have written them.
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{weights}: orbax {ocp.__version__} cannot read it: {reason}; save the model again"
        ) from error


def abstract_params(
    config: ModelConfig,
    *,
    dtype: jax.typing.DTypeLike,
    sharding: Sharding | Mapping[str, Any] | None = None,
) -> Params:
    """The params of a decoder as `jax.ShapeDtypeStruct`s, made without any array."""
    if sharding is None:
        sharding = SingleDeviceSharding(jax.devices()[0])
    decoder = nnx.eval_shape(lambda: Decoder(config, init=Init(jnp.dtype(dtype))))
    shapes = nnx.to_pure_dict(nnx.state(decoder))
    shardings = (
        jax.tree.map(lambda _: sharding, shapes) if isinstance(sharding, Sharding) else sharding
    )
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def _save_args(leaf: Any, spec: PartitionSpec) -> ocp.SaveArgs:
    """How a tensor is cut into chunks on disk."""
    if leaf.nbytes <= _LEAST_CHUNK_BYTES:
        return ocp.SaveArgs()
    num_bytes = min(max(leaf.nbytes // _CHUNKS, _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES)
    short = [
        axis for axis, cut in enumerate(spec) if cut is not None and leaf.shape[axis] <= _SHORT_AXIS
    ]
    return ocp.SaveArgs(chunk_byte_size=num_bytes, shard_axes=tuple(short))


def _flat(params: Params) -> dict[str, Any]:
    """Leaves by path, such as `layers.0.mlp.down.kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def _describe(leaf: Any) -> TensorRecord:
    return TensorRecord(list(leaf.shape), jnp.dtype(leaf.dtype).name)


def _check_tensors(directory: Path, target: Params, tensors: Mapping[str, TensorRecord]) -> None:
    """Raises ConfigError at the first tensor that is missing, not wanted, or of a wrong shape."""
    wanted = {path: list(leaf.shape) for path, leaf in _flat(target).items()}
    for path in sorted(wanted.keys() | tensors.keys()):
        where = f"{directory}: tensor {path}"
        if path not in tensors:
            raise ConfigError(f"{where}: got none; wanted shape {wanted[path]}, by {CONFIG_FILE}")
        got = tensors[path]
        if path not in wanted:
            raise ConfigError(f"{where}: got shape {got.shape}; wanted none, by {CONFIG_FILE}")
        if got.shape != wanted[path]:
            raise ConfigError(
                f"{where}: got shape {got.shape}; wanted {wanted[path]}, by {CONFIG_FILE}"
            )
        if got.dtype not in STORED_DTYPES:
            allowed = ", ".join(STORED_DTYPES)
            raise ConfigError(f"{where}: got dtype {got.dtype}; allowed: {allowed}")


def _check_files(weights: Path, files: Mapping[str, FileRecord]) -> None:
    """Raises ConfigError at the first file that is missing or not as it was written."""
    for name, wanted in files.items():
        path = weights / name
        if not path.is_file():
            raise ConfigError(f"{path}: got no file; wanted {wanted.num_bytes} bytes; {_REMEDY}")
        if (num_bytes := path.stat().st_size) != wanted.num_bytes:
            raise ConfigError(
                f"{path}: got {num_bytes} bytes; wanted {wanted.num_bytes}; {_REMEDY}"
            )
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, [weights / name for name in files])
        for (name, wanted), digest in zip(files.items(), digests, strict=True):
            if digest != wanted.blake2b:
                raise ConfigError(
                    f"{weights / name}: damaged: got digest {digest}; wanted {wanted.blake2b};"
                    f" {_REMEDY}"
                )


def _load_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_FILE
    try:
        return Manifest.from_json(_read(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read(path: Path) -> str:
    """The text of a file of the model directory; the caller's message names the path."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(
            f"{error.strerror}; wanted a model directory with {CONFIG_FILE}, {MANIFEST_FILE} and"
            f" {WEIGHTS_FOLDER}/"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"damaged: not UTF-8; {_REMEDY}") from error


def _digest(path: Path) -> str:
    """128 bits of BLAKE2b: plenty against accidents, and nobody is an opponent here."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; {_REMEDY}") from error
    return digest.hexdigest()
