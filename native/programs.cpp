#include "programs.hpp"

#include <algorithm>

namespace tandem {
namespace {

constexpr std::int64_t kBlockRows = 240;     // rows whose packed inputs are used by all panels before the next rows'
constexpr std::int64_t kTasksPerThread = 16; // so many that a thread which is late costs little
constexpr std::int64_t kTaskElements = 1 << 14;

}  // namespace

std::int64_t rows_per_task(std::int64_t rows, std::int64_t row_elements, int threads) {
    const std::int64_t worthwhile = std::max<std::int64_t>(1, kTaskElements / std::max<std::int64_t>(1, row_elements));
    return std::max(worthwhile, ceil_div(rows, 8 * threads));
}

PackedShape packed_shape(std::int64_t outputs, std::int64_t depth, Element element, bool gated) {
    const std::int64_t panels = ceil_div(outputs, kPanelColumns) * (gated ? 2 : 1);
    return {outputs, depth, ceil_div(depth, 2) * 2, panels, element, gated};
}

std::int64_t packed_bytes(const PackedShape& shape) {
    return shape.panels * kPanelColumns * shape.padded_depth * (shape.element == Element::kFloat32 ? 4 : 2);
}

void add_linear(Program& program, Runtime& runtime, const PackedLinear& linear, std::int64_t rows, Matrix inputs,
                Matrix outputs, bool add_to_outputs) {
    if (rows == 0 || linear.shape.panels == 0) return;
    const Kernels& kernels = runtime.kernels;
    const PackedShape& shape = linear.shape;
    const bool pairs = kernels.pairs && shape.element == Element::kBfloat16;
    const std::int64_t strips = ceil_div(rows, kernels.strip_rows);
    const bool as_it_lies = rows == 1 && !pairs && shape.padded_depth == shape.depth;
    if (!as_it_lies) {
        runtime.strips.reserve(rows * shape.padded_depth * (pairs ? 2 : 4));
        const StripTask task{inputs.data, inputs.stride,      rows,  strips,
                             shape.depth, shape.padded_depth, pairs, nullptr};
        program.push_back({strips, [task, &runtime](std::int64_t number, int) {
                               StripTask own = task;
                               own.packed = runtime.strips.floats();
                               runtime.kernels.strip(own, number);
                           }});
    }
    LinearTask task{};
    task.shape = shape;
    task.weights = linear.packed;
    task.rows = rows;
    task.strips = strips;
    const std::int64_t blocks = ceil_div(strips, std::max<std::int64_t>(1, kBlockRows / kernels.strip_rows));
    task.strips_per_block = ceil_div(strips, blocks);
    task.bias = linear.bias;
    task.outputs = outputs.data;
    task.output_stride = outputs.stride;
    task.add_to_outputs = add_to_outputs;
    task.pairs = pairs;
    const std::int64_t wide_tasks = ceil_div(shape.panels, kTaskPanelsMax) * blocks;
    task.panels_per_task = wide_tasks >= kTasksPerThread * runtime.pool.threads() ? kTaskPanelsMax : 2;
    const std::int64_t block_rows = std::min(rows, task.strips_per_block * kernels.strip_rows);
    runtime.need_scratch(kTaskPanelsMax * block_rows * kPanelColumns + 2 * kDepthBlock * kPanelColumns);
    const std::int64_t tasks =
        ceil_div(shape.panels, task.panels_per_task) * ceil_div(strips, task.strips_per_block);
    program.push_back({tasks, [task, inputs, as_it_lies, &runtime](std::int64_t number, int thread) {
                           LinearTask own = task;
                           own.strips_packed = as_it_lies ? inputs.data : runtime.strips.floats();
                           runtime.kernels.linear(own, number, runtime.scratch(thread));
                       }});
}

void add_rms_norm(Program& program, Runtime& runtime, NormTask task) {
    if (task.rows == 0) return;
    task.rows_per_task = rows_per_task(task.rows, task.width, runtime.pool.threads());
    program.push_back({ceil_div(task.rows, task.rows_per_task),
                       [task, &runtime](std::int64_t number, int) { runtime.kernels.rms_norm(task, number); }});
}

void add_embedding(Program& program, Runtime& runtime, EmbeddingTask task) {
    if (task.rows == 0) return;
    task.rows_per_task = rows_per_task(task.rows, 4 * task.width, runtime.pool.threads());
    program.push_back({ceil_div(task.rows, task.rows_per_task),
                       [task, &runtime](std::int64_t number, int) { runtime.kernels.embedding(task, number); }});
}

}  // namespace tandem
