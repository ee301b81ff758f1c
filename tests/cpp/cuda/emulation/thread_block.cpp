#include "cuda/emulation/thread_block.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "core/check.h"
#include "cuda/emulation/copy_async.h"
#include "cuda/emulation/emulator.h"
#include "cuda/emulation/fiber.h"
#include "cuda/emulation/sequence.h"
#include "cuda/emulation/shared_memory.h"

namespace emulator {
namespace {

using qlora::message;

/// A place in a kernel where threads meet.
struct Place {
  const char* instruction;
  std::source_location where;
};

/// Where a fixed number of fibers meet.
struct Rendezvous {
  unsigned expected = 0, arrived = 0, generation = 0;
  Place place{};       // of the first to arrive
  unsigned first = 0;  // who it was
};

struct Warp {
  Rendezvous rendezvous;
  // Used in turn: a lane can be one exchange ahead of another that has still to read.
  std::array<Slots, 2> slots;
};

struct Thread {
  Fiber fiber;
  const Rendezvous* waits_for = nullptr;
  unsigned generation = 0;  // of what it waits for
  bool is_done = false;

  bool can_run() const {
    return !is_done && (waits_for == nullptr || waits_for->generation != generation);
  }
};

struct ThreadBlock {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  Rendezvous rendezvous;
  const std::function<void()>* body = nullptr;
  unsigned index = 0, thread_count = 0, warp_count = 0;
  unsigned running = 0;
  std::string failure;
};

ThreadBlock block;

Warp& this_warp() { return *block.warps[block.running / lanes]; }

std::string describe(const Place& place) {
  if (place.where.line() == 0) return place.instruction;
  return message(place.instruction, " (", text(place.where), ")");
}

bool is_same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool is_same_place(const Place& a, const Place& b) {
  return a.where.line() == b.where.line() && is_same_text(a.where.file_name(), b.where.file_name());
}

void record_failure(const std::string& what) {
  block.failure = message("thread block ", block.index, ": ", what);
}

/// Whether the caller is the last to come, which then goes on at once; the others wait.
bool meet(Rendezvous& rendezvous, const Place& place, bool must_be_same_place = false) {
  if (rendezvous.arrived == 0) {
    rendezvous.place = place;
    rendezvous.first = block.running;
  } else if (!is_same_text(rendezvous.place.instruction, place.instruction) ||
             (must_be_same_place && !is_same_place(rendezvous.place, place))) {
    fail(message("is in ", describe(place), " while thread ", rendezvous.first, " waits in ",
                 describe(rendezvous.place)));
  }
  if (++rendezvous.arrived == rendezvous.expected) return true;
  Thread& thread = *block.threads[block.running];
  thread.waits_for = &rendezvous;
  thread.generation = rendezvous.generation;
  Fiber::suspend();
  thread.waits_for = nullptr;
  return false;
}

void open(Rendezvous& rendezvous) {
  rendezvous.arrived = 0;
  ++rendezvous.generation;
}

/// Thrown and caught on the same fiber: an exception cannot leave it.
struct Failure {
  std::string what;
};

void run_thread() {
  try {
    (*block.body)();
    check_no_copies_left();
  } catch (const Failure& failure) {
    record_failure(message("thread ", block.running, " ", failure.what));
  }
  block.threads[block.running]->is_done = true;
}

void fiber_main() {
  run_thread();
  Fiber::finish();
}

/// Where the threads are that cannot go on.
std::string describe_waiting() {
  std::string waiting;
  unsigned done = 0, described = 0;
  const Rendezvous* last = nullptr;
  for (unsigned t = 0; t < block.thread_count; ++t) {
    const Thread& thread = *block.threads[t];
    done += thread.is_done;
    if (thread.is_done || thread.waits_for == last) continue;
    last = thread.waits_for;
    if (++described <= 4) {
      waiting += message("; thread ", t, " waits in ", describe(last->place), " with ",
                         last->arrived - 1, " others of ", last->expected - 1);
    }
  }
  return message("threads wait for others that do not come", waiting, "; ", done,
                 " threads have returned");
}

/// Runs the threads of a warp as far as they can go. Whether any could.
bool run_warp(unsigned warp, const std::vector<unsigned>& lane_order, Index& thread_index) {
  bool has_progressed = false;
  for (const unsigned lane : lane_order) {
    const unsigned t = warp * lanes + lane;
    if (t >= block.thread_count || !block.threads[t]->can_run()) continue;
    has_progressed = true;
    block.running = thread_index.x = t;
    block.threads[t]->fiber.resume();
    if (!block.failure.empty()) return false;
  }
  return has_progressed;
}

/// Warps take turns, and in its turn a warp goes as far as it can: one that a barrier fails to hold
/// back runs far ahead of the others.
void run_threads(Index& thread_index, std::mt19937& random) {
  Sequence warps(block.warp_count, random), order_of_lanes(lanes, random);
  const auto is_over = [] {
    return std::all_of(block.threads.begin(), block.threads.begin() + block.thread_count,
                       [](const auto& thread) { return thread->is_done; });
  };
  do {
    bool has_progressed = false;
    for (const unsigned warp : warps.next()) {
      while (run_warp(warp, order_of_lanes.next(), thread_index)) has_progressed = true;
      if (!block.failure.empty()) return;
    }
    if (!has_progressed) return record_failure(describe_waiting());
  } while (!is_over());
}

}  // namespace

std::string run_thread_block(unsigned index, unsigned threads, std::size_t shared_bytes,
                             const std::function<void()>& body, Index& thread_index,
                             std::mt19937& random) {
  block.index = index;
  block.body = &body;
  block.failure.clear();
  block.thread_count = threads;
  block.warp_count = (threads + lanes - 1) / lanes;
  block.rendezvous = {.expected = threads};
  while (block.warps.size() < block.warp_count) block.warps.push_back(std::make_unique<Warp>());
  for (unsigned w = 0; w < block.warp_count; ++w) {
    block.warps[w]->rendezvous = {.expected = std::min(lanes, threads - w * lanes)};
  }
  while (block.threads.size() < threads) block.threads.push_back(std::make_unique<Thread>());
  for (unsigned t = 0; t < threads; ++t) {
    Thread& thread = *block.threads[t];
    thread.waits_for = nullptr;
    thread.is_done = false;
    thread.fiber.start(fiber_main);
  }
  the_shared_memory().begin_thread_block(shared_bytes, block.warp_count);
  forget_copies(threads);
  run_threads(thread_index, random);
  return block.failure;
}

unsigned this_thread() { return block.running; }

std::string text(std::source_location where) {
  const std::string path = where.file_name();
  return message(path.substr(path.rfind('/') + 1), ":", where.line());
}

void fail(const std::string& what) { throw Failure{what}; }

void wait_for_thread_block(std::source_location where) {
  if (meet(block.rendezvous, {"__syncthreads", where}, true)) {
    the_shared_memory().order_thread_block(where);
    open(block.rendezvous);
  }
}

void wait_for_warp(unsigned mask, std::source_location where) {
  Warp& warp = this_warp();
  const Place place{"__syncwarp", where};
  if (mask != all_lanes) fail(message("is in ", describe(place), " without all lanes in its mask"));
  if (meet(warp.rendezvous, place)) {
    the_shared_memory().order_warp(block.running / lanes, where);
    open(warp.rendezvous);
  }
}

const Slots& exchange_in_warp(const char* instruction, unsigned mask, const void* mine,
                              std::size_t bytes, void (*work)(Slots&), std::source_location where) {
  Warp& warp = this_warp();
  const Place place{instruction, where};
  if (mask != all_lanes) fail(message("is in ", describe(place), " without all lanes in its mask"));
  if (bytes > Slots::bytes_per_lane) fail(message("leaves too many bytes in ", describe(place)));
  if (warp.rendezvous.expected != lanes) {
    fail(message("is in ", describe(place), " in a warp of fewer than 32 threads"));
  }
  Slots& slots = warp.slots[warp.rendezvous.generation % 2];
  std::memcpy(slots.of_lane[block.running % lanes].data(), mine, bytes);
  if (meet(warp.rendezvous, place)) {
    if (work != nullptr) work(slots);
    open(warp.rendezvous);
  }
  return slots;
}

void check_aligned(const void* address, std::size_t alignment) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignment != 0) {
    fail(message("touches memory at ", address, ", want a multiple of ", alignment));
  }
}

unsigned lane() { return block.running % lanes; }

void gather_in_warp(const char* instruction, unsigned mask, const void* mine, std::size_t bytes,
                    void* all, std::source_location where) {
  const Slots& slots = exchange_in_warp(instruction, mask, mine, bytes, nullptr, where);
  for (unsigned lane = 0; lane < lanes; ++lane) {
    std::memcpy(static_cast<std::byte*>(all) + lane * bytes, slots.of_lane[lane].data(), bytes);
  }
}

void shuffle(const char* instruction, unsigned mask, const void* mine, std::size_t bytes,
             unsigned from_lane, void* out, std::source_location where) {
  const Slots& slots = exchange_in_warp(instruction, mask, mine, bytes, nullptr, where);
  std::memcpy(out, slots.of_lane[from_lane].data(), bytes);
}

}  // namespace emulator
