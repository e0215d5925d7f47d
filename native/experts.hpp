// Mixtures of experts as phases of a program: rows are routed, grouped by expert, multiplied, and added up again.
#pragma once

#include "programs.hpp"

namespace tandem {

// The experts of one layer that are here, [first, first + count) of all that the router knows. Their packed weights
// follow each other; `gate_up` and `down` are those of the first.
struct Experts {
    PackedLinear router;  // float32; an output for every expert
    PackedLinear gate_up, down;
    std::int64_t first, count;
    std::int64_t per_row;  // experts that a row is sent to
    bool normalized;       // a row's weights are divided by their sum
};

// Bytes of the runtime's `experts` that so many rows need.
std::int64_t experts_bytes(const Experts& experts, std::int64_t rows);

// A row's experts are those with the greatest softmax of the router's outputs, of equal ones the first. Their results,
// each times its weight, are added up in the order of their numbers; the sum is stored to `outputs`, or added to it.
// The runtime's `experts` must be reserved, and stay where they are until the program has run.
void add_experts(Program& program, Runtime& runtime, const Experts& experts, std::int64_t rows, Matrix inputs,
                 Matrix outputs, bool add_to_outputs);

}  // namespace tandem
