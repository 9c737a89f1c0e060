"""Profiles of devices that are not at hand, computed from their data sheets. Loads no JAX."""

import datetime

from jaxserve import __version__
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.profile import COMPUTED, Errors, ModelShape, Profile
from jaxserve.schedulers.estimators.bilinear import Grid, bilinear_of
from jaxserve.schedulers.estimators.memory import KvMemory
from jaxserve.schedulers.estimators.roofline_time import DEVICES, RooflineTime
from jaxserve.schedulers.estimators.slice_time import HostTime

MEMORY_SHARE = 0.9
"""Of a device's memory, for weights and KV pages; the rest is the programs' and the driver's."""

HOST = HostTime(slice_s=300e-6, row_s=10e-6, token_s=1e-6, prompt_s=0.1e-6)
"""About what the core was measured to take on a server CPU."""


def compute_profile(
    model: ModelConfig, *, device: str, num_devices: int, page_size: int, kv_dtype: str = "auto"
) -> Profile:
    """The roofline of `num_devices` devices named `device` with a bfloat16 model cut over them.

    Keys and values are stored as `kv_dtype`, auto being bfloat16.

    Raises ConfigError for a device that is not known, or when the weights leave no room for KV.
    """
    if device not in DEVICES:
        raise ConfigError(f"device: got {device!r}; allowed: {', '.join(DEVICES)}")
    sheet, precision = DEVICES[device], "bfloat16"
    shape = ModelShape.of(model)
    sizes = shape.sizes(precision, kv_dtype)
    time = RooflineTime(sizes=sizes, device=sheet, num_devices=num_devices, host=HOST)
    # Equal shares of the KV heads, each on one device or, where there are too few, on several.
    copies = max(1, num_devices // model.num_kv_heads)
    memory = KvMemory.within(
        int(MEMORY_SHARE * sheet.memory_bytes * num_devices) - sizes.weight_bytes,
        1.0,
        page_size=page_size,
        bytes_per_token=sizes.kv_bytes_per_token * copies,
    )
    if memory.num_pages < 2:
        gigabytes = sizes.weight_bytes / 1e9
        raise ConfigError(
            f"mesh: got tp={num_devices}, whose {num_devices * sheet.memory_bytes / 1e9:.0f} GB"
            f" leave nothing beside {gigabytes:.0f} GB of weights; allowed: more devices"
        )
    bilinear = bilinear_of(time, Grid())
    notes = [f"computed, not measured: {sheet.source}"]
    if kv_dtype not in ("auto", precision):
        notes.append(f"keys and values in {kv_dtype}")
    if copies > 1:
        notes.append(
            f"{num_devices} devices share {model.num_kv_heads} kv heads: keys and values are held"
            f" {copies} times"
        )
    return Profile(
        kind=COMPUTED,
        model_name=model.name,
        model=shape,
        device=sheet.kind,
        num_devices=num_devices,
        precision=precision,
        page_size=page_size,
        num_pages=memory.num_pages,
        kernels={},
        versions={"jaxserve": __version__},
        date=datetime.date.today().isoformat(),
        host_overlaps=True,
        time=time,
        bilinear=bilinear.time,
        errors=Errors(prefill=bilinear.prefill_error, decode=bilinear.decode_error),
        notes=tuple(notes),
    )
