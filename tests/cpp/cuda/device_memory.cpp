#include "cuda/device_memory.h"

#include <cuda_runtime_api.h>

namespace qlora {
namespace {

void expect_success(cudaError_t error, const char* what) {
  EXPECT_EQ(error, cudaSuccess) << what << ": " << cudaGetErrorString(error);
}

}  // namespace

TensorView OnDevice::operator()(HostTensor& tensor) {
  TensorView view = tensor.view();
  if (!view.is_present) return view;
  const std::vector<std::uint8_t>& bytes = tensor.bytes();
  void* memory = nullptr;
  expect_success(cudaMalloc(&memory, bytes.size()), "cudaMalloc");
  expect_success(
      cudaMemcpyAsync(memory, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, nullptr),
      "copy to the device");
  copies_.push_back({&tensor, memory});
  view.data = memory;
  view.device = {DeviceType::cuda, 0};
  return view;
}

NF4Weight OnDevice::operator()(StoredWeight& weight) {
  NF4Weight view = weight.view();
  view.codes = (*this)(weight.codes);
  view.absmax = (*this)(weight.absmax);
  view.nested_absmax = (*this)(weight.nested_absmax);
  view.nested_offset = (*this)(weight.nested_offset);
  return view;
}

OnDevice::~OnDevice() {
  expect_success(cudaStreamSynchronize(nullptr), "the kernels");
  for (const Copy& copy : copies_) {
    std::vector<std::uint8_t>& bytes = copy.original->bytes();
    expect_success(
        cudaMemcpyAsync(bytes.data(), copy.memory, bytes.size(), cudaMemcpyDeviceToHost, nullptr),
        "copy from the device");
    expect_success(cudaStreamSynchronize(nullptr), "copies");
    expect_success(cudaFree(copy.memory), "cudaFree");
  }
}

}  // namespace qlora
