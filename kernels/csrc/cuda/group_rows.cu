// Grouping by radix sort of (row, position) and selection of the first position of every row. The sort and the selection
// are CUB's (here and nowhere else: it is slow to compile); on the host the standard library stands in for them.
//
// Tables of few lookups are grouped by one block each, all of them in one launch: a step of many tables is otherwise bound
// by its launches, six a table here.
#include "cuda/group_rows.h"

#include "cuda/launch.cuh"

#if defined(__CUDACC__)
#include <thrust/iterator/counting_iterator.h>
#include <cub/block/block_discontinuity.cuh>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>
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

#if defined(__CUDACC__)

constexpr int kBlockThreads = 256;
constexpr int kItems = 16;  // of a thread
constexpr int kJobs = 32;   // of a launch: what its arguments have room for

bool is_small(int64_t lookups, int64_t num_rows) {
  // Rows are sorted as 32-bit words, and no row may look like the padding.
  return lookups <= kBlockThreads * kItems && num_rows < int64_t{0xFFFFFFFF};
}

struct SmallJob {
  const int64_t* indices;
  int64_t* rows;
  int64_t* order;
  int64_t* starts;
  int64_t num_rows;
  int32_t lookups;
  int32_t bits;
};

struct SmallJobs {
  SmallJob jobs[kJobs];
};

__global__ void __launch_bounds__(kBlockThreads) group_small(const __grid_constant__ SmallJobs all) {
  constexpr uint32_t kPadding = 0xFFFFFFFF;
  using Sort = cub::BlockRadixSort<uint32_t, kBlockThreads, kItems, uint16_t>;
  using Heads = cub::BlockDiscontinuity<uint32_t, kBlockThreads>;
  using Scan = cub::BlockScan<int, kBlockThreads>;
  __shared__ union {
    typename Sort::TempStorage sort;
    typename Heads::TempStorage heads;
    typename Scan::TempStorage scan;
  } shared;
  const SmallJob& job = all.jobs[blockIdx.x];
  const int first = static_cast<int>(threadIdx.x) * kItems;
  uint32_t rows[kItems];
  uint16_t positions[kItems];
  LAZYDP_UNROLL
  for (int i = 0; i < kItems; ++i) {
    const int position = first + i;
    positions[i] = static_cast<uint16_t>(position);
    rows[i] = kPadding;
    if (position >= job.lookups) continue;
    const int64_t row = job.indices[position];
    if (row < 0 || row >= job.num_rows) LAZYDP_REFUSE("indices: expected 0 <= index < num_rows");
    rows[i] = static_cast<uint32_t>(row);
  }
  // Padding has the largest key of so many bits and comes last among equals, since the sort is stable.
  Sort(shared.sort).Sort(rows, positions, 0, job.bits);
  __syncthreads();
  int heads[kItems];
  Heads(shared.heads).FlagHeads(heads, rows, [](uint32_t a, uint32_t b) { return a != b; });
  __syncthreads();
  LAZYDP_UNROLL
  for (int i = 0; i < kItems; ++i) heads[i] = first + i < job.lookups ? heads[i] : 0;
  int groups[kItems];
  int total = 0;
  Scan(shared.scan).ExclusiveSum(heads, groups, total);
  LAZYDP_UNROLL
  for (int i = 0; i < kItems; ++i) {
    if (first + i >= job.lookups) continue;
    job.order[first + i] = positions[i];
    if (!heads[i]) continue;
    job.rows[groups[i]] = rows[i];
    job.starts[groups[i]] = first + i;
  }
  for (int u = total + static_cast<int>(threadIdx.x); u <= job.lookups; u += kBlockThreads) {
    if (u < job.lookups) job.rows[u] = kNoRow;
    job.starts[u] = job.lookups;
  }
}

// Of those jobs that are small, so many as a launch takes; `next` goes on after the last of them.
cudaError_t group_small_jobs(std::span<const GroupRows> jobs, size_t& next, cudaStream_t stream) {
  SmallJobs all;
  int count = 0;
  for (; next < jobs.size() && count < kJobs; ++next) {
    const GroupRows& job = jobs[next];
    if (!is_small(job.lookups, job.num_rows)) continue;
    all.jobs[count++] = {job.indices, job.rows,     job.order,
                         job.starts,  job.num_rows, static_cast<int32_t>(job.lookups), bits_of_rows(job.num_rows)};
  }
  if (count == 0) return cudaSuccess;
  group_small<<<count, kBlockThreads, 0, stream>>>(all);
  return cudaGetLastError();
}

#else

bool is_small(int64_t, int64_t) { return false; }
cudaError_t group_small_jobs(std::span<const GroupRows> jobs, size_t& next, cudaStream_t) {
  next = jobs.size();
  return cudaSuccess;
}

#endif

cudaError_t group_large(const GroupRows& job, cudaStream_t stream) {
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

}  // namespace

cudaError_t group_rows_workspace(int64_t lookups, int64_t num_rows, size_t* bytes) {
  *bytes = 0;
  if (is_small(lookups, num_rows)) return cudaSuccess;
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

cudaError_t group_rows(std::span<const GroupRows> jobs, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (size_t next = 0; error == cudaSuccess && next < jobs.size();) error = group_small_jobs(jobs, next, stream);
  for (const GroupRows& job : jobs)
    if (error == cudaSuccess && !is_small(job.lookups, job.num_rows)) error = group_large(job, stream);
  return error;
}

}  // namespace lazydp::cuda
