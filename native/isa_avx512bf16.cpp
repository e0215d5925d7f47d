// The kernels for AVX-512 with bf16 dot products: linears over bf16 weights take inputs rounded to bf16, everything
// else is that of AVX-512.
#include "attention_pairs.hpp"
#include "dot_kernels.hpp"

namespace {

double multiply(std::int64_t rounds, bool pairs) { return pairs ? multiply_pairs(rounds) : multiply_floats(rounds); }

void strip_of_inputs(const tandem::StripTask& task, std::int64_t strip) {
    if (task.pairs) {
        strip_of_pairs(task, strip);
    } else {
        strip_of_floats(task, strip);
    }
}

void linear(const tandem::LinearTask& task, std::int64_t number, float* scratch) {
    if (task.pairs) {
        linear_of_pairs(task, number, scratch);
    } else {
        linear_of_floats(task, number, scratch);
    }
}

}  // namespace

const tandem::Kernels tandem::kKernelsAvx512Bf16 = {
    "avx512bf16", kStripRows, kStripRows, true,            96,         pack_panel,          unpack_panel, strip_of_inputs,
    linear,       rms_norm_rows, embed_rows, rope_and_store_rows, attend_tile_by_type,  merge_tile_by_type,
    read_memory,  multiply,     gate_rows,
};
