// The library's threads: they take the tasks of a program's phases, spin for a bounded time, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace tandem {

// Tasks that may run at once, in any order, on any thread. A phase begins when all tasks of the one before are done.
struct Phase {
    std::int64_t tasks;
    std::function<void(std::int64_t task, int thread)> run;
};

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

private:
    struct alignas(64) Progress {
        std::atomic<std::int64_t> next{0};
        alignas(64) std::atomic<std::int64_t> done{0};
    };

    void work(int thread);
    void serve(int thread);

    const std::int64_t spin_nanoseconds_;
    const std::vector<Phase>* phases_ = nullptr;
    std::unique_ptr<Progress[]> progress_;
    std::size_t progress_size_ = 0;
    // Odd while a program is open; changes with every program.
    alignas(64) std::atomic<std::uint32_t> ticket_{0};
    alignas(64) std::atomic<std::int32_t> joined_{0};
    std::atomic<std::int32_t> sleeping_{0};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> workers_;
};

}  // namespace tandem
