// The plain products' launcher and kernels, compiled for the emulator.
#include "cuda/nf4_matmul_plain.cu"
