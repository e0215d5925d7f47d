// Paged attention of one tile of query rows over key blocks.
//
// Keys are cut into blocks of kKeyBlock at absolute positions. Each block has its own softmax; blocks are added up in
// their order. Inside a block a query row's scores, greatest, sum and weighted values are computed lane by lane and
// key by key in an order that knows nothing of the other rows: keys that a row may not see add exact zeros.
#pragma once

#include "row_kernels.hpp"

namespace {

using namespace tandem;

constexpr std::int64_t kScoreStride = kKeyBlock + kLanes;  // no power of two: rows fall into different cache sets
constexpr std::int64_t kValueChunk = 64;                   // keys whose widened values stay in the first cache

// Keys [low, end) of one block that some row of the tile sees; panels of 16 from the block's start.
struct VisibleKeys {
    std::int64_t block_start, low, end, first_panel, last_panel;
};

// Where the keys and values of a block lie, by position in the block; zeros stand for those that nobody sees.
struct BlockPlaces {
    const char* keys[kKeyBlock];
    const char* values[kKeyBlock];
};

alignas(64) const char kZeros[4096] = {};  // a key of the greatest head_dim in float32

TANDEM_INLINE void find_places(const AttendTask& task, const AttendItem& item, const VisibleKeys& keys,
                               BlockPlaces& places) {
    const Pool& pool = task.pool;
    const std::int64_t* pages = task.page_table + item.row * task.page_table_stride;
    const std::int64_t slot_bytes = pool.head_dim * (pool.element == Element::kFloat32 ? 4 : 2);
    const std::int64_t head_bytes = pool.page_tokens * slot_bytes, side_bytes = pool.kv_heads * head_bytes;
    const std::int64_t page_bytes = pool.layers * 2 * side_bytes;
    const char* own = static_cast<const char*>(pool.data) + task.layer * 2 * side_bytes + item.kv_head * head_bytes;
    std::int64_t page = keys.low / pool.page_tokens;
    std::int64_t slot = keys.low - page * pool.page_tokens;
    const char* start = own + pages[page] * page_bytes;
    const std::int64_t first = keys.low - keys.block_start, last = keys.end - keys.block_start;
    for (std::int64_t j = keys.first_panel * kLanes; j < first; ++j) places.keys[j] = kZeros;
    for (std::int64_t j = first; j < last; ++j) {
        if (slot == pool.page_tokens) {
            start = own + pages[++page] * page_bytes;
            slot = 0;
        }
        places.keys[j] = start + slot * slot_bytes;
        places.values[j] = places.keys[j] + side_bytes;
        ++slot;
    }
    for (std::int64_t j = last; j < keys.last_panel * kLanes; ++j) places.keys[j] = kZeros;
}

constexpr std::int64_t kPanelsAhead = 3;  // of keys that are asked for before they are needed

// Ask for memory that is needed soon: pages are too short for the processor to see the pattern itself.
TANDEM_INLINE void prefetch(const char* const* from, std::int64_t count, std::int64_t slot_bytes) {
    for (std::int64_t j = 0; j < count; ++j) {
        for (std::int64_t byte = 0; byte < slot_bytes; byte += 64) _mm_prefetch(from[j] + byte, _MM_HINT_T0);
    }
}

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

// What one thread needs for one tile; `padded` is head_dim in whole lanes.
struct Workspace {
    float *queries, *scores, *keys, *values, *block, *total, *block_greatest, *block_sum, *greatest, *sum;

    Workspace(float* scratch, std::int64_t rows, std::int64_t padded) {
        const std::int64_t heads = padded_rows(rows);
        queries = scratch;
        scores = queries + rows * padded;
        keys = scores + rows * kScoreStride;
        values = keys + padded * kLanes;
        block = values + kValueChunk * padded;
        total = block + rows * padded;
        block_greatest = total + rows * padded;
        block_sum = block_greatest + heads;
        greatest = block_sum + heads;
        sum = greatest + heads;
    }

    static std::int64_t padded_rows(std::int64_t rows) { return (rows + kLanes - 1) / kLanes * kLanes; }
};

// Add a block's softmax to what the blocks before it gave. A block without a visible key changes nothing.
TANDEM_INLINE void add_block(float block_greatest, float block_sum, const float* block, float& greatest, float& sum,
                             float* total, std::int64_t padded) {
    constexpr float nothing = -__builtin_inff();
    if (block_greatest == nothing) return;
    if (greatest == nothing) {
        greatest = block_greatest;
        sum = block_sum;
        for (std::int64_t d = 0; d < padded; d += kLanes) store(total + d, load(block + d));
        return;
    }
    const float most = block_greatest > greatest ? block_greatest : greatest;
    alignas(64) float shrunk[kLanes];
    const Lanes most_lanes = same(most);
    store(shrunk, exponential(same(greatest) - most_lanes));
    const float old_factor = shrunk[0];
    store(shrunk, exponential(same(block_greatest) - most_lanes));
    const float new_factor = shrunk[0];
    for (std::int64_t d = 0; d < padded; d += kLanes) {
        store(total + d, fma(load(block + d), same(new_factor), load(total + d) * same(old_factor)));
    }
    sum = sum * old_factor + block_sum * new_factor;
    greatest = most;
}

TANDEM_INLINE void write_output(float* to, const float* total, float sum, std::int64_t dim) {
    for (std::int64_t d = 0; d < dim; d += kLanes) {
        store_up_to(to + d, load(total + d) / same(sum) + zero(), dim - d);  // + 0: no negative zeros
    }
}

TANDEM_INLINE VisibleKeys visible_keys(const AttendTask& task, const AttendItem& item, std::int64_t block) {
    VisibleKeys keys;
    keys.block_start = block * kKeyBlock;
    keys.end = least_of(keys.block_start + kKeyBlock, item.position + item.num_tokens);
    keys.low = task.window == 0 ? keys.block_start : most_of(keys.block_start, item.position - task.window + 1);
    keys.first_panel = (keys.low - keys.block_start) / kLanes;
    keys.last_panel = (keys.end - keys.block_start + kLanes - 1) / kLanes;
    return keys;
}

TANDEM_INLINE void begin_block(const AttendTask& task, const AttendItem& item, const VisibleKeys& keys,
                               BlockPlaces& places) {
    find_places(task, item, keys, places);
    const std::int64_t slot_bytes = task.pool.head_dim * (task.pool.element == Element::kFloat32 ? 4 : 2);
    const std::int64_t panels = least_of(kPanelsAhead, keys.last_panel - keys.first_panel);
    prefetch(places.keys + keys.first_panel * kLanes, panels * kLanes, slot_bytes);
}

TANDEM_INLINE void compute_scores(const AttendTask& task, const BlockPlaces& places, const VisibleKeys& keys,
                                  const Workspace& space, std::int64_t rows, std::int64_t padded) {
    const std::int64_t dim = task.heads.head_dim;
    const std::int64_t slot_bytes = dim * (task.pool.element == Element::kFloat32 ? 4 : 2);
    for (std::int64_t panel = keys.first_panel; panel < keys.last_panel; ++panel) {
        const std::int64_t start = panel * kLanes;
        if (panel + kPanelsAhead < keys.last_panel) {
            prefetch(places.keys + start + kPanelsAhead * kLanes, kLanes, slot_bytes);
        }
        const std::int64_t low = most_of(start, keys.low - keys.block_start);
        prefetch(places.values + low, least_of(start + kLanes, keys.end - keys.block_start) - low, slot_bytes);
        columns_of_keys(places.keys + start, task.pool.element, dim, space.keys);
        multiply_rows<1>(rows, dim, {space.queries, padded}, {space.keys, kLanes, 0},
                         {space.scores + start, kScoreStride, 0, Start::kStore});
    }
}

// Scores of one row -> weights; keys outside of [low, high] of the row get none.
TANDEM_INLINE void weigh_row(float* scores, const VisibleKeys& keys, std::int64_t low, std::int64_t high,
                             float& greatest, float& sum) {
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
        const Lanes weights = exponential(load(scores + j) - subtracted);
        sums = sums + weights;
        store(scores + j, weights);
    }
    sum = sum_of(sums);
}

TANDEM_INLINE void weigh_values(const AttendTask& task, const BlockPlaces& places, const VisibleKeys& keys,
                                const Workspace& space, std::int64_t rows, std::int64_t padded) {
    for (std::int64_t start = keys.low; start < keys.end; start += kValueChunk) {
        const std::int64_t count = least_of(kValueChunk, keys.end - start);
        for (std::int64_t j = 0; j < count; ++j) {
            widen_values(places.values[start - keys.block_start + j], task.pool.element, task.heads.head_dim,
                         space.values + j * padded);
        }
        const StridedRows weights{space.scores + (start - keys.block_start), kScoreStride};
        const Start how = start == keys.low ? Start::kStore : Start::kContinue;
        std::int64_t d = 0;
        for (; d + kWidePanels * kLanes <= padded; d += kWidePanels * kLanes) {
            multiply_rows<kWidePanels>(rows, count, weights, {space.values + d, padded, kLanes},
                                       {space.block + d, padded, kLanes, how});
        }
        for (; d < padded; d += kLanes) {
            multiply_rows<1>(rows, count, weights, {space.values + d, padded, kLanes},
                             {space.block + d, padded, kLanes, how});
        }
    }
}

TANDEM_INLINE void scale_queries(const AttendTask& task, const AttendItem& item, std::int64_t group,
                                 std::int64_t padded, float* to) {
    const std::int64_t dim = task.heads.head_dim;
    for (std::int64_t token = 0; token < item.num_tokens; ++token) {
        const std::int64_t first_head = (item.first_token + token) * task.heads.num_heads + item.kv_head * group;
        for (std::int64_t g = 0; g < group; ++g, to += padded) {
            const float* from = task.queries + (first_head + g) * dim;
            for (std::int64_t d = 0; d < padded; d += kLanes) {
                store(to + d, load_up_to(from + d, most_of(0, dim - d)) * same(task.scale));
            }
        }
    }
}

void attend_tile(const AttendTask& task, std::int64_t number, float* scratch) {
    const AttendItem& item = task.items[number];
    const std::int64_t dim = task.heads.head_dim, padded = padded_to_lanes(dim);
    const std::int64_t group = task.heads.num_heads / task.heads.num_kv_heads;
    const std::int64_t rows = item.num_tokens * group;
    const Workspace space(scratch, rows, padded);
    BlockPlaces places[2];  // of this block and of the next
    VisibleKeys keys = visible_keys(task, item, item.first_block);
    begin_block(task, item, keys, places[item.first_block % 2]);
    scale_queries(task, item, group, padded, space.queries);
    for (std::int64_t i = 0; i < rows; ++i) space.greatest[i] = -__builtin_inff();
    for (std::int64_t block = item.first_block; block < item.first_block + item.num_blocks; ++block) {
        compute_scores(task, places[block % 2], keys, space, rows, padded);
        for (std::int64_t i = 0; i < rows; ++i) {
            const std::int64_t own = item.position + i / group;
            const std::int64_t low = task.window == 0 ? 0 : own - task.window + 1;
            weigh_row(space.scores + i * kScoreStride, keys, low, own, space.block_greatest[i], space.block_sum[i]);
        }
        const VisibleKeys own_keys = keys;
        if (block + 1 < item.first_block + item.num_blocks) {
            keys = visible_keys(task, item, block + 1);
            begin_block(task, item, keys, places[(block + 1) % 2]);
        }
        weigh_values(task, places[block % 2], own_keys, space, rows, padded);
        for (std::int64_t i = 0; i < rows; ++i) {
            if (item.partial < 0) {
                add_block(space.block_greatest[i], space.block_sum[i], space.block + i * padded, space.greatest[i],
                          space.sum[i], space.total + i * padded, padded);
                continue;
            }
            const std::int64_t at = (block - item.first_block) * rows + i;
            float* partial = task.partials + item.partial + at * partial_floats(dim);
            partial[0] = space.block_greatest[i];
            partial[1] = space.block_sum[i];
            std::memcpy(partial + kLanes, space.block + i * padded, static_cast<std::size_t>(padded) * 4);
        }
    }
    for (std::int64_t i = 0; i < rows && item.partial < 0; ++i) {
        const std::int64_t head = (item.first_token + i / group) * task.heads.num_heads + item.kv_head * group;
        write_output(task.outputs + (head + i % group) * dim, space.total + i * padded, space.sum[i], dim);
    }
}

// Scratch: head_dim in whole lanes.
void merge_tile(const MergeTask& task, std::int64_t number, float* scratch) {
    const MergeItem& item = task.items[number];
    const std::int64_t dim = task.heads.head_dim, padded = padded_to_lanes(dim);
    const std::int64_t group = task.heads.num_heads / task.heads.num_kv_heads;
    const std::int64_t rows = item.num_tokens * group;
    for (std::int64_t i = 0; i < rows; ++i) {
        float greatest = -__builtin_inff(), sum = 0.0f;
        for (std::int64_t block = 0; block < item.num_blocks; ++block) {
            const float* partial = task.partials + item.first_partial + (block * rows + i) * partial_floats(dim);
            add_block(partial[0], partial[1], partial + kLanes, greatest, sum, scratch, padded);
        }
        const std::int64_t head = (item.first_token + i / group) * task.heads.num_heads + item.kv_head * group;
        write_output(task.outputs + (head + i % group) * dim, scratch, sum, dim);
    }
}

}  // namespace
