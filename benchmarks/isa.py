"""Forcing an instruction set, on our side and on torch's."""

# A forced set holds for torch as well, or the ratios would compare two machines. MKL does torch's
# products in fp32. bitsandbytes has no such setting: see weights.runs_avx512_bf16.
ISA_SETTINGS: dict[str, dict[str, str]] = {
    "scalar": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {},
}


def isa_environment(isa: str | None) -> dict[str, str]:
    """The environment variables for it; none: the best that the machine has."""
    return {} if isa is None else {"QLORA_NATIVE_CPU_ISA": isa, **ISA_SETTINGS[isa]}
