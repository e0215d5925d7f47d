// The one matrix kernel: a tile of M rows by P panels of 16 columns, held in registers.
//
// Each output element has one accumulator, to which products are added in the order of the depth. So a row's result
// does not depend on M, on P, on the other rows, nor on where its operands lie.
#pragma once

#include <type_traits>

#include "kernels.hpp"
#include "lanes.hpp"

namespace {

#if defined(__AVX512F__)
constexpr int kStripRows = 12;  // 24 accumulators of 32 registers
constexpr int kWidePanels = 2;
#else
constexpr int kStripRows = 6;  // 12 accumulators of 16 registers
constexpr int kWidePanels = 1;
#endif

enum class Start {
    kStore,     // the sums are the result
    kAdd,       // the sums are added to what is there
    kContinue,  // the accumulators start with what is there
};

// Rows as [depth][M]: the packed strips of a linear.
template <int M>
struct PackedRows {
    const float* from;
    TANDEM_INLINE Lanes at(std::int64_t depth, int row) const { return same(from[depth * M + row]); }
};

// Rows as they lie, `stride` floats apart.
struct StridedRows {
    const float* from;
    std::int64_t stride;
    TANDEM_INLINE Lanes at(std::int64_t depth, int row) const { return same(from[row * stride + depth]); }
};

// Columns as float32, 16 a panel.
struct WideColumns {
    const float* from;
    std::int64_t depth_stride, panel_stride;
    TANDEM_INLINE Lanes at(std::int64_t depth, int panel) const {
        return load(from + depth * depth_stride + panel * panel_stride);
    }
};

// The same, made from pairs of bf16 that lie in `pairs`; the pairs `ahead` bytes behind those are asked for meanwhile.
struct WidenedColumns {
    WideColumns columns;
    const char* pairs;
    std::int64_t panel_bytes, ahead;
    TANDEM_INLINE Lanes at(std::int64_t depth, int panel) const {
        if (depth % 2 == 0) _mm_prefetch(pairs + depth * 32 + panel * panel_bytes + ahead, _MM_HINT_T1);
        return columns.at(depth, panel);
    }
};

constexpr std::int64_t kPairsAhead = 4096;  // bytes: weights come from memory

// Columns as pairs of bf16, [depth / 2][16][2] a panel.
struct PairColumns {
    const std::uint16_t* from;
    std::int64_t panel_stride;
};

struct Sums {
    float* to;
    std::int64_t row_stride, panel_stride;
    Start start;
};

template <int M, int P>
TANDEM_INLINE void begin_sums(Lanes (&sums)[M][P], const Sums& result) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            sums[i][p] = result.start == Start::kContinue
                             ? load(result.to + i * result.row_stride + p * result.panel_stride)
                             : zero();
        }
    }
}

template <int M, int P>
TANDEM_INLINE void end_sums(const Lanes (&sums)[M][P], const Sums& result) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            float* to = result.to + i * result.row_stride + p * result.panel_stride;
            store(to, result.start == Start::kAdd ? load(to) + sums[i][p] : sums[i][p]);
        }
    }
}

template <int M, int P, class Rows, class Columns>
void multiply_tile(std::int64_t depth, Rows rows, Columns columns, Sums result) {
    Lanes sums[M][P];
    begin_sums(sums, result);
    for (std::int64_t k = 0; k < depth; ++k) {
        Lanes weights[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) weights[p] = columns.at(k, p);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const Lanes x = rows.at(k, i);
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) sums[i][p] = fma(x, weights[p], sums[i][p]);
        }
    }
    end_sums(sums, result);
}

template <int M, int P, class Rows>
void multiply_tile(std::int64_t depth, Rows rows, PairColumns columns, Sums result) {
    Lanes sums[M][P];
    begin_sums(sums, result);
    for (std::int64_t k = 0; k < depth; k += 2) {
        Lanes firsts[P], seconds[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            const std::uint16_t* from = columns.from + k * 16 + p * columns.panel_stride;
            // One row waits for memory alone: the processor's own reading ahead keeps up.
            if constexpr (M > 1) _mm_prefetch(reinterpret_cast<const char*>(from) + kPairsAhead, _MM_HINT_T1);
            widen_pairs(from, firsts[p], seconds[p]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const Lanes x = rows.at(k, i);
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) sums[i][p] = fma(x, firsts[p], sums[i][p]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const Lanes x = rows.at(k + 1, i);
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) sums[i][p] = fma(x, seconds[p], sums[i][p]);
        }
    }
    end_sums(sums, result);
}

// Call `use` with a number of rows, 1 to `kMost`, as a constant.
template <int kMost, class Use>
TANDEM_INLINE void with_rows(std::int64_t num_rows, const Use& use) {
    if (num_rows == kMost) {
        use(std::integral_constant<int, kMost>());
    } else if constexpr (kMost > 1) {
        with_rows<kMost - 1>(num_rows, use);
    }
}

// Packed rows: their number is part of how they lie.
template <int P, class Columns>
TANDEM_INLINE void multiply_packed(std::int64_t num_rows, std::int64_t depth, const float* rows, Columns columns,
                                   Sums result) {
    with_rows<kStripRows>(num_rows, [&](auto count) {
        multiply_tile<count(), P>(depth, PackedRows<count()>{rows}, columns, result);
    });
}

// First row of a strip where `rows` are cut into `strips` of nearly equal size.
TANDEM_INLINE std::int64_t strip_start(std::int64_t rows, std::int64_t strips, std::int64_t strip) {
    return rows * strip / strips;
}

// Cut any number of rows into strips; `use` gets the number of a strip's rows as a constant, those rows and their sums.
template <class Rows, class Use>
TANDEM_INLINE void over_strips(std::int64_t num_rows, Rows rows, const Sums& result, const Use& use) {
    const std::int64_t strips = (num_rows + kStripRows - 1) / kStripRows;
    for (std::int64_t strip = 0; strip < strips; ++strip) {
        const std::int64_t first = strip_start(num_rows, strips, strip);
        Sums part = result;
        part.to += first * result.row_stride;
        with_rows<kStripRows>(strip_start(num_rows, strips, strip + 1) - first, [&](auto count) {
            use(count, Rows{rows.from + first * rows.stride, rows.stride}, part);
        });
    }
}

// Any number of rows, as they lie, by P panels.
template <int P, class Columns>
TANDEM_INLINE void multiply_rows(std::int64_t num_rows, std::int64_t depth, StridedRows rows, Columns columns,
                                 Sums result) {
    over_strips(num_rows, rows, result, [&](auto count, StridedRows strip, const Sums& part) {
        multiply_tile<count(), P>(depth, strip, columns, part);
    });
}

}  // namespace
