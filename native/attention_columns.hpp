// Keys and values of the pool as operands of a register tile, in float32.
#pragma once

#include "attention_places.hpp"

namespace {

using namespace tandem;

TANDEM_INLINE __m256i load_words(const char* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// Eight words of each of eight rows -> word t of all rows in words[t].
TANDEM_INLINE void transpose_words(__m256i (&words)[8]) {
    __m256i pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(words[i], words[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(words[i], words[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        fours[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        words[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
        words[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
    }
}

// Sixteen keys, each head_dim elements -> [head_dim][16] float32.
void columns_of_keys(const char* const* keys, Element element, std::int64_t dim, float* to) {
    const bool narrow_keys = element == Element::kBfloat16;
    const std::int64_t step = narrow_keys ? 16 : 8;  // dimensions in eight words
    std::int64_t d = 0;
    for (; d + step <= dim; d += step) {
        const std::int64_t byte = d * (narrow_keys ? 2 : 4);
#pragma GCC unroll 2
        for (int half = 0; half < 16; half += 8) {
            __m256i words[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) words[i] = load_words(keys[half + i] + byte);
            transpose_words(words);
#pragma GCC unroll 8
            for (int t = 0; t < 8; ++t) {
                if (!narrow_keys) {
                    _mm256_storeu_ps(to + (d + t) * kLanes + half, _mm256_castsi256_ps(words[t]));
                    continue;
                }
                const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
                float* pair = to + (d + 2 * t) * kLanes + half;
                _mm256_storeu_ps(pair, _mm256_castsi256_ps(_mm256_slli_epi32(words[t], 16)));
                _mm256_storeu_ps(pair + kLanes, _mm256_castsi256_ps(_mm256_and_si256(words[t], upper)));
            }
        }
    }
    for (; d < dim; ++d) {
        for (int i = 0; i < kLanes; ++i) {
            std::uint16_t half;
            if (narrow_keys) {
                std::memcpy(&half, keys[i] + d * 2, 2);
                to[d * kLanes + i] = widened(half);
            } else {
                std::memcpy(to + d * kLanes + i, keys[i] + d * 4, 4);
            }
        }
    }
}

TANDEM_INLINE void widen_values(const char* from, Element element, std::int64_t dim, float* to) {
    for (std::int64_t d = 0; d < dim; d += kLanes) {
        const std::int64_t count = dim - d;
        if (element == Element::kFloat32) {
            store(to + d, load_up_to(reinterpret_cast<const float*>(from) + d, count));
        } else if (count >= kLanes) {
            store(to + d, widen(reinterpret_cast<const std::uint16_t*>(from) + d));
        } else {
            std::uint16_t some[kLanes] = {};
            std::memcpy(some, from + d * 2, static_cast<std::size_t>(count) * 2);
            store(to + d, widen(some));
        }
    }
}

// Columns that lie in the first cache; what is needed next is asked for meanwhile.
struct AskingColumns {
    WideColumns columns;
    SlotsAhead& ahead;

    TANDEM_INLINE Lanes at(std::int64_t depth, int panel) const {
        if (panel == 0) ahead.ask();
        return columns.at(depth, panel);
    }
};

// Columns of a tile straight from the pool: a value's elements from `byte` on.
template <bool kNarrow>
struct ValueColumns {
    const char* const* values;
    SlotsAhead& ahead;
    std::int64_t byte;

    TANDEM_INLINE Lanes at(std::int64_t key, int panel) const {
        if (panel == 0) ahead.ask();
        const char* from = values[key] + byte;
        if constexpr (kNarrow) return widen(reinterpret_cast<const std::uint16_t*>(from) + panel * kLanes);
        return load(reinterpret_cast<const float*>(from) + panel * kLanes);
    }
};

}  // namespace
