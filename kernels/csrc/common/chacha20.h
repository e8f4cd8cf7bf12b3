// ChaCha20 block function (RFC 8439, section 2.3), and how noise and keystreams are addressed in its input.
//
// FIXED FORMAT. The last four words of the input name what the block is for:
//
//     word 12   counter: number of the block within the draw
//     word 13   step                                            stream, low 32 bits
//     word 14   row, low 32 bits                                stream, high 32 bits
//     word 15   (table << 16) | row, bits 32..47                0xffff0000
//               noise of (table, row, step)                     keystream of a sampler
//
// Tables below 0x8000 are embedding tables, 0x8000 + i is dense parameter i, 0xfffe is kept for released counts and
// 0xffff for keystreams. Two different (table, row, step, counter) never share an input, so no block of the keystream
// is ever used twice.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace lazydp {

constexpr int kKeyWords = 8;
constexpr int kBlockWords = 16;
constexpr uint32_t kKeystreamTable = 0xffffu;
constexpr int64_t kMaxRows = int64_t{1} << 48;

// "expand 32-byte k"
constexpr uint32_t kSigma0 = 0x61707865u;
constexpr uint32_t kSigma1 = 0x3320646eu;
constexpr uint32_t kSigma2 = 0x79622d32u;
constexpr uint32_t kSigma3 = 0x6b206574u;

struct Key {
  uint32_t words[kKeyWords];
};

struct Address {
  uint32_t step;      // word 13
  uint32_t row_low;   // word 14
  uint32_t row_high;  // word 15: table and the high bits of the row
};

LAZYDP_HD uint32_t table_and_row_high(uint32_t table, int64_t row) {
  return (table << 16) | (static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32) & 0xffffu);
}

LAZYDP_HD Address noise_address(uint32_t table, int64_t row, uint32_t step) {
  return {step, static_cast<uint32_t>(row), table_and_row_high(table, row)};
}

LAZYDP_HD Address keystream_address(uint64_t stream) {
  return {static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32), kKeystreamTable << 16};
}

LAZYDP_HD uint32_t rotate_left(uint32_t x, int bits) { return (x << bits) | (x >> (32 - bits)); }

LAZYDP_HD void quarter_round(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  a += b;
  d = rotate_left(d ^ a, 16);
  c += d;
  b = rotate_left(b ^ c, 12);
  a += b;
  d = rotate_left(d ^ a, 8);
  c += d;
  b = rotate_left(b ^ c, 7);
}

// The 16 output words of one block, in the order in which RFC 8439 serialises them.
LAZYDP_HD void chacha20_block(const Key& key, uint32_t counter, const Address& address, uint32_t out[kBlockWords]) {
  const uint32_t input[kBlockWords] = {
      kSigma0,      kSigma1,      kSigma2,      kSigma3,      key.words[0], key.words[1], key.words[2],    key.words[3],
      key.words[4], key.words[5], key.words[6], key.words[7], counter,      address.step, address.row_low, address.row_high,
  };
  for (int i = 0; i < kBlockWords; ++i) out[i] = input[i];
  for (int round = 0; round < 10; ++round) {
    quarter_round(out[0], out[4], out[8], out[12]);
    quarter_round(out[1], out[5], out[9], out[13]);
    quarter_round(out[2], out[6], out[10], out[14]);
    quarter_round(out[3], out[7], out[11], out[15]);
    quarter_round(out[0], out[5], out[10], out[15]);
    quarter_round(out[1], out[6], out[11], out[12]);
    quarter_round(out[2], out[7], out[8], out[13]);
    quarter_round(out[3], out[4], out[9], out[14]);
  }
  for (int i = 0; i < kBlockWords; ++i) out[i] += input[i];
}

}  // namespace lazydp
