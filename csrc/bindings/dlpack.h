// The part of DLPack 1.3 (dmlc/dlpack on GitHub) that reads a tensor: its C exchange API, which a
// library puts on its tensor type as the capsule `__dlpack_c_exchange_api__` (torch from 2.10 or so
// on); and the struct that hands one out. It is an ABI: the order of the members is theirs.
#pragma once

#include <cstdint>

namespace qlora::dlpack {

constexpr std::uint32_t major_version = 1;
constexpr char capsule_name[] = "dlpack_exchange_api";

enum DeviceCode : std::int32_t { device_cpu = 1, device_cuda = 2 };
enum TypeCode : std::uint8_t { type_int = 0, type_uint = 1, type_float = 2, type_bfloat = 4 };

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

/// A tensor; shape and strides belong to it and are in elements.
struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t rank;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48);

/// What a capsule that `__dlpack__` returns points to.
struct ManagedTensor {
  Tensor tensor;
  void* manager_ctx;
  void (*deleter)(ManagedTensor* self);
};
constexpr char managed_tensor_name[] = "dltensor";

struct Version {
  std::uint32_t major, minor;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void (*allocate)();
  void (*from_object)();
  void (*to_object)();
  /// Fills a Tensor that lives until the GIL is released. -1 with a Python error; may be null.
  int (*view_of_object)(void* object, Tensor* out);
  void (*current_stream)();
};

}  // namespace qlora::dlpack
