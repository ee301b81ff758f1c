#include "cuda/emulation/streams.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <set>

#include "cuda/emulation/emulator.h"

namespace {

[[noreturn]] void fail(const char* reason) {
  std::fprintf(stderr, "emulator: %s\n", reason);
  std::abort();
}

}  // namespace

struct CUevent_st {
  // Of the last record, whether it was reached. Who waits for it waits for that one, though the
  // event be recorded again.
  std::shared_ptr<bool> is_reached = std::make_shared<bool>(true);
};

struct CUstream_st {
  struct Item {
    std::function<bool()> is_ready;
    std::function<void()> run;
  };
  int device = 0;
  std::deque<Item> items;
};

namespace {

constexpr std::size_t granule_bytes = 4096;

/// Fresh memory is nowhere: it lies where it is touched first.
struct Granule {
  enum class Place { nowhere, host, device };
  Place place = Place::nowhere;
  bool prefers_host = false;
  std::uint64_t used = 0;  // its key in managed_on_device, while it is there
};

struct ManagedRegion {
  std::size_t bytes;
  std::vector<Granule> granules;
};

std::vector<cudaStream_t> made_streams;
std::map<const std::byte*, ManagedRegion> managed_regions;
std::map<std::uint64_t, Granule*> managed_on_device;  // used longest ago first
std::map<const void*, std::size_t> device_memory;     // that does not move
std::set<void*> pinned;

bool is_made(cudaStream_t stream) {
  return std::find(made_streams.begin(), made_streams.end(), stream) != made_streams.end();
}

void queue(cudaStream_t stream, CUstream_st::Item item) {
  if (is_made(stream)) {
    stream->items.push_back(std::move(item));
  } else {
    if (!item.is_ready()) fail("a stream that does its work at once waits for one that does not");
    item.run();
  }
}

void queue_work(const emulator::Work& work, std::function<void()> run) {
  emulator::streams().queued.push_back(work);
  queue(work.stream, {[] { return true; },
                      [work, run = std::move(run)] {
                        emulator::streams().done.push_back(work);
                        run();
                      }});
}

/// Runs what can be run, a piece at a time, until `is_done`.
void run_until(const std::function<bool()>& is_done) {
  static std::mt19937 generator;
  const emulator::Turn turn = emulator::streams().turn;
  generator.seed(emulator::streams().seed);
  while (!is_done()) {
    std::vector<cudaStream_t> able;
    for (const cudaStream_t stream : made_streams) {
      if (!stream->items.empty() && stream->items.front().is_ready()) able.push_back(stream);
    }
    if (able.empty()) fail("streams wait for each other");
    std::size_t chosen = 0;
    if (turn == emulator::Turn::newest_stream) chosen = able.size() - 1;
    if (turn == emulator::Turn::shuffled) chosen = generator() % able.size();
    const CUstream_st::Item item = std::move(able[chosen]->items.front());
    able[chosen]->items.pop_front();
    item.run();
  }
}

/// The region that holds this memory, if it is managed.
ManagedRegion* find_region(const void* memory, std::size_t& first) {
  const auto* const begin = static_cast<const std::byte*>(memory);
  auto region = managed_regions.upper_bound(begin);
  if (region == managed_regions.begin()) return nullptr;
  --region;
  first = static_cast<std::size_t>(begin - region->first);
  return first < region->second.bytes ? &region->second : nullptr;
}

/// The granules of managed memory.
template <typename Function>
void for_each_granule(const void* memory, std::size_t bytes, Function&& function) {
  std::size_t first = 0;
  ManagedRegion* const region = find_region(memory, first);
  if (region == nullptr) fail("this memory is not managed");
  if (first + bytes > region->bytes) fail("beyond the managed memory");
  const std::size_t last = (first + bytes + granule_bytes - 1) / granule_bytes;
  for (std::size_t i = first / granule_bytes; i < last; ++i) function(region->granules[i]);
}

std::size_t free_bytes() {
  std::size_t used = managed_on_device.size() * granule_bytes;
  for (const auto& [memory, bytes] : device_memory) used += bytes;
  const std::size_t all = emulator::device().memory_bytes;
  return all > used ? all - used : 0;
}

void leave_device(Granule& granule) {
  if (granule.place == Granule::Place::device) {
    managed_on_device.erase(granule.used);
    emulator::streams().managed_on_device_bytes -= granule_bytes;
  }
  granule.place = Granule::Place::host;
}

void note_use(Granule& granule) {
  static std::uint64_t now = 0;
  managed_on_device.erase(granule.used);
  granule.used = ++now;
  managed_on_device[now] = &granule;
}

/// Leaves it where it is if there is no room.
void come_to_device(Granule& granule) {
  emulator::Streams& state = emulator::streams();
  if (granule.place != Granule::Place::device) {
    if (!emulator::make_room(granule_bytes)) return;
    granule.place = Granule::Place::device;
    state.managed_on_device_bytes += granule_bytes;
    state.peak_managed_on_device_bytes =
        std::max(state.peak_managed_on_device_bytes, state.managed_on_device_bytes);
  }
  note_use(granule);
}

void move(const void* memory, std::size_t bytes, bool is_to_device) {
  for_each_granule(memory, bytes, is_to_device ? come_to_device : leave_device);
}

/// What a kernel does to managed memory: it may be anywhere (cudaMemAdviseSetAccessedBy).
void touch(const void* memory, std::size_t bytes) {
  std::size_t first = 0;
  if (find_region(memory, first) == nullptr) return;
  for_each_granule(memory, bytes, [](Granule& granule) {
    if (granule.place == Granule::Place::nowhere) {
      granule.prefers_host ? leave_device(granule) : come_to_device(granule);
    } else if (granule.place == Granule::Place::device) {
      note_use(granule);
    }
  });
}

}  // namespace

namespace emulator {

Streams& streams() {
  static Streams state;
  return state;
}

bool is_to_fail() {
  int& left = streams().calls_until_failure;
  return left >= 0 && left-- == 0;
}

void queue_kernel(cudaStream_t stream, const void* memory, std::size_t bytes,
                  std::function<void()> run) {
  queue_work({Kind::kernel, memory, bytes, stream}, [=, run = std::move(run)] {
    touch(memory, bytes);
    run();
  });
}

void queue_launch(cudaStream_t stream, std::function<void()> run) {
  queue_work({Kind::kernel, nullptr, 0, stream}, std::move(run));
}

void queue_memset(const void* memory, std::size_t bytes, cudaStream_t stream,
                  std::function<void()> run) {
  queue_work({Kind::set_bytes, memory, bytes, stream}, [=, run = std::move(run)] {
    touch(memory, bytes);
    run();
  });
}

void when_reached(cudaStream_t stream, std::function<void()> run) {
  queue(stream, {[] { return true; }, std::move(run)});
}

bool is_late(cudaStream_t stream) { return is_made(stream); }

void queue_copy(cudaMemcpyKind kind, const void* host_memory, std::size_t bytes,
                cudaStream_t stream, std::function<void()> run) {
  queue_work({kind == cudaMemcpyHostToDevice ? Kind::copy_to_device : Kind::copy_to_host,
              host_memory, bytes, stream},
             std::move(run));
}

bool is_on_device(const void* memory, std::size_t bytes) {
  bool is_all = true;
  for_each_granule(memory, bytes, [&](const Granule& granule) {
    is_all &= granule.place == Granule::Place::device;
  });
  return is_all;
}

bool make_room(std::size_t bytes) {
  for (std::size_t free = free_bytes(); free < bytes; free += granule_bytes) {
    if (managed_on_device.empty()) return false;
    leave_device(*managed_on_device.begin()->second);
    streams().evicted_bytes += granule_bytes;
  }
  return true;
}

void note_on_device(const void* memory, std::size_t bytes) { device_memory[memory] = bytes; }

void forget_memory(void* memory) {
  device_memory.erase(memory);
  const auto region = managed_regions.find(static_cast<std::byte*>(memory));
  if (region == managed_regions.end()) return;
  move(memory, region->second.bytes, false);
  managed_regions.erase(region);
}

void wait_for(cudaStream_t stream) {
  if (is_made(stream)) run_until([&] { return stream->items.empty(); });
}

bool is_of_another_device(cudaStream_t stream) {
  return is_made(stream) && stream->device != device().current;
}

}  // namespace emulator

using emulator::device;
using emulator::is_to_fail;
using emulator::streams;

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device().driver_error == cudaSuccess ? streams().device_count : 0;
  return device().driver_error;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {.name = "Emulated", .major = device().major, .minor = device().minor};
  return device().driver_error;
}

cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* index) {
  if (!streams().knows_device_of_stream) return cudaErrorCallRequiresNewerDriver;
  *index = is_made(stream) ? stream->device : device().current;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  if (is_to_fail()) return cudaErrorMemoryAllocation;
  *stream = made_streams.emplace_back(new CUstream_st{.device = device().current, .items = {}});
  ++streams().live;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  emulator::note_unsafe_call();
  emulator::wait_for(stream);
  std::erase(made_streams, stream);
  delete stream;
  --streams().live;
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  queue(stream, {[is_reached = event->is_reached] { return *is_reached; }, [] {}});
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (is_to_fail()) return cudaErrorMemoryAllocation;
  *event = new CUevent_st;
  ++streams().live;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  emulator::note_unsafe_call();
  delete event;
  --streams().live;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->is_reached = std::make_shared<bool>(false);
  queue(stream, {[] { return true; }, [is_reached = event->is_reached] { *is_reached = true; }});
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  emulator::note_unsafe_call();
  ++device().synchronize_count;
  run_until([is_reached = event->is_reached] { return *is_reached; });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  emulator::note_unsafe_call();
  return *event->is_reached ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  ++device().memory_info_count;
  *free = free_bytes();
  *total = device().memory_bytes;
  return device().driver_error;
}

cudaError_t cudaMallocManaged(void** memory, std::size_t bytes, unsigned) {
  if (streams().is_managed_missing) return cudaErrorInvalidValue;
  emulator::note_unsafe_call();
  if (device().is_out_of_memory || is_to_fail()) return cudaErrorMemoryAllocation;
  const cudaError_t error = emulator::allocate_on_host(memory, bytes);
  if (error != cudaSuccess) return error;
  managed_regions[static_cast<std::byte*>(*memory)] = {
      bytes, std::vector<Granule>((bytes + granule_bytes - 1) / granule_bytes)};
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
  emulator::note_unsafe_call();
  if (is_to_fail()) return cudaErrorMemoryAllocation;
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xa5, bytes);
  pinned.insert(*memory);
  ++streams().live;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  emulator::note_unsafe_call();
  if (pinned.erase(memory) == 0) fail("this memory was not pinned");
  std::free(memory);
  --streams().live;
  return cudaSuccess;
}

cudaError_t cudaMemAdvise(const void* memory, std::size_t bytes, cudaMemoryAdvise advice,
                          cudaMemLocation location) {
  if (is_to_fail()) return cudaErrorInvalidValue;
  for_each_granule(memory, bytes, [&](Granule& granule) {
    if (advice != cudaMemAdviseSetPreferredLocation) return;
    granule.prefers_host = location.type == cudaMemLocationTypeHost;
  });
  streams().advice.push_back(advice);
  return cudaSuccess;
}

cudaError_t cudaMemPrefetchAsync(const void* memory, std::size_t bytes, cudaMemLocation location,
                                 unsigned, cudaStream_t stream) {
  const bool is_to_device = location.type == cudaMemLocationTypeDevice;
  std::size_t coming_bytes = 0;
  for_each_granule(memory, bytes, [&](const Granule& granule) {
    if (granule.place != Granule::Place::device) coming_bytes += granule_bytes;
  });
  if (streams().prefetch_error != cudaSuccess) return streams().prefetch_error;
  const bool is_refused =
      is_to_device && !device().evicts_managed_memory && coming_bytes > free_bytes();
  if (is_to_fail() || is_refused) return cudaErrorMemoryAllocation;
  queue_work({is_to_device ? emulator::Kind::prefetch_to_device : emulator::Kind::prefetch_to_host,
              memory, bytes, stream},
             [=] { move(memory, bytes, is_to_device); });
  return cudaSuccess;
}
