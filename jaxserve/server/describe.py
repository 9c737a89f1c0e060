"""What a replica says about itself, as a message. Knows records and fields only."""

from jaxserve import __version__
from jaxserve.models.info import ModelInfo
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.request import Limits


def describe(
    info: ModelInfo, limits: Limits, *, dispatch_s: float, replica: str
) -> pb.DescribeResponse:
    """What the replica says about itself; state and time are the service's."""
    config = info.config
    return pb.DescribeResponse(
        replica=replica,
        max_samples=limits.max_samples,
        model=pb.GetModelInfoResponse(
            model=info.name,
            source=info.source,
            vocab_size=limits.vocab_size,
            max_context=limits.max_context,
            eos_token_ids=config.eos_token_ids,
            num_parameters=config.num_parameters,
            dtype=info.dtype,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        ),
        server=pb.GetServerInfoResponse(
            version=__version__,
            schema=pb.DESCRIPTOR.package,
            platform=info.platform,
            device_kind=info.device_kind,
            num_devices=info.num_devices,
            kv_pages=info.num_pages,
            page_size=info.page_size,
            num_programs=info.programs,
            kernels=info.kernels,
            slice_dispatch_s=dispatch_s,
        ),
    )
