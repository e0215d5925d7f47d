// What one instruction set offers: plain functions over one task each, chosen at run time as a table.
//
// A task is a part of an operator that one thread computes alone. How an operator is cut into tasks never changes the
// order in which the numbers of one output element are added.
#pragma once

#include <cstdint>

namespace tandem {

constexpr std::int64_t kPanelColumns = 16;  // outputs of a linear that are computed side by side
constexpr std::int64_t kPairDepth = 32;     // packed bf16 weights have zeros up to a multiple of that many inputs
constexpr std::int64_t kDepthBlock = 256;   // inputs of a linear that are added up before the sum joins the others'
constexpr std::int64_t kKeyBlock = 256;     // keys of one softmax, aligned to absolute positions
constexpr std::int64_t kTaskPanelsMax = 4;
constexpr std::int64_t kLaneAlign = 16;
constexpr std::int64_t kHeadAlign = 32;   // values of a head are held in whole registers of 32 bf16
constexpr std::int64_t kValueChunk = 64;  // keys whose values, made ready for many rows, stay in the first cache

enum class Element : std::int32_t { kFloat32 = 0, kBfloat16 = 1 };

// Columns of one or several weights, packed: panels of 16 columns; bf16 as [depth / 2][column][2], float32 as
// [depth][column], zeros up to the padded depth. Gated: even panels hold gate columns, odd ones the up columns of the same numbers.
struct PackedShape {
    std::int64_t outputs;  // columns that the caller sees: with gated, half of those computed
    std::int64_t depth;
    std::int64_t padded_depth;  // even, with bf16 a multiple of kPairDepth
    std::int64_t panels;
    Element element;
    bool gated;
};

struct PackTask {
    PackedShape shape;
    const void* const* parts;  // weights [rows of part, depth], one after another
    const std::int64_t* part_rows;
    std::int64_t num_parts;
    void* packed;
};

// Inputs of a linear in strips of nearly equal numbers of rows: [strip][depth][row], or with bf16 pairs
// [strip][depth / 2][row][2], for tiles [strip][depth / 32][row][32]. Strip s has the rows [rows * s / strips, rows * (s + 1) / strips).
struct StripTask {
    const float* inputs;
    std::int64_t input_stride;
    std::int64_t rows, strips;
    std::int64_t depth, padded_depth;
    bool pairs;
    void* packed;
};

struct LinearTask {
    PackedShape shape;
    const void* weights;
    const void* strips_packed;
    std::int64_t rows, strips;
    std::int64_t strips_per_block;
    std::int64_t panels_per_task;
    const float* bias;  // [panels * 16] in packed order, or null
    float* outputs;
    std::int64_t output_stride;
    bool add_to_outputs;
    bool pairs;  // bf16 dot products
};

struct NormTask {
    const float* residual;
    std::int64_t residual_stride;
    const float* weight;
    float* outputs;
    std::int64_t output_stride;
    std::int64_t rows, width, rows_per_task;
    float epsilon;
};

// silu(gate) * up, value by value.
struct GateTask {
    const float* gate;
    std::int64_t gate_stride;
    const float* up;
    std::int64_t up_stride;
    float* outputs;
    std::int64_t rows, width, rows_per_task;
};

struct EmbeddingTask {
    const void* table;  // [vocabulary, width]
    PackedShape packed; // panels == 0: the table is plain
    Element element;
    std::int64_t width;
    const std::int64_t* token_ids;
    float* outputs;
    std::int64_t rows, rows_per_task;
};

// A pool as [page][layer][k|v][kv_head][slot][head_dim].
struct Pool {
    void* data;
    Element element;
    std::int64_t layers, kv_heads, page_tokens, head_dim;
};

struct Heads {
    std::int64_t num_heads, num_kv_heads, head_dim;
};

struct RopeTask {
    Heads heads;
    Pool pool;
    std::int64_t layer;
    const float* qkv;
    std::int64_t qkv_stride;
    const float* cosine;  // [rows, head_dim / 2], already multiplied with the attention factor
    const float* sine;
    const std::int64_t* slots;
    const float* query_norm;  // or null
    const float* key_norm;
    float epsilon;
    float* queries;  // [rows, num_heads, head_dim]
    std::int64_t rows, rows_per_task;
};

// Query rows of one tile: all query heads of one KV head for consecutive tokens of one row of the plan.
struct AttendItem {
    std::int64_t row;
    std::int64_t first_token, num_tokens;  // in the plan
    std::int64_t position;                 // of the first token
    std::int64_t kv_head;
    std::int64_t first_block, num_blocks;  // key blocks
    std::int64_t partial;                  // first partial result of this item; -1: it writes the output itself
};

struct AttendTask {
    Heads heads;
    Pool pool;
    std::int64_t layer;
    std::int64_t window;  // 0: all
    float scale;
    const float* queries;
    float* outputs;  // [tokens, num_heads * head_dim]
    const std::int64_t* page_table;
    std::int64_t page_table_stride;
    const AttendItem* items;
    std::int64_t num_items;
    float* partials;  // of each key block, see `partial_floats`
};

// Adds up partial results of one tile, block after block, for kHeadAlign dimensions of its heads.
struct MergeItem {
    std::int64_t first_token, num_tokens, kv_head;
    std::int64_t first_partial, num_blocks;
    std::int64_t first_dim;
};

struct MergeTask {
    Heads heads;
    Element element;  // of the pool
    const MergeItem* items;
    float* partials;
    float* outputs;
};

struct Kernels {
    const char* name;
    std::int64_t strip_rows;        // most rows of a strip of floats
    std::int64_t pair_strip_rows;   // most rows of a strip of bf16 pairs
    bool pairs;                     // linears over bf16 weights take bf16 pairs as inputs
    std::int64_t rows_of_tile_max;  // query rows of an attention tile
    void (*pack)(const PackTask&, std::int64_t panel);
    void (*unpack)(const PackTask&, std::int64_t panel);
    void (*strip)(const StripTask&, std::int64_t strip);
    void (*linear)(const LinearTask&, std::int64_t task, float* scratch);
    void (*rms_norm)(const NormTask&, std::int64_t task);
    void (*embedding)(const EmbeddingTask&, std::int64_t task);
    void (*rope_and_store)(const RopeTask&, std::int64_t task, float* scratch);
    void (*attend)(const AttendTask&, std::int64_t task, float* scratch);
    void (*merge)(const MergeTask&, std::int64_t task, float* scratch);
    double (*read)(const float* from, std::int64_t count);       // probe of the read bandwidth
    double (*multiply)(std::int64_t rounds, bool pairs);         // probe of the multiplication rate: flops done
    void (*gate)(const GateTask&, std::int64_t task);
};

extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
extern const Kernels kKernelsAvx512Bf16;
extern const Kernels kKernelsAmx;
extern const Kernels kKernelsAmxEmulated;  // of tests only

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t padded_to_lanes(std::int64_t count) { return ceil_div(count, kLaneAlign) * kLaneAlign; }
inline std::int64_t padded_head(std::int64_t head_dim) { return ceil_div(head_dim, kHeadAlign) * kHeadAlign; }
// Floats of one block's result: greatest scores and sums of the rows in whole lanes, then the rows' weighted values.
inline std::int64_t partial_floats(std::int64_t rows, std::int64_t head_dim) {
    return 2 * padded_to_lanes(rows) + rows * padded_head(head_dim);
}

}  // namespace tandem
