// Noise on rows. A warp draws 32 ChaCha20 blocks at a time, each lane one, into shared memory: 12 normals a lane, 384
// columns of one, two or more rows (a row has ceil(columns / 12) blocks; the last may be used in part). Then the warp
// walks those columns in order, 16 bytes a lane, and adds the noise to them. The rows' values are asked for before the blocks
// are drawn, so that memory works while the integer units do.
//
// A row's blocks fall to several warps, so last[row] is set by a second kernel, once all have read it.
#include "cuda/noise.h"

#include <type_traits>

#include "common/gaussian.h"
#include "common/skip_ahead.h"
#include "cuda/divider.cuh"
#include "cuda/launch.cuh"
#include "cuda/quad.cuh"

namespace lazydp::cuda {
namespace {

constexpr int kTileNormals = kLanes * kNormalsPerBlock;
constexpr int kQuadsPerBlock = kNormalsPerBlock / kQuad;
constexpr int kQuadsPerLane = kQuadsPerBlock;  // the tile's quads, over 32 lanes
static_assert(kNormalsPerBlock % kQuad == 0, "a quad belongs to one block");

int64_t blocks_per_row(int64_t columns) { return (columns + kNormalsPerBlock - 1) / kNormalsPerBlock; }

// Where a block of a tile lies: the position of its row among those of the job, and its number within the row.
struct Place {
  int64_t position;
  int64_t block;
};

// Tiles over the blocks of `positions` rows.
struct Tiling {
  int64_t positions;
  int64_t columns;
  Divider blocks_per_row;

  Tiling(int64_t positions_, int64_t columns_)
      : positions(positions_), columns(columns_), blocks_per_row(lazydp::cuda::blocks_per_row(columns_)) {}

  int64_t tiles() const { return (positions * lazydp::cuda::blocks_per_row(columns) + kLanes - 1) / kLanes; }

  LAZYDP_DEVICE Place place(int64_t tile, int block_of_tile) const {
    const int64_t unit = tile * kLanes + block_of_tile;
    const int64_t position = blocks_per_row.quotient(unit);
    return {position, blocks_per_row.remainder(unit, position)};
  }
};

// The quads of a tile that a lane moves: k-th of kQuadsPerLane, neighbours in memory for neighbouring lanes.
struct QuadPlace {
  int64_t position;
  int64_t column;
  int in_tile;  // index of its first normal in the tile
};

LAZYDP_DEVICE QuadPlace quad_place(const Tiling& tiling, int64_t tile, int lane, int k) {
  const int quad = lane + k * kLanes;
  const Place at = tiling.place(tile, quad / kQuadsPerBlock);
  return {at.position, at.block * kNormalsPerBlock + quad % kQuadsPerBlock * kQuad, quad * kQuad};
}

struct TileNormals {
  alignas(16) float z[kTileNormals];
};

LAZYDP_DEVICE void draw(const Key& key, uint32_t counter, const Address& address, bool ones, int lane, TileNormals& tile) {
  float z[kNormalsPerBlock];
  if (ones) {
    LAZYDP_UNROLL
    for (int j = 0; j < kNormalsPerBlock; ++j) z[j] = 1.0f;
  } else {
    uint32_t words[kBlockWords];
    chacha20_block(key, counter, address, words);
    normals_of_block(words, z);
  }
  LAZYDP_UNROLL
  for (int q = 0; q < kQuadsPerBlock; ++q) {
    store_shared(tile.z + lane * kNormalsPerBlock + q * kQuad, {{z[4 * q], z[4 * q + 1], z[4 * q + 2], z[4 * q + 3]}});
  }
}

template <bool kVector>
struct FillTiles {
  struct Thread {};
  using Shared = TileNormals;

  Fill job;
  Tiling tiling;
  int64_t count;

  LAZYDP_DEVICE void first(int64_t tile, int lane, Thread&, Shared& shared) const {
    const Place own = tiling.place(tile, lane);
    if (own.position >= job.rows) return;
    const Address address = noise_address(job.table, job.first_row + own.position, job.step);
    draw(job.key, static_cast<uint32_t>(own.block), address, false, lane, shared);
  }

  LAZYDP_DEVICE void second(int64_t tile, int lane, const Thread&, const Shared& shared) const {
    LAZYDP_UNROLL
    for (int k = 0; k < kQuadsPerLane; ++k) {
      const QuadPlace at = quad_place(tiling, tile, lane, k);
      const int width = quad_width(at.column, job.columns);
      if (at.position >= job.rows || width <= 0) continue;
      store_quad<kVector>(job.out + at.position * job.columns + at.column, load_shared(shared.z + at.in_tile), width);
    }
  }
};

constexpr int32_t kUpToDate = -1;

// The row at a position of the job, or kNoRow.
LAZYDP_DEVICE int64_t row_at(const CatchUp& job, int64_t position) {
  if (position >= job.count) return kNoRow;
  const int64_t row = job.rows ? job.rows[position] : position;
  if (row != kNoRow && (row < 0 || row >= job.num_rows)) LAZYDP_REFUSE("rows: expected 0 <= row < rows of weight");
  return row;
}

// The last step whose noise the row contains, or kUpToDate.
LAZYDP_DEVICE int32_t pending_since(const CatchUp& job, int64_t row) {
  const int32_t from = job.last[row];
  if (from == job.step) return kUpToDate;
  if (from < 0 || from > job.step) LAZYDP_REFUSE("last: expected 0 <= last <= step");
  if (from >= job.horizon) LAZYDP_REFUSE("transition: fewer starting steps than a row's last step asks for");
  return from;
}

// What the row of a position is worth to the bags that read it alone.
struct SingleBags {
  Bags bags;
  const int64_t* offsets;
  const float* per_lookup;
  float* out;
  int64_t columns;

  template <bool kVector>
  LAZYDP_DEVICE void give(int64_t position, int64_t column, const Quad& value, int width) const {
    for (int64_t j = bags.starts[position]; j < bags.starts[position + 1]; ++j) {
      const int64_t lookup = bags.order[j];
      const int64_t bag = bags.bag[lookup];
      if (offsets[bag + 1] - offsets[bag] != 1) continue;
      Quad sum = same(0.0f);
      add_product(sum, per_lookup ? per_lookup[lookup] : 1.0f, value);
      store_quad<kVector>(out + bag * columns + column, sum, width);
    }
  }
};
struct NoBags {};

template <bool kVector, bool kMomentum, class Readers>
struct CatchUpTiles {
  static constexpr bool kGather = !std::is_same_v<Readers, NoBags>;
  struct Thread {
    int64_t offset[kQuadsPerLane];  // of the quad in the table; negative: none
    int32_t from[kQuadsPerLane];
    Quad weight[kQuadsPerLane];
    Quad momentum[kMomentum ? kQuadsPerLane : 1];
  };
  struct Shared {
    TileNormals draws[kMomentum ? 2 : 1];
  };

  CatchUp job;
  Tiling tiling;
  int64_t count;
  Readers readers;

  LAZYDP_DEVICE void first(int64_t tile, int lane, Thread& thread, Shared& shared) const {
    LAZYDP_UNROLL
    for (int k = 0; k < kQuadsPerLane; ++k) load(quad_place(tiling, tile, lane, k), k, thread);
    const Place own = tiling.place(tile, lane);
    const int64_t row = row_at(job, own.position);
    if (row == kNoRow || pending_since(job, row) == kUpToDate) return;
    const Address address = noise_address(job.table, job.first_row + row, static_cast<uint32_t>(job.step));
    const auto counter = static_cast<uint32_t>(own.block);
    draw(job.key, counter, address, job.ones, lane, shared.draws[0]);
    if constexpr (kMomentum) draw(job.key, kSecondNormal + counter, address, job.ones, lane, shared.draws[1]);
  }

  LAZYDP_DEVICE void second(int64_t tile, int lane, Thread& thread, const Shared& shared) const {
    LAZYDP_UNROLL
    for (int k = 0; k < kQuadsPerLane; ++k) {
      if (thread.offset[k] < 0) continue;
      const QuadPlace at = quad_place(tiling, tile, lane, k);
      const int width = quad_width(at.column, job.columns);
      if (thread.from[k] != kUpToDate) {
        catch_up_quad(thread, k, shared, at.in_tile);
        store_quad<kVector>(job.weight + thread.offset[k], thread.weight[k], width);
        if constexpr (kMomentum) store_quad<kVector>(job.momentum + thread.offset[k], thread.momentum[k], width);
      }
      if constexpr (kGather) readers.template give<kVector>(at.position, at.column, thread.weight[k], width);
    }
  }

 private:
  LAZYDP_DEVICE void load(const QuadPlace& at, int k, Thread& thread) const {
    thread.offset[k] = -1;
    const int width = quad_width(at.column, job.columns);
    if (width <= 0) return;
    const int64_t row = row_at(job, at.position);
    if (row == kNoRow) return;
    thread.from[k] = pending_since(job, row);
    if (!kGather && thread.from[k] == kUpToDate) return;
    thread.offset[k] = row * job.columns + at.column;
    thread.weight[k] = load_quad<kVector>(job.weight + thread.offset[k], width);
    if constexpr (kMomentum) thread.momentum[k] = load_quad<kVector>(job.momentum + thread.offset[k], width);
  }

  LAZYDP_DEVICE void catch_up_quad(Thread& thread, int k, const Shared& shared, int in_tile) const {
    const Quad z1 = load_shared(shared.draws[0].z + in_tile);
    const int64_t from = thread.from[k];
    if constexpr (kMomentum) {
      const Quad z2 = load_shared(shared.draws[1].z + in_tile);
      const float m[4] = {job.transition[4 * from], job.transition[4 * from + 1], job.transition[4 * from + 2],
                          job.transition[4 * from + 3]};
      const float l[3] = {job.factor[3 * from], job.factor[3 * from + 1], job.factor[3 * from + 2]};
      LAZYDP_UNROLL
      for (int j = 0; j < kQuad; ++j)
        catch_up_with_momentum(thread.weight[k].v[j], thread.momentum[k].v[j], m, l, z1.v[j], z2.v[j]);
    } else {
      const float m = job.transition[from];
      const float l = job.factor[from];
      LAZYDP_UNROLL
      for (int j = 0; j < kQuad; ++j) thread.weight[k].v[j] = catch_up(thread.weight[k].v[j], m, l, z1.v[j]);
    }
  }
};

struct MarkRows {
  CatchUp job;
  int64_t count;

  LAZYDP_DEVICE void operator()(int64_t i) const {
    const int64_t row = row_at(job, i);
    if (row != kNoRow) job.last[row] = job.step;
  }
};

template <bool kVector, class Readers>
cudaError_t launch(const CatchUp& job, const Readers& readers, cudaStream_t stream) {
  const Tiling tiling(job.count, job.columns);
  if (job.momentum) return each_tile(CatchUpTiles<kVector, true, Readers>{job, tiling, tiling.tiles(), readers}, stream);
  return each_tile(CatchUpTiles<kVector, false, Readers>{job, tiling, tiling.tiles(), readers}, stream);
}

template <class Readers>
cudaError_t catch_up(const CatchUp& job, const Readers& readers, bool aligned, cudaStream_t stream) {
  const cudaError_t error = aligned ? launch<true>(job, readers, stream) : launch<false>(job, readers, stream);
  return error == cudaSuccess ? each(MarkRows{job, job.count}, stream) : error;
}

bool table_is_aligned(const CatchUp& job) {
  return rows_are_aligned(job.weight, job.columns) && (!job.momentum || rows_are_aligned(job.momentum, job.columns));
}

}  // namespace

cudaError_t fill_normals(const Fill& job, cudaStream_t stream) {
  const Tiling tiling(job.rows, job.columns);
  if (rows_are_aligned(job.out, job.columns)) return each_tile(FillTiles<true>{job, tiling, tiling.tiles()}, stream);
  return each_tile(FillTiles<false>{job, tiling, tiling.tiles()}, stream);
}

cudaError_t catch_up_rows(const CatchUp& job, cudaStream_t stream) {
  return catch_up(job, NoBags{}, table_is_aligned(job), stream);
}

cudaError_t catch_up_and_sum(const CatchUp& job, const Bags& bags, const BagSum& sum, cudaStream_t stream) {
  const SingleBags readers{bags, sum.offsets, sum.per_lookup, sum.out, sum.columns};
  const bool aligned = table_is_aligned(job) && rows_are_aligned(sum.out, sum.columns);
  const cudaError_t error = catch_up(job, readers, aligned, stream);
  return error == cudaSuccess ? bag_sum_but_single(sum, stream) : error;
}

}  // namespace lazydp::cuda
