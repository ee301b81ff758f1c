// The few tokens' launcher and kernels, compiled for the emulator.
#include "cuda/nf4_matmul_few_tokens.cu"
