// The codec's launchers and kernels, compiled for the emulator.
#include "cuda/nf4_codec.cu"
