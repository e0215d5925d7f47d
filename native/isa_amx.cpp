// The kernels for AMX: linears over bf16 weights by tiles, everything else is that of AVX-512 with bf16 dot products.
// The tile instructions are written out, so this needs an assembler that knows them and no option of the compiler.
#include "attention_pairs.hpp"
#include "tile_kernels.hpp"

const tandem::Kernels tandem::kKernelsAmx = {
    "amx",           kStripRows,    kTileStripRows, true,                96,
    pack_panel,      unpack_panel,  strip_of_inputs_for_tiles,
    linear_by_tiles, rms_norm_rows, embed_rows,     rope_and_store_rows, attend_tile_by_type, merge_tile_by_type,
    read_memory,     multiply_by_tiles, gate_rows,
};
