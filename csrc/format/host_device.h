// One macro: functions of the byte format compile for the host and, under nvcc, for the device.
#pragma once

#if defined(__CUDACC__)
#define QLORA_HOST_DEVICE __host__ __device__
#else
#define QLORA_HOST_DEVICE
#endif
