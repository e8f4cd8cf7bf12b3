// Weighted products on the matrix unit AMX, which multiplies bfloat16 and adds in float32.
#include "cpu/weighted_products_amx.h"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <memory>
#include <new>

// GCC 12 takes the deliberately undefined operands of its own AVX-512 headers for mistakes (PR 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,amx-tile,amx-bf16")
#endif

namespace lazydp::cpu {
namespace {

constexpr int kTile = 16;                // rows of a tile register, and float32 numbers in one of its rows
constexpr int kGroup = 32;               // units that one instruction multiplies: bfloat16 numbers in a row of a register
constexpr int kSpan = 2 * kTile;         // outputs, and columns, of the four sums that are in registers at a time
constexpr int kTileBytes = kTile * 64;   // of a register
constexpr int kParts = 3;                // of a float32 number
enum Part : int { kHigh, kMiddle, kLow };
constexpr int64_t kGroupBytes = kParts * 2 * kTileBytes;  // of the packed numbers of 32 units in a span
constexpr int64_t kUnitsPerChunk = 2048;
constexpr int64_t kRowSpansPerTask = 4;     // of a task's sums, which stay in the second cache while units are added
constexpr int64_t kColumnSpansPerTask = 8;
constexpr std::align_val_t kAlignment{64};

struct Free {
  void operator()(unsigned char* memory) const { ::operator delete[](memory, kAlignment); }
};
using Memory = std::unique_ptr<unsigned char[], Free>;

Memory memory_for(int64_t bytes) {
  return Memory(static_cast<unsigned char*>(::operator new[](static_cast<size_t>(bytes), kAlignment)));
}

int64_t ceil_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// The three parts of sixteen float32 numbers, each in the upper half of a word. They are bfloat16 numbers of the sign of their
// number; their sum is the number, or less where a part would lie below the least normal number.
struct Parts {
  __m512i part[kParts];

  explicit Parts(__m512 x) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    part[kHigh] = _mm512_and_si512(_mm512_castps_si512(x), upper);
    const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(part[kHigh]));
    part[kMiddle] = _mm512_and_si512(_mm512_castps_si512(rest), upper);
    const __m512 low = _mm512_sub_ps(rest, _mm512_castsi512_ps(part[kMiddle]));
    part[kLow] = _mm512_and_si512(_mm512_castps_si512(low), upper);
  }
};

// Words of two units: that of the first one in the lower half.
__m512i paired(__m512i first, __m512i second) { return _mm512_or_si512(_mm512_srli_epi32(first, 16), second); }

// Sixteen rows of sixteen words, transposed.
void transpose(__m512i (&r)[kTile]) {
  __m512i t[kTile];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // Row i of four now has, for each quarter q, words of the rows 0 to 3 (4 to 7, ...) and the column 4 q + i.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i even_low = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);         // quarters 0 and 2 of rows 0 to 7
    const __m512i odd_low = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);          // quarters 1 and 3
    const __m512i even_high = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);   // of rows 8 to 15
    const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    t[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    t[12 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) r[i] = t[i];
}

// The numbers of at most 32 units in some columns, one pointer and one factor for each unit.
struct UnitRows {
  const float* rows[kGroup];
  float scale[kGroup];
  int count;
};

// A product below the least normal number is 0; "not less than" holds for what is not a number.
__m512 scaled(__m512 x, float by) {
  const __m512 product = _mm512_mul_ps(x, _mm512_set1_ps(by));
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(product), _mm512_set1_ps(FLT_MIN), _CMP_NLT_UQ), product);
}

// Packs sixteen columns, of which some are there, to one register for each part; the parts of a span lie two registers apart.
// kGrads: scaled, and a row of the register for each column; else a row for each pair of units.
template <bool kGrads>
void pack_tile(const UnitRows& units, int64_t column, __mmask16 some, unsigned char* out) {
  __m512i pairs[kParts][kTile];
#pragma GCC unroll 16
  for (int pair = 0; pair < kTile; ++pair) {
    __m512 of_unit[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int unit = 2 * pair + i;
      if (unit < units.count) {
        of_unit[i] = _mm512_maskz_loadu_ps(some, units.rows[unit] + column);
        if constexpr (kGrads) of_unit[i] = scaled(of_unit[i], units.scale[unit]);
      } else {
        of_unit[i] = _mm512_setzero_ps();
      }
    }
    const Parts first(of_unit[0]), second(of_unit[1]);
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) pairs[part][pair] = paired(first.part[part], second.part[part]);
  }
  for (int part = 0; part < kParts; ++part) {
    if constexpr (kGrads) transpose(pairs[part]);
    unsigned char* const tile = out + part * 2 * kTileBytes;
#pragma GCC unroll 16
    for (int row = 0; row < kTile; ++row) _mm512_store_si512(tile + row * 64, pairs[part][row]);
  }
}

// One factor of the product, packed for a chunk of units: block by block, of each all spans, of each all groups of units.
struct Packed {
  int64_t width;  // outputs or columns
  int64_t groups_each;  // of a block
  Memory memory;

  Packed(int64_t width, int64_t blocks, int64_t groups_each)
      : width(width), groups_each(groups_each), memory(memory_for(blocks * groups_each * spans() * kGroupBytes)) {}

  int64_t spans() const { return ceil_of(width, kSpan); }
  unsigned char* at(int64_t block, int64_t span, int64_t group) const {
    return memory.get() + ((block * spans() + span) * groups_each + group) * kGroupBytes;
  }

  template <bool kGrads>
  void pack(const UnitRows& units, int64_t block, int64_t group) const {
    for (int64_t column = 0; column < spans() * kSpan; column += kTile) {
      const int64_t there = std::clamp<int64_t>(width - column, 0, kTile);
      unsigned char* const out = at(block, column / kSpan, group) + column % kSpan / kTile * kTileBytes;
      pack_tile<kGrads>(units, there ? column : 0, static_cast<__mmask16>((1u << there) - 1), out);
    }
  }
};

struct TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

// What the instructions of a tile read was written by ordinary stores, and the other way round; the compiler sees neither.
void order_memory() { asm volatile("" ::: "memory"); }

// The registers: 0 to 3 are sums, of two tiles of outputs by two of columns, 4 and 5 outputs, 6 and 7 columns.
#define LAZYDP_LOAD_ROWS(part)                                     \
  _tile_loadd(4, rows + (part) * 2 * kTileBytes, 64);              \
  _tile_loadd(5, rows + (part) * 2 * kTileBytes + kTileBytes, 64);
#define LAZYDP_LOAD_COLUMNS(part)                                     \
  _tile_loadd(6, columns + (part) * 2 * kTileBytes, 64);              \
  _tile_loadd(7, columns + (part) * 2 * kTileBytes + kTileBytes, 64);
#define LAZYDP_MULTIPLY_ADD  \
  _tile_dpbf16ps(0, 4, 6);   \
  _tile_dpbf16ps(1, 4, 7);   \
  _tile_dpbf16ps(2, 5, 6);   \
  _tile_dpbf16ps(3, 5, 7);

// Adds the product of one group of units to the registers. Parts of 2^-7 or less come first, the largest ones last.
inline void add_group(const unsigned char* rows, const unsigned char* columns) {
  LAZYDP_LOAD_ROWS(kLow)
  LAZYDP_LOAD_COLUMNS(kHigh)
  LAZYDP_MULTIPLY_ADD
  LAZYDP_LOAD_ROWS(kMiddle)
  LAZYDP_MULTIPLY_ADD
  LAZYDP_LOAD_COLUMNS(kMiddle)
  LAZYDP_MULTIPLY_ADD
  LAZYDP_LOAD_ROWS(kHigh)
  LAZYDP_MULTIPLY_ADD
  LAZYDP_LOAD_COLUMNS(kLow)
  LAZYDP_MULTIPLY_ADD
  LAZYDP_LOAD_COLUMNS(kHigh)
  LAZYDP_MULTIPLY_ADD
}

#undef LAZYDP_LOAD_ROWS
#undef LAZYDP_LOAD_COLUMNS
#undef LAZYDP_MULTIPLY_ADD

// Four tiles of float32 sums, as they come from the registers, and the float64 sums they belong to.
struct Fold {
  alignas(64) float block[4][kTile][kTile];
  double* sums = nullptr;  // [4][kTile][kTile]

  void take(double* into) {
    _tile_stored(0, block[0], 64);
    _tile_stored(1, block[1], 64);
    _tile_stored(2, block[2], 64);
    _tile_stored(3, block[3], 64);
    order_memory();
    sums = into;
  }

  void add(int64_t begin, int64_t end) const {
    if (!sums) return;
    const float* const from = &block[0][0][0];
    for (int64_t i = begin * kTile; i < end * kTile; i += kTile) {
      _mm512_store_pd(sums + i, _mm512_add_pd(_mm512_load_pd(sums + i), _mm512_cvtps_pd(_mm256_load_ps(from + i))));
      _mm512_store_pd(sums + i + 8,
                      _mm512_add_pd(_mm512_load_pd(sums + i + 8), _mm512_cvtps_pd(_mm256_load_ps(from + i + 8))));
    }
  }
};

constexpr int64_t kSumsPerSpan = 4 * kTile * kTile;
constexpr int64_t kFoldRows = 4 * kTile;
constexpr int64_t kSumsPerTask = kRowSpansPerTask * kColumnSpansPerTask * kSumsPerSpan;

// The sums of one task: some spans of outputs by some spans of columns, in memory of their own.
struct TaskSums {
  const WeightedProduct& job;
  double* memory;  // [row_spans, column_spans, 4, kTile, kTile]
  int64_t row;     // the first output
  int64_t column;  // the first column
  int64_t row_spans;
  int64_t column_spans;

  double* span(int64_t row_span, int64_t column_span) const {
    return memory + (row_span * column_spans + column_span) * kSumsPerSpan;
  }
  void clear() const { std::fill_n(memory, row_spans * column_spans * kSumsPerSpan, 0.0); }
  void read() const {
    each([](double* sums, const double* out, __mmask8 some) { _mm512_store_pd(sums, _mm512_maskz_loadu_pd(some, out)); });
  }
  void write() const {
    each([](const double* sums, double* out, __mmask8 some) { _mm512_mask_storeu_pd(out, some, _mm512_load_pd(sums)); });
  }

  // Calls f(sums, out, mask) for eight numbers at a time.
  template <class F>
  void each(const F& f) const {
    const int64_t rows = std::min(row_spans * kSpan, job.outputs - row), columns = std::min(column_spans * kSpan, job.columns - column);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += 8) {
        const int64_t tile = r % kSpan / kTile * 2 + c % kSpan / kTile;
        double* const sums = span(r / kSpan, c / kSpan) + (tile * kTile + r % kTile) * kTile + c % kTile;
        const __mmask8 some = static_cast<__mmask8>((1u << std::min<int64_t>(columns - c, 8)) - 1);
        f(sums, job.out + (row + r) * job.columns + column + c, some);
      }
  }
};

// The blocks of some units, and their groups of 32; the last one of either may have fewer.
struct Blocks {
  int64_t units;
  int64_t block;

  int64_t groups_each() const { return ceil_of(block, kGroup); }
  int64_t count() const { return ceil_of(units, block); }
  int64_t groups_of(int64_t number) const { return ceil_of(std::min(block, units - number * block), kGroup); }
};

class Product {
 public:
  Product(const WeightedProduct& job, const Blocks& most)
      : job_(job),
        rows_(job.outputs, most.count(), most.groups_each()),
        columns_(job.columns, most.count(), most.groups_each()),
        sums_(memory_for(row_tasks() * column_tasks() * kSumsPerTask * static_cast<int64_t>(sizeof(double)))) {}

  void begin(int64_t first, int64_t count) {
    first_ = first;
    blocks_ = {count, job_.block};
  }

  int64_t pack_tasks() const { return 2 * blocks_.count() * blocks_.groups_each(); }

  void pack(int64_t task) const {
    const int64_t block = task / 2 / blocks_.groups_each(), group = task / 2 % blocks_.groups_each();
    const int64_t begin = block * job_.block + group * kGroup;
    const int64_t end = std::min({begin + kGroup, (block + 1) * job_.block, blocks_.units});
    if (begin >= end) return;
    const bool grads = task % 2 == 0;
    UnitRows units{{}, {}, static_cast<int>(end - begin)};
    for (int i = 0; i < units.count; ++i) {
      const int64_t unit = job_.order ? job_.order[first_ + begin + i] : first_ + begin + i;
      units.rows[i] = grads ? job_.grads + unit * job_.outputs : job_.inputs + unit * job_.columns;
      units.scale[i] = job_.scale[unit];
    }
    if (grads)
      rows_.pack<true>(units, block, group);
    else
      columns_.pack<false>(units, block, group);
  }

  int64_t row_tasks() const { return ceil_of(rows_.spans(), kRowSpansPerTask); }
  int64_t column_tasks() const { return ceil_of(columns_.spans(), kColumnSpansPerTask); }

  void add(int64_t task) const {
    const int64_t row = task / column_tasks() * kRowSpansPerTask, column = task % column_tasks() * kColumnSpansPerTask;
    const TaskSums sums{job_,
                        reinterpret_cast<double*>(sums_.get()) + task * kSumsPerTask,
                        row * kSpan,
                        column * kSpan,
                        std::min(kRowSpansPerTask, rows_.spans() - row),
                        std::min(kColumnSpansPerTask, columns_.spans() - column)};
    sums.clear();
    if (!job_.overwrite || first_ > 0) sums.read();
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
    Fold folds[2];  // one is filled while the other is added
    int next = 0;
    for (int64_t block = 0; block < blocks_.count(); ++block)
      for (int64_t r = 0; r < sums.row_spans; ++r)
        for (int64_t c = 0; c < sums.column_spans; ++c, next ^= 1) {
          multiply(row + r, column + c, block, folds[next ^ 1]);
          folds[next].take(sums.span(r, c));
        }
    folds[next ^ 1].add(0, kFoldRows);
    _tile_release();
    sums.write();
  }

 private:
  // Forms the product of one block in the registers; meanwhile adds the product before it, which has left them.
  void multiply(int64_t row_span, int64_t column_span, int64_t block, const Fold& before) const {
    const int64_t groups = blocks_.groups_of(block);
    const unsigned char* const rows = rows_.at(block, row_span, 0);
    const unsigned char* const columns = columns_.at(block, column_span, 0);
    order_memory();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t group = 0; group < groups; ++group) {
      add_group(rows + group * kGroupBytes, columns + group * kGroupBytes);
      before.add(group * kFoldRows / groups, (group + 1) * kFoldRows / groups);
    }
  }

  const WeightedProduct& job_;
  Packed rows_;
  Packed columns_;
  Memory sums_;
  int64_t first_ = 0;
  Blocks blocks_{0, 1};
};

constexpr long kRequestState = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;          // XFEATURE_XTILEDATA

}  // namespace

bool can_use_amx() {
  // The kernel gives the registers to processes that ask for them.
  static const bool can = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                          syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
  return can;
}

void weighted_product_amx(const WeightedProduct& job, const Parallel& parallel) {
  const int64_t chunk = ceil_of(kUnitsPerChunk, job.block) * job.block;
  Product product(job, {std::min(chunk, job.units), job.block});
  for (int64_t first = 0; first < job.units; first += chunk) {
    product.begin(first, std::min(chunk, job.units - first));
    parallel.each(product.pack_tasks(), [&](int64_t task) { product.pack(task); });
    parallel.each(product.row_tasks() * product.column_tasks(), [&](int64_t task) { product.add(task); });
  }
}

}  // namespace lazydp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace lazydp::cpu {

bool can_use_amx() { return false; }
void weighted_product_amx(const WeightedProduct&, const Parallel&) {}

}  // namespace lazydp::cpu

#endif
