// The part of the C interface that measures: where the time goes, and what the machine can do at most.
#include <chrono>

#include "runtime.hpp"

namespace {

using namespace tandem;

double seconds_since(std::chrono::steady_clock::time_point began) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

}  // namespace

extern "C" {

#define TANDEM_EXPORT __attribute__((visibility("default")))

// Whether the time of phases is added up by kind from now on.
TANDEM_EXPORT void tandem_set_profiling(Runtime* runtime, std::int32_t on) { runtime->pool.set_profiling(on != 0); }

// Give what was added up since the last call: seconds and, of those, waited ones of each kind [kinds, 2]. Gives 2 if
// there are not as many kinds.
TANDEM_EXPORT std::int32_t tandem_take_profile(Runtime* runtime, std::int64_t kinds, double* values) {
    if (kinds != static_cast<std::int64_t>(kKinds)) return 2;
    for (const KindTime& time : runtime->pool.take_profile()) {
        *values++ = time.seconds;
        *values++ = time.waited;
    }
    return 0;
}

// Bytes a second that all threads read together from `memory`, once over it.
TANDEM_EXPORT double tandem_read_rate(Runtime* runtime, const void* memory, std::int64_t bytes) {
    const std::int64_t piece = 1 << 18;  // floats
    const std::int64_t pieces = bytes / 4 / piece;
    std::vector<double> kept(static_cast<std::size_t>(runtime->pool.threads() * 16));
    const auto began = std::chrono::steady_clock::now();
    runtime->pool.run({{Kind::kOther, pieces, [&](std::int64_t task, int thread) {
                            kept[static_cast<std::size_t>(thread * 16)] +=
                                runtime->kernels.read(static_cast<const float*>(memory) + task * piece, piece);
                        }}});
    return static_cast<double>(pieces * piece * 4) / seconds_since(began);
}

// Floating-point operations a second of all threads in registers; `pairs`: by bf16 dot products.
TANDEM_EXPORT double tandem_multiply_rate(Runtime* runtime, std::int64_t rounds, std::int32_t pairs) {
    const std::int64_t tasks = runtime->pool.threads() * 8;
    std::vector<double> flops(static_cast<std::size_t>(tasks));
    const auto began = std::chrono::steady_clock::now();
    runtime->pool.run({{Kind::kOther, tasks, [&](std::int64_t task, int) {
                            flops[static_cast<std::size_t>(task)] = runtime->kernels.multiply(rounds, pairs != 0);
                        }}});
    const double seconds = seconds_since(began);
    double total = 0.0;
    for (const double part : flops) total += part;
    return total / seconds;
}

}  // extern "C"
