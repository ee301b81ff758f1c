// The optimisers' launchers and kernels, compiled for the emulator.
#include "cuda/optimizer.cu"
