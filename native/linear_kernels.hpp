// Linears over packed weights: packing, reading back, strips of inputs, and the product with its epilogues.
#pragma once

#include "tile.hpp"

namespace {

using namespace tandem;

// Which weight row a packed column holds; null for padding.
TANDEM_INLINE const char* weight_row(const PackTask& task, std::int64_t panel, std::int64_t lane,
                                     std::int64_t element_bytes) {
    const PackedShape& shape = task.shape;
    std::int64_t column = panel * kPanelColumns + lane;
    if (shape.gated) {
        column = (panel / 2) * kPanelColumns + lane;
        if (column >= shape.outputs) return nullptr;
        column += (panel % 2) * shape.outputs;
    }
    for (std::int64_t part = 0; part < task.num_parts; ++part) {
        if (column < task.part_rows[part]) {
            return static_cast<const char*>(task.parts[part]) + column * shape.depth * element_bytes;
        }
        column -= task.part_rows[part];
    }
    return nullptr;
}

template <class T>
void pack_panel_as(const PackTask& task, std::int64_t panel, std::int64_t together) {
    const PackedShape& shape = task.shape;
    T* packed = static_cast<T*>(task.packed) + panel * shape.padded_depth * kPanelColumns;
    for (std::int64_t lane = 0; lane < kPanelColumns; ++lane) {
        const T* row = reinterpret_cast<const T*>(weight_row(task, panel, lane, sizeof(T)));
        for (std::int64_t k = 0; k < shape.padded_depth; ++k) {
            T* to = packed + (k / together * kPanelColumns + lane) * together + k % together;
            *to = row != nullptr && k < shape.depth ? row[k] : T{0};
        }
    }
}

// Sixteen rows of bf16 at a time, a pair as one word.
void pack_panel_of_pairs(const PackTask& task, std::int64_t panel) {
    const PackedShape& shape = task.shape;
    const char* rows[kPanelColumns];
    for (std::int64_t lane = 0; lane < kPanelColumns; ++lane) {
        rows[lane] = weight_row(task, panel, lane, 2);
        if (rows[lane] == nullptr || shape.depth != shape.padded_depth) return pack_panel_as<std::uint16_t>(task, panel, 2);
    }
    char* to = static_cast<char*>(task.packed) + panel * shape.padded_depth * kPanelColumns * 2;
    for (std::int64_t k = 0; k < shape.depth * 2; k += 4) {
#pragma GCC unroll 16
        for (std::int64_t lane = 0; lane < kPanelColumns; ++lane) {
            std::memcpy(to, rows[lane] + k, 4);
            to += 4;
        }
    }
}

void pack_panel(const PackTask& task, std::int64_t panel) {
    if (task.shape.element == Element::kBfloat16) {
        pack_panel_of_pairs(task, panel);
    } else {
        pack_panel_as<float>(task, panel, 1);
    }
}

template <class T>
void unpack_panel_as(const PackTask& task, std::int64_t panel, std::int64_t together) {
    const PackedShape& shape = task.shape;
    const T* packed = static_cast<const T*>(task.packed) + panel * shape.padded_depth * kPanelColumns;
    for (std::int64_t lane = 0; lane < kPanelColumns; ++lane) {
        T* row = reinterpret_cast<T*>(const_cast<char*>(weight_row(task, panel, lane, sizeof(T))));
        for (std::int64_t k = 0; row != nullptr && k < shape.depth; ++k) {
            row[k] = packed[(k / together * kPanelColumns + lane) * together + k % together];
        }
    }
}

void unpack_panel(const PackTask& task, std::int64_t panel) {
    if (task.shape.element == Element::kBfloat16) {
        unpack_panel_as<std::uint16_t>(task, panel, 2);
    } else {
        unpack_panel_as<float>(task, panel, 1);
    }
}

template <int M>
void interleave_rows(const float* from, std::int64_t stride, std::int64_t depth, float* to) {
    for (std::int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) to[k * M + i] = from[i * stride + k];
    }
}

void strip_of_floats(const StripTask& task, std::int64_t strip) {
    const std::int64_t first = strip_start(task.rows, task.strips, strip);
    const std::int64_t count = strip_start(task.rows, task.strips, strip + 1) - first;
    const float* from = task.inputs + first * task.input_stride;
    float* to = static_cast<float*>(task.packed) + first * task.padded_depth;
    with_rows<kStripRows>(count, [&](auto rows) {
        interleave_rows<rows()>(from, task.input_stride, task.depth, to);
    });
    for (std::int64_t i = task.depth * count; i < task.padded_depth * count; ++i) to[i] = 0.0f;
}

// Products of one block of rows with the panels of one task, summed over the depth into `sums` [panel][row][16].
template <int P>
void multiply_panels(const LinearTask& task, std::int64_t first_strip, std::int64_t last_strip, std::int64_t panel,
                     std::int64_t depth_start, float* sums, std::int64_t sums_panel_stride, bool widened,
                     float* wide) {
    const PackedShape& shape = task.shape;
    const std::int64_t depth = least_of(kDepthBlock, shape.padded_depth - depth_start);
    const std::int64_t panel_elements = shape.padded_depth * kPanelColumns;
    const std::int64_t offset = panel * panel_elements + depth_start * kPanelColumns;
    const std::uint16_t* narrow_from = static_cast<const std::uint16_t*>(task.weights) + offset;
    WideColumns columns{static_cast<const float*>(task.weights) + offset, kPanelColumns, panel_elements};
    if (widened) {
        for (int p = 0; p < P; ++p) {
            float* to = wide + p * kDepthBlock * kPanelColumns;
            for (std::int64_t k = 0; k < depth; k += 2) {
                Lanes firsts, seconds;
                widen_pairs(narrow_from + p * panel_elements + k * kPanelColumns, firsts, seconds);
                store(to + k * kPanelColumns, firsts);
                store(to + (k + 1) * kPanelColumns, seconds);
            }
        }
        columns = {wide, kPanelColumns, kDepthBlock * kPanelColumns};
    }
    const bool direct = shape.element == Element::kBfloat16 && !widened;
    const std::int64_t first_row = strip_start(task.rows, task.strips, first_strip);
    for (std::int64_t strip = first_strip; strip < last_strip; ++strip) {
        const std::int64_t start = strip_start(task.rows, task.strips, strip);
        const std::int64_t count = strip_start(task.rows, task.strips, strip + 1) - start;
        const float* rows =
            static_cast<const float*>(task.strips_packed) + start * shape.padded_depth + depth_start * count;
        const Sums result{sums + (start - first_row) * kPanelColumns, kPanelColumns, sums_panel_stride,
                          depth_start == 0 ? Start::kStore : Start::kAdd};
        if (direct) {
            multiply_packed<P>(count, depth, rows, PairColumns{narrow_from, panel_elements}, result);
        } else if (widened && strip == first_strip) {
            const WidenedColumns asking{columns, reinterpret_cast<const char*>(narrow_from), panel_elements * 2,
                                        kDepthBlock * kPanelColumns * 2};
            multiply_packed<P>(count, depth, rows, asking, result);
        } else {
            multiply_packed<P>(count, depth, rows, columns, result);
        }
    }
}

TANDEM_INLINE Lanes silu(Lanes x) { return x / (same(1.0f) + exponential(zero() - x)); }

TANDEM_INLINE void finish_plain(const LinearTask& task, std::int64_t first_row, std::int64_t num_rows,
                                std::int64_t first_panel, std::int64_t last_panel, const float* sums) {
    for (std::int64_t panel = first_panel; panel < last_panel; ++panel) {
        const std::int64_t column = panel * kPanelColumns;
        const std::int64_t count = least_of(kPanelColumns, task.shape.outputs - column);
        for (std::int64_t i = 0; i < num_rows; ++i) {
            Lanes value = load(sums + ((panel - first_panel) * num_rows + i) * kPanelColumns);
            if (task.bias != nullptr) value = value + load(task.bias + column);
            float* to = task.outputs + (first_row + i) * task.output_stride + column;
            if (task.add_to_outputs) value = load_up_to(to, count) + value;
            store_up_to(to, value, count);
        }
    }
}

TANDEM_INLINE void finish_gated(const LinearTask& task, std::int64_t first_row, std::int64_t num_rows,
                                std::int64_t first_panel, std::int64_t last_panel, const float* sums) {
    for (std::int64_t panel = first_panel; panel < last_panel; panel += 2) {
        const std::int64_t column = panel / 2 * kPanelColumns;
        const std::int64_t count = least_of(kPanelColumns, task.shape.outputs - column);
        for (std::int64_t i = 0; i < num_rows; ++i) {
            Lanes gate = load(sums + ((panel - first_panel) * num_rows + i) * kPanelColumns);
            Lanes up = load(sums + ((panel + 1 - first_panel) * num_rows + i) * kPanelColumns);
            if (task.bias != nullptr) {
                gate = gate + load(task.bias + panel * kPanelColumns);
                up = up + load(task.bias + (panel + 1) * kPanelColumns);
            }
            store_up_to(task.outputs + (first_row + i) * task.output_stride + column, silu(gate) * up, count);
        }
    }
}

// With more rows than that, bf16 weights are widened once for all strips. Two registers are cheap to widen each time
// in the shadow of 48 multiplications, but not in that of 12; and a tile of 6 has no registers left for it.
#if defined(__AVX512F__)
constexpr bool kWidensOnce = false;
#else
constexpr bool kWidensOnce = true;
#endif
constexpr std::int64_t kDirectRows = 11;

struct LinearPart {
    std::int64_t first_strip, last_strip, first_row, num_rows, first_panel, last_panel;
};

// Tasks of one block of rows follow each other, so that a thread's strips stay in the caches.
TANDEM_INLINE LinearPart part_of(const LinearTask& task, std::int64_t number) {
    const std::int64_t groups = (task.shape.panels + task.panels_per_task - 1) / task.panels_per_task;
    LinearPart part;
    part.first_strip = number / groups * task.strips_per_block;
    part.last_strip = least_of(task.strips, part.first_strip + task.strips_per_block);
    part.first_row = strip_start(task.rows, task.strips, part.first_strip);
    part.num_rows = strip_start(task.rows, task.strips, part.last_strip) - part.first_row;
    part.first_panel = number % groups * task.panels_per_task;
    part.last_panel = least_of(task.shape.panels, part.first_panel + task.panels_per_task);
    return part;
}

TANDEM_INLINE void finish(const LinearTask& task, const LinearPart& part, const float* sums) {
    if (task.shape.gated) {
        finish_gated(task, part.first_row, part.num_rows, part.first_panel, part.last_panel, sums);
    } else {
        finish_plain(task, part.first_row, part.num_rows, part.first_panel, part.last_panel, sums);
    }
}

template <int P>
TANDEM_INLINE std::int64_t multiply_some_panels(const LinearTask& task, const LinearPart& part, std::int64_t panel,
                                                std::int64_t depth_start, float* sums, bool widened, float* wide) {
    for (; panel + P <= part.last_panel; panel += P) {
        const std::int64_t stride = part.num_rows * kPanelColumns;
        multiply_panels<P>(task, part.first_strip, part.last_strip, panel, depth_start,
                           sums + (panel - part.first_panel) * stride, stride, widened, wide);
    }
    return panel;
}

// Scratch: kTaskPanelsMax * rows of a block * 16 sums, then kWidePanels * kDepthBlock * 16 widened weights.
void linear_of_floats(const LinearTask& task, std::int64_t number, float* scratch) {
    const LinearPart part = part_of(task, number);
    float* wide = scratch + kTaskPanelsMax * part.num_rows * kPanelColumns;
    // Widening pays once several strips use the widened weights; both ways add the same products in the same order.
    const bool widened = kWidensOnce && task.shape.element == Element::kBfloat16 && part.num_rows > kDirectRows;
    for (std::int64_t depth_start = 0; depth_start < task.shape.padded_depth; depth_start += kDepthBlock) {
        std::int64_t panel = part.first_panel;
        if (part.num_rows == 1) {  // four chains of additions at once hide each other's latency
            panel = multiply_some_panels<4>(task, part, panel, depth_start, scratch, false, wide);
        }
        if (part.num_rows <= 2 || kWidePanels == 2) {  // more rows are chains enough, and need the registers
            panel = multiply_some_panels<2>(task, part, panel, depth_start, scratch, widened, wide);
        }
        multiply_some_panels<1>(task, part, panel, depth_start, scratch, widened, wide);
    }
    finish(task, part, scratch);
}

}  // namespace
