// Operators as phases of a program: how each is cut into tasks.
#pragma once

#include "runtime.hpp"

namespace tandem {

using Program = std::vector<Phase>;

struct PackedLinear {
    const void* packed;
    const float* bias;  // in packed order, or null
    PackedShape shape;
};

struct Matrix {
    float* data;
    std::int64_t stride;  // floats between rows
};

PackedShape packed_shape(std::int64_t outputs, std::int64_t depth, Element element, bool gated);
std::int64_t packed_bytes(const PackedShape& shape);

// Rows of a linear whose inputs are not one matrix bring their own strips: what `add_linear` is made of.
// Most rows of a strip, bytes of so many rows' strips, where those of a row begin in the runtime's, and the task that makes them (it has no
// place yet for what it packs).
std::int64_t strip_rows(const Runtime& runtime, const PackedShape& shape);
std::int64_t strip_bytes(const Runtime& runtime, const PackedShape& shape, std::int64_t rows);
char* strips_at(const Runtime& runtime, const PackedShape& shape, std::int64_t first_row);
StripTask strip_task(const Runtime& runtime, const PackedShape& shape, std::int64_t rows, Matrix inputs);
// A product whose strips and panels of a task are yet to be told; its number of tasks once they are.
LinearTask linear_task(const Runtime& runtime, const PackedLinear& linear, std::int64_t rows, Matrix outputs,
                       bool add_to_outputs);
std::int64_t linear_tasks(const LinearTask& task);
// Blocks of rows that several linears of so many rows together have at most.
std::int64_t linear_blocks_max(const Runtime& runtime, const PackedShape& shape, std::int64_t rows,
                               std::int64_t linears);
std::int64_t panels_per_task(const Runtime& runtime, const PackedShape& shape, std::int64_t blocks);
void need_linear_scratch(Runtime& runtime, std::int64_t rows);

void add_linear(Program& program, Runtime& runtime, const PackedLinear& linear, std::int64_t rows, Matrix inputs,
                Matrix outputs, bool add_to_outputs);
void add_rms_norm(Program& program, Runtime& runtime, NormTask task);
void add_gate(Program& program, Runtime& runtime, GateTask task);
void add_embedding(Program& program, Runtime& runtime, EmbeddingTask task);

// Rows of one task, so that its work is worth handing out.
std::int64_t rows_per_task(std::int64_t rows, std::int64_t row_elements, int threads);

}  // namespace tandem
