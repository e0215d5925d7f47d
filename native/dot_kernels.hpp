// Linears by bf16 dot products (AVX-512 BF16): pairs of inputs and weights, accumulated in float32.
#pragma once

#include "dot_tile.hpp"
#include "linear_kernels.hpp"
#include "probes.hpp"

namespace {

using namespace tandem;

// 32 floats, zeros from `count` on, rounded to bf16.
TANDEM_INLINE __m512i rounded_words(const float* from, std::int64_t count) {
    const Lanes first = load_up_to(from, most_of(0, count));
    const Lanes second = load_up_to(from + kLanes, most_of(0, count - kLanes));
    return (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
}

// Inputs rounded to bf16, as [depth / 2][row] words of two.
void strip_of_pairs(const StripTask& task, std::int64_t strip) {
    static_assert(kStripRows <= 16 && kPairDepth == 32, "a strip's rows are the columns of one transposed block");
    const std::int64_t first = strip_start(task.rows, task.strips, strip);
    const std::int64_t count = strip_start(task.rows, task.strips, strip + 1) - first;
    const __mmask16 rows = static_cast<__mmask16>((1u << count) - 1);
    char* to = static_cast<char*>(task.packed) + first * task.padded_depth * 2;
    const float* from = task.inputs + first * task.input_stride;
    for (std::int64_t k = 0; k < task.padded_depth; k += kPairDepth) {
        __m512i words[16];
#pragma GCC unroll 16
        for (std::int64_t i = 0; i < 16; ++i) {
            words[i] = _mm512_setzero_si512();
            if (i < count) words[i] = rounded_words(from + i * task.input_stride + k, task.depth - k);
        }
        if (count == 1) {
            _mm512_storeu_si512(to + k * 2, words[0]);
            continue;
        }
        transpose_sixteen(words);
#pragma GCC unroll 16
        for (std::int64_t t = 0; t < 16; ++t) _mm512_mask_storeu_epi32(to + (k / 2 + t) * count * 4, rows, words[t]);
    }
}

// How far ahead weights are asked for. Several strips use a block one after another, so it is the next one then.
constexpr std::int64_t kStripAheadBytes = 7168;
constexpr std::int64_t kBlockAheadBytes = kDepthBlock * kPanelColumns * 2;
constexpr std::int64_t kOwnReadingRows = 2;  // so few rows wait for memory alone: the processor's own reading keeps up

// One panel over one block of the depth.
TANDEM_INLINE void dot_block(const LinearTask& task, const LinearPart& part, std::int64_t panel,
                             std::int64_t depth_start, float* sums) {
    const std::int64_t padded = task.shape.padded_depth;
    const std::int64_t depth = least_of(kDepthBlock, padded - depth_start);
    const WordColumns columns{
        static_cast<const std::uint16_t*>(task.weights) + (panel * padded + depth_start) * kPanelColumns,
        kPanelColumns, 0};
    const std::int64_t strips = part.last_strip - part.first_strip;
    const std::int64_t turns = strips >= 4 ? 4 : strips >= 2 ? 2 : 1;
    const std::int64_t ahead = strips == 1 ? kStripAheadBytes : kBlockAheadBytes;
    for (std::int64_t strip = part.first_strip; strip < part.last_strip; ++strip) {
        const std::int64_t start = strip_start(task.rows, task.strips, strip);
        const std::int64_t count = strip_start(task.rows, task.strips, strip + 1) - start;
        const char* rows = static_cast<const char*>(task.strips_packed) + (start * padded + depth_start * count) * 2;
        float* to = sums + ((panel - part.first_panel) * part.num_rows + start - part.first_row) * kPanelColumns;
        const Sums result{to, kPanelColumns, 0, depth_start == 0 ? Start::kStore : Start::kAdd};
        const std::int64_t turn = strip - part.first_strip;
        if (turn < turns && part.num_rows > kOwnReadingRows) {
            dot_packed(count, depth / 2, rows, AheadColumns{columns, ahead, turn, turns}, result);
        } else {
            dot_packed(count, depth / 2, rows, columns, result);
        }
    }
}

// Weights are read as they lie, one stream of memory, whatever the number of rows: several panels side by side would
// save reading rows, but several streams come in at four fifths of the rate. One row's dot products wait for each other,
// six cycles a line of weights; memory takes eight.
void linear_of_pairs(const LinearTask& task, std::int64_t number, float* scratch) {
    const LinearPart part = part_of(task, number);
    for (std::int64_t panel = part.first_panel; panel < part.last_panel; ++panel) {
        for (std::int64_t depth = 0; depth < task.shape.padded_depth; depth += kDepthBlock) {
            dot_block(task, part, panel, depth, scratch);
        }
    }
    finish(task, part, scratch);
}

// Probe: floating-point operations of bf16 dot products in registers.
double multiply_pairs(std::int64_t rounds) {
    constexpr int chains = 24;
    __m512 sums[chains];
#pragma GCC unroll 24
    for (int s = 0; s < chains; ++s) sums[s] = _mm512_set1_ps(kStart + static_cast<float>(s));
    const __m512i factor = _mm512_set1_epi32(0x3a003a00);
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
        for (int s = 0; s < chains; ++s) sums[s] = dot(sums[s], factor, factor);
    }
    float total = 0.0f;
#pragma GCC unroll 24
    for (int s = 0; s < chains; ++s) total += sum_of({sums[s]});
    return total == 12345.0f ? 0.0 : 4.0 * kLanes * chains * static_cast<double>(rounds);
}

}  // namespace
