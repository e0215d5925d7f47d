// Paged attention of one tile of query rows over key blocks.
//
// Keys are cut into blocks of kKeyBlock at absolute positions. Each block has its own softmax; blocks are added up in
// their order. Inside a block a query row's scores, greatest, sum and weighted values are computed lane by lane and
// key by key in an order that knows nothing of the other rows: keys that a row may not see add exact zeros.
//
// How scores and weighted values are multiplied is the `Arithmetic`: FloatArithmetic here, pairs of bf16 in
// attention_pairs.hpp.
#pragma once

#include "attention_columns.hpp"

namespace {

using namespace tandem;

constexpr std::int64_t kScoreStride = kKeyBlock + kLanes;  // no power of two: rows fall into different cache sets

// What one thread needs for one tile; `padded` is head_dim as it is held here, see `padded_head`.
struct Workspace {
    float *queries, *scores, *keys, *values, *total, *greatest, *sum, *block;

    Workspace(float* scratch, std::int64_t rows, std::int64_t padded) {
        queries = scratch;
        scores = queries + rows * padded;
        keys = scores + rows * kScoreStride;
        values = keys + padded * 2 * kLanes;
        total = values + kValueChunk * padded;
        greatest = total + rows * padded;
        sum = greatest + padded_to_lanes(rows);
        block = sum + padded_to_lanes(rows);
    }
};

// What one block gave: greatest scores and sums of its rows, each padded to lanes, then weighted values [row][padded].
struct BlockResult {
    float *greatest, *sum, *values;

    BlockResult(float* from, std::int64_t rows)
        : greatest(from), sum(from + padded_to_lanes(rows)), values(from + 2 * padded_to_lanes(rows)) {}
};

TANDEM_INLINE void begin_total(std::int64_t rows, std::int64_t width, std::int64_t padded, float* greatest, float* sum,
                               float* total) {
    for (std::int64_t i = 0; i < rows; i += kLanes) {
        store(greatest + i, same(-__builtin_inff()));
        store(sum + i, zero());
    }
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t d = 0; d < width; d += kLanes) store(total + i * padded + d, zero());
    }
}

// Add a block's softmax to what the blocks before it gave, rows side by side in lanes. What has no visible key has the
// greatest score -inf and adds zeros. `width` of the `padded` values a row are added.
TANDEM_INLINE void add_block(const BlockResult& block, std::int64_t rows, std::int64_t width, std::int64_t padded,
                             float* greatest, float* sum, float* total) {
    constexpr float least = -3e38f;  // minus infinity less that is minus infinity, and no NaN
    for (std::int64_t first = 0; first < rows; first += kLanes) {
        const Lanes before = load(greatest + first), added = load(block.greatest + first);
        const Lanes most = greater_of(greater_of(before, added), same(least));
        alignas(64) float old_factors[kLanes], new_factors[kLanes];
        store(old_factors, exponential(before - most));
        store(new_factors, exponential(added - most));
        store(greatest + first, most);
        store(sum + first,
              load(sum + first) * load(old_factors) + load(block.sum + first) * load(new_factors));
        for (std::int64_t i = 0; i < least_of(kLanes, rows - first); ++i) {
            const Lanes old_factor = same(old_factors[i]), new_factor = same(new_factors[i]);
            float* to = total + (first + i) * padded;
            const float* from = block.values + (first + i) * padded;
            for (std::int64_t d = 0; d < width; d += kLanes) {
                store(to + d, fma(load(from + d), new_factor, load(to + d) * old_factor));
            }
        }
    }
}

// Scores of one row -> weights; keys outside of [low, high] of the row get none.
TANDEM_INLINE void weigh_row(float* scores, const VisibleKeys& keys, std::int64_t low, std::int64_t high,
                             SlotsAhead& ahead, float& greatest, float& sum) {
    constexpr float nothing = -__builtin_inff();
    const std::int64_t first = keys.first_panel * kLanes, last = keys.last_panel * kLanes;
    for (std::int64_t j = first; j < least_of(last, low - keys.block_start); ++j) scores[j] = nothing;
    for (std::int64_t j = most_of(first, high + 1 - keys.block_start); j < last; ++j) scores[j] = nothing;
    Lanes most = same(nothing);
    for (std::int64_t j = first; j < last; j += kLanes) most = greater_of(most, load(scores + j));
    greatest = greatest_of(most);
    if (greatest == nothing) {
        for (std::int64_t j = first; j < last; j += kLanes) store(scores + j, zero());
        sum = 0.0f;
        return;
    }
    Lanes sums = zero();
    const Lanes subtracted = same(greatest);
    for (std::int64_t j = first; j < last; j += kLanes) {
        ahead.ask();
        const Lanes weights = exponential(load(scores + j) - subtracted);
        sums = sums + weights;
        store(scores + j, weights);
    }
    sum = sum_of(sums);
}

// Scores and weighted values in float32.
struct FloatArithmetic {
    static void take_query(const float* from, std::int64_t dim, std::int64_t padded, float scale, float* to) {
        for (std::int64_t d = 0; d < padded; d += kLanes) {
            store(to + d, load_up_to(from + d, most_of(0, dim - d)) * same(scale));
        }
    }

    static void take_weights(float*, const VisibleKeys&) {}

    template <int P>
    static std::int64_t score_panels(const AttendTask& task, const BlockWalk& walk, std::int64_t panel,
                                     const Workspace& space, std::int64_t rows, std::int64_t padded) {
        const std::int64_t dim = task.heads.head_dim;
        for (; panel + P <= walk.keys.last_panel; panel += P) {
            for (int p = 0; p < P; ++p) {
                columns_of_keys(walk.places->keys + (panel + p) * kLanes, task.pool.element, dim,
                                space.keys + p * padded * kLanes);
            }
            multiply_rows<P>(rows, dim, StridedRows{space.queries, padded},
                             AskingColumns{{space.keys, kLanes, padded * kLanes}, walk.values_ahead},
                             {space.scores + panel * kLanes, kScoreStride, kLanes, Start::kStore});
        }
        return panel;
    }

    static void scores(const AttendTask& task, const BlockWalk& walk, const Workspace& space, std::int64_t rows,
                       std::int64_t padded) {
        std::int64_t panel = walk.keys.first_panel;
        panel = score_panels<kWidePanels>(task, walk, panel, space, rows, padded);
        if (kWidePanels > 1) score_panels<1>(task, walk, panel, space, rows, padded);
    }

    template <bool kNarrow>
    static void direct_values(const BlockWalk& walk, const Workspace& space, std::int64_t rows, std::int64_t padded,
                              std::int64_t dim, float* to) {
        const std::int64_t first = walk.keys.low - walk.keys.block_start, count = walk.keys.end - walk.keys.low;
        const StridedRows weights{space.scores + first, kScoreStride};
        const auto columns = [&](std::int64_t d) {
            return ValueColumns<kNarrow>{walk.places->values + first, walk.keys_ahead, d * (kNarrow ? 2 : 4)};
        };
        std::int64_t d = 0;
        for (; d + kWidePanels * kLanes <= dim; d += kWidePanels * kLanes) {
            multiply_rows<kWidePanels>(rows, count, weights, columns(d), {to + d, padded, kLanes, Start::kStore});
        }
        for (; d < dim; d += kLanes) {
            multiply_rows<1>(rows, count, weights, columns(d), {to + d, padded, kLanes, Start::kStore});
        }
    }

    // Many rows: values are widened once for all of them, some keys at a time.
    static void shared_values(const AttendTask& task, const BlockWalk& walk, const Workspace& space, std::int64_t rows,
                              std::int64_t padded, float* to) {
        const VisibleKeys& keys = walk.keys;
        for (std::int64_t start = keys.low; start < keys.end; start += kValueChunk) {
            const std::int64_t first = start - keys.block_start, count = least_of(kValueChunk, keys.end - start);
            for (std::int64_t j = first; j < first + count; ++j) {
                walk.keys_ahead.ask();
                widen_values(walk.places->values[j], task.pool.element, task.heads.head_dim,
                             space.values + (j - first) * padded);
            }
            const StridedRows weights{space.scores + first, kScoreStride};
            const Start how = start == keys.low ? Start::kStore : Start::kContinue;
            std::int64_t d = 0;
            for (; d + kWidePanels * kLanes <= padded; d += kWidePanels * kLanes) {
                multiply_rows<kWidePanels>(rows, count, weights, WideColumns{space.values + d, padded, kLanes},
                                           {to + d, padded, kLanes, how});
            }
        }
    }

    static void values(const AttendTask& task, const BlockWalk& walk, const Workspace& space, std::int64_t rows,
                       std::int64_t padded, float* to) {
        const std::int64_t dim = task.heads.head_dim;
        if (rows > kStripRows || dim % kLanes != 0) {
            shared_values(task, walk, space, rows, padded, to);
        } else if (task.pool.element == Element::kBfloat16) {
            direct_values<true>(walk, space, rows, padded, dim, to);
        } else {
            direct_values<false>(walk, space, rows, padded, dim, to);
        }
    }

    static void in_order(float*, std::int64_t) {}
};

template <class Arithmetic>
TANDEM_INLINE void take_queries(const AttendTask& task, const AttendItem& item, std::int64_t group,
                                std::int64_t padded, float* to) {
    const std::int64_t dim = task.heads.head_dim;
    for (std::int64_t token = 0; token < item.num_tokens; ++token) {
        const std::int64_t first_head = (item.first_token + token) * task.heads.num_heads + item.kv_head * group;
        for (std::int64_t g = 0; g < group; ++g, to += padded) {
            Arithmetic::take_query(task.queries + (first_head + g) * dim, dim, padded, task.scale, to);
        }
    }
}

template <class Arithmetic>
TANDEM_INLINE void write_output(float* to, float* total, float sum, std::int64_t dim, std::int64_t width) {
    Arithmetic::in_order(total, width);
    for (std::int64_t d = 0; d < dim; d += kLanes) {
        store_up_to(to + d, load(total + d) / same(sum) + zero(), dim - d);  // + 0: no negative zeros
    }
}

template <class Arithmetic>
void attend_tile(const AttendTask& task, std::int64_t number, float* scratch) {
    const AttendItem& item = task.items[number];
    const std::int64_t dim = task.heads.head_dim, padded = padded_head(dim);
    const std::int64_t group = task.heads.num_heads / task.heads.num_kv_heads;
    const std::int64_t rows = item.num_tokens * group;
    const std::int64_t last_block = item.first_block + item.num_blocks;
    const Workspace space(scratch, rows, padded);
    BlockWalk walk(task, number);
    take_queries<Arithmetic>(task, item, group, padded, space.queries);
    if (item.partial < 0) begin_total(rows, padded, padded, space.greatest, space.sum, space.total);
    for (std::int64_t block = item.first_block; block < last_block; ++block) {
        const std::int64_t at = (block - item.first_block) * partial_floats(rows, dim);
        const BlockResult result(item.partial < 0 ? space.block : task.partials + item.partial + at, rows);
        walk.begin(block);
        Arithmetic::scores(task, walk, space, rows, padded);
        for (std::int64_t i = 0; i < rows; ++i) {
            const std::int64_t own = item.position + i / group;
            const std::int64_t low = task.window == 0 ? 0 : own - task.window + 1;
            float* scores = space.scores + i * kScoreStride;
            weigh_row(scores, walk.keys, low, own, walk.keys_ahead, result.greatest[i], result.sum[i]);
            Arithmetic::take_weights(scores, walk.keys);
        }
        Arithmetic::values(task, walk, space, rows, padded, result.values);
        if (item.partial < 0) add_block(result, rows, padded, padded, space.greatest, space.sum, space.total);
    }
    for (std::int64_t i = 0; i < rows && item.partial < 0; ++i) {
        const std::int64_t head = (item.first_token + i / group) * task.heads.num_heads + item.kv_head * group;
        write_output<Arithmetic>(task.outputs + (head + i % group) * dim, space.total + i * padded, space.sum[i], dim,
                                 padded);
    }
}

// Scratch: rows of the tile * head_dim as it is held, and two floats a row.
template <class Arithmetic>
void merge_tile(const MergeTask& task, std::int64_t number, float* scratch) {
    const MergeItem& item = task.items[number];
    const std::int64_t dim = task.heads.head_dim, padded = padded_head(dim);
    const std::int64_t group = task.heads.num_heads / task.heads.num_kv_heads;
    const std::int64_t rows = item.num_tokens * group;
    const std::int64_t width = kHeadAlign;
    float* total = scratch;
    float* greatest = total + rows * padded;
    float* sum = greatest + padded_to_lanes(rows);
    begin_total(rows, width, padded, greatest, sum, total);
    for (std::int64_t block = 0; block < item.num_blocks; ++block) {
        BlockResult result(task.partials + item.first_partial + block * partial_floats(rows, dim), rows);
        result.values += item.first_dim;
        add_block(result, rows, width, padded, greatest, sum, total);
    }
    for (std::int64_t i = 0; i < rows; ++i) {
        const std::int64_t head = (item.first_token + i / group) * task.heads.num_heads + item.kv_head * group;
        write_output<Arithmetic>(task.outputs + (head + i % group) * dim + item.first_dim, total + i * padded, sum[i],
                                 least_of(width, dim - item.first_dim), width);
    }
}

}  // namespace
