// What this machine can do at best: bytes a second from and to memory, and floating-point operations
// a second. probes.py compiles this file when a benchmark starts and calls the extern "C" functions.
//
// Every kernel is compiled for its own instruction set by a function attribute, and run only where
// CPUID has it. A figure is the best of short repetitions: a limit is what nothing exceeds.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "probes_arithmetic.h"

namespace {

using qlora_probes::features;
using Clock = std::chrono::steady_clock;

// ---- threads that start together

/// Every thread waits until all have come; spinning, because waking takes as long as a repetition.
class SpinBarrier {
 public:
  explicit SpinBarrier(int count) : count_(count) {}

  void wait() {
    const int round = round_.load();
    if (arrived_.fetch_add(1) + 1 == count_) {
      arrived_.store(0);
      round_.fetch_add(1);
    } else {
      while (round_.load() == round) std::this_thread::yield();
    }
  }

 private:
  const int count_;
  std::atomic<int> arrived_{0}, round_{0};
};

/// The shortest time in seconds in which all threads have done `work(thread)` once.
template <typename Prepare, typename Work>
double best_seconds(int threads, int repetitions, Prepare prepare, Work work) {
  SpinBarrier barrier(threads);
  double best = 1e30;
  const auto run = [&](int thread) {
    prepare(thread);
    work(thread);  // warms up, unmeasured
    for (int i = 0; i < repetitions; ++i) {
      barrier.wait();
      const auto start = Clock::now();
      work(thread);
      barrier.wait();
      if (thread == 0) {
        best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
      }
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
  return best;
}

// ---- memory

volatile std::int64_t sink;  // so that no result is unused

constexpr std::size_t kLine = 64;
constexpr int kMaxStreams = 8;
constexpr std::size_t kPrefetchBytes = 2048;  // ahead in each stream; 1 to 4 KB measured alike

/// 64 bytes; the compiler makes one load of it, or two or four, as the target has registers.
typedef std::int64_t Line __attribute__((vector_size(kLine), may_alias));

/// Reads `bytes` as `streams` runs side by side, so that as many pages are being fetched from.
template <int streams>
[[gnu::always_inline]] inline std::int64_t read_lines(const char* data, std::size_t bytes) {
  const std::size_t run = bytes / streams / kLine * kLine;
  Line sums[streams] = {};
  for (std::size_t i = 0; i < run; i += kLine) {
    for (int s = 0; s < streams; ++s) {
      const char* const line = data + s * run + i;
      __builtin_prefetch(line + kPrefetchBytes);
      sums[s] += *reinterpret_cast<const Line*>(line);
    }
  }
  std::int64_t sum = 0;
  for (const Line& line : sums) sum += line[0] + line[7];
  return sum;
}

[[gnu::always_inline]] inline std::int64_t read_any(const char* data, std::size_t bytes,
                                                    int streams) {
  switch (streams) {
    case 1: return read_lines<1>(data, bytes);
    case 2: return read_lines<2>(data, bytes);
    case 4: return read_lines<4>(data, bytes);
    default: return read_lines<8>(data, bytes);
  }
}

/// A line written through the caches, which read it first.
[[gnu::always_inline]] inline void store_cached(char* to, const char* from) {
  *reinterpret_cast<Line*>(to) = *reinterpret_cast<const Line*>(from);
}

/// A line written past the caches: four stores fill a write buffer, which goes out as a whole.
[[gnu::always_inline]] inline void store_uncached(char* to, const char* from) {
#if defined(__x86_64__)
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i,
                     _mm_load_si128(reinterpret_cast<const __m128i*>(from) + i));
  }
#else
  store_cached(to, from);
#endif
}

template <void store(char*, const char*)>
void copy_lines(char* to, const char* from, std::size_t bytes, int streams) {
  const std::size_t run = bytes / streams / kLine * kLine;
  for (std::size_t i = 0; i < run; i += kLine) {
    for (std::size_t at = i; at < i + run * streams; at += run) {
      __builtin_prefetch(from + at + kPrefetchBytes);
      store(to + at, from + at);
    }
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

#if defined(__x86_64__)
/// The same with one store a line, which measures 10 % faster than four.
[[gnu::target("avx512f")]] void copy_avx512(char* to, const char* from, std::size_t bytes,
                                            int streams) {
  const std::size_t run = bytes / streams / kLine * kLine;
  for (std::size_t i = 0; i < run; i += kLine) {
    for (std::size_t at = i; at < i + run * streams; at += run) {
      __builtin_prefetch(from + at + kPrefetchBytes);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at),
                          _mm512_load_si512(reinterpret_cast<const __m512i*>(from + at)));
    }
  }
  _mm_sfence();
}
[[gnu::target("avx512f")]] std::int64_t read_avx512(const char* data, std::size_t bytes, int n) {
  return read_any(data, bytes, n);
}
[[gnu::target("avx2")]] std::int64_t read_avx2(const char* data, std::size_t bytes, int n) {
  return read_any(data, bytes, n);
}
#endif

std::int64_t read_baseline(const char* data, std::size_t bytes, int n) {
  return read_any(data, bytes, n);
}

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

/// Pages like those of a tensor, that is to say small ones; the thread that uses them touches them.
Memory allocate(std::size_t bytes) {
  return Memory(static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
}

}  // namespace

extern "C" {

/// Bytes a second that `threads` threads read, each from its own `bytes_each`.
double probe_read_bandwidth(int threads, std::size_t bytes_each, int repetitions) {
  auto read = read_baseline;
#if defined(__x86_64__)
  if (features().avx2) read = read_avx2;
  if (features().avx512) read = read_avx512;
#endif
  std::vector<Memory> buffers(threads);
  double best = 0;
  for (int streams = 1; streams <= kMaxStreams; streams *= 2) {
    const double seconds = best_seconds(
        threads, repetitions,
        [&](int t) {
          if (buffers[t]) return;
          buffers[t] = allocate(bytes_each + kPrefetchBytes);
          std::memset(buffers[t].get(), 1, bytes_each);
        },
        [&](int t) { sink = read(buffers[t].get(), bytes_each, streams); });
    best = std::max(best, threads * static_cast<double>(bytes_each) / seconds);
  }
  return best;
}

/// Bytes read and bytes written a second, together, of a copy of `bytes_each` by each thread: the
/// better of stores through the caches (where a line is read before it is written: not counted) and
/// past them.
double probe_copy_bandwidth(int threads, std::size_t bytes_each, int repetitions) {
  std::vector<void (*)(char*, const char*, std::size_t, int)> copies{copy_lines<store_cached>,
                                                                     copy_lines<store_uncached>};
#if defined(__x86_64__)
  if (features().avx512) copies.push_back(copy_avx512);
#endif
  std::vector<Memory> from(threads), to(threads);
  double best = 0;
  for (const auto copy : copies) {
    for (const int streams : {1, 4}) {
      const double seconds = best_seconds(
          threads, repetitions,
          [&](int t) {
            if (from[t]) return;
            from[t] = allocate(bytes_each + kPrefetchBytes);
            to[t] = allocate(bytes_each);
            std::memset(from[t].get(), 1, bytes_each);
            std::memset(to[t].get(), 1, bytes_each);
          },
          [&](int t) { copy(to[t].get(), from[t].get(), bytes_each, streams); });
      best = std::max(best, 2.0 * threads * static_cast<double>(bytes_each) / seconds);
    }
  }
  return best;
}

/// Floating-point operations a second of "fma_avx2", "fma_avx512" (fp32), "vdpbf16ps" or
/// "tdpbf16ps" (bf16); 0 where the processor or the operating system lacks it.
double probe_peak(const char* name, int threads, int repetitions) {
  const qlora_probes::PeakKernel kernel = qlora_probes::find_peak_kernel(name);
  if (kernel.run == nullptr) return 0;
  const auto nothing = [](int) {};
  return threads * kernel.operations /
         best_seconds(threads, repetitions, nothing, [&](int) { kernel.run(); });
}
}
