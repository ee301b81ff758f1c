// The thread block's shared memory, with a shadow that knows who touched each byte and when.
//
// Two threads that touch one byte, one of them writing, must have a __syncthreads between them, or,
// in one warp, a __syncwarp: nothing else orders memory, no shuffle, vote or mma either. That the
// emulator runs them in an order in which the bytes come out right does not excuse it. A clock
// advances at each such barrier; an access is stamped with it, and is ordered before what follows a
// barrier exactly if its stamp is older than the barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

namespace emulator {

class SharedMemory {
 public:
  /// Fresh memory of `bytes` bytes, none of them written, for a thread block of `warps` warps.
  void begin_thread_block(std::size_t bytes, unsigned warps);

  /// A barrier `where`: what came before is ordered before what follows, for all threads or for
  /// those of a warp.
  void order_thread_block(std::source_location where);
  void order_warp(unsigned warp, std::source_location where);

  std::byte* data() { return data_; }
  bool contains(const void* address) const { return address >= data_ && address < data_ + bytes_; }

  // An access by `thread`; one that is out of range, unaligned or not ordered fails the run.
  void read(unsigned thread, const void* address, std::size_t bytes, std::size_t alignment);
  void write(unsigned thread, const void* address, std::size_t bytes, std::size_t alignment);

  /// From the one to the other call the bytes are on their way, and nobody may touch them. After it
  /// they count as written by `thread` just then.
  void begin_copy(unsigned thread, void* address, std::size_t bytes);
  void end_copy(unsigned thread, const void* address, std::size_t bytes);

 private:
  static constexpr std::uint16_t nobody = 0xffff;

  /// Stamps older than the thread block mean that it did not happen.
  struct Byte {
    std::uint32_t written = 0, read = 0;
    std::uint16_t writer = nobody;
    // One who read it since, and one more: in another warp if there is such a one. No more is
    // needed to find one that a write clashes with.
    std::uint16_t reader = nobody, other_reader = nobody;
    bool is_on_its_way = false;
  };

  /// The last one of its kind.
  struct Barrier {
    std::uint32_t stamp = 0, number = 0;  // since the thread block began
    std::source_location where{};
  };

  static std::string describe(const char* name, const Barrier& last);
  Byte* find(const void* address, std::size_t bytes, std::size_t alignment);
  void note_reader(Byte& byte, unsigned thread) const;
  void check_not_on_its_way(const Byte& byte, const char* verb) const;
  bool is_ordered(unsigned thread, unsigned other, std::uint32_t stamp) const;
  void check_readers_ordered(const Byte& byte, unsigned thread) const;
  [[noreturn]] void fail_unordered(const Byte& byte, unsigned thread, const char* verb,
                                   unsigned other, const char* others_verb) const;

  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  std::vector<std::byte> memory_;
  std::vector<Byte> shadow_;
  std::uint32_t clock_ = 0;
  std::uint32_t begin_ = 0;  // of the thread block
  Barrier thread_block_barrier_;
  std::vector<Barrier> warp_barrier_;
};

SharedMemory& the_shared_memory();

}  // namespace emulator
