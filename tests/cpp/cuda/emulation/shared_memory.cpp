#include "cuda/emulation/shared_memory.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "cuda/emulation/emulator.h"
#include "cuda/emulation/thread_block.h"

namespace emulator {
namespace {

constexpr std::size_t alignment_of_memory = 128;  // as dynamic_shared_memory promises
constexpr std::byte poison{0xff};                 // NaN in every floating-point type

unsigned warp_of(unsigned thread) { return thread / lanes; }

}  // namespace

SharedMemory& the_shared_memory() {
  static SharedMemory memory;
  return memory;
}

void SharedMemory::begin_thread_block(std::size_t bytes, unsigned warps) {
  if (memory_.size() < bytes + alignment_of_memory) memory_.resize(bytes + alignment_of_memory);
  const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
  data_ = memory_.data() + (alignment_of_memory - address % alignment_of_memory);
  bytes_ = bytes;
  std::fill_n(data_, bytes, poison);
  if (shadow_.size() < bytes) shadow_.resize(bytes);
  begin_ = ++clock_;
  thread_block_barrier_ = {.stamp = begin_};
  warp_barrier_.assign(warps, {.stamp = begin_});
}

void SharedMemory::order_thread_block(std::source_location where) {
  thread_block_barrier_ = {++clock_, thread_block_barrier_.number + 1, where};
}

void SharedMemory::order_warp(unsigned warp, std::source_location where) {
  warp_barrier_[warp] = {++clock_, warp_barrier_[warp].number + 1, where};
}

SharedMemory::Byte* SharedMemory::find(const void* address, std::size_t bytes,
                                       std::size_t alignment) {
  const auto offset =
      reinterpret_cast<std::intptr_t>(address) - reinterpret_cast<std::intptr_t>(data_);
  if (offset < 0 || static_cast<std::size_t>(offset) + bytes > bytes_) {
    fail(qlora::message("touches bytes ", offset, " to ",
                        offset + static_cast<std::intptr_t>(bytes) - 1, " of ", bytes_,
                        " bytes of shared memory"));
  }
  if (static_cast<std::size_t>(offset) % alignment != 0) {
    fail(qlora::message("touches ", bytes, " bytes at byte ", offset,
                        " of shared memory, want a multiple of ", alignment));
  }
  return &shadow_[static_cast<std::size_t>(offset)];
}

bool SharedMemory::is_ordered(unsigned thread, unsigned other, std::uint32_t stamp) const {
  return thread == other || stamp < thread_block_barrier_.stamp ||
         (warp_of(thread) == warp_of(other) && stamp < warp_barrier_[warp_of(thread)].stamp);
}

std::string SharedMemory::describe(const char* name, const Barrier& last) {
  if (last.number == 0) return qlora::message("no ", name, " so far");
  return qlora::message("the last ", name, " was number ", last.number, ", at ", text(last.where));
}

void SharedMemory::fail_unordered(const Byte& byte, unsigned thread, const char* verb,
                                  unsigned other, const char* others_verb) const {
  std::string barriers =
      "__syncthreads between (" + describe("__syncthreads", thread_block_barrier_);
  if (warp_of(thread) == warp_of(other)) {
    barriers =
        "__syncwarp or " + barriers + ", " + describe("__syncwarp", warp_barrier_[warp_of(thread)]);
  }
  fail(qlora::message(verb, " byte ", &byte - shadow_.data(), " of shared memory, which thread ",
                      other, " ", others_verb, ", with no ", barriers, ")"));
}

void SharedMemory::check_not_on_its_way(const Byte& byte, const char* verb) const {
  if (byte.is_on_its_way && byte.written >= begin_) {
    fail(qlora::message(verb, " byte ", &byte - shadow_.data(),
                        " of shared memory, to which a copy is on its way that thread ",
                        byte.writer, " has not waited for"));
  }
}

void SharedMemory::note_reader(Byte& byte, unsigned thread) const {
  const auto reader = static_cast<std::uint16_t>(thread);
  const bool is_first = byte.reader == nobody || byte.read < thread_block_barrier_.stamp;
  const bool are_several_warps = !is_first && byte.other_reader != nobody &&
                                 warp_of(byte.other_reader) != warp_of(byte.reader);
  if (are_several_warps) return;
  const bool is_of_same_warp = !is_first && warp_of(byte.reader) == warp_of(thread);
  if (is_first || (is_of_same_warp && byte.read < warp_barrier_[warp_of(thread)].stamp)) {
    byte.reader = reader;
    byte.other_reader = nobody;
    byte.read = clock_;
  } else if (byte.reader != reader) {
    byte.other_reader = reader;
  }
}

void SharedMemory::check_readers_ordered(const Byte& byte, unsigned thread) const {
  for (const unsigned reader : {byte.reader, byte.other_reader}) {
    if (reader != nobody && !is_ordered(thread, reader, byte.read)) {
      fail_unordered(byte, thread, "writes", reader, "has read");
    }
  }
}

void SharedMemory::read(unsigned thread, const void* address, std::size_t bytes,
                        std::size_t alignment) {
  Byte* const first = find(address, bytes, alignment);
  for (Byte* byte = first; byte != first + bytes; ++byte) {
    if (byte->written < begin_) {
      fail(qlora::message("reads byte ", byte - shadow_.data(),
                          " of shared memory, which nobody has written"));
    }
    check_not_on_its_way(*byte, "reads");
    if (!is_ordered(thread, byte->writer, byte->written)) {
      fail_unordered(*byte, thread, "reads", byte->writer, "has written");
    }
    note_reader(*byte, thread);
  }
}

void SharedMemory::write(unsigned thread, const void* address, std::size_t bytes,
                         std::size_t alignment) {
  Byte* const first = find(address, bytes, alignment);
  for (Byte* byte = first; byte != first + bytes; ++byte) {
    if (byte->written >= begin_) {
      check_not_on_its_way(*byte, "writes");
      if (!is_ordered(thread, byte->writer, byte->written)) {
        fail_unordered(*byte, thread, "writes", byte->writer, "has written");
      }
      check_readers_ordered(*byte, thread);
    }
    *byte = {.written = clock_, .writer = static_cast<std::uint16_t>(thread)};
  }
}

void SharedMemory::begin_copy(unsigned thread, void* address, std::size_t bytes) {
  write(thread, address, bytes, bytes);
  Byte* const first = find(address, bytes, bytes);
  for (Byte* byte = first; byte != first + bytes; ++byte) byte->is_on_its_way = true;
  std::fill_n(static_cast<std::byte*>(address), bytes, poison);
}

void SharedMemory::end_copy(unsigned thread, const void* address, std::size_t bytes) {
  Byte* const first = find(address, bytes, bytes);
  for (Byte* byte = first; byte != first + bytes; ++byte) {
    *byte = {.written = clock_, .writer = static_cast<std::uint16_t>(thread)};
  }
}

void check_global(const void* address) {
  if (the_shared_memory().contains(address)) {
    fail("uses shared memory in an instruction that is emulated for global memory alone");
  }
}

std::byte* shared_memory() { return the_shared_memory().data(); }

void load_shared(const void* address, std::size_t bytes, std::size_t alignment, void* out) {
  the_shared_memory().read(this_thread(), address, bytes, alignment);
  std::memcpy(out, address, bytes);
}

void store_shared(void* address, std::size_t bytes, std::size_t alignment, const void* value) {
  the_shared_memory().write(this_thread(), address, bytes, alignment);
  std::memcpy(address, value, bytes);
}

}  // namespace emulator
