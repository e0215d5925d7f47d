// The kernels for AVX-512 without bf16 instructions; bit for bit those of AVX2.
#include "attention_kernels.hpp"
#include "probes.hpp"

namespace {
double multiply(std::int64_t rounds, bool) { return multiply_floats(rounds); }
}  // namespace

const tandem::Kernels tandem::kKernelsAvx512 = {
    "avx512",        kStripRows, kStripRows, false,      96,                  pack_panel,  unpack_panel, strip_of_floats,
    linear_of_floats, rms_norm_rows,  embed_rows,     rope_and_store_rows, attend_tile<FloatArithmetic>, merge_tile<FloatArithmetic>,
    read_memory,     multiply,        gate_rows,
};
