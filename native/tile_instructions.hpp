// Tile registers (AMX): load, store, zero, multiply pairs of bf16. Compiled for a CPU that has them, or with
// TANDEM_EMULATED_TILES as plain code that computes what the architecture's manual says, for tests on any CPU.
#pragma once

#include "lanes.hpp"

namespace {

constexpr int kTileRows = 16;    // rows of a tile; a row has 64 bytes
constexpr int kTileBytes = 64;
constexpr int kTileDepth = 32;   // bf16 elements of a row

// As the instruction reads it; rows and bytes of the eight tiles, zero for one that is not used.
struct alignas(64) TileConfig {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t bytes[16];
    std::uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

#if defined(TANDEM_EMULATED_TILES)

struct EmulatedTiles {
    TileConfig config;
    alignas(64) unsigned char tiles[8][kTileRows][kTileBytes];
};
thread_local EmulatedTiles kEmulated;

inline void configure_tiles(const TileConfig& config) {
    kEmulated = EmulatedTiles{};
    kEmulated.config = config;
}

inline void release_tiles() { kEmulated = EmulatedTiles{}; }

template <int T>
void load_tile(const void* from, std::int64_t stride) {
    std::memset(kEmulated.tiles[T], 0, sizeof kEmulated.tiles[T]);
    for (int row = 0; row < kEmulated.config.rows[T]; ++row) {
        std::memcpy(kEmulated.tiles[T][row], static_cast<const char*>(from) + row * stride, kEmulated.config.bytes[T]);
    }
}

template <int T>
void store_tile(void* to, std::int64_t stride) {
    for (int row = 0; row < kEmulated.config.rows[T]; ++row) {
        std::memcpy(static_cast<char*>(to) + row * stride, kEmulated.tiles[T][row], kEmulated.config.bytes[T]);
    }
}

template <int T>
void zero_tile() {
    std::memset(kEmulated.tiles[T], 0, sizeof kEmulated.tiles[T]);
}

// TDPBF16PS: the first and the second elements of the pairs have a sum each, by FMA in the order of the depth; both are
// added, then that is added to the tile. Rounded to nearest even, denormal numbers are zeros.
template <int C, int A, int B>
void multiply_tiles() {
    const TileConfig& config = kEmulated.config;
    if (config.bytes[A] != config.rows[B] * 4 || config.rows[C] != config.rows[A] ||
        config.bytes[C] != config.bytes[B] || config.bytes[C] != kTileBytes) {
        __builtin_trap();  // the instruction faults as well
    }
    const unsigned int before = _mm_getcsr();
    _mm_setcsr(0x9fc0);  // all exceptions masked, denormal operands and results are zeros
    for (int row = 0; row < config.rows[C]; ++row) {
        Lanes firsts = zero(), seconds = zero();
        for (int pair = 0; pair < config.rows[B]; ++pair) {
            std::uint32_t word;
            std::memcpy(&word, kEmulated.tiles[A][row] + pair * 4, 4);
            float first, second;
            const std::uint32_t first_bits = word << 16, second_bits = word & 0xffff0000u;
            std::memcpy(&first, &first_bits, 4);
            std::memcpy(&second, &second_bits, 4);
            Lanes columns[2];
            widen_pairs(reinterpret_cast<const std::uint16_t*>(kEmulated.tiles[B][pair]), columns[0], columns[1]);
            firsts = fma(same(first), columns[0], firsts);
            seconds = fma(same(second), columns[1], seconds);
        }
        float* to = reinterpret_cast<float*>(kEmulated.tiles[C][row]);
        store(to, load(to) + (firsts + seconds));
    }
    _mm_setcsr(before);
}

#else

// The compiler's own intrinsics do not say that they read and write memory.
inline void configure_tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }

template <int T>
TANDEM_INLINE void load_tile(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
TANDEM_INLINE void store_tile(void* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

template <int T>
TANDEM_INLINE void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

template <int C, int A, int B>
TANDEM_INLINE void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace
