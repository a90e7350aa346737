// Threads: how those of one pass share the work, and wait for each other.
//
// Fast: a pass has some 200 points where its threads wait, so a wait must cost about a microsecond
// (Barrier). Exact: which thread computes an output never changes how that output is added up.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <optional>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "errors.h"

// Where the threads of a pass wait for each other. They spin for some microseconds, then sleep.
//
// OpenMP's own barrier spins for milliseconds: where another process keeps a core busy, two threads
// of a pass share a core, and the one that spins would keep the one that is waited for from work.
class Barrier {
 public:
  // Return once `size` threads have come here.
  void meet(int size) {
    const uint32_t now = round;
    if (++arrived < size) return wait(now);
    arrived = 0;
    round++;
    if (!sleepers) return;
    std::lock_guard<std::mutex> held(lock);
    changed.notify_all();
  }

 private:
  static constexpr int LOOKS = 32;                      // at `round`, before each look at the clock
  static constexpr std::chrono::microseconds SPIN{20};  // for so long, then sleep

  void wait(uint32_t past) {
    const auto began = std::chrono::steady_clock::now();
    do {
      for (int i = 0; i < LOOKS; i++) {
        if (round != past) return;
        relax();
      }
    } while (std::chrono::steady_clock::now() - began < SPIN);
    std::unique_lock<std::mutex> held(lock);
    sleepers++;
    changed.wait(held, [&] { return round != past; });
    sleepers--;
  }

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::mutex lock;
  std::condition_variable changed;
  std::atomic<uint32_t> round{0};
  std::atomic<int> arrived{0};
  std::atomic<int> sleepers{0};
};

// One of `size` threads that do a thing together.
struct Worker {
  Barrier& barrier;
  int rank;
  int size;

  void meet() { barrier.meet(size); }

  // Its part of 0 .. count - 1.
  int64_t begin(int64_t count) const { return count * rank / size; }
  int64_t end(int64_t count) const { return count * (rank + 1) / size; }

  template <class F> void each(int64_t count, const F& f) {
    for (int64_t i = begin(count); i < end(count); i++) f(i);
  }
};

// work(its own room) by every thread, once all have their room, which make(worker) allocates.
//
// Where one has none, nobody begins, because who began would wait for it. work allocates nothing.
template <class Make, class Work>
static void parallel(int threads, const Make& make, const Work& work) {
  check(threads >= 1, "threads: expected 1 or more");
  Barrier barrier;
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    Worker worker{barrier, omp_get_thread_num(), omp_get_num_threads()};
#else
    Worker worker{barrier, 0, 1};
#endif
    std::optional<decltype(make(worker))> room;
    try {
      room.emplace(make(worker));
    } catch (...) {
      failed = true;
    }
    worker.meet();
    if (!failed) {
      work(*room);
      worker.meet();  // so that nobody has long to wait, and spin, at OpenMP's own end
    }
  }
  if (failed) throw std::bad_alloc();
}

// f(i) for i from 0 to count - 1, which may allocate.
template <class F> static void parallel_for(int threads, int64_t count, const F& f) {
  std::atomic<bool> failed{false};
  auto make = [](Worker& worker) { return worker; };
  parallel(threads, make, [&](Worker& worker) {
    try {
      worker.each(count, f);
    } catch (...) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}
