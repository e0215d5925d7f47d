// Sixteen float lanes: one AVX-512 register, or two AVX2 registers side by side.
//
// Every operation rounds each lane alike in both forms, and reductions add the lanes in one fixed tree, so kernels
// written with Lanes give the same bits on both instruction sets. Everything is in an unnamed namespace: each
// instruction set is compiled into its own object, and no inline function may be shared between them.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define TANDEM_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

struct Lanes {
    __m512 v;
};

TANDEM_INLINE Lanes zero() { return {_mm512_setzero_ps()}; }
TANDEM_INLINE Lanes same(float value) { return {_mm512_set1_ps(value)}; }
TANDEM_INLINE Lanes load(const float* from) { return {_mm512_loadu_ps(from)}; }
TANDEM_INLINE void store(float* to, Lanes x) { _mm512_storeu_ps(to, x.v); }
TANDEM_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TANDEM_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
TANDEM_INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
TANDEM_INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
TANDEM_INLINE Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
// Both give the second operand if one is not a number.
TANDEM_INLINE Lanes greater_of(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
TANDEM_INLINE Lanes smaller_of(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
TANDEM_INLINE Lanes nearest_integer(Lanes x) {
    return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// x times two to the power of n; n holds integers, and the result must be a normal number.
TANDEM_INLINE Lanes times_power_of_two(Lanes x, Lanes n) {
    return {_mm512_scalef_ps(x.v, n.v)};
}
// x where `tested` is not below the bound (or not a number), zero elsewhere.
TANDEM_INLINE Lanes zero_if_below(Lanes x, Lanes tested, float bound) {
    const __mmask16 keep = _mm512_cmp_ps_mask(tested.v, _mm512_set1_ps(bound), _CMP_NLT_UQ);
    return {_mm512_maskz_mov_ps(keep, x.v)};
}
// x where it is finite, zero elsewhere.
TANDEM_INLINE Lanes zero_if_not_finite(Lanes x) {
    const __m512 size = _mm512_abs_ps(x.v);
    const __mmask16 keep = _mm512_cmp_ps_mask(size, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    return {_mm512_maskz_mov_ps(keep, x.v)};
}
// Sixteen pairs of bf16, the first of each pair in the low half: the firsts, and the seconds, as floats.
TANDEM_INLINE void widen_pairs(const std::uint16_t* from, Lanes& firsts, Lanes& seconds) {
    const __m512i pairs = _mm512_loadu_si512(from);
    firsts = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
    seconds = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
TANDEM_INLINE Lanes widen(const std::uint16_t* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
// Round to nearest even; not for infinities and what is not a number.
TANDEM_INLINE void narrow(std::uint16_t* to, Lanes x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
TANDEM_INLINE __m256 low_half(Lanes x) { return _mm512_castps512_ps256(x.v); }
TANDEM_INLINE __m256 high_half(Lanes x) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1));
}

#else

struct Lanes {
    __m256 low, high;
};

TANDEM_INLINE Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TANDEM_INLINE Lanes same(float value) {
    const __m256 both = _mm256_set1_ps(value);
    return {both, both};
}
TANDEM_INLINE Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
TANDEM_INLINE void store(float* to, Lanes x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
TANDEM_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
TANDEM_INLINE Lanes operator+(Lanes a, Lanes b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
TANDEM_INLINE Lanes operator-(Lanes a, Lanes b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
TANDEM_INLINE Lanes operator*(Lanes a, Lanes b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
TANDEM_INLINE Lanes operator/(Lanes a, Lanes b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
TANDEM_INLINE Lanes greater_of(Lanes a, Lanes b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
TANDEM_INLINE Lanes smaller_of(Lanes a, Lanes b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
TANDEM_INLINE Lanes nearest_integer(Lanes x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, mode), _mm256_round_ps(x.high, mode)};
}
TANDEM_INLINE __m256 times_power_of_two(__m256 x, __m256 n) {
    const __m256i shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), shifted));
}
TANDEM_INLINE Lanes times_power_of_two(Lanes x, Lanes n) {
    return {times_power_of_two(x.low, n.low), times_power_of_two(x.high, n.high)};
}
TANDEM_INLINE Lanes zero_if_below(Lanes x, Lanes tested, float bound) {
    const __m256 least = _mm256_set1_ps(bound);
    return {_mm256_and_ps(x.low, _mm256_cmp_ps(tested.low, least, _CMP_NLT_UQ)),
            _mm256_and_ps(x.high, _mm256_cmp_ps(tested.high, least, _CMP_NLT_UQ))};
}
TANDEM_INLINE __m256 zero_if_not_finite(__m256 x) {
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    return _mm256_and_ps(x, _mm256_cmp_ps(size, _mm256_set1_ps(__builtin_inff()), _CMP_LT_OQ));
}
TANDEM_INLINE Lanes zero_if_not_finite(Lanes x) { return {zero_if_not_finite(x.low), zero_if_not_finite(x.high)}; }
TANDEM_INLINE void widen_pairs(const std::uint16_t* from, Lanes& firsts, Lanes& seconds) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 16));
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    firsts = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
    seconds = {_mm256_castsi256_ps(_mm256_and_si256(low, upper)), _mm256_castsi256_ps(_mm256_and_si256(high, upper))};
}
TANDEM_INLINE __m256 widen_eight(const std::uint16_t* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
TANDEM_INLINE Lanes widen(const std::uint16_t* from) { return {widen_eight(from), widen_eight(from + 8)}; }
TANDEM_INLINE __m256i rounded_to_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_srli_epi32(rounded, 16);
}
TANDEM_INLINE void narrow(std::uint16_t* to, Lanes x) {
    const __m256i mixed = _mm256_packus_epi32(rounded_to_bf16(x.low), rounded_to_bf16(x.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(mixed, 0xd8));
}
TANDEM_INLINE __m256 low_half(Lanes x) { return x.low; }
TANDEM_INLINE __m256 high_half(Lanes x) { return x.high; }

#endif

// Lane i is added to lane i + 8, then i + 4, i + 2, i + 1.
TANDEM_INLINE float sum_of(Lanes x) {
    const __m256 eight = _mm256_add_ps(low_half(x), high_half(x));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

TANDEM_INLINE float greatest_of(Lanes x) {
    const __m256 eight = _mm256_max_ps(low_half(x), high_half(x));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// e to the power of x within 2 units in the last place; exactly zero below -87, bounded above by exp(88).
TANDEM_INLINE Lanes exponential(Lanes x) {
    constexpr float least = -87.0f;
    const Lanes bounded = smaller_of(same(88.0f), greater_of(same(least), x));
    const Lanes n = nearest_integer(bounded * same(1.44269504088896341f));
    // ln 2 in two parts: the product of n with the first is exact.
    Lanes r = fma(n, same(-0.693359375f), bounded);
    r = fma(n, same(2.12194440054690581e-4f), r);
    Lanes p = same(1.9875691500e-4f);
    p = fma(p, r, same(1.3981999507e-3f));
    p = fma(p, r, same(8.3334519073e-3f));
    p = fma(p, r, same(4.1665795894e-2f));
    p = fma(p, r, same(1.6666665459e-1f));
    p = fma(p, r, same(5.0000001201e-1f));
    p = fma(p, r * r, r) + same(1.0f);
    return zero_if_below(times_power_of_two(p, n), x, least);
}

TANDEM_INLINE Lanes load_some(const float* from, std::int64_t count) {
    alignas(64) float filled[kLanes] = {};
    for (std::int64_t i = 0; i < count; ++i) filled[i] = from[i];
    return load(filled);
}

TANDEM_INLINE void store_some(float* to, Lanes x, std::int64_t count) {
    alignas(64) float filled[kLanes];
    store(filled, x);
    for (std::int64_t i = 0; i < count; ++i) to[i] = filled[i];
}

// `count` lanes, the others zero.
TANDEM_INLINE Lanes load_up_to(const float* from, std::int64_t count) {
    return count >= kLanes ? load(from) : load_some(from, count);
}

TANDEM_INLINE void store_up_to(float* to, Lanes x, std::int64_t count) {
    if (count >= kLanes) {
        store(to, x);
    } else {
        store_some(to, x, count);
    }
}

TANDEM_INLINE std::int64_t least_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
TANDEM_INLINE std::int64_t most_of(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

}  // namespace
