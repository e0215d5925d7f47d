// The register tile for bf16 dot products (AVX-512 BF16): M rows by P panels of 16 columns, operands as words of two.
//
// As in tile.hpp an output element has one accumulator, to which pairs of products are added in the order of the depth.
#pragma once

#include "tile.hpp"

namespace {

TANDEM_INLINE __m512 dot(__m512 sums, __m512i rows, __m512i columns) {
    return _mm512_dpbf16_ps(sums, (__m512bh)rows, (__m512bh)columns);
}

// Sixteen words of each of sixteen rows -> word t of all rows in words[t].
TANDEM_INLINE void transpose_sixteen(__m512i (&words)[16]) {
    __m512i pairs[16], fours[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(words[i], words[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(words[i], words[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i low_even = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
        const __m512i high_even = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
        const __m512i high_odd = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
        words[c] = _mm512_shuffle_i32x4(low_even, high_even, 0x88);
        words[4 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        words[8 + c] = _mm512_shuffle_i32x4(low_even, high_even, 0xdd);
        words[12 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
}

// Rows as [pair][M] words: the packed strips of a linear.
template <int M>
struct PackedWords {
    const char* from;
    TANDEM_INLINE __m512i at(std::int64_t pair, int row) const {
        std::int32_t word;
        std::memcpy(&word, from + (pair * M + row) * 4, 4);
        return _mm512_set1_epi32(word);
    }
};

// Rows of words as they lie, `stride` words apart.
struct StridedWords {
    const float* from;
    std::int64_t stride;
    TANDEM_INLINE __m512i at(std::int64_t pair, int row) const {
        std::int32_t word;
        std::memcpy(&word, from + row * stride + pair, 4);
        return _mm512_set1_epi32(word);
    }
};

// Columns as words, 16 a panel.
struct WordColumns {
    const void* from;
    std::int64_t pair_stride, panel_stride;  // words
    template <int P>
    TANDEM_INLINE void take(std::int64_t pair, __m512i (&words)[P]) const {
        const char* start = static_cast<const char*>(from) + pair * pair_stride * 4;
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) words[p] = _mm512_loadu_si512(start + p * panel_stride * 4);
    }
};

// One panel, and what lies `ahead` bytes behind it is asked for: weights come from memory. Strips that use the same
// columns share that, pair by pair: strip `turn` asks where pair modulo `turns` (a power of two) is its number.
struct AheadColumns {
    WordColumns columns;
    std::int64_t ahead, turn, turns;
    TANDEM_INLINE void take(std::int64_t pair, __m512i (&words)[1]) const {
        const char* next = static_cast<const char*>(columns.from) + pair * columns.pair_stride * 4 + ahead;
        if ((pair & (turns - 1)) == turn) _mm_prefetch(next, _MM_HINT_T1);
        columns.take(pair, words);
    }
};

template <int M, int P, class Rows, class Columns>
void dot_tile(std::int64_t pairs, Rows rows, Columns columns, Sums result) {
    Lanes sums[M][P];
    begin_sums(sums, result);
    for (std::int64_t k = 0; k < pairs; ++k) {
        __m512i words[P];
        columns.take(k, words);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const __m512i x = rows.at(k, i);
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) sums[i][p] = {dot(sums[i][p].v, x, words[p])};
        }
    }
    end_sums(sums, result);
}

// Packed rows by one panel.
template <class Columns>
TANDEM_INLINE void dot_packed(std::int64_t num_rows, std::int64_t pairs, const char* rows, Columns columns,
                              Sums result) {
    with_rows<kStripRows>(num_rows, [&](auto count) {
        dot_tile<count(), 1>(pairs, PackedWords<count()>{rows}, columns, result);
    });
}

// Any number of rows, as they lie, by P panels.
template <int P, class Columns>
TANDEM_INLINE void dot_rows(std::int64_t num_rows, std::int64_t pairs, StridedWords rows, Columns columns,
                            Sums result) {
    over_strips(num_rows, rows, result, [&](auto count, StridedWords strip, const Sums& part) {
        dot_tile<count(), P>(pairs, strip, columns, part);
    });
}

}  // namespace
