// An operator set in use: kernels, threads, and workspaces that grow to what was needed and are kept.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"

namespace tandem {

// Anonymous memory in huge pages where the system gives them.
void* allocate_pages(std::int64_t bytes);
void release_pages(void* memory, std::int64_t bytes);

class Buffer {
public:
    Buffer() = default;
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    // At least that many bytes; the content is lost when it grows.
    void reserve(std::int64_t bytes);
    float* floats() const { return static_cast<float*>(memory_); }
    std::int64_t bytes() const { return bytes_; }

private:
    void* memory_ = nullptr;
    std::int64_t bytes_ = 0;
};

class Runtime {
public:
    Runtime(const Kernels& chosen, int threads, std::int64_t spin_nanoseconds)
        : kernels(chosen), pool(threads, spin_nanoseconds) {}

    const Kernels& kernels;
    ThreadPool pool;
    Buffer strips;    // inputs of the linear that runs
    Buffer partials;  // of the attention that runs
    Buffer activations;  // of the layers that run
    Buffer experts;      // of the experts that run

    // Scratch of one thread; call `need_scratch` with the floats before a program runs.
    float* scratch(int thread) const { return scratch_.floats() + thread * scratch_floats_; }
    void need_scratch(std::int64_t floats);
    std::int64_t workspace_bytes() const {
        return strips.bytes() + partials.bytes() + activations.bytes() + experts.bytes() + scratch_.bytes();
    }

private:
    Buffer scratch_;
    std::int64_t scratch_floats_ = 0;
};

}  // namespace tandem
