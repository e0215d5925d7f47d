// The library's threads: they take the tasks of a program's phases, spin for a bounded time, then sleep.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace tandem {

// What a phase computes: profiles add up by it. `PROFILE_KINDS` of the package's native/library.py has the names.
enum class Kind {
    kStrips,  // inputs of a linear, packed
    kLinear,
    kHead,  // the linear that makes logits
    kNorm,
    kRopeAndStore,
    kAttention,
    kMerge,  // partial results of attention, added up
    kExperts,
    kEmbedding,
    kOther,
};
constexpr std::size_t kKinds = static_cast<std::size_t>(Kind::kOther) + 1;

// Tasks that may run at once, in any order, on any thread. A phase begins when all tasks of the one before are done.
// Each thread has a range of neighbouring tasks, which it does in order before it takes what others have left of
// theirs: what lies in memory in the order of the tasks then comes in as one stream a thread.
struct Phase {
    Kind kind;
    std::int64_t tasks;
    std::function<void(std::int64_t task, int thread)> run;
};

// Seconds from the end of the phase before until a phase's last task is done, and for how much of that a thread had no
// task, on average of all threads of the pool: those that wait for others or have not woken up yet.
struct KindTime {
    double seconds = 0.0;
    double waited = 0.0;
};
using Profile = std::array<KindTime, kKinds>;

class ThreadPool {
public:
    // `threads` counts the caller of `run`, too. A worker without work spins for `spin_nanoseconds`, then sleeps.
    ThreadPool(int threads, std::int64_t spin_nanoseconds);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Run all phases; returns when every task is done. One caller at a time. A worker that is asleep or descheduled
    // when the phases begin is not waited for: the others take its tasks.
    void run(const std::vector<Phase>& phases);

    // Whether phases are timed from now on. Each thread then reads the clock twice for a phase, otherwise never.
    void set_profiling(bool on) { profiling_ = on; }
    // What was added up since the last call.
    Profile take_profile();

private:
    using Clock = std::chrono::steady_clock;
    struct alignas(64) Progress {
        std::atomic<std::int64_t> done{0};
        std::atomic<std::int64_t> busy{0};  // nanoseconds of all threads, if they are timed
        Clock::time_point ended{};          // written by the thread that did the last task
    };

    void begin(const std::vector<Phase>& phases);
    void run_alone(const std::vector<Phase>& phases);
    void work(int thread);
    std::int64_t run_range(std::size_t phase, std::int64_t range, std::int64_t ranges, int thread);
    void serve(int thread);
    void add_to_profile(Clock::time_point began);
    void add(Kind kind, Clock::duration seconds, Clock::duration busy);

    const std::int64_t spin_nanoseconds_;
    const std::vector<Phase>* phases_ = nullptr;
    std::unique_ptr<Progress[]> progress_;
    std::unique_ptr<std::atomic<std::int64_t>[]> taken_;  // [phase][range]: tasks that a thread has begun
    std::size_t progress_size_ = 0;
    bool profiling_ = false;
    Profile profile_{};
    // Odd while a program is open; changes with every program.
    alignas(64) std::atomic<std::uint32_t> ticket_{0};
    alignas(64) std::atomic<std::int32_t> joined_{0};
    std::atomic<std::int32_t> sleeping_{0};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> workers_;
};

}  // namespace tandem
