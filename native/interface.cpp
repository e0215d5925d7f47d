// The plain C interface: pointers, sizes, strides. Callers vouch for shapes; nothing here throws.
#include <new>

#include "layers.hpp"
#include "processor.hpp"

namespace {

using namespace tandem;

template <class Work>
int guarded(Work work) {
    try {
        work();
        return 0;
    } catch (...) {  // memory is what can run out here
        return 1;
    }
}

}  // namespace

extern "C" {

#define TANDEM_EXPORT __attribute__((visibility("default")))

// Raised with every change of this interface.
TANDEM_EXPORT std::int32_t tandem_interface_version() { return 5; }

// Whether this CPU runs the kernels of that name.
TANDEM_EXPORT std::int32_t tandem_supports(const char* kernels) {
    return cpu_runs(kernels) ? 1 : 0;
}

// Null if the kernels are unknown or do not run here, or threads cannot be started.
TANDEM_EXPORT Runtime* tandem_create(const char* kernels, std::int32_t threads, std::int64_t spin_nanoseconds) {
    if (tandem_supports(kernels) == 0) return nullptr;
    try {
        return new Runtime(*find_kernels(kernels), threads, spin_nanoseconds);
    } catch (...) {
        return nullptr;
    }
}

TANDEM_EXPORT void tandem_destroy(Runtime* runtime) { delete runtime; }

TANDEM_EXPORT std::int64_t tandem_workspace_bytes(const Runtime* runtime) { return runtime->workspace_bytes(); }

// Null if there is no memory.
TANDEM_EXPORT void* tandem_allocate(std::int64_t bytes) { return allocate_pages(bytes); }
TANDEM_EXPORT void tandem_release(void* memory, std::int64_t bytes) { release_pages(memory, bytes); }

struct TandemLinear {
    void* packed;
    const float* bias;
    std::int64_t outputs;
    std::int64_t depth;
    std::int32_t element;
    std::int32_t gated;
};

static PackedLinear packed_linear(const TandemLinear& linear) {
    return {linear.packed, linear.bias,
            packed_shape(linear.outputs, linear.depth, static_cast<Element>(linear.element), linear.gated != 0)};
}

TANDEM_EXPORT std::int64_t tandem_packed_bytes(const TandemLinear* linear) {
    return packed_bytes(packed_linear(*linear).shape);
}

static int over_panels(Runtime* runtime, const TandemLinear* linear, const void* const* parts,
                       const std::int64_t* part_rows, std::int64_t num_parts,
                       void (*kernel)(const PackTask&, std::int64_t)) {
    return guarded([&] {
        const PackTask task{packed_linear(*linear).shape, parts, part_rows, num_parts, linear->packed};
        runtime->pool.run({{Kind::kOther, task.shape.panels, [&](std::int64_t panel, int) { kernel(task, panel); }}});
    });
}

// Parts: weights [part_rows[i], depth], side by side; gated: their first half are gates, the second half ups.
TANDEM_EXPORT std::int32_t tandem_pack(Runtime* runtime, const TandemLinear* linear, const void* const* parts,
                                       const std::int64_t* part_rows, std::int64_t num_parts) {
    return over_panels(runtime, linear, parts, part_rows, num_parts, runtime->kernels.pack);
}

TANDEM_EXPORT std::int32_t tandem_unpack(Runtime* runtime, const TandemLinear* linear, void* const* parts,
                                         const std::int64_t* part_rows, std::int64_t num_parts) {
    return over_panels(runtime, linear, parts, part_rows, num_parts, runtime->kernels.unpack);
}

// `head`: its outputs are logits, which only profiles tell apart.
TANDEM_EXPORT std::int32_t tandem_linear(Runtime* runtime, const TandemLinear* linear, std::int64_t rows,
                                         float* inputs, std::int64_t input_stride, float* outputs,
                                         std::int64_t output_stride, std::int32_t add_to_outputs, std::int32_t head) {
    return guarded([&] {
        Program program;
        add_linear(program, *runtime, packed_linear(*linear), rows, {inputs, input_stride}, {outputs, output_stride},
                   add_to_outputs != 0);
        if (head != 0 && !program.empty()) program.back().kind = Kind::kHead;
        runtime->pool.run(program);
    });
}

TANDEM_EXPORT std::int32_t tandem_rms_norm(Runtime* runtime, std::int64_t rows, std::int64_t width,
                                           const float* residual, std::int64_t residual_stride, const float* weight,
                                           float epsilon, float* outputs) {
    return guarded([&] {
        Program program;
        add_rms_norm(program, *runtime, {residual, residual_stride, weight, outputs, width, rows, width, 0, epsilon});
        runtime->pool.run(program);
    });
}

// silu(gate) * up: what a gated linear makes of its halves, to the bit.
TANDEM_EXPORT std::int32_t tandem_gate(Runtime* runtime, std::int64_t rows, std::int64_t width, const float* gate,
                                       std::int64_t gate_stride, const float* up, std::int64_t up_stride,
                                       float* outputs) {
    return guarded([&] {
        Program program;
        add_gate(program, *runtime, {gate, gate_stride, up, up_stride, outputs, rows, width, 0});
        runtime->pool.run(program);
    });
}

// `packed`: null for a plain table [vocabulary, width]. 2 if a token id is not in the vocabulary.
TANDEM_EXPORT std::int32_t tandem_embedding(Runtime* runtime, const void* table, std::int32_t element,
                                            const TandemLinear* packed, std::int64_t vocabulary,
                                            std::int64_t width, std::int64_t rows, const std::int64_t* token_ids,
                                            float* outputs) {
    for (std::int64_t row = 0; row < rows; ++row) {
        if (token_ids[row] < 0 || token_ids[row] >= vocabulary) return 2;
    }
    return guarded([&] {
        EmbeddingTask task{};
        task.table = packed != nullptr ? packed->packed : table;
        if (packed != nullptr) task.packed = packed_linear(*packed).shape;
        task.element = static_cast<Element>(element);
        task.width = width;
        task.token_ids = token_ids;
        task.outputs = outputs;
        task.rows = rows;
        Program program;
        add_embedding(program, *runtime, task);
        runtime->pool.run(program);
    });
}

// Packed weights of the experts follow each other; `gate_up` and `down` are those of the first that is here.
struct TandemExperts {
    TandemLinear router, gate_up, down;
    std::int64_t first, count;  // those that are here
    std::int64_t per_row;
    std::int32_t normalized;
};

static Experts experts_of(const TandemExperts& experts) {
    return {packed_linear(experts.router),
            packed_linear(experts.gate_up),
            packed_linear(experts.down),
            experts.first,
            experts.count,
            experts.per_row,
            experts.normalized != 0};
}

// Null outputs: only takes the workspace.
TANDEM_EXPORT std::int32_t tandem_experts(Runtime* runtime, const TandemExperts* experts, std::int64_t rows,
                                          float* inputs, std::int64_t input_stride, float* outputs,
                                          std::int64_t output_stride, std::int32_t add_to_outputs) {
    return guarded([&] {
        const Experts own = experts_of(*experts);
        Program program;
        runtime->experts.reserve(experts_bytes(own, rows));
        add_experts(program, *runtime, own, rows, {inputs, input_stride}, {outputs, output_stride},
                    add_to_outputs != 0);
        if (outputs != nullptr) runtime->pool.run(program);
    });
}

struct TandemPlan {
    std::int64_t num_rows;
    const std::int64_t* offsets;
    const std::int64_t* starts;
    const std::int64_t* positions;
    const std::int64_t* slots;
    const std::int64_t* page_table;
    std::int64_t page_table_stride;
    std::int64_t num_heads;
    std::int64_t num_kv_heads;
    std::int64_t head_dim;
    void* pool;
    std::int32_t pool_element;
    float attention_factor;
    std::int64_t num_layers;
    std::int64_t page_tokens;
    const float* frequencies;
};

// Copies what it is given, but for the pool; null if there is no memory.
TANDEM_EXPORT Plan* tandem_begin(Runtime* runtime, const TandemPlan* plan) {
    try {
        const PlanRows rows{plan->num_rows, plan->offsets,    plan->starts,           plan->positions,
                            plan->slots,    plan->page_table, plan->page_table_stride};
        const Heads heads{plan->num_heads, plan->num_kv_heads, plan->head_dim};
        const Pool pool{plan->pool,           static_cast<Element>(plan->pool_element), plan->num_layers,
                        plan->num_kv_heads,   plan->page_tokens,                        plan->head_dim};
        return new Plan(*runtime, rows, heads, pool, plan->frequencies, plan->attention_factor);
    } catch (...) {
        return nullptr;
    }
}

TANDEM_EXPORT void tandem_end(Plan* plan) { delete plan; }

TANDEM_EXPORT std::int32_t tandem_rope_and_store(Plan* plan, std::int64_t layer, float* qkv, std::int64_t qkv_stride,
                                                 const float* query_norm, const float* key_norm, float epsilon,
                                                 float* queries) {
    return guarded([&] {
        const HeadNorms norms{query_norm, key_norm, epsilon};
        Program program;
        plan->add_rope_and_store(program, layer, {qkv, qkv_stride}, query_norm == nullptr ? nullptr : &norms, queries);
        plan->runtime().pool.run(program);
    });
}

// `window` 0: all positions.
TANDEM_EXPORT std::int32_t tandem_attend(Plan* plan, std::int64_t layer, std::int64_t window, const float* queries,
                                         float* outputs) {
    return guarded([&] {
        Program program;
        plan->add_attend(program, layer, window, queries, outputs);
        plan->runtime().pool.run(program);
    });
}

// One decoder layer; pointers stay the caller's. Norms of heads may be null. `window` 0: all positions. `experts`: null,
// or what is there instead of gate_up and down.
struct TandemLayer {
    const float* input_norm;
    const float* query_norm;
    const float* key_norm;
    const float* middle_norm;
    TandemLinear qkv, output, gate_up, down;
    const TandemExperts* experts;
    std::int64_t window;
    float epsilon;
    float head_epsilon;
};

// All layers of a plan in one parallel region; adds to `residual` [tokens, hidden]. Null: only takes the workspace.
TANDEM_EXPORT std::int32_t tandem_layers(Plan* plan, const TandemLayer* layers, std::int64_t num_layers,
                                         std::int64_t hidden, float* residual) {
    return guarded([&] {
        LayerStack stack(*plan, hidden, residual);
        for (std::int64_t i = 0; i < num_layers; ++i) {
            const TandemLayer& layer = layers[i];
            const auto experts = layer.experts == nullptr ? std::nullopt : std::optional(experts_of(*layer.experts));
            stack.add({i, layer.input_norm, {layer.query_norm, layer.key_norm, layer.head_epsilon}, layer.middle_norm,
                       packed_linear(layer.qkv), packed_linear(layer.output), packed_linear(layer.gate_up),
                       packed_linear(layer.down), experts, layer.window, layer.epsilon});
        }
        residual == nullptr ? stack.reserve() : stack.run();
    });
}

}  // extern "C"
