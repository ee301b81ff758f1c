// Stands in for CUDA's header of this name: the driver's functions, of which the backend looks up
// one.
#pragma once

using CUdevice = int;
enum CUresult { CUDA_SUCCESS = 0 };

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* is_active);
