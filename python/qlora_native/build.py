"""What was built, and what this machine has to run it on."""

from typing import TypedDict

from qlora_native import _core


class BuildInfo(TypedDict):
    """See `build_info`."""

    version: str
    cxx_compiler: str
    cpu_sets: list[str]
    cpu_set: str
    cuda: bool
    cuda_compiler: str
    cuda_archs: str
    cuda_devices: list[str]
    cuda_problems: list[str]


def build_info() -> BuildInfo:
    """What was built and what is in use.

    The version and the compilers; the instruction sets that this build has and this processor can
    run, and the one in use (`QLORA_NATIVE_CPU_ISA` forces one); whether the CUDA backend was built,
    and for which architectures; the GPUs that it can use, and why there is none, or what is wrong
    with the others.

    It asks the CUDA driver, which a forked child cannot use from then on. Importing does not.
    """
    report = _core.cuda_device_report()
    return {
        **_core.build_info(),
        "cuda_devices": report["usable"],
        "cuda_problems": report["problems"],
    }
