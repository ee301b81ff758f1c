# The x86-64 instruction sets of the CPU backend: one object library for each folder of csrc/cpu, compiled for its set alone.
# Which of them run is decided by the processor, in csrc/cpu/instruction_sets.cpp.
include(CheckCXXCompilerFlag)

set(QLORA_AVX2_FLAGS -mavx2 -mfma -mf16c)
set(QLORA_AVX512_FLAGS ${QLORA_AVX2_FLAGS} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
set(QLORA_AVX512_BF16_FLAGS ${QLORA_AVX512_FLAGS} -mavx512bf16)
set(QLORA_AMX_FLAGS ${QLORA_AVX512_BF16_FLAGS} -mamx-tile -mamx-bf16)

function(qlora_add_cpu_set target name)
  string(TOUPPER ${name} upper)
  add_library(qlora_cpu_${name} OBJECT ${ARGN})
  target_include_directories(qlora_cpu_${name} PRIVATE csrc)
  target_link_libraries(qlora_cpu_${name} PRIVATE qlora_flags)
  # Optimised in debug builds too: intrinsics are slow calls otherwise, and inline functions that stay out of line could be
  # taken by the linker for code that must run without the set (tests/cpp/cpu/set_isolation.cmake looks).
  target_compile_options(qlora_cpu_${name} PRIVATE ${QLORA_${upper}_FLAGS} $<$<CONFIG:Debug>:-O2>
    # Before GCC 13 its AVX-512 intrinsics that leave lanes undefined warn of that themselves (GCC bug 105593).
    $<$<AND:$<CXX_COMPILER_ID:GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-maybe-uninitialized -Wno-uninitialized>)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:qlora_cpu_${name}>)
endfunction()

function(qlora_add_cpu_sets target)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    return()
  endif()
  string(REPLACE ";" " " flags "${QLORA_AMX_FLAGS}")
  check_cxx_compiler_flag("${flags}" QLORA_COMPILER_HAS_X86_SETS)
  if(NOT QLORA_COMPILER_HAS_X86_SETS)
    message(WARNING "The compiler lacks ${flags}: only the scalar CPU kernels are built")
    return()
  endif()
  target_compile_definitions(${target} PRIVATE QLORA_X86_SETS)
  target_sources(${target} PRIVATE csrc/cpu/simd/dynamic_map_tables.cpp)
  if(QLORA_SANITIZE AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # Checks as calls: written out, those of the unrolled kernels take GCC some five minutes to compile.
    set_source_files_properties(
      csrc/cpu/avx2/lora.cpp csrc/cpu/avx2/optimizer.cpp csrc/cpu/avx512/lora.cpp csrc/cpu/avx512/optimizer.cpp PROPERTIES
      COMPILE_OPTIONS "--param=asan-instrumentation-with-call-threshold=0")
  endif()
  qlora_add_cpu_set(${target} avx2
    csrc/cpu/avx2/dora.cpp
    csrc/cpu/avx2/dropout.cpp
    csrc/cpu/avx2/kernels.cpp
    csrc/cpu/avx2/lora.cpp
    csrc/cpu/avx2/nf4_codec.cpp
    csrc/cpu/avx2/nf4_linear.cpp
    csrc/cpu/avx2/optimizer.cpp)
  qlora_add_cpu_set(${target} avx512
    csrc/cpu/avx512/dora.cpp
    csrc/cpu/avx512/dropout.cpp
    csrc/cpu/avx512/kernels.cpp
    csrc/cpu/avx512/lora.cpp
    csrc/cpu/avx512/nf4_codec.cpp
    csrc/cpu/avx512/nf4_linear.cpp
    csrc/cpu/avx512/optimizer.cpp)
  qlora_add_cpu_set(${target} avx512_bf16
    csrc/cpu/avx512_bf16/kernels.cpp
    csrc/cpu/avx512_bf16/lora.cpp
    csrc/cpu/avx512_bf16/nf4_linear.cpp)
  qlora_add_cpu_set(${target} amx
    csrc/cpu/amx/kernels.cpp
    csrc/cpu/amx/lora.cpp
    csrc/cpu/amx/nf4_linear.cpp)
endfunction()
