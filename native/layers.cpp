#include "layers.hpp"

#include <algorithm>

namespace tandem {

LayerStack::LayerStack(Plan& plan, std::int64_t hidden, float* residual)
    : plan_(plan), runtime_(plan.runtime()), rows_(plan.tokens()), hidden_(hidden), residual_(residual) {}

void LayerStack::add(const Layer& layer) {
    layers_.push_back(layer);
    middle_max_ = std::max(middle_max_, layer.gate_up.shape.outputs);
}

void LayerStack::reserve() {
    if (rows_ == 0) return;
    const Heads& heads = plan_.heads();
    const std::int64_t query_width = heads.num_heads * heads.head_dim;
    const std::int64_t qkv_width = query_width + 2 * heads.num_kv_heads * heads.head_dim;
    // Attention's are no longer needed when the MLP begins.
    const std::int64_t widest = std::max(qkv_width + 2 * query_width, middle_max_);
    runtime_.activations.reserve(rows_ * (hidden_ + widest) * 4);
    for (const Layer& layer : layers_) {
        if (layer.experts) runtime_.experts.reserve(experts_bytes(*layer.experts, rows_));
    }
    for (const Layer& layer : layers_) build(layer);
}

void LayerStack::run() {
    reserve();
    runtime_.pool.run(program_);
}

void LayerStack::build(const Layer& layer) {
    const Heads& heads = plan_.heads();
    const std::int64_t query_width = heads.num_heads * heads.head_dim;
    const std::int64_t qkv_width = query_width + 2 * heads.num_kv_heads * heads.head_dim;
    float* const normed = runtime_.activations.floats();
    float* const qkv = normed + rows_ * hidden_;
    float* const queries = qkv + rows_ * qkv_width;
    float* const attended = queries + rows_ * query_width;
    float* const middle = qkv;
    const std::int64_t middle_width = layer.gate_up.shape.outputs;
    const Matrix residual{residual_, hidden_};
    const auto norm = [&](const float* weight) {
        add_rms_norm(program_, runtime_,
                     {residual_, hidden_, weight, normed, hidden_, rows_, hidden_, 0, layer.epsilon});
    };
    norm(layer.input_norm);
    add_linear(program_, runtime_, layer.qkv, rows_, {normed, hidden_}, {qkv, qkv_width}, false);
    const HeadNorms* head_norms = layer.head_norms.query == nullptr ? nullptr : &layer.head_norms;
    plan_.add_rope_and_store(program_, layer.number, {qkv, qkv_width}, head_norms, queries);
    plan_.add_attend(program_, layer.number, layer.window, queries, attended);
    add_linear(program_, runtime_, layer.output, rows_, {attended, query_width}, residual, true);
    norm(layer.middle_norm);
    if (layer.experts) return add_experts(program_, runtime_, *layer.experts, rows_, {normed, hidden_}, residual, true);
    add_linear(program_, runtime_, layer.gate_up, rows_, {normed, hidden_}, {middle, middle_width}, false);
    add_linear(program_, runtime_, layer.down, rows_, {middle, middle_width}, residual, true);
}

}  // namespace tandem
