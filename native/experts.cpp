#include "experts.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

namespace tandem {
namespace {

// Hands out parts of a workspace; without one it only counts.
class Parts {
public:
    explicit Parts(char* memory) : memory_(memory) {}

    template <class T>
    T* take(std::int64_t count) {
        T* part = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
        bytes_ += ceil_div(count * static_cast<std::int64_t>(sizeof(T)), 64) * 64;
        return part;
    }
    std::int64_t bytes() const { return bytes_; }

private:
    char* memory_;
    std::int64_t bytes_ = 0;
};

// A pair is a row and one of its experts that are here. Pairs are ordered by expert, those of one expert by row.
struct Workspace {
    float* logits;          // [rows, all experts]
    std::int32_t* chosen;   // [rows, per_row] experts in ascending order, counted from the first that is here
    float* weights;         // [rows, per_row]
    std::int64_t* pair_of;  // [rows, per_row]; -1: the expert is not here
    std::int64_t* row_of;   // [pairs]
    std::int64_t* starts;   // [count + 1] an expert's first pair
    std::int64_t* strips;   // [count + 1] its first strip
    std::int64_t* tasks[2]; // [count + 1] the first task of its gate_up, of its down
    float* middle;          // [pairs, intermediate]
    float* results;         // [pairs, outputs]

    std::int64_t fill(const Experts& experts, std::int64_t rows, char* memory) {
        Parts parts(memory);
        const std::int64_t chosen_max = rows * experts.per_row;
        const std::int64_t pairs_max = rows * std::min(experts.per_row, experts.count);
        logits = parts.take<float>(rows * experts.router.shape.outputs);
        chosen = parts.take<std::int32_t>(chosen_max);
        weights = parts.take<float>(chosen_max);
        pair_of = parts.take<std::int64_t>(chosen_max);
        row_of = parts.take<std::int64_t>(pairs_max);
        for (std::int64_t** prefix : {&starts, &strips, &tasks[0], &tasks[1]}) {
            *prefix = parts.take<std::int64_t>(experts.count + 1);
        }
        middle = parts.take<float>(pairs_max * experts.gate_up.shape.outputs);
        results = parts.take<float>(pairs_max * experts.down.shape.outputs);
        return parts.bytes();
    }
};

// One layer's rows on their way through its experts. How many rows an expert gets is known when the program runs:
// phases have as many tasks as there can be, and those that there are not do nothing. They lie between the others, so
// that each thread's range has its share of work.
class ExpertsRun {
public:
    ExpertsRun(Runtime& runtime, const Experts& experts, std::int64_t rows, Matrix inputs, Matrix outputs, bool add)
        : runtime_(runtime), experts_(experts), rows_(rows), inputs_(inputs), outputs_(outputs), add_(add),
          pairs_max_(rows * std::min(experts.per_row, experts.count)),
          used_max_(std::min(experts.count, pairs_max_)),
          stages_{{experts.gate_up, inputs, {}}, {experts.down, {}, {}}} {
        work_.fill(experts, rows, reinterpret_cast<char*>(runtime.experts.floats()));
        stages_[0].outputs = {work_.middle, experts.gate_up.shape.outputs};
        stages_[1].inputs = stages_[0].outputs;
        stages_[1].outputs = {work_.results, experts.down.shape.outputs};
        for (const Stage& stage : stages_) {
            const PackedShape& shape = stage.linear.shape;
            runtime.strips.reserve(strip_bytes(runtime, shape, pairs_max_));
            runtime.need_scratch(strip_rows(runtime, shape) * shape.depth);
        }
        need_linear_scratch(runtime, rows);
        runtime.need_scratch(std::max(experts.down.shape.outputs, 2 * experts.router.shape.outputs));
    }

    Matrix logits() const { return {work_.logits, experts_.router.shape.outputs}; }
    std::int64_t strips_max() const { return pairs_max_ / strip_rows(runtime_, experts_.gate_up.shape) + used_max_; }
    std::int64_t tasks_max(int stage) const {
        return ceil_div(stages_[stage].linear.shape.panels, panels_each(stage)) *
               linear_blocks_max(runtime_, stages_[stage].linear.shape, pairs_max_, used_max_);
    }

    void route(std::int64_t row, int thread);
    void group();
    void strip(int stage, std::int64_t task_number, int thread);
    void multiply(int stage, std::int64_t task_number, int thread);
    void combine(std::int64_t row, int thread);

private:
    struct Stage {
        PackedLinear linear;
        Matrix inputs, outputs;
    };

    std::int64_t panels_each(int stage) const {
        return panels_per_task(runtime_, stages_[stage].linear.shape, used_max_);
    }
    LinearTask task_of(int stage, std::int64_t expert) const;
    // The work that task `task` of `tasks` does, of as much as a prefix says that there is; -1: none.
    std::int64_t work_of(const std::int64_t* prefix, std::int64_t task, std::int64_t tasks) const {
        const std::int64_t number = task * prefix[experts_.count] / tasks;
        return (task + 1) * prefix[experts_.count] / tasks > number ? number : -1;
    }
    // The expert that number `number` of a prefix belongs to.
    std::int64_t find(const std::int64_t* prefix, std::int64_t number) const {
        return std::upper_bound(prefix, prefix + experts_.count + 1, number) - prefix - 1;
    }

    Runtime& runtime_;
    const Experts experts_;
    const std::int64_t rows_;
    const Matrix inputs_, outputs_;
    const bool add_;
    const std::int64_t pairs_max_, used_max_;
    Stage stages_[2];
    Workspace work_{};
};

// Scratch: probabilities, and the experts in the order of their choice.
void ExpertsRun::route(std::int64_t row, int thread) {
    const std::int64_t total = experts_.router.shape.outputs;
    const float* logits = work_.logits + row * total;
    float* probabilities = runtime_.scratch(thread);
    float* open = probabilities + total;  // not chosen yet
    float greatest = logits[0];
    for (std::int64_t e = 1; e < total; ++e) greatest = logits[e] > greatest ? logits[e] : greatest;
    double sum = 0.0;
    for (std::int64_t e = 0; e < total; ++e) {
        const double power = std::exp(static_cast<double>(logits[e]) - static_cast<double>(greatest));
        probabilities[e] = static_cast<float>(power);
        sum += power;
        open[e] = 1.0f;
    }
    for (std::int64_t e = 0; e < total; ++e) {
        probabilities[e] = static_cast<float>(static_cast<double>(probabilities[e]) / sum);
    }
    std::int32_t* chosen = work_.chosen + row * experts_.per_row;
    float* weights = work_.weights + row * experts_.per_row;
    float chosen_sum = 0.0f;
    for (std::int64_t j = 0; j < experts_.per_row; ++j) {
        std::int64_t best = -1;
        for (std::int64_t e = 0; e < total; ++e) {
            if (open[e] != 0.0f && (best < 0 || probabilities[e] > probabilities[best])) best = e;
        }
        open[best] = 0.0f;
        chosen_sum += probabilities[best];
    }
    std::int64_t j = 0;
    for (std::int64_t e = 0; e < total; ++e) {
        if (open[e] != 0.0f) continue;
        chosen[j] = static_cast<std::int32_t>(e - experts_.first);
        weights[j++] = experts_.normalized ? probabilities[e] / chosen_sum : probabilities[e];
    }
}

void ExpertsRun::group() {
    const std::int64_t slots = rows_ * experts_.per_row, count = experts_.count;
    std::int64_t* starts = work_.starts;
    std::fill(starts, starts + count + 1, 0);
    for (std::int64_t slot = 0; slot < slots; ++slot) {
        const std::int64_t expert = work_.chosen[slot];
        if (expert >= 0 && expert < count) ++starts[expert + 1];
    }
    for (std::int64_t e = 0; e < count; ++e) starts[e + 1] += starts[e];
    std::int64_t* next = work_.strips;  // until strips are counted
    std::copy(starts, starts + count, next);
    for (std::int64_t slot = 0; slot < slots; ++slot) {
        const std::int64_t expert = work_.chosen[slot];
        const bool here = expert >= 0 && expert < count;
        work_.pair_of[slot] = here ? next[expert]++ : -1;
        if (here) work_.row_of[work_.pair_of[slot]] = slot / experts_.per_row;
    }
    work_.strips[0] = work_.tasks[0][0] = work_.tasks[1][0] = 0;
    for (std::int64_t e = 0; e < count; ++e) {
        const std::int64_t rows = starts[e + 1] - starts[e];
        work_.strips[e + 1] = work_.strips[e] + ceil_div(rows, strip_rows(runtime_, experts_.gate_up.shape));
        for (int stage = 0; stage < 2; ++stage) {
            work_.tasks[stage][e + 1] = work_.tasks[stage][e] + (rows == 0 ? 0 : linear_tasks(task_of(stage, e)));
        }
    }
}

void ExpertsRun::strip(int stage, std::int64_t task_number, int thread) {
    const std::int64_t number = work_of(work_.strips, task_number, strips_max());
    if (number < 0) return;
    const std::int64_t expert = find(work_.strips, number);
    const std::int64_t rows = work_.starts[expert + 1] - work_.starts[expert];
    const std::int64_t strips = work_.strips[expert + 1] - work_.strips[expert];
    const std::int64_t own = number - work_.strips[expert];
    const std::int64_t first = work_.starts[expert] + rows * own / strips;
    const std::int64_t last = work_.starts[expert] + rows * (own + 1) / strips;
    const PackedShape& shape = stages_[stage].linear.shape;
    Matrix from{stages_[stage].inputs.data + first * stages_[stage].inputs.stride, stages_[stage].inputs.stride};
    if (stage == 0) {
        from = {runtime_.scratch(thread), shape.depth};
        for (std::int64_t pair = first; pair < last; ++pair) {
            std::memcpy(from.data + (pair - first) * shape.depth,
                        inputs_.data + work_.row_of[pair] * inputs_.stride,
                        static_cast<std::size_t>(shape.depth) * sizeof(float));
        }
    }
    StripTask task = strip_task(runtime_, shape, last - first, from);
    task.packed = strips_at(runtime_, shape, first);
    runtime_.kernels.strip(task, 0);
}

LinearTask ExpertsRun::task_of(int stage, std::int64_t expert) const {
    const Stage& own = stages_[stage];
    const std::int64_t first = work_.starts[expert];
    PackedLinear linear = own.linear;
    linear.packed = static_cast<const char*>(linear.packed) + expert * packed_bytes(linear.shape);
    const Matrix outputs{own.outputs.data + first * own.outputs.stride, own.outputs.stride};
    LinearTask task = linear_task(runtime_, linear, work_.starts[expert + 1] - first, outputs, false);
    task.panels_per_task = panels_each(stage);
    task.strips_packed = strips_at(runtime_, linear.shape, first);
    return task;
}

void ExpertsRun::multiply(int stage, std::int64_t task_number, int thread) {
    const std::int64_t number = work_of(work_.tasks[stage], task_number, tasks_max(stage));
    if (number < 0) return;
    const std::int64_t expert = find(work_.tasks[stage], number);
    runtime_.kernels.linear(task_of(stage, expert), number - work_.tasks[stage][expert], runtime_.scratch(thread));
}

// Scratch: one row.
void ExpertsRun::combine(std::int64_t row, int thread) {
    const std::int64_t width = experts_.down.shape.outputs;
    float* total = runtime_.scratch(thread);
    std::fill(total, total + width, 0.0f);
    for (std::int64_t slot = row * experts_.per_row; slot < (row + 1) * experts_.per_row; ++slot) {
        if (work_.pair_of[slot] < 0) continue;
        const float* result = work_.results + work_.pair_of[slot] * width;
        const float weight = work_.weights[slot];
        for (std::int64_t k = 0; k < width; ++k) total[k] += weight * result[k];
    }
    float* to = outputs_.data + row * outputs_.stride;
    for (std::int64_t k = 0; k < width; ++k) to[k] = add_ ? to[k] + total[k] : total[k];
}

}  // namespace

std::int64_t experts_bytes(const Experts& experts, std::int64_t rows) {
    return Workspace{}.fill(experts, rows, nullptr);
}

void add_experts(Program& program, Runtime& runtime, const Experts& experts, std::int64_t rows, Matrix inputs,
                 Matrix outputs, bool add_to_outputs) {
    if (rows == 0) return;
    const auto run = std::make_shared<ExpertsRun>(runtime, experts, rows, inputs, outputs, add_to_outputs);
    const auto over_rows = [&](std::int64_t row_elements, void (ExpertsRun::*work)(std::int64_t, int)) {
        const std::int64_t each = rows_per_task(rows, row_elements, runtime.pool.threads());
        program.push_back({Kind::kExperts, ceil_div(rows, each), [run, rows, each, work](std::int64_t task, int thread) {
                               const std::int64_t last = std::min(rows, (task + 1) * each);
                               for (std::int64_t row = task * each; row < last; ++row) (*run.*work)(row, thread);
                           }});
    };
    add_linear(program, runtime, experts.router, rows, inputs, run->logits(), false);
    over_rows(64 * experts.router.shape.outputs, &ExpertsRun::route);
    program.push_back({Kind::kExperts, 1, [run](std::int64_t, int) { run->group(); }});
    for (int stage = 0; stage < 2; ++stage) {
        program.push_back({Kind::kExperts, run->strips_max(), [run, stage](std::int64_t number, int thread) {
                               run->strip(stage, number, thread);
                           }});
        program.push_back({Kind::kExperts, run->tasks_max(stage), [run, stage](std::int64_t number, int thread) {
                               run->multiply(stage, number, thread);
                           }});
    }
    over_rows(experts.per_row * experts.down.shape.outputs, &ExpertsRun::combine);
}

}  // namespace tandem
