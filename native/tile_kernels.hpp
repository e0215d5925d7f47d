// Linears over bf16 weights by tile registers: two tiles of rows by two panels of 16 columns, summed in float32.
//
// An output element has one accumulator. To it are added the sums of 32 products each, in the order of the depth; the
// instruction fixes the order inside of the 32. Rows of a tile, panels side by side, accumulators that wait in memory
// between two parts of the depth: nothing of that changes an element's order.
#pragma once

#include "linear_kernels.hpp"
#include "probes.hpp"
#include "tile_instructions.hpp"

namespace {

using namespace tandem;

constexpr std::int64_t kTileStripRows = 2 * kTileRows;
constexpr std::int64_t kTilePart = 512;  // depth whose weights and inputs stay in the first cache
constexpr std::int64_t kTileSize = kTileRows * kTileBytes;
static_assert(kPairDepth % kTileDepth == 0, "packed weights are whole tiles");

// Nearest even; what is not a number stays so, denormal numbers become zeros.
TANDEM_INLINE void round_to_bf16(std::uint16_t* to, Lanes x) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(x.v);
    std::memcpy(to, &rounded, sizeof rounded);
#else
    float plain[kLanes];
    store(plain, x);
    for (int i = 0; i < kLanes; ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, plain + i, 4);
        const std::uint32_t exponent = bits & 0x7f800000u, sign = bits >> 16 & 0x8000u;
        if (exponent == 0) {
            to[i] = static_cast<std::uint16_t>(sign);
        } else if (plain[i] != plain[i]) {
            to[i] = static_cast<std::uint16_t>(bits >> 16 | 0x40u);
        } else {
            to[i] = static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
        }
    }
#endif
}

// Inputs rounded to bf16, as [depth / 32][row][32].
void strip_of_tiles(const StripTask& task, std::int64_t strip) {
    const std::int64_t first = strip_start(task.rows, task.strips, strip);
    const std::int64_t count = strip_start(task.rows, task.strips, strip + 1) - first;
    char* to = static_cast<char*>(task.packed) + first * task.padded_depth * 2;
    for (std::int64_t k = 0; k < task.padded_depth; k += kTileDepth) {
        for (std::int64_t i = 0; i < count; ++i, to += kTileBytes) {
            const float* from = task.inputs + (first + i) * task.input_stride + k;
            std::uint16_t rounded[kTileDepth];
            round_to_bf16(rounded, load_up_to(from, most_of(0, task.depth - k)));
            round_to_bf16(rounded + kLanes, load_up_to(from + kLanes, most_of(0, task.depth - k - kLanes)));
            std::memcpy(to, rounded, sizeof rounded);
        }
    }
}

// Tiles 0 to 3 are sums (two panels of the first rows, then of the second), 4 and 5 rows, 6 and 7 weights.
inline void configure_strip(std::int64_t rows) {
    TileConfig config{};
    config.palette = 1;
    const std::int64_t firsts = least_of(rows, kTileRows), seconds = rows - firsts;
    const std::int64_t rows_of[8] = {firsts, firsts, seconds, seconds, firsts, seconds, kTileRows, kTileRows};
    for (int tile = 0; tile < 8; ++tile) {
        config.rows[tile] = static_cast<std::uint8_t>(rows_of[tile]);
        config.bytes[tile] = rows_of[tile] == 0 ? 0 : kTileBytes;
    }
    configure_tiles(config);
}

struct TileOperands {
    const char* rows;  // [depth / 32][rows of strip][32]
    std::int64_t num_rows;
    const char* columns;  // [depth / 2][16][2], panel after panel
    std::int64_t panel_bytes;
    std::int64_t depth;
    float* sums;  // [panel][row][16]
    std::int64_t sums_panel_stride;
};

template <int T>
TANDEM_INLINE void begin_tile(float* from, bool first) {
    if (first) {
        zero_tile<T>();
    } else {
        load_tile<T>(from, kTileBytes);
    }
}

// R tiles of rows by P panels.
template <int R, int P>
void multiply_strip_of_tiles(const TileOperands& given, bool first) {
    float* second_rows = given.sums + kTileRows * kPanelColumns;
    begin_tile<0>(given.sums, first);
    if constexpr (P == 2) begin_tile<1>(given.sums + given.sums_panel_stride, first);
    if constexpr (R == 2) begin_tile<2>(second_rows, first);
    if constexpr (R == 2 && P == 2) begin_tile<3>(second_rows + given.sums_panel_stride, first);
    const char* rows = given.rows;
    const char* columns = given.columns;
    for (std::int64_t k = 0; k < given.depth; k += kTileDepth) {
        load_tile<6>(columns, kTileBytes);
        load_tile<4>(rows, kTileBytes);
        multiply_tiles<0, 4, 6>();
        if constexpr (P == 2) {
            load_tile<7>(columns + given.panel_bytes, kTileBytes);
            multiply_tiles<1, 4, 7>();
        }
        if constexpr (R == 2) {
            load_tile<5>(rows + kTileSize, kTileBytes);
            multiply_tiles<2, 5, 6>();
        }
        if constexpr (R == 2 && P == 2) multiply_tiles<3, 5, 7>();
        rows += given.num_rows * kTileBytes;
        columns += kTileSize;
    }
    store_tile<0>(given.sums, kTileBytes);
    if constexpr (P == 2) store_tile<1>(given.sums + given.sums_panel_stride, kTileBytes);
    if constexpr (R == 2) store_tile<2>(second_rows, kTileBytes);
    if constexpr (R == 2 && P == 2) store_tile<3>(second_rows + given.sums_panel_stride, kTileBytes);
}

template <int P>
std::int64_t multiply_panels_of_tiles(const LinearTask& task, const LinearPart& part, std::int64_t panel,
                                      std::int64_t depth_start, float* sums, std::int64_t& configured) {
    const std::int64_t padded = task.shape.padded_depth, panel_bytes = padded * kPanelColumns * 2;
    const std::int64_t panel_stride = part.num_rows * kPanelColumns;
    for (; panel + P <= part.last_panel; panel += P) {
        for (std::int64_t strip = part.first_strip; strip < part.last_strip; ++strip) {
            const std::int64_t start = strip_start(task.rows, task.strips, strip);
            const std::int64_t count = strip_start(task.rows, task.strips, strip + 1) - start;
            if (count != configured) configure_strip(configured = count);
            TileOperands given;
            given.rows = static_cast<const char*>(task.strips_packed) + (start * padded + depth_start * count) * 2;
            given.num_rows = count;
            given.columns = static_cast<const char*>(task.weights) + panel * panel_bytes +
                            depth_start * kPanelColumns * 2;
            given.panel_bytes = panel_bytes;
            given.depth = least_of(kTilePart, padded - depth_start);
            given.sums = sums + (panel - part.first_panel) * panel_stride + (start - part.first_row) * kPanelColumns;
            given.sums_panel_stride = panel_stride;
            if (count > kTileRows) {
                multiply_strip_of_tiles<2, P>(given, depth_start == 0);
            } else {
                multiply_strip_of_tiles<1, P>(given, depth_start == 0);
            }
        }
    }
    return panel;
}

void linear_of_tiles(const LinearTask& task, std::int64_t number, float* scratch) {
    const LinearPart part = part_of(task, number);
    std::int64_t configured = 0;
    for (std::int64_t depth_start = 0; depth_start < task.shape.padded_depth; depth_start += kTilePart) {
        const std::int64_t panel =
            multiply_panels_of_tiles<2>(task, part, part.first_panel, depth_start, scratch, configured);
        multiply_panels_of_tiles<1>(task, part, panel, depth_start, scratch, configured);
    }
    release_tiles();
    finish(task, part, scratch);
}

// Probe: floating-point operations of tiles that are already loaded.
double multiply_tiles_rate(std::int64_t rounds) {
    alignas(64) static const char zeros[kTileSize] = {};
    configure_strip(kTileStripRows);
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    load_tile<4>(zeros, kTileBytes);
    load_tile<5>(zeros, kTileBytes);
    load_tile<6>(zeros, kTileBytes);
    load_tile<7>(zeros, kTileBytes);
    for (std::int64_t round = 0; round < rounds; ++round) {
        multiply_tiles<0, 4, 6>();
        multiply_tiles<1, 4, 7>();
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
    }
    release_tiles();
    return 4.0 * 2.0 * kTileRows * kTileRows * kTileDepth * static_cast<double>(rounds);
}

void strip_of_inputs_for_tiles(const StripTask& task, std::int64_t strip) {
    if (task.pairs) {
        strip_of_tiles(task, strip);
    } else {
        strip_of_floats(task, strip);
    }
}

void linear_by_tiles(const LinearTask& task, std::int64_t number, float* scratch) {
    if (task.pairs) {
        linear_of_tiles(task, number, scratch);
    } else {
        linear_of_floats(task, number, scratch);
    }
}

double multiply_by_tiles(std::int64_t rounds, bool pairs) {
    return pairs ? multiply_tiles_rate(rounds) : multiply_floats(rounds);
}

}  // namespace
