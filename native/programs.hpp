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

void add_linear(Program& program, Runtime& runtime, const PackedLinear& linear, std::int64_t rows, Matrix inputs,
                Matrix outputs, bool add_to_outputs);
void add_rms_norm(Program& program, Runtime& runtime, NormTask task);
void add_embedding(Program& program, Runtime& runtime, EmbeddingTask task);

// Rows of one task, so that its work is worth handing out.
std::int64_t rows_per_task(std::int64_t rows, std::int64_t row_elements, int threads);

}  // namespace tandem
