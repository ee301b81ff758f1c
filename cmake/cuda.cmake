# Decides whether the CUDA backend is built, and adds it, or the file that stands in for it.

if(NOT QLORA_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "QLORA_CUDA is '${QLORA_CUDA}', want AUTO, ON or OFF")
endif()

set(QLORA_HAS_CUDA OFF)
if(NOT QLORA_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  # Checked with the architectures that will be built, or CMake would try the compiler's default.
  set(CMAKE_CUDA_ARCHITECTURES ${QLORA_CUDA_ARCHS})
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    # Asked before the language is enabled, where a compiler that does not know these architectures ends the configuration.
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE nvcc_says ERROR_QUIET)
    if(nvcc_says MATCHES "release ([0-9]+\\.[0-9]+)" AND CMAKE_MATCH_1 VERSION_LESS 12.8)
      set(reason "${CMAKE_CUDA_COMPILER} is CUDA ${CMAKE_MATCH_1}, want 12.8 or newer")
    else()
      enable_language(CUDA)
      set(QLORA_HAS_CUDA ON)
      if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has C++20
        set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
        set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
      endif()
    endif()
  else()
    set(reason "no CUDA compiler was found; install a CUDA toolkit, or point CUDACXX at its nvcc")
  endif()
  if(NOT QLORA_HAS_CUDA)
    if(QLORA_CUDA STREQUAL "ON")
      message(FATAL_ERROR "QLORA_CUDA=ON, but ${reason}")
    endif()
    message(STATUS "qlora_native: CPU only (${reason})")
  endif()
endif()

function(qlora_add_cuda_backend target)
  if(NOT QLORA_HAS_CUDA)
    target_sources(${target} PRIVATE csrc/cuda/unavailable.cpp)
    return()
  endif()
  message(STATUS "qlora_native: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${QLORA_CUDA_ARCHS}")
  target_sources(${target} PRIVATE
    csrc/cuda/cuda_backend.cpp
    csrc/cuda/device_report.cpp
    csrc/cuda/dropout.cu
    csrc/cuda/lora.cu
    csrc/cuda/lora_plan.cpp
    csrc/cuda/nf4_codec.cu
    csrc/cuda/nf4_matmul_dispatch.cpp
    csrc/cuda/nf4_matmul_few_tokens.cu
    csrc/cuda/nf4_matmul_plain.cu
    csrc/cuda/nf4_matmul_plan.cpp
    csrc/cuda/nf4_matmul_tiles.cu
    csrc/cuda/optimizer.cu
    csrc/cuda/page_memory.cpp
    csrc/cuda/paged_buffer.cpp
    csrc/cuda/paging_plan.cpp
    csrc/cuda/runtime.cpp)
  string(REPLACE ";" "," architectures "${QLORA_CUDA_ARCHS}")
  set_source_files_properties(csrc/cuda/cuda_backend.cpp PROPERTIES COMPILE_DEFINITIONS
    "QLORA_CUDA_ARCHS=\"${architectures}\";QLORA_CUDA_COMPILER=\"nvcc ${CMAKE_CUDA_COMPILER_VERSION}\"")
  set_target_properties(${target} PROPERTIES
    CUDA_STANDARD 20
    CUDA_STANDARD_REQUIRED ON
    CUDA_ARCHITECTURES "${QLORA_CUDA_ARCHS}"
    CUDA_RUNTIME_LIBRARY Static
    CUDA_VISIBILITY_PRESET hidden)
  # Products must not be fused into sums: see qlora_flags.
  # A kernel that spills registers, or keeps an array in local memory, is slow: ptxas warns of it.
  set(cuda_flags --fmad=false --expt-relaxed-constexpr -Xcompiler=-ffp-contract=off,-Wall,-Wextra
    -Xptxas=--warn-on-spills,--warn-on-local-memory-usage)
  list(LENGTH QLORA_CUDA_ARCHS architecture_count)
  if(architecture_count GREATER 1)
    # Two architectures of a file at a time: on two cores 8.4 s instead of 15.6 for a file that is built alone.
    list(APPEND cuda_flags --threads=2)
  endif()
  if(QLORA_WERROR)
    list(APPEND cuda_flags -Werror=all-warnings -Xcompiler=-Werror -Xptxas=-Werror)
  endif()
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_flags}>")
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
endfunction()
