// Operators that treat each row alone: RMS norm, gated SiLU, embedding, rope with the store into the pool.
#pragma once

#include "linear_kernels.hpp"

namespace {

using namespace tandem;

constexpr float kStoredMax = 1e18f;  // a product of two stored values still has an exponent in float32

// Sum of squares: four running sums of 16 lanes, added in one order.
TANDEM_INLINE float sum_of_squares(const float* from, std::int64_t width) {
    Lanes sums[4] = {zero(), zero(), zero(), zero()};
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
            const Lanes x = load(from + i + s * kLanes);
            sums[s] = fma(x, x, sums[s]);
        }
    }
    for (int s = 0; i < width; i += kLanes, ++s) {
        const Lanes x = load_up_to(from + i, width - i);
        sums[s] = fma(x, x, sums[s]);
    }
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

TANDEM_INLINE float root_scale(float squares, std::int64_t width, float epsilon) {
    const float mean = squares / static_cast<float>(width) + epsilon;
    return 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(mean)));
}

TANDEM_INLINE void scale_row(const float* from, float scale, const float* weight, float* to, std::int64_t width) {
    for (std::int64_t i = 0; i < width; i += kLanes) {
        const std::int64_t count = width - i;
        store_up_to(to + i, load_up_to(from + i, count) * same(scale) * load_up_to(weight + i, count), count);
    }
}

void rms_norm_rows(const NormTask& task, std::int64_t number) {
    const std::int64_t first = number * task.rows_per_task;
    const std::int64_t last = least_of(task.rows, first + task.rows_per_task);
    for (std::int64_t row = first; row < last; ++row) {
        const float* residual = task.residual + row * task.residual_stride;
        const float scale = root_scale(sum_of_squares(residual, task.width), task.width, task.epsilon);
        scale_row(residual, scale, task.weight, task.outputs + row * task.output_stride, task.width);
    }
}

// The same operations as the epilogue of a gated linear.
void gate_rows(const GateTask& task, std::int64_t number) {
    const std::int64_t first = number * task.rows_per_task;
    const std::int64_t last = least_of(task.rows, first + task.rows_per_task);
    for (std::int64_t row = first; row < last; ++row) {
        const float* gate = task.gate + row * task.gate_stride;
        const float* up = task.up + row * task.up_stride;
        float* to = task.outputs + row * task.width;
        for (std::int64_t i = 0; i < task.width; i += kLanes) {
            const std::int64_t count = task.width - i;
            store_up_to(to + i, silu(load_up_to(gate + i, count)) * load_up_to(up + i, count), count);
        }
    }
}

TANDEM_INLINE float widened(std::uint16_t value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

void embed_rows(const EmbeddingTask& task, std::int64_t number) {
    const std::int64_t first = number * task.rows_per_task;
    const std::int64_t last = least_of(task.rows, first + task.rows_per_task);
    const bool narrow_table = task.element == Element::kBfloat16;
    const float* floats = static_cast<const float*>(task.table);
    const std::uint16_t* halves = static_cast<const std::uint16_t*>(task.table);
    for (std::int64_t row = first; row < last; ++row) {
        const std::int64_t id = task.token_ids[row];
        float* to = task.outputs + row * task.width;
        if (task.packed.panels == 0) {
            for (std::int64_t k = 0; k < task.width; ++k) {
                to[k] = narrow_table ? widened(halves[id * task.width + k]) : floats[id * task.width + k];
            }
            continue;
        }
        const std::int64_t panel = id / kPanelColumns * task.packed.padded_depth * kPanelColumns;
        const std::int64_t lane = id % kPanelColumns;
        for (std::int64_t k = 0; k < task.width; ++k) {
            to[k] = narrow_table ? widened(halves[panel + (k / 2 * kPanelColumns + lane) * 2 + k % 2])
                                 : floats[panel + k * kPanelColumns + lane];
        }
    }
}

// First half * cosine - second half * sine, and second half * cosine + first half * sine.
TANDEM_INLINE void rotate(const float* from, const float* cosine, const float* sine, float* to, std::int64_t half) {
    for (std::int64_t i = 0; i < half; i += kLanes) {
        const std::int64_t count = half - i;
        const Lanes first = load_up_to(from + i, count), second = load_up_to(from + half + i, count);
        const Lanes c = load_up_to(cosine + i, count), s = load_up_to(sine + i, count);
        store_up_to(to + i, first * c - second * s, count);
        store_up_to(to + half + i, second * c + first * s, count);
    }
}

// What is not finite becomes zero: a broken row cannot reach rows that use its pages later.
TANDEM_INLINE void store_head(const Pool& pool, std::int64_t offset, const float* from) {
    for (std::int64_t i = 0; i < pool.head_dim; i += kLanes) {
        const std::int64_t count = pool.head_dim - i;
        const Lanes kept = zero_if_not_finite(load_up_to(from + i, count));
        const Lanes bounded = greater_of(same(-kStoredMax), smaller_of(same(kStoredMax), kept));
        if (pool.element == Element::kFloat32) {
            store_up_to(static_cast<float*>(pool.data) + offset + i, bounded, count);
            continue;
        }
        std::uint16_t* to = static_cast<std::uint16_t*>(pool.data) + offset + i;
        std::uint16_t rounded[kLanes];
        narrow(rounded, bounded);
        std::memcpy(to, rounded, static_cast<std::size_t>(least_of(count, kLanes)) * 2);
    }
}

// Elements between the start of the pool and a slot of one head; side 0 has the keys, 1 the values.
TANDEM_INLINE std::int64_t pool_offset(const Pool& pool, std::int64_t layer, std::int64_t side, std::int64_t kv_head,
                                       std::int64_t page, std::int64_t slot) {
    return ((((page * pool.layers + layer) * 2 + side) * pool.kv_heads + kv_head) * pool.page_tokens + slot) *
           pool.head_dim;
}

// Scratch: 2 * head_dim floats.
void rope_and_store_rows(const RopeTask& task, std::int64_t number, float* scratch) {
    const std::int64_t dim = task.heads.head_dim, half = dim / 2;
    const std::int64_t first = number * task.rows_per_task;
    const std::int64_t last = least_of(task.rows, first + task.rows_per_task);
    float* normed = scratch;
    float* rotated = scratch + dim;
    for (std::int64_t row = first; row < last; ++row) {
        const float* head = task.qkv + row * task.qkv_stride;
        const float* cosine = task.cosine + row * half;
        const float* sine = task.sine + row * half;
        const std::int64_t page = task.slots[row] / task.pool.page_tokens;
        const std::int64_t slot = task.slots[row] % task.pool.page_tokens;
        for (std::int64_t h = 0; h < task.heads.num_heads + task.heads.num_kv_heads; ++h, head += dim) {
            const bool is_query = h < task.heads.num_heads;
            const float* norm = is_query ? task.query_norm : task.key_norm;
            const float* from = head;
            if (norm != nullptr) {
                scale_row(head, root_scale(sum_of_squares(head, dim), dim, task.epsilon), norm, normed, dim);
                from = normed;
            }
            if (is_query) {
                rotate(from, cosine, sine, task.queries + (row * task.heads.num_heads + h) * dim, half);
                continue;
            }
            rotate(from, cosine, sine, rotated, half);
            const std::int64_t kv_head = h - task.heads.num_heads;
            store_head(task.pool, pool_offset(task.pool, task.layer, 0, kv_head, page, slot), rotated);
        }
        for (std::int64_t kv_head = 0; kv_head < task.heads.num_kv_heads; ++kv_head, head += dim) {
            store_head(task.pool, pool_offset(task.pool, task.layer, 1, kv_head, page, slot), head);
        }
    }
}

}  // namespace
