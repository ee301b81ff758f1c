#include "cuda/emulation/copy_async.h"

#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "core/check.h"
#include "cuda/emulation/emulator.h"
#include "cuda/emulation/shared_memory.h"
#include "cuda/emulation/thread_block.h"

namespace emulator {
namespace {

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
  bool is_inside;
};

using Group = std::vector<Copy>;

struct CopiesOfThread {
  Group open;                   // of no group yet
  std::deque<Group> committed;  // oldest first
};

std::vector<CopiesOfThread> copies_of_threads;

CopiesOfThread& my_copies() { return copies_of_threads[this_thread()]; }

void land(const Copy& copy) {
  the_shared_memory().end_copy(this_thread(), copy.to, copy.bytes);
  if (copy.is_inside) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

}  // namespace

void forget_copies(unsigned threads) {
  if (copies_of_threads.size() < threads) copies_of_threads.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    copies_of_threads[t].open.clear();
    copies_of_threads[t].committed.clear();
  }
}

void check_no_copies_left() {
  const CopiesOfThread& copies = my_copies();
  std::size_t left = copies.open.size();
  for (const Group& group : copies.committed) left += group.size();
  if (left > 0) {
    fail(qlora::message("returns without having waited for ", left,
                        " of its copies to shared memory"));
  }
}

void copy_async(void* to, const void* from, std::size_t bytes, bool is_inside) {
  if (reinterpret_cast<std::uintptr_t>(from) % bytes != 0) {
    fail(qlora::message("copies ", bytes, " bytes to shared memory from ", from,
                        ", want a multiple of ", bytes));
  }
  the_shared_memory().begin_copy(this_thread(), to, bytes);
  my_copies().open.push_back({to, from, bytes, is_inside});
}

void commit_copies() {
  CopiesOfThread& copies = my_copies();
  copies.committed.push_back(std::move(copies.open));
  copies.open.clear();
}

void wait_for_copies(int pending) {
  auto& committed = my_copies().committed;
  while (committed.size() > static_cast<std::size_t>(pending)) {
    for (const Copy& copy : committed.front()) land(copy);
    committed.pop_front();
  }
}

}  // namespace emulator
