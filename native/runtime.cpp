#include "runtime.hpp"

#include <sys/mman.h>

#include <new>

namespace tandem {
namespace {

constexpr std::int64_t kHugePage = 2 << 20;

std::int64_t rounded_bytes(std::int64_t bytes) {
    const std::int64_t unit = bytes >= kHugePage ? kHugePage : 4096;
    return ceil_div(bytes, unit) * unit;
}

}  // namespace

void* allocate_pages(std::int64_t bytes) {
    const std::int64_t size = rounded_bytes(bytes);
    const std::int64_t spare = size >= kHugePage ? kHugePage : 0;  // to cut a piece that starts at a huge page
    char* memory = static_cast<char*>(mmap(nullptr, static_cast<std::size_t>(size + spare), PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) return nullptr;
    if (spare == 0) return memory;
    const std::int64_t before =
        (kHugePage - static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(memory) % kHugePage)) % kHugePage;
    if (before > 0) munmap(memory, static_cast<std::size_t>(before));
    if (before < spare) munmap(memory + before + size, static_cast<std::size_t>(spare - before));
    madvise(memory + before, static_cast<std::size_t>(size), MADV_HUGEPAGE);  // advice: nothing is lost without
    return memory + before;
}

void release_pages(void* memory, std::int64_t bytes) {
    if (memory != nullptr) munmap(memory, static_cast<std::size_t>(rounded_bytes(bytes)));
}

Buffer::~Buffer() { release_pages(memory_, bytes_); }

void Buffer::reserve(std::int64_t bytes) {
    if (bytes <= bytes_) return;
    release_pages(memory_, bytes_);
    bytes_ = 0;
    memory_ = allocate_pages(bytes);
    if (memory_ == nullptr) throw std::bad_alloc();
    bytes_ = bytes;
}

void Runtime::need_scratch(std::int64_t floats) {
    const std::int64_t padded = ceil_div(floats, 64) * 64 + 64;
    if (padded <= scratch_floats_) return;
    scratch_floats_ = padded;
    scratch_.reserve(padded * 4 * pool.threads());
}

}  // namespace tandem
