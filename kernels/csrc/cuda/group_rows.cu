// Grouping by radix sort of (row, position) and selection of the first position of every row. The sort and the selection
// are CUB's (here and nowhere else: it is slow to compile); on the host the standard library stands in for them.
#include "cuda/group_rows.h"

#include "cuda/launch.cuh"

#if defined(__CUDACC__)
#include <thrust/iterator/counting_iterator.h>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_select.cuh>
#endif

namespace lazydp::cuda {
namespace {

constexpr size_t kAlignment = 256;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int bits_of_rows(int64_t num_rows) {
  int bits = 1;
  while (bits < 63 && (num_rows - 1) >> bits > 0) ++bits;
  return bits;
}

struct IsFirstOfRow {
  const uint64_t* sorted;

  LAZYDP_DEVICE bool operator()(int64_t position) const { return position == 0 || sorted[position] != sorted[position - 1]; }
};

// The workspace, cut up. `scratch` is what CUB asks for.
struct Workspace {
  uint64_t* sorted;     // [lookups]
  int64_t* positions;   // [lookups]: 0, 1, 2, ...
  int64_t* num_groups;  // [1]
  void* scratch;
  size_t scratch_bytes;
};

size_t bytes_before_scratch(int64_t lookups) {
  return 2 * aligned(static_cast<size_t>(lookups) * sizeof(int64_t)) + aligned(sizeof(int64_t));
}

Workspace cut_up(const GroupRows& job) {
  const size_t list = aligned(static_cast<size_t>(job.lookups) * sizeof(int64_t));
  char* const base = static_cast<char*>(job.workspace);
  const size_t before = bytes_before_scratch(job.lookups);
  return {reinterpret_cast<uint64_t*>(base), reinterpret_cast<int64_t*>(base + list),
          reinterpret_cast<int64_t*>(base + 2 * list), base + before, job.workspace_bytes - before};
}

#if defined(__CUDACC__)

cudaError_t sort(const GroupRows& job, const Workspace& work, size_t& bytes, void* scratch, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(scratch, bytes, reinterpret_cast<const uint64_t*>(job.indices), work.sorted,
                                         work.positions, job.order, job.lookups, 0, bits_of_rows(job.num_rows), stream);
}

cudaError_t select_firsts(const GroupRows& job, const Workspace& work, size_t& bytes, void* scratch, cudaStream_t stream) {
  return cub::DeviceSelect::If(scratch, bytes, thrust::counting_iterator<int64_t>(0), job.starts, work.num_groups, job.lookups,
                               IsFirstOfRow{work.sorted}, stream);
}

#else

cudaError_t sort(const GroupRows& job, const Workspace& work, size_t& bytes, void* scratch, cudaStream_t) {
  bytes = 1;
  if (!scratch) return cudaSuccess;
  std::copy(work.positions, work.positions + job.lookups, job.order);
  const uint64_t used = ~uint64_t{0} >> (64 - bits_of_rows(job.num_rows));
  const auto key = [&](int64_t position) { return static_cast<uint64_t>(job.indices[position]) & used; };
  std::stable_sort(job.order, job.order + job.lookups, [&](int64_t a, int64_t b) { return key(a) < key(b); });
  for (int64_t i = 0; i < job.lookups; ++i) work.sorted[i] = static_cast<uint64_t>(job.indices[job.order[i]]);
  return cudaSuccess;
}

cudaError_t select_firsts(const GroupRows& job, const Workspace& work, size_t& bytes, void* scratch, cudaStream_t) {
  bytes = 1;
  if (!scratch) return cudaSuccess;
  const IsFirstOfRow first{work.sorted};
  int64_t groups = 0;
  for (int64_t i = 0; i < job.lookups; ++i) {
    if (first(i)) job.starts[groups++] = i;
  }
  *work.num_groups = groups;
  return cudaSuccess;
}

#endif

struct NumberLookups {
  const int64_t* indices;
  int64_t* positions;
  int64_t num_rows;
  int64_t count;

  LAZYDP_DEVICE void operator()(int64_t i) const {
    if (indices[i] < 0 || indices[i] >= num_rows) LAZYDP_REFUSE("indices: expected 0 <= index < num_rows");
    positions[i] = i;
  }
};

struct NameGroups {
  const uint64_t* sorted;
  const int64_t* num_groups;
  int64_t* rows;
  int64_t* starts;
  int64_t lookups;
  int64_t count;  // lookups + 1

  LAZYDP_DEVICE void operator()(int64_t u) const {
    const bool is_group = lookups > 0 && u < *num_groups;
    if (u < lookups) rows[u] = is_group ? static_cast<int64_t>(sorted[starts[u]]) : kNoRow;
    if (!is_group) starts[u] = lookups;
  }
};

}  // namespace

cudaError_t group_rows_workspace(int64_t lookups, int64_t num_rows, size_t* bytes) {
  GroupRows job{};
  job.lookups = lookups;
  job.num_rows = num_rows;
  size_t to_sort = 0;
  size_t to_select = 0;
  cudaError_t error = sort(job, {}, to_sort, nullptr, nullptr);
  if (error == cudaSuccess) error = select_firsts(job, {}, to_select, nullptr, nullptr);
  *bytes = bytes_before_scratch(lookups) + (to_sort > to_select ? to_sort : to_select);
  return error;
}

cudaError_t group_rows(const GroupRows& job, cudaStream_t stream) {
  const Workspace work = cut_up(job);
  cudaError_t error = cudaSuccess;
  if (job.lookups > 0) {
    size_t bytes = work.scratch_bytes;
    error = each(NumberLookups{job.indices, work.positions, job.num_rows, job.lookups}, stream);
    if (error == cudaSuccess) error = sort(job, work, bytes, work.scratch, stream);
    if (error == cudaSuccess) error = select_firsts(job, work, bytes, work.scratch, stream);
  }
  if (error != cudaSuccess) return error;
  return each(NameGroups{work.sorted, work.num_groups, job.rows, job.starts, job.lookups, job.lookups + 1}, stream);
}

}  // namespace lazydp::cuda
