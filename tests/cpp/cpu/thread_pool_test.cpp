#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace qlora {
namespace {

/// How often parallel_for visits each index.
std::vector<int> count_visits(int num_threads, std::int64_t count, std::int64_t grain) {
  std::vector<std::atomic<int>> visits(static_cast<std::size_t>(count));
  parallel_for(num_threads, count, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) ++visits[static_cast<std::size_t>(i)];
  });
  return {visits.begin(), visits.end()};
}

/// Runs `body` in a forked child. It exits 0 if `body` returns true, and is killed if it does not
/// return in 30 seconds.
template <typename Body>
bool succeeds_in_forked_child(Body&& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    try {
      _exit(body() ? 0 : 1);
    } catch (...) {
      _exit(2);
    }
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST(ThreadPool, EveryIndexIsVisitedOnce) {
  for (const int threads : {-1, 0, 1, 2, 3, 7, 20}) {
    for (const std::int64_t count : {0, 1, 2, 63, 64, 65, 1000, 12345}) {
      for (const std::int64_t grain : {1, 7, 64, 5000}) {
        ASSERT_EQ(count_visits(threads, count, grain),
                  std::vector<int>(static_cast<std::size_t>(count), 1))
            << threads << " threads, " << count << " indices, grain " << grain;
      }
    }
  }
}

TEST(ThreadPool, PiecesBeginAtMultiplesOfTheGrain) {
  std::mutex mutex;
  std::vector<std::int64_t> begins, lengths;
  parallel_for(4, 1003, 10, [&](std::int64_t begin, std::int64_t end) {
    const std::lock_guard lock(mutex);
    begins.push_back(begin);
    if (end < 1003) lengths.push_back(end - begin);
  });
  EXPECT_GT(begins.size(), 4u);
  for (const std::int64_t begin : begins) EXPECT_EQ(begin % 10, 0);
  for (const std::int64_t length : lengths) EXPECT_EQ(length % 10, 0);
}

TEST(ThreadPool, PiecesRunOnAsManyThreadsAsAskedForAndNoMore) {
  // Every piece waits until all three threads hold one: it hangs unless three threads really work.
  std::atomic<int> arrived{0};
  std::mutex mutex;
  std::set<std::thread::id> threads;
  parallel_for(3, 3, 1, [&](std::int64_t, std::int64_t) {
    ++arrived;
    while (arrived < 3) std::this_thread::yield();
    const std::lock_guard lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  EXPECT_EQ(threads.size(), 3u);

  count_visits(7, 1000, 1);  // the pool has grown to seven
  threads.clear();
  parallel_for(2, 1000, 1, [&](std::int64_t, std::int64_t) {
    const std::lock_guard lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  EXPECT_LE(threads.size(), 2u);
}

TEST(ThreadPool, OneThreadIsTheCallersAndGetsOnePiece) {
  int calls = 0;
  parallel_for(1, 1000, 1, [&](std::int64_t begin, std::int64_t end) {
    ++calls;
    EXPECT_EQ(begin, 0);
    EXPECT_EQ(end, 1000);
  });
  EXPECT_EQ(calls, 1);
}

TEST(ThreadPool, AnExceptionInAPieceIsRethrownToTheCaller) {
  for (const int threads : {1, 2, 7}) {
    for (const std::int64_t bad : {0, 499, 999}) {
      const auto run = [&] {
        parallel_for(threads, 1000, 1, [&](std::int64_t begin, std::int64_t end) {
          if (begin <= bad && bad < end) throw std::out_of_range("piece");
        });
      };
      EXPECT_THROW(run(), std::out_of_range) << threads << " threads";
      EXPECT_EQ(count_visits(threads, 100, 1), std::vector<int>(100, 1)) << "afterwards";
    }
  }
}

TEST(ThreadPool, AnExceptionInEveryPieceIsRethrownOnce) {
  EXPECT_THROW(
      parallel_for(4, 100, 1, [](std::int64_t, std::int64_t) { throw std::out_of_range("all"); }),
      std::out_of_range);
}

TEST(ThreadPool, ANestedCallRunsOnItsOwnThread) {
  std::vector<std::atomic<int>> visits(64 * 100);
  parallel_for(4, 64, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::thread::id outer = std::this_thread::get_id();
      parallel_for(4, 100, 1, [&](std::int64_t inner_begin, std::int64_t inner_end) {
        EXPECT_EQ(std::this_thread::get_id(), outer);
        for (std::int64_t j = inner_begin; j < inner_end; ++j) {
          ++visits[static_cast<std::size_t>(i * 100 + j)];
        }
      });
    }
  });
  for (const auto& visit : visits) ASSERT_EQ(visit, 1);
}

TEST(ThreadPool, CallsFromSeveralThreadsAtOnceAreAllRight) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&wrong, caller] {
      for (int round = 0; round < 200; ++round) {
        const int threads = 1 + (caller + round) % 4;
        wrong += count_visits(threads, 300, 1) != std::vector<int>(300, 1);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

TEST(ThreadPool, WorksInAForkedChild) {
  count_visits(4, 1000, 1);  // the parent's pool has threads, which the child does not inherit
  for (int generation = 0; generation < 3; ++generation) {
    EXPECT_TRUE(succeeds_in_forked_child(
        [] { return count_visits(4, 1000, 1) == std::vector<int>(1000, 1); }));
  }
  EXPECT_EQ(count_visits(4, 1000, 1), std::vector<int>(1000, 1)) << "in the parent, afterwards";
}

TEST(ThreadPool, WorksInAChildForkedWhileThePoolIsBusy) {
  std::atomic<int> running{0};
  std::atomic<bool> may_end{false};
  std::thread busy([&] {
    parallel_for(2, 2, 1, [&](std::int64_t, std::int64_t) {
      ++running;
      while (!may_end) std::this_thread::yield();
    });
  });
  // Both pieces: a thread that is still starting may hold a lock of AddressSanitizer's allocator,
  // which GCC 12's does not release in a forked child.
  while (running < 2) std::this_thread::yield();
  EXPECT_TRUE(succeeds_in_forked_child(
      [] { return count_visits(4, 1000, 1) == std::vector<int>(1000, 1); }));
  may_end = true;
  busy.join();
}

TEST(ThreadPool, DoesItsWorkWhereTheSystemHasNoMoreThreads) {
  EXPECT_TRUE(succeeds_in_forked_child([] {
    pthread_attr_t attributes;  // no address space has room for such a stack
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, std::size_t{1} << 50);
    pthread_setattr_default_np(&attributes);
    for (int round = 0; round < 2; ++round) {
      if (count_visits(4, 1000, 1) != std::vector<int>(1000, 1)) return false;
    }
    pthread_attr_setstacksize(&attributes, std::size_t{1} << 20);
    pthread_setattr_default_np(&attributes);
    // Threads can be had again: the pool grows, and a call uses them.
    std::atomic<int> arrived{0};
    parallel_for(2, 2, 1, [&](std::int64_t, std::int64_t) {
      ++arrived;
      while (arrived < 2) std::this_thread::yield();
    });
    return true;
  }));
}

}  // namespace
}  // namespace qlora
