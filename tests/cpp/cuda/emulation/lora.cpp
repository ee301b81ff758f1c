// LoRA's launchers and kernels, compiled for the emulator.
#include "cuda/lora.cu"
