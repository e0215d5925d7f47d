// One plan of tokens: its rope angles, and its attention cut into tiles, for every window that a layer asks for.
#pragma once

#include <map>

#include "programs.hpp"

namespace tandem {

// What a plan's rows look like; the arrays are copied.
struct PlanRows {
    std::int64_t num_rows;
    const std::int64_t* offsets;    // [num_rows + 1]
    const std::int64_t* starts;     // [num_rows]
    const std::int64_t* positions;  // [tokens]
    const std::int64_t* slots;      // [tokens]
    const std::int64_t* page_table; // [num_rows, page_table_stride]
    std::int64_t page_table_stride;
};

struct HeadNorms {
    const float* query;
    const float* key;
    float epsilon;
};

class Plan {
public:
    Plan(Runtime& runtime, const PlanRows& rows, const Heads& heads, const Pool& pool, const float* frequencies,
         float attention_factor);

    Runtime& runtime() const { return runtime_; }
    std::int64_t tokens() const { return tokens_; }
    const Heads& heads() const { return heads_; }

    void add_rope_and_store(Program& program, std::int64_t layer, Matrix qkv, const HeadNorms* norms, float* queries);
    void add_attend(Program& program, std::int64_t layer, std::int64_t window, const float* queries, float* outputs);

private:
    struct Tiles {
        std::vector<AttendItem> items;
        std::vector<MergeItem> merges;
        std::int64_t partial_floats = 0;
        std::int64_t rows_max = 0;
    };

    void compute_angles(const float* frequencies, float attention_factor, const std::int64_t* positions);
    const Tiles& tiles(std::int64_t window);
    // Most key blocks of one task: so that there are enough tasks for all threads.
    std::int64_t blocks_of_task(std::int64_t window) const;
    void cut_row(Tiles& tiles, std::int64_t row, std::int64_t window, std::int64_t blocks_max) const;

    Runtime& runtime_;
    const Heads heads_;
    const Pool pool_;
    std::int64_t tokens_, page_table_stride_;
    std::vector<std::int64_t> offsets_, starts_, slots_, page_table_;
    std::vector<float> cosine_, sine_;
    std::map<std::int64_t, Tiles> tiles_;
};

}  // namespace tandem
