// What this machine can do at most: read memory, multiply in registers. For ratios, never for results.
#pragma once

#include "lanes.hpp"

namespace {

// Read `count` floats, a multiple of 128; the result is worthless but keeps the reads.
double read_memory(const float* from, std::int64_t count) {
    Lanes sums[8] = {zero(), zero(), zero(), zero(), zero(), zero(), zero(), zero()};
    for (std::int64_t i = 0; i < count; i += 8 * kLanes) {
#pragma GCC unroll 8
        for (int s = 0; s < 8; ++s) sums[s] = sums[s] + load(from + i + s * kLanes);
    }
    float total = 0.0f;
    for (int s = 0; s < 8; ++s) total += sum_of(sums[s]);
    return static_cast<double>(total);
}

volatile float kStart = 1.0f;  // unknown to the compiler

// Multiply and add in registers; gives the number of floating-point operations.
double multiply_floats(std::int64_t rounds) {
#if defined(__AVX512F__)
    constexpr int chains = 24;
#else
    constexpr int chains = 6;  // of two registers each
#endif
    float starts[chains + kLanes];
    for (int i = 0; i < chains + kLanes; ++i) starts[i] = kStart + static_cast<float>(i);
    Lanes sums[chains];
#pragma GCC unroll 24
    for (int s = 0; s < chains; ++s) sums[s] = load(starts + s);  // all different, or halves would be shared
    const Lanes factor = same(0.999f), added = same(1e-3f);
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
        for (int s = 0; s < chains; ++s) sums[s] = fma(sums[s], factor, added);
    }
    float total = 0.0f;
#pragma GCC unroll 24
    for (int s = 0; s < chains; ++s) total += sum_of(sums[s]);
    const double flops = 2.0 * kLanes * chains * static_cast<double>(rounds);
    return total == 12345.0f ? 0.0 : flops;
}

}  // namespace
