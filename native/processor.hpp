// Which kernels there are, and which of them this CPU and its operating system run.
#pragma once

#include "kernels.hpp"

namespace tandem {

// Null if there are none of that name.
const Kernels* find_kernels(const char* name);

// Asks the system for the tile registers where they are needed: once granted, they are the whole process's.
bool cpu_runs(const char* name);

}  // namespace tandem
