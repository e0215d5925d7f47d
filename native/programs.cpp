#include "programs.hpp"

#include <algorithm>

namespace tandem {
namespace {

constexpr std::int64_t kBlockRows = 240;     // rows that a task goes over: their packed inputs stay in the caches
constexpr std::int64_t kTasksPerThread = 16; // so many that a thread which is late costs little
constexpr std::int64_t kTaskElements = 1 << 14;

std::int64_t block_strips(const Runtime& runtime, const PackedShape& shape) {
    return std::max<std::int64_t>(1, kBlockRows / strip_rows(runtime, shape));
}

std::int64_t blocks_of(const Runtime& runtime, const PackedShape& shape, std::int64_t strips) {
    return ceil_div(strips, block_strips(runtime, shape));
}

}  // namespace

std::int64_t rows_per_task(std::int64_t rows, std::int64_t row_elements, int threads) {
    const std::int64_t worthwhile = std::max<std::int64_t>(1, kTaskElements / std::max<std::int64_t>(1, row_elements));
    return std::max(worthwhile, ceil_div(rows, 8 * threads));
}

PackedShape packed_shape(std::int64_t outputs, std::int64_t depth, Element element, bool gated) {
    const std::int64_t panels = ceil_div(outputs, kPanelColumns) * (gated ? 2 : 1);
    const std::int64_t unit = element == Element::kBfloat16 ? kPairDepth : 2;
    return {outputs, depth, ceil_div(depth, unit) * unit, panels, element, gated};
}

std::int64_t packed_bytes(const PackedShape& shape) {
    return shape.panels * kPanelColumns * shape.padded_depth * (shape.element == Element::kFloat32 ? 4 : 2);
}

bool takes_pairs(const Runtime& runtime, const PackedShape& shape) {
    return runtime.kernels.pairs && shape.element == Element::kBfloat16;
}

std::int64_t strip_rows(const Runtime& runtime, const PackedShape& shape) {
    return takes_pairs(runtime, shape) ? runtime.kernels.pair_strip_rows : runtime.kernels.strip_rows;
}

std::int64_t strip_bytes(const Runtime& runtime, const PackedShape& shape, std::int64_t rows) {
    return rows * shape.padded_depth * (takes_pairs(runtime, shape) ? 2 : 4);
}

char* strips_at(const Runtime& runtime, const PackedShape& shape, std::int64_t first_row) {
    return reinterpret_cast<char*>(runtime.strips.floats()) + strip_bytes(runtime, shape, first_row);
}

StripTask strip_task(const Runtime& runtime, const PackedShape& shape, std::int64_t rows, Matrix inputs) {
    return {inputs.data, inputs.stride,      rows,  ceil_div(rows, strip_rows(runtime, shape)),
            shape.depth, shape.padded_depth, takes_pairs(runtime, shape), nullptr};
}

LinearTask linear_task(const Runtime& runtime, const PackedLinear& linear, std::int64_t rows, Matrix outputs,
                       bool add_to_outputs) {
    LinearTask task{};
    task.shape = linear.shape;
    task.weights = linear.packed;
    task.rows = rows;
    task.strips = ceil_div(rows, strip_rows(runtime, linear.shape));
    task.strips_per_block = ceil_div(task.strips, blocks_of(runtime, linear.shape, task.strips));
    task.bias = linear.bias;
    task.outputs = outputs.data;
    task.output_stride = outputs.stride;
    task.add_to_outputs = add_to_outputs;
    task.pairs = takes_pairs(runtime, linear.shape);
    return task;
}

std::int64_t linear_tasks(const LinearTask& task) {
    return ceil_div(task.shape.panels, task.panels_per_task) * ceil_div(task.strips, task.strips_per_block);
}

std::int64_t linear_blocks_max(const Runtime& runtime, const PackedShape& shape, std::int64_t rows,
                               std::int64_t linears) {
    return rows / (strip_rows(runtime, shape) * block_strips(runtime, shape)) + linears;
}

std::int64_t panels_per_task(const Runtime& runtime, const PackedShape& shape, std::int64_t blocks) {
    const std::int64_t wide_tasks = ceil_div(shape.panels, kTaskPanelsMax) * blocks;
    return wide_tasks >= kTasksPerThread * runtime.pool.threads() ? kTaskPanelsMax : 2;
}

void need_linear_scratch(Runtime& runtime, std::int64_t rows) {
    runtime.need_scratch(kTaskPanelsMax * std::min(rows, kBlockRows) * kPanelColumns + 2 * kDepthBlock * kPanelColumns);
}

void add_linear(Program& program, Runtime& runtime, const PackedLinear& linear, std::int64_t rows, Matrix inputs,
                Matrix outputs, bool add_to_outputs) {
    if (rows == 0 || linear.shape.panels == 0) return;
    const PackedShape& shape = linear.shape;
    const bool as_it_lies = rows == 1 && !takes_pairs(runtime, shape) && shape.padded_depth == shape.depth;
    if (!as_it_lies) {
        runtime.strips.reserve(strip_bytes(runtime, shape, rows));
        const StripTask task = strip_task(runtime, shape, rows, inputs);
        program.push_back({Kind::kStrips, task.strips, [task, &runtime](std::int64_t number, int) {
                               StripTask own = task;
                               own.packed = runtime.strips.floats();
                               runtime.kernels.strip(own, number);
                           }});
    }
    LinearTask task = linear_task(runtime, linear, rows, outputs, add_to_outputs);
    task.panels_per_task = panels_per_task(runtime, shape, blocks_of(runtime, shape, task.strips));
    need_linear_scratch(runtime, rows);
    program.push_back({Kind::kLinear, linear_tasks(task),
                       [task, inputs, as_it_lies, &runtime](std::int64_t number, int thread) {
                           LinearTask own = task;
                           own.strips_packed = as_it_lies ? inputs.data : runtime.strips.floats();
                           runtime.kernels.linear(own, number, runtime.scratch(thread));
                       }});
}

void add_rms_norm(Program& program, Runtime& runtime, NormTask task) {
    if (task.rows == 0) return;
    task.rows_per_task = rows_per_task(task.rows, task.width, runtime.pool.threads());
    program.push_back({Kind::kNorm, ceil_div(task.rows, task.rows_per_task),
                       [task, &runtime](std::int64_t number, int) { runtime.kernels.rms_norm(task, number); }});
}

void add_gate(Program& program, Runtime& runtime, GateTask task) {
    if (task.rows == 0) return;
    task.rows_per_task = rows_per_task(task.rows, 8 * task.width, runtime.pool.threads());
    program.push_back({Kind::kOther, ceil_div(task.rows, task.rows_per_task),
                       [task, &runtime](std::int64_t number, int) { runtime.kernels.gate(task, number); }});
}

void add_embedding(Program& program, Runtime& runtime, EmbeddingTask task) {
    if (task.rows == 0) return;
    task.rows_per_task = rows_per_task(task.rows, 4 * task.width, runtime.pool.threads());
    program.push_back({Kind::kEmbedding, ceil_div(task.rows, task.rows_per_task),
                       [task, &runtime](std::int64_t number, int) { runtime.kernels.embedding(task, number); }});
}

}  // namespace tandem
