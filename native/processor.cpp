#include "processor.hpp"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

namespace tandem {
namespace {

const Kernels* const kAll[] = {
    &kKernelsAvx2, &kKernelsAvx512, &kKernelsAvx512Bf16, &kKernelsAmx,
#if defined(TANDEM_EMULATED_TILES)
    &kKernelsAmxEmulated,
#endif
};

// The CPU has tiles and multiplies bf16 in them; the system saves their state, and lets this process use them.
bool has_tiles() {
    unsigned int a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned int bf16_tiles = 1u << 22, tiles = 1u << 24, saves_state = 1u << 27;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & saves_state) == 0) return false;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & bf16_tiles) == 0 || (d & tiles) == 0) return false;
    constexpr unsigned int tile_state = 3u << 17;  // configuration and data
    unsigned int low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & tile_state) != tile_state) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace

const Kernels* find_kernels(const char* name) {
    for (const Kernels* kernels : kAll) {
        if (std::strcmp(kernels->name, name) == 0) return kernels;
    }
    return nullptr;
}

bool cpu_runs(const char* name) {
    __builtin_cpu_init();
    if (find_kernels(name) == nullptr) return false;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
    if (std::strcmp(name, "avx2") == 0 || std::strcmp(name, "amx-emulated") == 0) return true;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512) return false;
    if (std::strcmp(name, "avx512") == 0) return true;
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    return std::strcmp(name, "avx512bf16") == 0 || has_tiles();
}

}  // namespace tandem
