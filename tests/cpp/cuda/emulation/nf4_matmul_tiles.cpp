// The tensor-core kernel for the middle and its launcher, compiled for the emulator.
#include "cuda/nf4_matmul_tiles.cu"
