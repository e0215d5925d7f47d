// The linears of AMX with tile instructions in plain code, everything else that of AVX2: for tests on any CPU, never
// part of an installed library.
#include "attention_kernels.hpp"
#include "tile_kernels.hpp"

const tandem::Kernels tandem::kKernelsAmxEmulated = {
    "amx-emulated",  kStripRows,    kTileStripRows, true,                96,
    pack_panel,      unpack_panel,  strip_of_inputs_for_tiles,
    linear_by_tiles, rms_norm_rows, embed_rows,     rope_and_store_rows, attend_tile<FloatArithmetic>,
    merge_tile<FloatArithmetic>,
    read_memory,     multiply_by_tiles, gate_rows,
};
