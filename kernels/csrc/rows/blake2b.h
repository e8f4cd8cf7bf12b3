// BLAKE2b (RFC 7693) with a digest of 8 bytes, keyed, with a personalisation: the codes of hashed vocabularies.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>

#include "rows/texts.h"

namespace lazydp::rows {

static_assert(std::endian::native == std::endian::little, "words are read as they lie in memory");

namespace blake2b {

inline constexpr size_t kBlock = 128;
using State = std::array<uint64_t, 8>;
inline constexpr State kInitial = {0x6a09e667f3bcc908u, 0xbb67ae8584caa73bu, 0x3c6ef372fe94f82bu, 0xa54ff53a5f1d36f1u,
                                   0x510e527fade682d1u, 0x9b05688c2b3e6c1fu, 0x1f83d9abfb41bd6bu, 0x5be0cd19137e2179u};
inline constexpr uint8_t kSigma[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

// The last blocks of several texts at once: of text i the words blocks[i][0..15] and the bytes up to its end, counted[i].
// digests[i] is the first word of the digest. All lengths give the same bits.
using LastBlocks = void (*)(const State& start, const uint64_t (*blocks)[16], const uint64_t* counted, uint64_t* digests);
struct Lanes {
  size_t count;
  LastBlocks hash;
};
inline constexpr size_t kMostLanes = 8;

// What this machine runs fastest; LAZYDP_SIMD (portable, avx2, avx512) names less, as for the kernels on tensors.
Lanes best_lanes();
// By name; count 0 where this machine does not run it. For tests.
Lanes lanes_named(const char* name);

}  // namespace blake2b

class KeyedBlake2b {
 public:
  // Key of 1 to 64 bytes, or none; person of at most 16.
  KeyedBlake2b(std::span<const uint8_t> key, std::span<const uint8_t> person, blake2b::Lanes lanes = blake2b::best_lanes())
      : lanes_(lanes), keyed_(!key.empty()) {
    if (key.size() > 64 || person.size() > 16)
      throw std::invalid_argument("expected a key of at most 64 bytes and a person of at most 16");
    std::array<uint8_t, 64> parameters{};
    parameters[0] = kDigest;
    parameters[1] = static_cast<uint8_t>(key.size());
    parameters[2] = 1;  // fanout
    parameters[3] = 1;  // depth
    if (!person.empty()) std::memcpy(parameters.data() + 48, person.data(), person.size());
    blake2b::State words;
    std::memcpy(words.data(), parameters.data(), 64);
    for (size_t i = 0; i < 8; ++i) start_[i] = blake2b::kInitial[i] ^ words[i];
    if (keyed_) std::memcpy(key_block_.data(), key.data(), key.size());
    after_key_ = start_;
    if (keyed_) compress(after_key_, key_block_.data(), kBlock, false);
  }

  uint64_t operator()(std::span<const uint8_t> text) const {
    // With a key and no text the block of the key is the last one.
    blake2b::State state = start_;
    if (keyed_ && text.empty()) {
      compress(state, key_block_.data(), kBlock, true);
      return state[0];
    }
    if (keyed_) state = after_key_;
    uint64_t counted = keyed_ ? kBlock : 0;
    size_t done = 0;
    while (text.size() - done > kBlock) {
      counted += kBlock;
      compress(state, text.data() + done, counted, false);
      done += kBlock;
    }
    std::array<uint8_t, kBlock> last{};
    if (text.size() > done) std::memcpy(last.data(), text.data() + done, text.size() - done);
    compress(state, last.data(), counted + (text.size() - done), true);
    return state[0];
  }

  // The hashes of the texts `which`; those of one block several at a time.
  void hash(const Texts& texts, std::span<const uint32_t> which, std::span<uint64_t> digests) const {
    uint64_t blocks[blake2b::kMostLanes][16];
    uint64_t counted[blake2b::kMostLanes], found[blake2b::kMostLanes];
    size_t places[blake2b::kMostLanes];
    size_t waiting = 0;
    for (size_t i = 0; i < which.size(); ++i) {
      const auto text = texts[which[i]];
      if (lanes_.count < 2 || text.empty() || text.size() > kBlock) {
        digests[i] = (*this)(text);
        continue;
      }
      std::memset(blocks[waiting], 0, kBlock);
      std::memcpy(blocks[waiting], text.data(), text.size());
      counted[waiting] = (keyed_ ? kBlock : 0) + text.size();
      places[waiting++] = i;
      if (waiting < lanes_.count) continue;
      lanes_.hash(keyed_ ? after_key_ : start_, blocks, counted, found);
      for (size_t lane = 0; lane < waiting; ++lane) digests[places[lane]] = found[lane];
      waiting = 0;
    }
    for (size_t lane = 0; lane < waiting; ++lane) digests[places[lane]] = (*this)(texts[which[places[lane]]]);
  }

 private:
  static constexpr size_t kBlock = blake2b::kBlock;
  static constexpr uint8_t kDigest = 8;

  static void compress(blake2b::State& state, const uint8_t* block, uint64_t counted, bool last) {
    uint64_t m[16];
    std::memcpy(m, block, kBlock);
    uint64_t v[16];
    for (size_t i = 0; i < 8; ++i) v[i] = state[i], v[i + 8] = blake2b::kInitial[i];
    v[12] ^= counted;
    if (last) v[14] = ~v[14];
    const auto quarter = [&v](int a, int b, int c, int d, uint64_t x, uint64_t y) {
      v[a] += v[b] + x;
      v[d] = std::rotr(v[d] ^ v[a], 32);
      v[c] += v[d];
      v[b] = std::rotr(v[b] ^ v[c], 24);
      v[a] += v[b] + y;
      v[d] = std::rotr(v[d] ^ v[a], 16);
      v[c] += v[d];
      v[b] = std::rotr(v[b] ^ v[c], 63);
    };
#pragma GCC unroll 12
    for (int round = 0; round < 12; ++round) {
      const uint8_t* s = blake2b::kSigma[round % 10];
      quarter(0, 4, 8, 12, m[s[0]], m[s[1]]);
      quarter(1, 5, 9, 13, m[s[2]], m[s[3]]);
      quarter(2, 6, 10, 14, m[s[4]], m[s[5]]);
      quarter(3, 7, 11, 15, m[s[6]], m[s[7]]);
      quarter(0, 5, 10, 15, m[s[8]], m[s[9]]);
      quarter(1, 6, 11, 12, m[s[10]], m[s[11]]);
      quarter(2, 7, 8, 13, m[s[12]], m[s[13]]);
      quarter(3, 4, 9, 14, m[s[14]], m[s[15]]);
    }
    for (size_t i = 0; i < 8; ++i) state[i] ^= v[i] ^ v[i + 8];
  }

  blake2b::Lanes lanes_;
  bool keyed_;
  blake2b::State start_{};
  blake2b::State after_key_{};
  std::array<uint8_t, kBlock> key_block_{};
};

}  // namespace lazydp::rows
