"""What a deployment tells others about its model."""

from dataclasses import dataclass

from jaxserve.models.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model as served: where it came from, its shape, and how it is computed.

    `kernels` names the backend picked for each op, `programs` counts compiled slice programs.
    """

    name: str
    source: str
    config: ModelConfig
    dtype: str
    num_pages: int
    page_size: int
    programs: int
    kernels: dict[str, str]
    platform: str
    device_kind: str
    num_devices: int
