// Where a block's keys and values lie in the paged pool, and asking for them before they are needed.
#pragma once

#include "row_kernels.hpp"

namespace {

using namespace tandem;

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

TANDEM_INLINE std::int64_t slot_bytes_of(const Pool& pool) {
    return pool.head_dim * (pool.element == Element::kFloat32 ? 4 : 2);
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

// Where keys of one item's row and KV head lie; their values are `side_bytes` behind them.
class KeysOfRow {
public:
    const std::int64_t page_tokens, slot_bytes, side_bytes;

    KeysOfRow(const AttendTask& task, const AttendItem& item)
        : page_tokens(task.pool.page_tokens),
          slot_bytes(slot_bytes_of(task.pool)),
          side_bytes(task.pool.kv_heads * page_tokens * slot_bytes),
          page_bytes_(task.pool.layers * 2 * side_bytes),
          pages_(task.page_table + item.row * task.page_table_stride),
          own_(static_cast<const char*>(task.pool.data) + task.layer * 2 * side_bytes +
               item.kv_head * page_tokens * slot_bytes) {}

    TANDEM_INLINE const char* at(std::int64_t page, std::int64_t slot) const {
        return own_ + pages_[page] * page_bytes_ + slot * slot_bytes;
    }

private:
    const std::int64_t page_bytes_;
    const std::int64_t* const pages_;
    const char* const own_;
};

TANDEM_INLINE void find_places(const AttendTask& task, const AttendItem& item, const VisibleKeys& keys,
                               BlockPlaces& places) {
    const KeysOfRow row(task, item);
    std::int64_t page = keys.low / row.page_tokens;
    std::int64_t slot = keys.low - page * row.page_tokens;
    const std::int64_t first = keys.low - keys.block_start, last = keys.end - keys.block_start;
    for (std::int64_t j = 0; j < first; ++j) places.keys[j] = places.values[j] = kZeros;
    for (std::int64_t j = first; j < last;) {
        if (slot == row.page_tokens) {
            ++page;
            slot = 0;
        }
        const char* from = row.at(page, slot);
        const std::int64_t count = least_of(last - j, row.page_tokens - slot);
        for (std::int64_t i = 0; i < count; ++i, ++j, from += row.slot_bytes) {
            places.keys[j] = from;
            places.values[j] = from + row.side_bytes;
        }
        slot += count;
    }
    for (std::int64_t j = last; j < kKeyBlock; ++j) places.keys[j] = places.values[j] = kZeros;
}

// Ask for memory that is needed soon: pages are too short for the processor to see the pattern itself.
TANDEM_INLINE void prefetch(const char* const* from, std::int64_t count, std::int64_t slot_bytes) {
    for (std::int64_t j = 0; j < count; ++j) {
        for (std::int64_t byte = 0; byte < slot_bytes; byte += 64) _mm_prefetch(from[j] + byte, _MM_HINT_T1);
    }
}

// Keys or values that are needed next. They are asked for one by one, in the order in which they lie, while others are
// multiplied: few reads can be under way at once, and a burst of them stops whatever is computed.
template <_mm_hint kInto>
class Slots {
public:
    Slots() = default;
    Slots(const char* const* slots, std::int64_t first, std::int64_t last, std::int64_t slot_bytes)
        : slots_(slots), next_(first), last_(last), slot_bytes_(slot_bytes) {}

    // Go on with these after the last one.
    void then(const char* const* slots, std::int64_t first, std::int64_t last) {
        slots_after_ = slots;
        first_after_ = first;
        last_after_ = last;
    }

    TANDEM_INLINE void ask() {
        if (next_ >= last_ && (last_after_ == 0 || !go_on())) return;
        const char* from = slots_[next_++];
        _mm_prefetch(from, kInto);
        for (std::int64_t byte = 64; byte < slot_bytes_; byte += 64) _mm_prefetch(from + byte, kInto);
    }

private:
    bool go_on() {
        slots_ = slots_after_;
        next_ = first_after_;
        last_ = last_after_;
        first_after_ = last_after_ = 0;
        return next_ < last_;
    }

    const char* const* slots_ = nullptr;
    std::int64_t next_ = 0, last_ = 0, slot_bytes_ = 0;
    const char* const* slots_after_ = nullptr;
    std::int64_t first_after_ = 0, last_after_ = 0;
};

using SlotsAhead = Slots<_MM_HINT_T1>;  // from memory into the second cache
using SlotsNear = Slots<_MM_HINT_T0>;   // from there into the first

constexpr std::int64_t kPanelsAtOnce = 3;  // of an item's first keys, asked for before anything is computed

// One line of each page of memory that a block lies in, long before more of it is asked for: the pool is larger than
// what the processor keeps translations of, and a line whose page is unknown holds up those behind it.
TANDEM_INLINE void ask_for_translations(const AttendTask& task, const AttendItem& item, std::int64_t block) {
    constexpr std::int64_t memory_page = 4096;
    const VisibleKeys keys = visible_keys(task, item, block);
    const KeysOfRow row(task, item);
    const std::int64_t step = least_of(row.page_tokens, most_of(1, memory_page / row.slot_bytes));
    for (std::int64_t key = keys.low; key < keys.end; key += step) {
        const char* from = row.at(key / row.page_tokens, key % row.page_tokens);
        _mm_prefetch(from, _MM_HINT_T1);
        _mm_prefetch(from + row.side_bytes, _MM_HINT_T1);
    }
}

constexpr std::int64_t kBlocksAhead = 2;  // translations are asked for so early; from 1 to 4 it is much the same

// Goes over the blocks of an item: where this block's keys and values lie, and what is needed after them.
class BlockWalk {
public:
    VisibleKeys keys;
    const BlockPlaces* places;
    const std::int64_t slot_bytes;
    // This block's values, to be asked for while its keys are multiplied; and the keys of the next block while values
    // are weighed. After an item's last block come the first keys of the item that this thread probably does next.
    mutable SlotsAhead values_ahead, keys_ahead;

    BlockWalk(const AttendTask& task, std::int64_t number)
        : slot_bytes(slot_bytes_of(task.pool)), task_(task), number_(number) {
        const AttendItem& item = task.items[number];
        next_keys_ = visible_keys(task, item, item.first_block);
        find_places(task, item, next_keys_, two_[item.first_block % 2]);
        const std::int64_t panels = least_of(kPanelsAtOnce, next_keys_.last_panel - next_keys_.first_panel);
        prefetch(two_[item.first_block % 2].keys + next_keys_.first_panel * kLanes, panels * kLanes, slot_bytes);
    }

    TANDEM_INLINE void begin(std::int64_t block) {
        const AttendItem& item = task_.items[number_];
        const std::int64_t last_block = item.first_block + item.num_blocks - 1;
        keys = next_keys_;
        places = &two_[block % 2];
        values_ahead = slots_of(places->values, keys);
        keys_ahead = slots_of(nullptr, {});
        const std::int64_t left = last_block - block;
        if (left >= kBlocksAhead) {
            ask_for_translations(task_, item, block + kBlocksAhead);
        } else if (const AttendItem* next = next_item(); next != nullptr && kBlocksAhead - left <= next->num_blocks) {
            ask_for_translations(task_, *next, next->first_block + kBlocksAhead - left - 1);
        }
        if (block < last_block) {
            BlockPlaces& after = two_[(block + 1) % 2];
            next_keys_ = visible_keys(task_, item, block + 1);
            find_places(task_, item, next_keys_, after);
            keys_ahead = slots_of(after.keys, next_keys_);
            // Too short a block to ask for much while its values are weighed.
            if (block + 1 == last_block && next_keys_.end - next_keys_.low < kKeyBlock / 2) ask_for_next_item();
        } else if (keys.end - keys.low >= kKeyBlock / 2 || block == item.first_block) {
            ask_for_next_item();
        }
    }

private:
    // What this thread does next, unless somebody else takes it or its range ends; null: nothing.
    const AttendItem* next_item() const {
        return number_ + 1 < task_.num_items ? &task_.items[number_ + 1] : nullptr;
    }

    void ask_for_next_item() {
        const AttendItem* next = next_item();
        if (next == nullptr) return;
        const VisibleKeys visible = visible_keys(task_, *next, next->first_block);
        find_places(task_, *next, visible, of_next_item_);
        keys_ahead.then(of_next_item_.keys, visible.low - visible.block_start, visible.end - visible.block_start);
    }

    SlotsAhead slots_of(const char* const* slots, const VisibleKeys& visible) const {
        return {slots, visible.low - visible.block_start, visible.end - visible.block_start, slot_bytes};
    }

    const AttendTask& task_;
    const std::int64_t number_;
    BlockPlaces two_[2], of_next_item_;
    VisibleKeys next_keys_;
};

}  // namespace
