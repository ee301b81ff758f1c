#include "core/backend.h"

#include "support/expect_error.h"
#include "support/stored_weight.h"

namespace qlora {
namespace {

class EmptyBackend final : public Backend {
 public:
  const char* name() const override { return "Empty"; }
};

void expect_unsupported(const std::string& operation, const std::function<void()>& call) {
  expect_error<Unsupported>(operation + ": the Empty backend does not have this operation yet",
                            call);
}

TEST(Backend, AnOperationThatItDoesNotOverrideIsUnsupportedByName) {
  const EmptyBackend empty;
  const Backend& backend = empty;
  expect_unsupported("nf4_quantize", [&] { backend.nf4_quantize({}, {}, {}); });
  expect_unsupported("nf4_dequantize", [&] { backend.nf4_dequantize({}, {}, {}); });
  expect_unsupported("nf4_dequantize_absmax", [&] { backend.nf4_dequantize_absmax({}, {}, {}); });
  expect_unsupported("nf4_linear", [&] { backend.nf4_linear({}, {}, {}, {}, {}); });
  expect_unsupported("nf4_linear_grad_input",
                     [&] { backend.nf4_linear_grad_input({}, {}, {}, {}); });
  expect_unsupported("lora_forward", [&] { backend.lora_forward({}, {}); });
  expect_unsupported("lora_backward", [&] { backend.lora_backward({}, {}); });
  expect_unsupported("lora_forward_grouped", [&] { backend.lora_forward_grouped({}, {}); });
  expect_unsupported("lora_backward_grouped", [&] { backend.lora_backward_grouped({}, {}); });
  expect_unsupported("dora_scale", [&] { backend.dora_scale({}, {}); });
  expect_unsupported("dora_scale_backward", [&] { backend.dora_scale_backward({}, {}); });
  expect_unsupported("dropout", [&] { backend.dropout({}, 0.0, {}, {}, {}); });
  expect_unsupported("optimizer_step",
                     [&] { backend.optimizer_step(OptimizerRule::adamw, {}, {}, {}); });
  expect_unsupported("make_paged_buffer", [&] { backend.make_paged_buffer({}, {}); });
}

TEST(Backend, TheCpuHasOneAndItIsTheSameEachTime) {
  EXPECT_STREQ(backend_for({DeviceType::cpu, 0}).name(), "CPU");
  EXPECT_EQ(&backend_for({DeviceType::cpu, 0}), &cpu_backend());
}

TEST(Backend, CudaIsUnsupportedInACpuBuildAndTheErrorSaysWhatToDo) {
  if (cuda_info().is_compiled) GTEST_SKIP() << "this build has CUDA";
  const std::string text =
      "this build of qlora_native has no CUDA backend; install a CUDA toolkit (nvcc 12.8 or newer) "
      "and reinstall with --config-settings=cmake.define.QLORA_CUDA=ON";
  expect_error<Unsupported>(text, [] { backend_for({DeviceType::cuda, 0}); });

  StoredWeight weight(1, 32, 32, false);
  HostTensor w(DType::float32, {1, 32});
  NF4Weight on_cuda = weight.view();
  TensorView w_on_cuda = w.view();
  for (TensorView* tensor : {&on_cuda.codes, &on_cuda.absmax, &w_on_cuda}) {
    tensor->device = {DeviceType::cuda, 0};
  }
  expect_error<Unsupported>(text, [&] { nf4_quantize(w_on_cuda, on_cuda, {}); });
}

TEST(Backend, CudaInfoOfACpuBuildIsEmpty) {
  if (cuda_info().is_compiled) GTEST_SKIP() << "this build has CUDA";
  EXPECT_TRUE(cuda_info().architectures.empty());
  EXPECT_TRUE(cuda_info().compiler.empty());
}

TEST(Backend, AnUnknownDeviceTypeIsAnErrorNotAFallThrough) {
  EXPECT_THROW(backend_for({static_cast<DeviceType>(9), 0}), Unsupported);
}

}  // namespace
}  // namespace qlora
