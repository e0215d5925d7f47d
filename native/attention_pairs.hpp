// Attention by bf16 dot products (AVX-512 BF16) over a bf16 pool: queries and softmax weights are rounded to bf16,
// scores and weighted values accumulated in float32. The softmax itself is float32.
#pragma once

#include "attention_kernels.hpp"
#include "dot_tile.hpp"

namespace {

using namespace tandem;

constexpr std::int64_t kPairDims = 32;  // bf16 elements of a register
static_assert(kHeadAlign == kPairDims, "a head's values are held in whole registers of both kinds");

TANDEM_INLINE __mmask16 words_of(std::int64_t elements) {
    return elements >= kPairDims ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << (elements / 2)) - 1);
}

// Sixteen keys -> [head_dim / 2][16] words of two dimensions.
TANDEM_INLINE void columns_of_pairs(const char* const* keys, SlotsAhead& values, std::int64_t dim, std::uint32_t* to) {
    for (std::int64_t d = 0; d < dim; d += kPairDims) {
        const __mmask16 mask = words_of(dim - d);
        __m512i words[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            if (i % 4 == 0) values.ask();
            words[i] = _mm512_maskz_loadu_epi32(mask, keys[i] + d * 2);
        }
        transpose_sixteen(words);
#pragma GCC unroll 16
        for (int t = 0; t < 16; ++t) _mm512_storeu_si512(to + (d / 2 + t) * kLanes, words[t]);
    }
}

// Values of two keys, 32 dimensions, as words of two keys: dimensions 0-3, 8-11, 16-19, 24-27 and then the others.
TANDEM_INLINE void pair_values(const char* first, const char* second, __mmask16 mask, __m512i (&words)[2]) {
    const __m512i a = _mm512_maskz_loadu_epi32(mask, first);
    const __m512i b = _mm512_maskz_loadu_epi32(mask, second);
    words[0] = _mm512_unpacklo_epi16(a, b);
    words[1] = _mm512_unpackhi_epi16(a, b);
}

// Columns that lie in the first cache. Meanwhile some of the values are asked for (the others where columns are made),
// and the keys of the columns after these.
template <int P>
struct AskingWords {
    AskingWords(const WordColumns& of, std::int64_t pairs, SlotsAhead& values_of, SlotsNear& keys_of)
        : columns(of), values(values_of), keys(keys_of) {
        while (2 * (skipped + 1) * P * kLanes <= pairs) skipped = 2 * skipped + 1;
    }

    TANDEM_INLINE void take(std::int64_t pair, __m512i (&words)[P]) const {
        if ((pair & (2 * skipped + 1)) == 0) values.ask();
        if ((pair & skipped) == 0) keys.ask();
        columns.take(pair, words);
    }

    WordColumns columns;
    SlotsAhead& values;
    SlotsNear& keys;
    std::int64_t skipped = 0;  // pairs between two keys that are asked for, a power of two less one
};

// Columns of a tile straight from the pool: pairs of keys, 32 dimensions from `byte` on.
struct PairedValues {
    const char* const* values;
    SlotsAhead& ahead;
    std::int64_t byte;
    __mmask16 mask;

    TANDEM_INLINE void take(std::int64_t pair, __m512i (&words)[2]) const {
        ahead.ask();
        pair_values(values[2 * pair] + byte, values[2 * pair + 1] + byte, mask, words);
    }
};

// Weighted values of M rows over 64 dimensions at once, so that a key's lines are read one after another.
template <int M>
void weigh_wide(std::int64_t pairs, StridedWords weights, const PairedValues& columns, Sums result) {
    Lanes sums[M][4];
    begin_sums(sums, result);
    PairedValues second = columns;
    second.byte += kPairDims * 2;
    for (std::int64_t k = 0; k < pairs; ++k) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            __m512i words[2];
            (half == 0 ? columns : second).take(k, words);
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
                const __m512i x = weights.at(k, i);
                sums[i][2 * half] = {dot(sums[i][2 * half].v, x, words[0])};
                sums[i][2 * half + 1] = {dot(sums[i][2 * half + 1].v, x, words[1])};
            }
        }
    }
    end_sums(sums, result);
}

constexpr int kWideRows = 7;  // 28 accumulators of 32 registers

struct PairArithmetic {
    static void take_query(const float* from, std::int64_t dim, std::int64_t padded, float scale, float* to) {
        for (std::int64_t d = 0; d < padded; d += kLanes) {
            const Lanes scaled = load_up_to(from + d, most_of(0, dim - d)) * same(scale);
            const __m256bh rounded = _mm512_cvtneps_pbh(scaled.v);
            std::memcpy(to + d / 2, &rounded, sizeof rounded);
        }
    }

    // Weights of a row, rounded, where its scores were.
    static void take_weights(float* scores, const VisibleKeys& keys) {
        for (std::int64_t j = keys.first_panel * kLanes; j < keys.last_panel * kLanes; j += kLanes) {
            const __m256bh rounded = _mm512_cvtneps_pbh(load(scores + j).v);
            std::memcpy(scores + j / 2, &rounded, sizeof rounded);
        }
    }

    template <int P>
    static std::int64_t score_panels(const AttendTask& task, const BlockWalk& walk, SlotsNear& near,
                                     std::int64_t panel, const Workspace& space, std::int64_t rows,
                                     std::int64_t padded) {
        const std::int64_t dim = task.heads.head_dim, panel_words = padded / 2 * kLanes;
        std::uint32_t* words = reinterpret_cast<std::uint32_t*>(space.keys);
        for (; panel + P <= walk.keys.last_panel; panel += P) {
            for (int p = 0; p < P; ++p) {
                const std::int64_t first = (panel + p) * kLanes;
                columns_of_pairs(walk.places->keys + first, walk.values_ahead, dim, words + p * panel_words);
            }
            dot_rows<P>(rows, dim / 2, StridedWords{space.queries, padded},
                        AskingWords<P>({words, kLanes, panel_words}, dim / 2, walk.values_ahead, near),
                        {space.scores + panel * kLanes, kScoreStride, kLanes, Start::kStore});
        }
        return panel;
    }

    static void scores(const AttendTask& task, const BlockWalk& walk, const Workspace& space, std::int64_t rows,
                       std::int64_t padded) {
        // Keys of the panels after those that are multiplied. Many rows take longer over them than it pays.
        const std::int64_t second = (walk.keys.first_panel + 2) * kLanes;
        SlotsNear near;
        if (rows <= kStripRows) {
            near = {walk.places->keys, second, walk.keys.end - walk.keys.block_start, walk.slot_bytes};
        }
        const std::int64_t panel = score_panels<2>(task, walk, near, walk.keys.first_panel, space, rows, padded);
        score_panels<1>(task, walk, near, panel, space, rows, padded);
    }

    // Few rows: each value is read once, straight from the pool.
    static void direct_values(const BlockWalk& walk, const StridedWords& weights, std::int64_t first,
                              std::int64_t pairs, std::int64_t rows, std::int64_t dim, const Sums& result) {
        std::int64_t d = 0;
        const auto columns = [&](std::int64_t from) {
            return PairedValues{walk.places->values + first, walk.keys_ahead, from * 2, words_of(dim - from)};
        };
        const auto part = [&](std::int64_t from) {
            return Sums{result.to + from, result.row_stride, result.panel_stride, result.start};
        };
        for (; rows <= kWideRows && d + 2 * kPairDims <= dim; d += 2 * kPairDims) {
            with_rows<kWideRows>(rows, [&](auto count) {
                weigh_wide<count()>(pairs, weights, columns(d), part(d));
            });
        }
        for (; d < dim; d += kPairDims) dot_rows<2>(rows, pairs, weights, columns(d), part(d));
    }

    // Many rows: values are paired once for all of them, some keys at a time.
    static void shared_values(const BlockWalk& walk, StridedWords weights, std::int64_t first, std::int64_t pairs,
                              std::int64_t rows, std::int64_t dim, std::int64_t padded, std::uint32_t* words,
                              Sums result) {
        constexpr std::int64_t at_once = kValueChunk / 2;
        for (std::int64_t start = 0; start < pairs; start += at_once, weights.from += at_once) {
            const std::int64_t count = least_of(at_once, pairs - start);
            for (std::int64_t d = 0; d < dim; d += kPairDims) {
                const std::int64_t key = first + 2 * start;
                const PairedValues columns{walk.places->values + key, walk.keys_ahead, d * 2, words_of(dim - d)};
                for (std::int64_t pair = 0; pair < count; ++pair) {
                    __m512i two[2];
                    columns.take(pair, two);
                    _mm512_storeu_si512(words + pair * padded + d, two[0]);
                    _mm512_storeu_si512(words + pair * padded + d + kLanes, two[1]);
                }
            }
            for (std::int64_t d = 0; d < dim; d += kPairDims) {
                Sums part = result;
                part.to += d;
                dot_rows<2>(rows, count, weights, WordColumns{words + d, padded, kLanes}, part);
            }
            result.start = Start::kContinue;
        }
    }

    static void values(const AttendTask& task, const BlockWalk& walk, const Workspace& space, std::int64_t rows,
                       std::int64_t padded, float* to) {
        const std::int64_t dim = task.heads.head_dim;
        const std::int64_t first = (walk.keys.low - walk.keys.block_start) / 2 * 2;  // the key before has no weight
        const std::int64_t pairs = (walk.keys.end - walk.keys.block_start - first + 1) / 2;
        const StridedWords weights{space.scores + first / 2, kScoreStride};
        const Sums result{to, padded, kLanes, Start::kStore};
        if (rows <= kStripRows) return direct_values(walk, weights, first, pairs, rows, dim, result);
        shared_values(walk, weights, first, pairs, rows, dim, padded, reinterpret_cast<std::uint32_t*>(space.values),
                      result);
    }

    // Values as `pair_values` leaves them -> in the order of the dimensions.
    static void in_order(float* total, std::int64_t width) {
        const __m512i firsts = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i seconds = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        for (std::int64_t d = 0; d < width; d += kPairDims) {
            const __m512 low = load(total + d).v, high = load(total + d + kLanes).v;
            store(total + d, {_mm512_permutex2var_ps(low, firsts, high)});
            store(total + d + kLanes, {_mm512_permutex2var_ps(low, seconds, high)});
        }
    }
};

void attend_tile_by_type(const AttendTask& task, std::int64_t number, float* scratch) {
    if (task.pool.element == Element::kBfloat16) {
        attend_tile<PairArithmetic>(task, number, scratch);
    } else {
        attend_tile<FloatArithmetic>(task, number, scratch);
    }
}

void merge_tile_by_type(const MergeTask& task, std::int64_t number, float* scratch) {
    if (task.element == Element::kBfloat16) {
        merge_tile<PairArithmetic>(task, number, scratch);
    } else {
        merge_tile<FloatArithmetic>(task, number, scratch);
    }
}

}  // namespace
