#include "plan.hpp"

#include <algorithm>
#include <cmath>

namespace tandem {
namespace {

constexpr std::int64_t kTilesPerThread = 8;  // fewer than that, and runs of key blocks become tasks of their own

std::int64_t attend_scratch(std::int64_t rows, std::int64_t head_dim) {
    const std::int64_t padded = padded_head(head_dim);
    return 2 * rows * padded + rows * (kKeyBlock + kLaneAlign) + (2 * kLaneAlign + kValueChunk) * padded +
           2 * padded_to_lanes(rows) + partial_floats(rows, head_dim);
}

}  // namespace

Plan::Plan(Runtime& runtime, const PlanRows& rows, const Heads& heads, const Pool& pool, const float* frequencies,
           float attention_factor)
    : runtime_(runtime),
      heads_(heads),
      pool_(pool),
      tokens_(rows.offsets[rows.num_rows]),
      page_table_stride_(rows.page_table_stride),
      offsets_(rows.offsets, rows.offsets + rows.num_rows + 1),
      starts_(rows.starts, rows.starts + rows.num_rows),
      slots_(rows.slots, rows.slots + tokens_),
      page_table_(rows.page_table, rows.page_table + rows.num_rows * rows.page_table_stride) {
    if (tokens_ > 0) compute_angles(frequencies, attention_factor, rows.positions);
}

void Plan::compute_angles(const float* frequencies, float attention_factor, const std::int64_t* positions) {
    const std::int64_t half = heads_.head_dim / 2;
    cosine_.resize(static_cast<std::size_t>(tokens_ * half));
    sine_.resize(cosine_.size());
    const std::int64_t rows_each = rows_per_task(tokens_, 64 * half, runtime_.pool.threads());
    // Sine and cosine in double: rounded to float they are the same whichever mathematics library computes them.
    const Program program = {{Kind::kRopeAndStore, ceil_div(tokens_, rows_each), [&](std::int64_t task, int) {
        const std::int64_t last = std::min(tokens_, (task + 1) * rows_each);
        for (std::int64_t row = task * rows_each; row < last; ++row) {
            for (std::int64_t i = 0; i < half; ++i) {
                const double angle = static_cast<double>(static_cast<float>(positions[row]) * frequencies[i]);
                const auto at = static_cast<std::size_t>(row * half + i);
                cosine_[at] = static_cast<float>(std::cos(angle)) * attention_factor;
                sine_[at] = static_cast<float>(std::sin(angle)) * attention_factor;
            }
        }
    }}};
    runtime_.pool.run(program);
}

void Plan::add_rope_and_store(Program& program, std::int64_t layer, Matrix qkv, const HeadNorms* norms,
                              float* queries) {
    if (tokens_ == 0) return;
    RopeTask task{};
    task.heads = heads_;
    task.pool = pool_;
    task.layer = layer;
    task.qkv = qkv.data;
    task.qkv_stride = qkv.stride;
    task.cosine = cosine_.data();
    task.sine = sine_.data();
    task.slots = slots_.data();
    if (norms != nullptr) {
        task.query_norm = norms->query;
        task.key_norm = norms->key;
        task.epsilon = norms->epsilon;
    }
    task.queries = queries;
    task.rows = tokens_;
    const std::int64_t elements = (heads_.num_heads + 2 * heads_.num_kv_heads) * heads_.head_dim;
    task.rows_per_task = rows_per_task(tokens_, 2 * elements, runtime_.pool.threads());
    runtime_.need_scratch(2 * heads_.head_dim);
    program.push_back({Kind::kRopeAndStore, ceil_div(tokens_, task.rows_per_task),
                       [task, this](std::int64_t number, int thread) {
                           runtime_.kernels.rope_and_store(task, number, runtime_.scratch(thread));
                       }});
}

void Plan::cut_row(Tiles& tiles, std::int64_t row, std::int64_t window, std::int64_t blocks_max) const {
    const auto r = static_cast<std::size_t>(row);
    const std::int64_t group = heads_.num_heads / heads_.num_kv_heads;
    const std::int64_t tokens_max = std::max<std::int64_t>(1, runtime_.kernels.rows_of_tile_max / group);
    const std::int64_t tokens = offsets_[r + 1] - offsets_[r];
    for (std::int64_t first = 0; first < tokens; first += tokens_max) {
        const std::int64_t count = std::min(tokens_max, tokens - first);
        const std::int64_t position = starts_[r] + first;
        const std::int64_t low = window == 0 ? 0 : std::max<std::int64_t>(0, position - window + 1);
        const std::int64_t first_block = low / kKeyBlock;
        const std::int64_t num_blocks = (position + count - 1) / kKeyBlock + 1 - first_block;
        const std::int64_t block_floats = partial_floats(count * group, heads_.head_dim);
        tiles.rows_max = std::max(tiles.rows_max, count * group);
        for (std::int64_t kv_head = 0; kv_head < heads_.num_kv_heads; ++kv_head) {
            AttendItem item{row, offsets_[r] + first, count, position, kv_head, first_block, num_blocks, -1};
            if (num_blocks <= blocks_max) {
                tiles.items.push_back(item);
                continue;
            }
            for (std::int64_t dim = 0; dim < heads_.head_dim; dim += kHeadAlign) {
                tiles.merges.push_back({item.first_token, count, kv_head, tiles.partial_floats, num_blocks, dim});
            }
            for (std::int64_t done = 0; done < num_blocks; done += item.num_blocks) {
                item.first_block = first_block + done;
                item.num_blocks = std::min(blocks_max, num_blocks - done);
                item.partial = tiles.partial_floats;
                tiles.items.push_back(item);
                tiles.partial_floats += item.num_blocks * block_floats;
            }
        }
    }
}

std::int64_t Plan::blocks_of_task(std::int64_t window) const {
    constexpr std::int64_t everything = std::int64_t{1} << 60;
    const std::int64_t group = heads_.num_heads / heads_.num_kv_heads;
    const std::int64_t tokens_max = std::max<std::int64_t>(1, runtime_.kernels.rows_of_tile_max / group);
    const int threads = runtime_.pool.threads();
    std::int64_t num_tiles = 0, num_blocks = 0;
    for (std::size_t row = 0; row < starts_.size(); ++row) {
        const std::int64_t tokens = offsets_[row + 1] - offsets_[row];
        const std::int64_t tiles = ceil_div(tokens, tokens_max);
        const std::int64_t keys = window == 0 ? starts_[row] + tokens : std::min(starts_[row] + tokens, window + tokens_max);
        num_tiles += tiles * heads_.num_kv_heads;
        num_blocks += tiles * ceil_div(keys, kKeyBlock) * heads_.num_kv_heads;
    }
    if (threads == 1) return everything;
    if (num_tiles >= kTilesPerThread * threads) return everything;
    return std::max<std::int64_t>(1, num_blocks / (kTilesPerThread * threads));
}

const Plan::Tiles& Plan::tiles(std::int64_t window) {
    const auto found = tiles_.find(window);
    if (found != tiles_.end()) return found->second;
    Tiles& tiles = tiles_[window];
    const std::int64_t blocks_max = blocks_of_task(window);
    for (std::size_t row = 0; row < starts_.size(); ++row) {
        cut_row(tiles, static_cast<std::int64_t>(row), window, blocks_max);
    }
    // The longest first, dealt out to the threads' ranges: a thread that ends late ends little later than the others.
    std::stable_sort(tiles.items.begin(), tiles.items.end(), [](const AttendItem& a, const AttendItem& b) {
        return a.num_blocks * a.num_tokens > b.num_blocks * b.num_tokens;
    });
    const std::vector<AttendItem> sorted = std::move(tiles.items);
    const std::size_t threads = static_cast<std::size_t>(runtime_.pool.threads());
    tiles.items.clear();
    for (std::size_t first = 0; first < threads; ++first) {
        for (std::size_t i = first; i < sorted.size(); i += threads) tiles.items.push_back(sorted[i]);
    }
    return tiles;
}

void Plan::add_attend(Program& program, std::int64_t layer, std::int64_t window, const float* queries,
                      float* outputs) {
    if (tokens_ == 0) return;
    const Tiles& cut = tiles(window);
    AttendTask task{};
    task.heads = heads_;
    task.pool = pool_;
    task.layer = layer;
    task.window = window;
    task.scale = 1.0f / std::sqrt(static_cast<float>(heads_.head_dim));
    task.queries = queries;
    task.outputs = outputs;
    task.page_table = page_table_.data();
    task.page_table_stride = page_table_stride_;
    task.items = cut.items.data();
    task.num_items = static_cast<std::int64_t>(cut.items.size());
    runtime_.partials.reserve(cut.partial_floats * 4);
    runtime_.need_scratch(attend_scratch(cut.rows_max, heads_.head_dim));
    program.push_back({Kind::kAttention, task.num_items, [task, this](std::int64_t number, int thread) {
                           AttendTask own = task;
                           own.partials = runtime_.partials.floats();
                           runtime_.kernels.attend(own, number, runtime_.scratch(thread));
                       }});
    if (cut.merges.empty()) return;
    const MergeTask merge{heads_, pool_.element, cut.merges.data(), nullptr, outputs};
    program.push_back({Kind::kMerge, static_cast<std::int64_t>(cut.merges.size()),
                       [merge, this](std::int64_t number, int thread) {
                           MergeTask own = merge;
                           own.partials = runtime_.partials.floats();
                           runtime_.kernels.merge(own, number, runtime_.scratch(thread));
                       }});
}

}  // namespace tandem
