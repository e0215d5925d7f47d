// Decoder layers as one program: no thread goes idle between the operators of a plan.
#pragma once

#include <optional>

#include "experts.hpp"
#include "plan.hpp"

namespace tandem {

struct Layer {
    std::int64_t number;  // in the pool
    const float* input_norm;
    HeadNorms head_norms;  // both null: none
    const float* middle_norm;
    PackedLinear qkv, output, gate_up, down;
    std::optional<Experts> experts;  // instead of gate_up and down
    std::int64_t window;  // 0: all positions
    float epsilon;
};

// The layers of one plan. The runtime's activations hold what goes from operator to operator: one stack at a time.
class LayerStack {
public:
    // `residual` [tokens, hidden] is read and added to.
    LayerStack(Plan& plan, std::int64_t hidden, float* residual);

    void add(const Layer& layer);
    void reserve();  // the workspace that `run` needs
    void run();

private:
    void build(const Layer& layer);

    Plan& plan_;
    Runtime& runtime_;
    const std::int64_t rows_, hidden_;
    float* const residual_;
    std::int64_t middle_max_ = 0;
    std::vector<Layer> layers_;
    Program program_;
};

}  // namespace tandem
