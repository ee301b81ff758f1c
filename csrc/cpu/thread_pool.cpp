#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/openmp_runtime.h"

namespace qlora {
namespace {

/// One parallel_for: pieces are claimed by an atomic counter.
class Job {
 public:
  Job(std::int64_t count, std::int64_t piece, RangeFunction body)
      : count_(count), piece_(piece), body_(body) {}

  void work() noexcept {
    for (;;) {
      const std::int64_t begin = next_.fetch_add(piece_, std::memory_order_relaxed);
      if (begin >= count_) return;
      try {
        body_(begin, std::min(begin + piece_, count_));
      } catch (...) {
        const std::lock_guard lock(error_mutex_);
        if (!error_) error_ = std::current_exception();
      }
    }
  }

  void rethrow_error() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const std::int64_t count_, piece_;
  const RangeFunction body_;
  std::atomic<std::int64_t> next_{0};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

class ThreadPool {
 public:
  /// Runs `job` on the caller and up to `wanted_count` helpers. False, with nothing done, if the
  /// pool is in use.
  bool try_run(Job& job, int wanted_count) {
    const std::unique_lock in_use(in_use_, std::try_to_lock);
    if (!in_use) return false;
    const int helper_count = grow(wanted_count);
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      wanted_helpers_ = helper_count;
      active_helpers_ = helper_count;
      ++generation_;
    }
    job_posted_.notify_all();
    job.work();
    std::unique_lock lock(mutex_);
    job_done_.wait(lock, [&] { return active_helpers_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  /// Starts what is missing of `wanted_count` helpers. Returns how many of them there are: fewer,
  /// even none, where the system has no more threads or memory.
  int grow(int wanted_count) {
    const auto count = [this] { return static_cast<int>(helpers_.size()); };
    try {
      while (count() < wanted_count) {
        helpers_.emplace_back([this, index = count(), seen = generation_] { help(index, seen); });
      }
    } catch (const std::exception&) {
    }
    return std::min(count(), wanted_count);
  }

  void help(int index, std::uint64_t seen) {
    for (;;) {
      std::unique_lock lock(mutex_);
      job_posted_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= wanted_helpers_) continue;
      Job* const job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_helpers_ == 0) job_done_.notify_one();
    }
  }

  std::mutex in_use_;  // held for the length of a job
  std::mutex mutex_;   // guards what follows
  std::condition_variable job_posted_, job_done_;
  Job* job_ = nullptr;
  std::uint64_t generation_ = 0;
  int wanted_helpers_ = 0;
  int active_helpers_ = 0;
  std::vector<std::thread> helpers_;
};

// Never destroyed: at exit helpers may still sleep in it, and after a fork the parent's copy must
// not be touched.
ThreadPool* process_pool = nullptr;
bool is_forked_child = false;

void start_fresh_pool() { process_pool = new ThreadPool; }

void start_over_in_child() {
  is_forked_child = true;
  start_fresh_pool();
}

// When the library is loaded: a process may fork before its first call of parallel_for, and after
// torch's first parallel operation.
[[maybe_unused]] const bool is_watching_forks = [] {
  start_fresh_pool();
  return pthread_atfork(nullptr, nullptr, start_over_in_child) == 0;
}();

thread_local bool is_inside_job = false;

struct InsideJob {
  InsideJob() { is_inside_job = true; }
  ~InsideJob() { is_inside_job = false; }
};

void work_as_openmp_thread(void* job) {
  const InsideJob inside;
  static_cast<Job*>(job)->work();
}

}  // namespace

void parallel_for(int num_threads, std::int64_t count, std::int64_t grain, RangeFunction body) {
  if (count <= 0) return;
  const std::int64_t grain_count = (count + grain - 1) / grain;
  const int threads = static_cast<int>(std::min<std::int64_t>(num_threads, grain_count));
  if (threads <= 1 || is_inside_job) return body(0, count);

  // A few pieces a thread even out threads of unequal speed.
  constexpr std::int64_t pieces_per_thread = 4;
  const std::int64_t piece_grains =
      std::max<std::int64_t>(1, grain_count / (threads * pieces_per_thread));
  Job job(count, piece_grains * grain, body);
  // GNU's OpenMP hangs in a forked child of a process that has used it, as torch's own operations do
  // there unless torch.set_num_threads(1) came first.
  const OpenMPParallel openmp = is_forked_child ? nullptr : openmp_parallel();
  if (openmp != nullptr) {
    openmp(work_as_openmp_thread, &job, static_cast<unsigned>(threads), 0);
  } else {
    const InsideJob inside;
    if (!process_pool->try_run(job, threads - 1)) job.work();
  }
  job.rethrow_error();
}

}  // namespace qlora
