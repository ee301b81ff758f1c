// Dropout's launcher and kernel, compiled for the emulator.
#include "cuda/dropout.cu"
