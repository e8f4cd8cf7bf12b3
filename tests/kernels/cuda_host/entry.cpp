// The launchers of the CUDA kernels, compiled for the host, under C names for ctypes. Each returns null, or what was wrong.
#include <stdexcept>
#include <string>

#include "cuda/bags.h"
#include "cuda/group_rows.h"
#include "cuda/launch.cuh"
#include "cuda/noise.h"

namespace {

using namespace lazydp;
using namespace lazydp::cuda;

template <class F>
const char* guarded(const F& launch) {
  static std::string message;
  try {
    const cudaError_t error = launch();
    if (error == cudaSuccess) return nullptr;
    message = "error " + std::to_string(error);
  } catch (const std::exception& wrong) {
    message = wrong.what();
  }
  return message.c_str();
}

Key key_of(const uint32_t* words) {
  Key key;
  for (int i = 0; i < kKeyWords; ++i) key.words[i] = words[i];
  return key;
}

// The arguments that catch-up and the fused gather share.
struct CatchUpArguments {
  float* weight;
  float* momentum;
  int32_t* last;
  const int64_t* rows;
  int64_t count;
  int64_t num_rows;
  int64_t columns;
  const float* transition;
  const float* factor;
  int64_t horizon;
  const uint32_t* key;
  int64_t table;
  int64_t step;
  int64_t ones;
  int64_t first_row;
};

CatchUp catch_up_of(const CatchUpArguments& a) {
  return {a.weight,
          a.momentum,
          a.last,
          a.rows,
          a.count,
          a.num_rows,
          a.columns,
          a.transition,
          a.factor,
          a.horizon,
          key_of(a.key),
          static_cast<uint32_t>(a.table),
          static_cast<int32_t>(a.step),
          a.ones != 0,
          a.first_row};
}

}  // namespace

extern "C" {

void host_set_order(int64_t number) { order() = static_cast<Order>(number); }

const char* host_fill(float* out, int64_t rows, int64_t columns, int64_t first_row, const uint32_t* key, int64_t table,
                      int64_t step) {
  return guarded([&] {
    return fill_normals({out, rows, columns, first_row, key_of(key), static_cast<uint32_t>(table), static_cast<uint32_t>(step)},
                        {});
  });
}

const char* host_catch_up(const CatchUpArguments* arguments) {
  return guarded([&] { return catch_up_rows(catch_up_of(*arguments), {}); });
}

const char* host_catch_up_and_sum(const CatchUpArguments* arguments, const Bags* bags, const BagSum* sum) {
  return guarded([&] { return catch_up_and_sum(catch_up_of(*arguments), *bags, *sum, {}); });
}

const char* host_bag_sum(const BagSum* job) {
  return guarded([&] { return bag_sum(*job, {}); });
}

int64_t host_bag_sq_norms_workspace(int64_t features, int64_t examples) {
  return bag_squared_norms_workspace(features, examples);
}

const char* host_bag_sq_norms(const BagSquaredNorms* job) {
  return guarded([&] { return bag_squared_norms(*job, {}); });
}

int64_t host_scatter_add_workspace(int64_t lookups, int64_t columns) { return scatter_add_workspace(lookups, columns); }

const char* host_scatter_add(const ScatterAdd* job) {
  return guarded([&] { return scatter_add(*job, {}); });
}

int64_t host_group_rows_workspace(int64_t lookups, int64_t num_rows) {
  size_t bytes = 0;
  return group_rows_workspace(lookups, num_rows, &bytes) == cudaSuccess ? static_cast<int64_t>(bytes) : -1;
}

const char* host_group_rows(const GroupRows* job) {
  return guarded([&] { return group_rows({job, 1}, {}); });
}
}
