"""What XLA has to be told of a GPU to compile for it where there is none. Loads no JAX.

The numbers are those that the driver reports of the chip (NVIDIA's tuning guides of Ampere and
Hopper say the same); memory and its rate are the data sheet's.
"""

from typing import Final, NamedTuple

from jaxserve.schedulers.estimators.roofline_time import DEVICES

_CUDA: Final = (13, 0)  # of runtime and driver; from 12.4 on a CUDA graph may have branches
_CUDNN: Final = (9, 12)


class GpuLimits(NamedTuple):
    """A chip's limits. What is "of a core" is of one streaming multiprocessor."""

    capability: tuple[int, int]
    cores: int
    fpus: int  # float32 units of a core
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int  # of a core, for all programs on it
    program_shared_bytes: int  # at most for one program
    registers: int = 65536  # of a core
    threads: int = 2048  # of a core
    programs: int = 32  # of a core
    reserved_bytes: int = 1024  # of shared memory, for each program

    def programs_per_core(self, *, registers: int, threads: int, shared_bytes: int) -> int:
        """How many programs of so many registers a thread fit on a core.

        Registers are handed out to warps by the 256 (CUDA Occupancy Calculator).
        """
        warps = -(-threads // 32)
        warp_registers = -(-registers * 32 // 256) * 256
        fit = (
            self.programs,
            self.threads // (warps * 32),
            self.registers // (warp_registers * warps),
            self.shared_bytes // (shared_bytes + self.reserved_bytes),
        )
        return min(fit)


_HOPPER: Final = GpuLimits(
    capability=(9, 0),
    cores=132,
    fpus=128,
    clock_ghz=1.98,
    l2_bytes=50 << 20,
    shared_bytes=228 << 10,
    program_shared_bytes=227 << 10,
)
GPU_LIMITS: Final[dict[str, GpuLimits]] = {
    "h200": _HOPPER,
    "h100": _HOPPER,
    "a100": GpuLimits(
        capability=(8, 0),
        cores=108,
        fpus=64,
        clock_ghz=1.41,
        l2_bytes=40 << 20,
        shared_bytes=164 << 10,
        program_shared_bytes=163 << 10,
    ),
}


def target_config(chip: str) -> str:
    """XLA's GpuTargetConfigProto for a chip of GPU_LIMITS, as text."""
    limits, sheet = GPU_LIMITS[chip], DEVICES[chip]
    major, minor = limits.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {limits.shared_bytes}
  shared_memory_per_block_optin: {limits.program_shared_bytes}
  threads_per_core_limit: {limits.threads}
  core_count: {limits.cores}
  fpus_per_core: {limits.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(sheet.memory_bytes_per_s)}
  l2_cache_size: {limits.l2_bytes}
  clock_rate_ghz: {limits.clock_ghz}
  device_memory_size: {int(sheet.memory_bytes)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: {limits.registers}
  registers_per_block_limit: {limits.registers}
  driver_version: "{_CUDA[0]}.{_CUDA[1]}.0"
}}
platform_name: "CUDA"
runtime_version {{ major: {_CUDA[0]} minor: {_CUDA[1]} }}
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}
device_description_str: "{sheet.kind}"
"""
