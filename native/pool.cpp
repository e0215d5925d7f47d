#include "pool.hpp"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>

namespace tandem {
namespace {

constexpr int kPausesBeforeYield = 4096;  // somebody who is waited for may have lost its CPU to us

inline void pause_briefly() { __builtin_ia32_pause(); }

// Wait for a condition that another running thread is about to make true.
template <class Condition>
void wait_until(Condition condition) {
    for (int pauses = 0; !condition(); ++pauses) {
        pause_briefly();
        if (pauses == kPausesBeforeYield) {
            sched_yield();
            pauses = 0;
        }
    }
}

void sleep_while(std::atomic<std::uint32_t>& word, std::uint32_t value) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<std::uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

ThreadPool::ThreadPool(int threads, std::int64_t spin_nanoseconds) : spin_nanoseconds_(spin_nanoseconds) {
    workers_.reserve(static_cast<std::size_t>(threads > 1 ? threads - 1 : 0));
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { serve(thread); });
}

ThreadPool::~ThreadPool() {
    stopping_ = true;
    ticket_ += 2;  // stays closed, and wakes who is about to sleep
    wake_all(ticket_);
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const std::vector<Phase>& phases) {
    bool shared = false;
    for (const Phase& phase : phases) shared = shared || phase.tasks > 1;
    if (!shared || workers_.empty()) return run_alone(phases);
    begin(phases);
    const Clock::time_point began = profiling_ ? Clock::now() : Clock::time_point();
    ticket_.fetch_add(1);
    if (sleeping_.load() > 0) wake_all(ticket_);
    work(0);
    ticket_.fetch_add(1);
    wait_until([this] { return joined_.load() == 0; });
    if (profiling_) add_to_profile(began);
}

void ThreadPool::begin(const std::vector<Phase>& phases) {
    const std::size_t ranges = static_cast<std::size_t>(threads());
    if (progress_size_ < phases.size()) {
        progress_size_ = phases.size() * 2;
        progress_ = std::make_unique<Progress[]>(progress_size_);
        taken_ = std::make_unique<std::atomic<std::int64_t>[]>(progress_size_ * ranges);
    }
    for (std::size_t i = 0; i < phases.size(); ++i) {
        progress_[i].done.store(0, std::memory_order_relaxed);
        progress_[i].busy.store(0, std::memory_order_relaxed);
    }
    for (std::size_t i = 0; i < phases.size() * ranges; ++i) taken_[i].store(0, std::memory_order_relaxed);
    phases_ = &phases;
}

void ThreadPool::run_alone(const std::vector<Phase>& phases) {
    for (const Phase& phase : phases) {
        const Clock::time_point began = profiling_ ? Clock::now() : Clock::time_point();
        for (std::int64_t task = 0; task < phase.tasks; ++task) phase.run(task, 0);
        if (!profiling_) continue;
        const Clock::duration whole = Clock::now() - began;
        add(phase.kind, whole, whole);
    }
}

void ThreadPool::work(int thread) {
    const std::vector<Phase>& phases = *phases_;
    const bool timed = profiling_;
    for (std::size_t i = 0; i < phases.size(); ++i) {
        Progress& progress = progress_[i];
        const std::int64_t tasks = phases[i].tasks, ranges = std::min<std::int64_t>(tasks, threads());
        const Clock::time_point began = timed ? Clock::now() : Clock::time_point();
        for (std::int64_t turn = 0; turn < ranges; ++turn) {
            const std::int64_t ran = run_range(i, (thread + turn) % ranges, ranges, thread);
            if (ran == 0) continue;
            const bool last = progress.done.fetch_add(ran, std::memory_order_release) + ran == tasks;
            if (timed && last) progress.ended = Clock::now();
        }
        if (timed) progress.busy.fetch_add((Clock::now() - began).count(), std::memory_order_relaxed);
        wait_until([&] { return progress.done.load(std::memory_order_acquire) == tasks; });
    }
}

// Run what nobody has begun yet of one of a phase's ranges; returns how many tasks that was.
std::int64_t ThreadPool::run_range(std::size_t phase, std::int64_t range, std::int64_t ranges, int thread) {
    const Phase& own = (*phases_)[phase];
    const std::int64_t first = own.tasks * range / ranges, size = own.tasks * (range + 1) / ranges - first;
    std::atomic<std::int64_t>& taken = taken_[phase * static_cast<std::size_t>(threads()) + static_cast<std::size_t>(range)];
    std::int64_t ran = 0;
    while (taken.load(std::memory_order_relaxed) < size) {
        const std::int64_t task = taken.fetch_add(1, std::memory_order_relaxed);
        if (task >= size) break;
        own.run(first + task, thread);
        ++ran;
    }
    return ran;
}

void ThreadPool::serve(int thread) {
    std::uint32_t served = 0;
    Clock::time_point idle_since = Clock::now();
    for (int pauses = 0; !stopping_;) {
        const std::uint32_t ticket = ticket_.load();
        if (ticket % 2 == 1 && ticket != served) {
            joined_.fetch_add(1);
            // Once joined, an open program stays until we leave; it may have closed just before.
            if (ticket_.load() == ticket) work(thread);
            joined_.fetch_sub(1);
            served = ticket;
            idle_since = Clock::now();
            pauses = 0;
            continue;
        }
        pause_briefly();
        if (++pauses % 64 != 0) continue;
        if (Clock::now() - idle_since < std::chrono::nanoseconds(spin_nanoseconds_)) continue;
        sleeping_.fetch_add(1);
        if (!stopping_) sleep_while(ticket_, ticket);
        sleeping_.fetch_sub(1);
        idle_since = Clock::now();
    }
}

// Nobody else is in the program any more.
void ThreadPool::add_to_profile(Clock::time_point began) {
    for (std::size_t i = 0; i < phases_->size(); ++i) {
        const Phase& phase = (*phases_)[i];
        // Who did the last task may lose the CPU before it notes the time; a phase without tasks notes none.
        const Clock::time_point ended = phase.tasks > 0 ? std::max(began, progress_[i].ended) : began;
        add(phase.kind, ended - began, Clock::duration(progress_[i].busy.load(std::memory_order_relaxed)));
        began = ended;
    }
}

void ThreadPool::add(Kind kind, Clock::duration whole, Clock::duration busy) {
    const auto seconds = [](Clock::duration duration) { return std::chrono::duration<double>(duration).count(); };
    KindTime& time = profile_[static_cast<std::size_t>(kind)];
    const double waited = seconds(whole) - seconds(busy) / threads();
    time.seconds += seconds(whole);
    time.waited += std::max(0.0, waited);
}

Profile ThreadPool::take_profile() {
    const Profile taken = profile_;
    profile_ = {};
    return taken;
}

}  // namespace tandem
