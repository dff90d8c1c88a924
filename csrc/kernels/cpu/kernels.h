// The CPU kernels of every op, once for each instruction set.
#pragma once
#include <functional>

#include "kernels/adapter.h"
#include "kernels/apt.h"
#include "kernels/attention_pool.h"

namespace petl::cpu {

// Runs body(begin, end) over disjoint ranges that cover [0, count), possibly on several threads.
using ParallelFor = void (*)(int64_t count, const std::function<void(int64_t, int64_t)>& body);

struct Kernels {
  const char* path;
  void (*adapter_forward)(const AdapterForward&, ParallelFor);
  void (*adapter_backward)(const AdapterBackward&, ParallelFor);
  void (*apt_forward)(const AptForward&, ParallelFor);
  void (*apt_backward)(const AptBackward&, ParallelFor);
  void (*attention_pool_forward)(const AttentionPoolForward&, ParallelFor);
  void (*attention_pool_backward)(const AttentionPoolBackward&, ParallelFor);
};

// The kernels of the chosen path: what the environment variable PETL_CPU_PATH names, else the best that this CPU runs.
// Null where the variable names a path that this build or CPU does not have.
const Kernels* kernels();

// Chooses a path by name for the whole process; "auto" returns to the default. False: not in this build or CPU.
bool choose_path(const char* name);

// The names of the paths that this build has and this CPU runs, best first, separated by spaces.
const char* available_paths();

}  // namespace petl::cpu
